"""rlgf against the servers that docs/servers.md is about, each with a pretrained chat model on a CPU.

``test_what_the_server_honours`` holds the table of that page: where it fails, a server has changed and the page with
it. The others hold what rlgf makes of it: texts are whole and requested once, partial texts go on where they stop,
and what a server refuses is reported.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from conftest import Result, toy_examples, write_rows
from real_server import make_chat_model
from real_servers import APIS, CONTEXT, KINDS, PROMPTS, SEEN, UNSURE, Running, beginning, probe, running
from rlgf_cli.config.guide import GuideConfig
from rlgf_cli.guides.openai.guide import OpenAIGuide
from rlgf_cli.models.gguf import packaged_smollm2
from rlgf_cli.protocols import Completion, Example, GuideRequest

pytestmark = pytest.mark.slow  # a minute or two for each server

LENGTH = 24
ANOTHER = {
    "transformers": "Server is pinned to",
    "vllm": "has no model 'another'",
    "llama.cpp": "the answer is by 'smollm2', and 'another' was asked for",
}
VERDICTS = {
    "vllm": {"structured_outputs": {"choice": ["Verdict: A", "Verdict: B"]}},
    "llama.cpp": {"grammar": 'root ::= "Verdict: " ("A" | "B")'},
}
"""What keeps the model to the form of a verdict, which it is too small to find itself."""


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, smollm2_folder: Path) -> Iterator[Running]:
    kind, gguf = KINDS[request.param], packaged_smollm2()
    if reason := kind.missing():
        pytest.skip(f"{kind.title}: {reason}")
    assert gguf is not None
    with running(kind, smollm2_folder, gguf) as server:
        yield server


@pytest.fixture(scope="module")
def toy_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("policy") / "toy")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key, no endpoint and no cache of the user's."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "VLLM_API_KEY", "LLAMA_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RLGF_CACHE_DIR", str(tmp_path / "cache"))


def name_of(run: Running) -> str:
    return next(name for name, kind in KINDS.items() if kind is run.kind)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def modes(run: Running) -> list[str]:
    """The ways in which a guide on the server goes on from the partial text itself."""
    return ["completion", "prefill"] if run.kind.prefill else ["completion"]


def guide_of(run: Running, mode: str, **changes: Any) -> OpenAIGuide:
    settings = {"api": "completion"} if mode == "completion" else {"continuation": "prefill"}
    greedy = {"temperature": 0, **changes.pop("sampling", {})}
    config = {"name": run.guide, "base_url": run.server.url, "mode": "live", "sampling": greedy, **settings, **changes}
    return OpenAIGuide(GuideConfig.model_validate(config), seed=0)


def test_what_the_server_honours(run: Running) -> None:
    name = name_of(run)
    seen = {of: answer for of, answer in probe(run).items() if (name, of) not in UNSURE}
    assert seen == {of: answer for of, answer in SEEN[name].items() if (name, of) not in UNSURE}


@pytest.mark.parametrize("api", APIS)
def test_whole_texts_are_collected_once(run: Running, run_cli: Callable[..., Result], api: str, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "prompts.jsonl", toy_examples(3))
    before = run.answers()

    def collect(file: str, *more: object) -> list[dict[str, Any]]:
        done = run_cli(
            "collect-guide", "--guide", run.guide, "--base-url", run.server.url, "--api", api, "--data", data, "-k", 2,
            "--max-new-tokens", 12, "--concurrency", 4, "--max-retries", 1, *more, "-o", tmp_path / file,
        )  # fmt: skip
        assert done.exit_code == 0, done.stderr + run.server.log[-3000:]
        return rows_of(tmp_path / file)

    rows = collect("guide.jsonl")
    assert {(row["id"], row["sample_index"]) for row in rows} == {(f"toy-0-{i}", k) for i in range(3) for k in (0, 1)}
    for row in rows:
        assert row["completion"] == row["completion"].strip() != ""
        assert row["model"] in (run.model, f"{run.model}@main")
        assert 0 < row["usage"]["completion_tokens"] <= 12 and row["usage"]["prompt_tokens"] > 1
        assert row["finish_reason"] == "length" or row["usage"]["completion_tokens"] < 12
    assert len({row["completion"] for row in rows}) > 3  # it samples
    spend = json.loads((tmp_path / "guide.jsonl.run.json").read_text())["spend"]
    assert spend["calls"] == run.answers() - before == len({(row["prompt"], row["sample_index"]) for row in rows})
    assert spend["unknown_outcome"] == 0

    # neither --resume nor another file requests them again
    assert collect("guide.jsonl", "--resume") == rows
    again = collect("other.jsonl")
    texts = [{(row["id"], row["sample_index"]): row["completion"] for row in of} for of in (rows, again)]
    assert texts[0] == texts[1]
    assert run.answers() - before == spend["calls"]


def test_partial_texts_go_on_where_they_stop(run: Running) -> None:
    for mode in modes(run):
        api = "completion" if mode == "completion" else "chat"
        whole = run.text(api, PROMPTS[api], temperature=0, max_tokens=LENGTH).rstrip()
        for count in (1, 2, 4):
            begun = beginning(whole, count)
            with closing(guide_of(run, mode)) as guide:
                (rest,) = guide.complete([GuideRequest(Example("a", PROMPTS[api]), begun, max_new_tokens=LENGTH)])
            assert isinstance(rest, Completion)
            assert (begun + rest.text).startswith(whole), (mode, begun, rest.text)
            assert rest.repaired == ()


def test_a_stop_text_ends_what_was_written_and_not_the_partial_text(run: Running) -> None:
    for mode in modes(run):
        api = "completion" if mode == "completion" else "chat"
        whole = run.text(api, PROMPTS[api], temperature=0, max_tokens=LENGTH)
        begun, words = beginning(whole, 2), whole.split()
        later = next(word for word in words[3:] if word not in words[:3] and word.isalpha())
        with closing(guide_of(run, mode, sampling={"stop": [later, words[1]]})) as guide:
            (rest,) = guide.complete([GuideRequest(Example("a", PROMPTS[api]), begun, max_new_tokens=LENGTH)])
        assert isinstance(rest, Completion) and rest.finish_reason == "stop"
        assert later not in rest.text and words[1] not in rest.text
        assert rest.text.strip() and whole.startswith(begun + rest.text)


@pytest.mark.parametrize("api", APIS)
def test_what_the_server_refuses_is_reported(
    run: Running, run_cli: Callable[..., Result], api: str, tmp_path: Path
) -> None:
    rows = toy_examples(2)
    rows[1]["prompt"] = "dog " * (CONTEXT + 200)
    data = write_rows(tmp_path / "prompts.jsonl", rows)
    asked = ("--base-url", run.server.url, "--api", api, "--data", data, "--max-new-tokens", 4, "--max-retries", 1)

    another = run_cli("collect-guide", "--guide", f"{run.kind.guide}:another", *asked, "-o", tmp_path / "other.jsonl")
    assert another.exit_code in (1, 2)
    assert ANOTHER[name_of(run)] in another.stderr
    assert not (tmp_path / "other.jsonl").exists() or not rows_of(tmp_path / "other.jsonl")

    long = run_cli("collect-guide", "--guide", run.guide, *asked, "-o", tmp_path / "long.jsonl")
    written = [row["id"] for row in rows_of(tmp_path / "long.jsonl")]
    if SEEN[name_of(run)]["a prompt that is too long"] == "answered":
        assert (long.exit_code, sorted(written)) == (0, ["toy-0-0", "toy-0-1"])
    else:
        assert (long.exit_code, written) == (1, ["toy-0-0"])
        assert "1 of 2 texts are still missing (refused: 1)" in long.stderr


def test_aggrevated_is_guided_by_the_server(
    run: Running, run_cli: Callable[..., Result], toy_policy: Path, tmp_path: Path
) -> None:
    policy = shutil.copytree(toy_policy, tmp_path / "policy")
    text = {"schema_version": 1, "template": "{prompt}\n", "chat": False, "response_prefix": ""}
    (policy / "rlgf_text.json").write_text(json.dumps(text))
    data = write_rows(tmp_path / "prompts.jsonl", toy_examples(4))
    for mode in modes(run):
        before = run.answers()
        key = "guide.api=completion" if mode == "completion" else "guide.continuation=prefill"
        done = run_cli(
            "train", "--alg", "aggrevated", "--model", policy, "--guide", run.guide, "--base-url", run.server.url,
            "--data", data, "--reward", "coverage", "--max-steps", 2, "--episodes", 4, "--batch-size", 4, "--epochs", 1,
            "--max-new-tokens", 8, "--lr", "1e-4", "--device", "cpu", "--set", key, "-o", tmp_path / mode,
        )  # fmt: skip
        assert done.exit_code == 0, done.stderr + run.server.log[-3000:]
        steps = rows_of(tmp_path / mode / "metrics.jsonl")
        assert [row["step"] for row in steps] == [1, 2]
        manifest = json.loads((tmp_path / mode / "run.json").read_text())
        requests = sum(row["guide/requests"] for row in steps)
        assert manifest["spend"]["calls"] == run.answers() - before
        assert manifest["spend"]["calls"] + manifest["spend"]["cached"] == requests > 0
        assert set(manifest["guide"]["models"]) <= {run.model, f"{run.model}@main"}


def test_the_server_judges(run: Running, run_cli: Callable[..., Result], tmp_path: Path) -> None:
    rows = [{**row, "prediction": row["references"][0] + " again"} for row in toy_examples(3)]
    data = write_rows(tmp_path / "texts.jsonl", rows)
    more = VERDICTS.get(name_of(run), {})
    judge = {
        "name": f"judge:{run.guide}",
        "params": {"max_new_tokens": 12, "guide": {"base_url": run.server.url, "extra_body": more}},
    }
    (tmp_path / "eval.yaml").write_text(json.dumps({"metrics": [judge]}))
    before = run.answers()
    done = run_cli("eval", "-c", tmp_path / "eval.yaml", "--predictions", data, "-o", tmp_path / "out")
    answers = run.answers() - before
    if not more:  # nothing keeps this one to a verdict's form
        assert done.exit_code == 1 and "no verdict" in done.stderr, done.stderr
        assert answers >= 6
        return
    assert done.exit_code == 0, done.stderr + run.server.log[-3000:]
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert 0 <= scores["metrics"]["judge"]["value"] <= 1
    assert answers == 6  # both orders of each pair, and none is asked again
