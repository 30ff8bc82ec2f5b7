"""A conversation from data to checkpoint through the command line: what is shown first, and what every stage reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from chats import chat_checkpoint
from conftest import Result, toy_examples, write_rows
from rlgf_cli.models.text import FILE

SYSTEM = {"role": "system", "content": "the queen ."}


def rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": row["id"],
            "prompt": [SYSTEM, {"role": "user", "content": row["prompt"]}],
            "references": row["references"],
        }
        for row in toy_examples(count)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model from elsewhere."""
    folder = chat_checkpoint(tmp_path_factory.mktemp("model"), "chatml")
    (folder / FILE).unlink()
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", rows(6))


@pytest.fixture
def run(run_cli: Callable[..., Result], data: Path, tmp_path: Path) -> Callable[..., Result]:
    (tmp_path / "mine.py").write_text(
        "def f(text, messages): return len(text) / 100 + (messages[0]['role'] == 'system')"
    )

    def call(command: str, model: Path, *more: object) -> Result:
        return run_cli(command, "--model", model, "--data", data, "--device", "cpu", "--max-new-tokens", 12, *more)

    return call


FORMAT = "text: the tokenizer's chat template; a response ends with '<|im_end|>'"
PROMPT = "'<|im_start|>system\\nthe queen .<|im_end|>\\n<|im_start|>user\\n{}<|im_end|>\\n<|im_start|>assistant\\n'"


def first_lines(result: Result) -> list[str]:
    lines = result.stderr.splitlines()
    at = lines.index("an example as the model reads it:")
    return [next(line for line in lines if line.startswith("text: ")), *lines[at + 1 : at + 3]]


def test_what_is_trained_is_shown_before(run: Callable[..., Result], model: Path, tmp_path: Path) -> None:
    row = rows(1)[0]
    shown = PROMPT.format(row["prompt"][1]["content"])
    sft = run("sft", model, "--max-steps", 1, "-o", tmp_path / "sft")
    assert sft.exit_code == 0, sft.stderr
    expected = [FORMAT, f"  prompt    {shown}", f"  response  '{row['references'][0]}<|im_end|>'"]
    assert first_lines(sft) == expected
    ends = json.loads((tmp_path / "sft" / "generation_config.json").read_text())["eos_token_id"]
    assert set(AutoTokenizer.from_pretrained(model).convert_ids_to_tokens(ends)) == {"<|im_end|>", "<eos>"}

    stored = [FORMAT.replace(";", ", as stored with the checkpoint;"), *expected[1:]]
    train = (
        "--alg",
        "ppo",
        "--reward",
        f"{tmp_path / 'mine.py'}:f",
        "--episodes",
        4,
        "--minibatch-size",
        4,
        "--max-steps",
        1,
    )
    rl = run("train", tmp_path / "sft", *train, "-o", tmp_path / "rl")
    assert rl.exit_code == 0, rl.stderr
    assert first_lines(rl) == stored
    dry = run("train", tmp_path / "sft", *train, "--dry-run", "-o", tmp_path / "no")
    assert dry.exit_code == 0 and first_lines(dry) == stored and not (tmp_path / "no").exists()
    (rollouts,) = (tmp_path / "rl" / "rollouts").iterdir()
    episodes = [json.loads(line) for line in rollouts.read_text().splitlines()]
    assert all(e["prompt"][0] == SYSTEM and 1 <= e["score"] < 2 for e in episodes)
    assert json.loads((tmp_path / "rl" / "run.json").read_text())["text"]["chat"] is True


def test_eval_generate_and_report_read_conversations(
    run: Callable[..., Result], run_cli: Callable[..., Result], model: Path, data: Path, tmp_path: Path
) -> None:
    done = run("eval", model, "--metrics", "rouge", "-o", tmp_path / "eval")
    assert done.exit_code == 0 and FORMAT in done.stderr, done.stderr
    predictions = [json.loads(line) for line in (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()]
    assert [p["prompt"] for p in predictions] == [row["prompt"] for row in rows(6)]
    again = run_cli(
        "eval", "--predictions", tmp_path / "eval" / "predictions.jsonl", "--data", data, "--metrics", "rouge",
        "-o", tmp_path / "again",
    )  # fmt: skip
    assert again.exit_code == 0, again.stderr
    assert run_cli("compare", tmp_path / "eval", tmp_path / "again", "--force").exit_code == 0
    page = run_cli("report", tmp_path / "eval", tmp_path / "again", "-o", tmp_path / "page.html")
    assert page.exit_code == 0, page.stderr
    assert "[system]\nthe queen .\n\n[user]\n" in (tmp_path / "page.html").read_text()
    done = run("generate", model, "-o", tmp_path / "texts.jsonl")
    assert done.exit_code == 0 and FORMAT in done.stderr
    assert json.loads((tmp_path / "texts.jsonl").read_text().splitlines()[0])["prompt"] == rows(1)[0]["prompt"]


def test_no_chat_is_warned_of_and_doctor_fails_it(run_cli: Callable[..., Result], model: Path, tmp_path: Path) -> None:
    plain = write_rows(tmp_path / "plain.jsonl", toy_examples(4))
    common = ("--model", model, "--data", plain, "--device", "cpu", "--max-new-tokens", 8)
    done = run_cli("eval", *common, "--metrics", "rouge", "--no-chat", "-o", tmp_path / "eval")
    assert done.exit_code == 0
    assert "text: the prompt as it is, without a template, as the config says; a response ends with" in done.stderr
    assert "warning: this model has a chat template, and it is NOT used" in done.stderr
    doctor = run_cli("doctor", *common, "--no-chat", "--json")
    assert doctor.exit_code == 1
    checks = {check["name"]: check for check in json.loads(doctor.stdout)["checks"]}
    assert checks["text.template"]["status"] == "fail" and "leave --no-chat" in checks["text.template"]["remedy"]
    checks = {c["name"]: c for c in json.loads(run_cli("doctor", *common, "--json").stdout)["checks"]}
    assert checks["text.template"]["status"] == "ok"
    # what sft taught without the template is that checkpoint's format, and no mistake
    assert run_cli("sft", *common, "--no-chat", "--max-steps", 1, "-o", tmp_path / "sft").exit_code == 0
    taught = ("--model", tmp_path / "sft", *common[2:])
    checks = {c["name"]: c for c in json.loads(run_cli("doctor", *taught, "--json").stdout)["checks"]}
    assert checks["text.template"]["status"] == "ok" and "as stored with" in checks["text.template"]["finding"]


def test_a_run_that_began_in_plain_text_goes_on_in_it(run: Callable[..., Result], tmp_path: Path, model: Path) -> None:
    plain = write_rows(tmp_path / "plain.jsonl", toy_examples(4))
    common = ("--data", plain, "--batch-size", 2, "--save-steps", 1, "--max-steps", 2)
    assert run("sft", model, *common, "-o", tmp_path / "run").exit_code == 0
    manifest = tmp_path / "run" / "run.json"
    state = json.loads(manifest.read_text())
    assert state.pop("text")["chat"] is True
    manifest.write_text(json.dumps({**state, "status": "interrupted"}))  # as an earlier version left it
    resumed = run("sft", model, *common, "--resume", "-o", tmp_path / "run")
    assert resumed.exit_code == 0, resumed.stderr
    assert "warning: this run began before a model's chat template was used by default" in resumed.stderr
    assert json.loads((tmp_path / "run" / FILE).read_text())["chat"] is False


def test_a_template_that_refuses_the_data_is_said(run_cli: Callable[..., Result], data: Path, tmp_path: Path) -> None:
    folder = chat_checkpoint(tmp_path / "m", "{% for m in messages %}{% if m.role == 'system' %}"
                             "{{ raise_exception('no system') }}{% endif %}{{ m.content }}{% endfor %}")  # fmt: skip
    done = run_cli("sft", "--model", folder, "--data", data, "--device", "cpu", "-o", tmp_path / "run")
    assert done.exit_code == 2 and not (tmp_path / "run").exists()
    assert "example 'toy-0-0': the chat template refuses a conversation of system, user: no system" in done.stderr
