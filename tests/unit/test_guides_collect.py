"""``collect-guide``: what is written, asked again, refused, counted, and what survives a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from collecting import no_endpoint
from fake_openai import FakeOpenAI, Reply, Request
from rlgf_cli.config.collect_guide import CollectGuideConfig
from rlgf_cli.config.loader import resolve
from rlgf_cli.errors import Interrupted, RlgfError, StoppedEarly, UserError
from rlgf_cli.guides.openai.guide import OpenAIGuide
from rlgf_cli.guides.recorded import RecordedGuide
from rlgf_cli.protocols import Example
from rlgf_cli.stages import collect_guide as stage
from rlgf_cli.stages.session import FileResult

KEY = "sk-planted-0123456789abcdef"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_endpoint(monkeypatch, tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def prompts_file(folder: Path, count: int = 6, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps({"id": f"p{i}", "prompt": f"prompt {i}"}) + "\n" for i in range(count)))
    return path


def collect(server: FakeOpenAI | None, data: Path, output: Path, existing: str = "refuse", **flags: Any) -> FileResult:
    flags = {key.replace("__", "."): value for key, value in flags.items()}
    resolved = resolve(
        CollectGuideConfig,
        flags={
            "guide": "openai:m",
            "guide.base_url": server.url if server else None,
            "guide.max_retries": 0,
            "guide.outage_limit_s": 1,
            "data": str(data),
            "output": str(output),
            **flags,
        },
    )
    return stage.run(resolved, existing=existing)  # type: ignore[arg-type]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts_of(path: Path) -> set[tuple[str, int, str]]:
    """What a file holds: when and where a text was bought may differ between two files."""
    return {(row["id"], row["sample_index"], row["completion"]) for row in lines(path)}


def manifest(path: Path) -> dict[str, Any]:
    return json.loads(path.with_name(path.name + ".run.json").read_text())


def asked(requests: list[Request]) -> Counter[tuple[str, int]]:
    return Counter((request.prompt, request.body["seed"]) for request in requests)


def test_a_line_per_text_with_all_that_is_known(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "guide.jsonl"
    with FakeOpenAI(lambda n, seen: Reply(finish_reason="length" if n == 0 else "stop")) as server:
        result = collect(
            server, prompts_file(tmp_path), out, guide="gpt-3.5", samples=2, max_new_tokens=9, limit=4,
            guide__sampling__temperature=0.7, guide__prompt_template="Q: {prompt}",
            guide__usd_per_million_input=0.5, guide__usd_per_million_output=1.5,
        )  # fmt: skip
    rows = lines(out)
    assert {(row["id"], row["sample_index"]) for row in rows} == {(f"p{i}", k) for i in range(4) for k in (0, 1)}
    for row in rows:
        assert row["prompt"] == f"prompt {row['id'][1:]}" and len(row["prompt_sha256"]) == 64
        assert row["prefix"] == "" and row["completion"].startswith("answer ")
        assert (row["model"], row["guide"]) == ("gpt-3.5-turbo-0613", "gpt-3.5")
        assert row["sampling"]["temperature"] == 0.7 and row["sampling"]["max_new_tokens"] == 9
        assert row["usage"] == {"prompt_tokens": 3, "completion_tokens": 2}
        assert row["cost_usd"] == pytest.approx((3 * 0.5 + 2 * 1.5) / 1e6)
    assert [row["finish_reason"] for row in rows].count("length") == 1
    saved = manifest(out)
    assert saved["status"] == "done" and saved["command"] == "collect-guide"
    assert saved["result"] == result.summary == {
        "records": 8, "prompts": 4, "empty": 0, "cut_at_length": 1, "same_text": 0,
        "models": {"gpt-3.5-turbo-0613": 8}, "new": 8, "missing": 0, "failed": {}, "mended": {},
        "usage": {"prompt_tokens": 24, "completion_tokens": 16},
        "cost_usd": pytest.approx(8 * (3 * 0.5 + 2 * 1.5) / 1e6),
    }  # fmt: skip
    assert saved["spend"]["usage"] == {"prompt_tokens": 24, "completion_tokens": 16}
    assert saved["spend"]["charged_usd"] == pytest.approx(8 * (3 * 0.5 + 2 * 1.5) / 1e6)
    assert saved["settings"]["model"] == "gpt-3.5-turbo" and saved["settings"]["prompt_template"] == "Q: {prompt}"
    assert saved["parents"][0]["path"] == str(tmp_path / "data.jsonl")
    guide = RecordedGuide(out)
    assert guide.coverage([Example(f"p{i}", f"prompt {i}") for i in range(6)]) == (4, ["p4", "p5"])
    assert len(guide.samples(Example("p0", "prompt 0"))) == 2


def test_resume_asks_only_for_what_is_missing(tmp_path: Path) -> None:
    data, out = prompts_file(tmp_path), tmp_path / "guide.jsonl"
    with FakeOpenAI() as server:
        collect(server, data, out, limit=2)
        with pytest.raises(UserError, match="already exists"):
            collect(server, data, out)
        assert len(server.requests) == 2
        collect(server, data, out, "resume", samples=2)
        assert len(server.requests) == 12
        result = collect(server, data, out, "resume", samples=2)
        assert len(server.requests) == 12 and result.summary["new"] == 0
        assert max(asked(server.requests).values()) == 1
        collect(server, data, tmp_path / "undisturbed.jsonl", samples=2)
    assert manifest(out)["resumed"] == 2 and manifest(out)["result"]["records"] == 12
    assert texts_of(out) == texts_of(tmp_path / "undisturbed.jsonl")


def test_resume_under_other_settings_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    data, out = prompts_file(tmp_path), tmp_path / "guide.jsonl"
    with FakeOpenAI() as server:
        collect(server, data, out, limit=2)
        before = out.read_bytes(), manifest(out)
        for change in (
            {"guide__sampling__temperature": 0.5},
            {"guide__prompt_template": "Q: {prompt}"},
            {"guide": "openai:another"},
            {"max_new_tokens": 65},
            {"seed": 1},
        ):
            with pytest.raises(UserError, match="with other settings") as caught:
                collect(server, data, out, "resume", **change)
            assert next(iter(change)).rpartition("__")[2].replace("guide", "model") in str(caught.value)
        assert (out.read_bytes(), manifest(out)) == before
        # the transport is no setting: the rest may be fetched from another address, faster
        server.requests.clear()
        url = server.url.replace("127.0.0.1", "localhost")
        collect(server, data, out, "resume", guide__base_url=url, guide__concurrency=1, guide__timeout_s=9)
        assert len(server.requests) == 4
        # --overwrite starts again
        collect(server, data, out, "overwrite", limit=3, max_new_tokens=65)
    assert len(lines(out)) == 3


def test_failures_are_counted_not_written_and_asked_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data, out = prompts_file(tmp_path, 8), tmp_path / "guide.jsonl"

    def plan(n: int, seen: Request) -> Reply:
        if seen.prompt in ("prompt 1", "prompt 2"):
            return Reply(finish_reason="content_filter")
        return Reply(status=500) if seen.prompt == "prompt 5" else Reply(text="" if seen.prompt == "prompt 6" else None)

    with FakeOpenAI(plan) as server:
        with pytest.raises(RlgfError, match=r"3 of 8 texts .* \(content_filter: 2, server: 1\)") as caught:
            collect(server, data, out)
        assert caught.value.exit_code == 1 and "--resume" in (caught.value.hint or "")
        assert {row["id"] for row in lines(out)} == {"p0", "p3", "p4", "p6", "p7"}
        saved = manifest(out)
        assert saved["status"] == "failed"
        assert saved["result"]["failed"] == {"content_filter": 2, "server": 1}
        assert saved["result"]["missing"] == 3 and saved["result"]["empty"] == 1
        assert "no text for 'p5': status 500" in capfd.readouterr().err
        # an empty text was received and paid for: it is kept, not asked for again, and never used
        server.plan = lambda n, seen: Reply()
        server.requests.clear()
        collect(server, data, out, "resume")
        assert {request.prompt for request in server.requests} == {"prompt 1", "prompt 2", "prompt 5"}
    assert manifest(out)["status"] == "done"
    assert RecordedGuide(out).coverage([Example(f"p{i}", f"prompt {i}") for i in range(8)]) == (7, ["p6"])


def test_an_endpoint_that_is_down_is_waited_for_and_given_up(tmp_path: Path, capfd: Any) -> None:
    data, out = prompts_file(tmp_path, 500), tmp_path / "guide.jsonl"
    with FakeOpenAI(lambda n, seen: Reply(status=503) if n >= 10 else Reply()) as server:
        with pytest.raises(StoppedEarly, match="the guide has been down for") as caught:
            collect(server, data, out, guide__concurrency=4)
        assert caught.value.exit_code == 3 and "--resume" in (caught.value.hint or "")
        assert len(server.requests) < 40  # one at a time tries whether it is up again
        assert len(lines(out)) == 10 and manifest(out)["status"] == "stopped"
        assert "the guide does not answer (status 503" in capfd.readouterr().err
        server.plan = lambda n, seen: Reply()
        collect(server, data, out, "resume")
    assert len(lines(out)) == 500


def test_an_outage_costs_no_retries(tmp_path: Path, capfd: Any) -> None:
    """Requests that fail while the server is down are asked again when it is up, with max_retries 1."""
    went_down: list[float] = []

    def plan(n: int, seen: Request) -> Reply:
        if n < 20 or (went_down and time.monotonic() > went_down[0] + 2):
            return Reply()
        went_down.append(time.monotonic())
        return Reply(status=503)

    with FakeOpenAI(plan) as server:
        flags = {"guide__concurrency": 8, "guide__max_retries": 1, "guide__outage_limit_s": 60}
        found = collect(server, prompts_file(tmp_path, 100), tmp_path / "guide.jsonl", **flags)
    assert found.summary["new"] == 100 and found.summary["failed"] == {}
    assert "the guide answers again after" in capfd.readouterr().err


def test_failures_between_successes_do_not_end_the_collection(tmp_path: Path) -> None:
    seen_before: set[str] = set()

    def plan(n: int, seen: Request) -> Reply:
        if int(seen.prompt.split()[1]) % 2 == 0 and seen.prompt not in seen_before:
            seen_before.add(seen.prompt)
            return Reply(status=500)
        return Reply()

    with FakeOpenAI(plan) as server:
        found = collect(server, prompts_file(tmp_path, 80), tmp_path / "guide.jsonl", guide__concurrency=1)
        assert len(server.requests) == 120  # those that failed were asked once more at the end
    assert found.summary["new"] == 80


def test_a_refused_key_leaves_nothing_behind(tmp_path: Path) -> None:
    out = tmp_path / "guide.jsonl"
    with FakeOpenAI(lambda n, seen: Reply(status=401)) as server, pytest.raises(UserError, match="refused the key"):
        collect(server, prompts_file(tmp_path), out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl"]


def test_a_key_refused_later_keeps_what_came(tmp_path: Path) -> None:
    out = tmp_path / "guide.jsonl"
    with (
        FakeOpenAI(lambda n, seen: Reply(status=401) if n == 3 else Reply()) as server,
        pytest.raises(StoppedEarly, match="refused the key"),
    ):
        collect(server, prompts_file(tmp_path), out, guide__concurrency=1)
    assert len(lines(out)) == 3
    assert manifest(out)["status"] == "stopped" and manifest(out)["result"]["records"] == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"guide": "gpt-9"}, "unknown guide"),
        ({"guide": "recorded.jsonl"}, "no such guide file"),
        ({"data": "missing.jsonl"}, "no such file"),
        ({"guide": "hf:runs/nothing"}, "no such checkpoint"),
        ({"guide": "gpt-3.5", "max_new_tokens": 20000}, "takes 16385"),
        ({"output": "x.jsonl.gz"}, "cannot be .gz"),
    ],
)
def test_bad_input_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"data": prompts_file(tmp_path), "output": tmp_path / "guide.jsonl", **flags}
    with pytest.raises(UserError, match=message):
        collect(None, given.pop("data"), given.pop("output"), **given)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        collect(None, prompts_file(tmp_path), tmp_path / "guide.jsonl", guide="gpt-3.5")
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]
    with FakeOpenAI() as server:  # on this machine none is needed
        collect(server, tmp_path / "data.jsonl", tmp_path / "guide.jsonl")
    assert KEY not in server.requests[0].headers["authorization"]


def test_a_torn_last_line_is_asked_for_again(tmp_path: Path) -> None:
    data, out = prompts_file(tmp_path), tmp_path / "guide.jsonl"
    with FakeOpenAI() as server:
        collect(server, data, out)
        whole = out.read_bytes()
        out.write_bytes(whole[:-20])
        server.requests.clear()
        collect(server, data, out, "resume")
        assert not server.requests  # it came whole, so it is in the cache
        out.write_bytes(whole[:-20])
        collect(server, data, out, "resume", guide__mode="live")
        assert len(server.requests) == 1
    assert {row["id"] for row in lines(out)} == {f"p{i}" for i in range(6)}


def test_texts_whose_ids_have_moved_are_not_bought_again(tmp_path: Path) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "guide.jsonl"
    data.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')  # ids are line-1 and line-2
    with FakeOpenAI() as server:
        collect(server, data, out)
        server.requests.clear()
        data.write_text('{"prompt": "new"}\n{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "a"}\n')
        collect(server, data, out, "resume", guide__mode="live")
        # the one text for "a" serves one of the two examples that have this prompt
        assert Counter(request.prompt for request in server.requests) == {"new": 1, "a": 1}
    examples = [Example("line-1", "new"), Example("line-2", "a"), Example("line-3", "b"), Example("line-4", "a")]
    assert RecordedGuide(out).coverage(examples) == (4, [])


def test_samples_that_are_all_one_text_are_noticed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with FakeOpenAI(lambda n, seen: Reply(text="always this")) as server:
        result = collect(server, prompts_file(tmp_path), tmp_path / "guide.jsonl", samples=2)
    assert result.summary["same_text"] == 6
    assert "some servers ignore it" in capfd.readouterr().err


def test_ctrl_c_keeps_what_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = prompts_file(tmp_path), tmp_path / "guide.jsonl"
    stream = OpenAIGuide.stream

    def pressed(self: OpenAIGuide, requests: Any) -> Any:
        for n, answer in enumerate(stream(self, requests)):
            if n == 2:
                raise KeyboardInterrupt
            yield answer

    with FakeOpenAI() as server:
        with monkeypatch.context() as patched:
            patched.setattr(OpenAIGuide, "stream", pressed)
            with pytest.raises(Interrupted) as caught:
                collect(server, data, out, guide__concurrency=1)
        assert caught.value.exit_code == 130
        assert len(lines(out)) == 2 and manifest(out)["status"] == "interrupted"
        collect(server, data, out, "resume")
    assert len(lines(out)) == 6


def test_a_local_checkpoint_as_guide(tmp_path: Path, tiny_gpt2: Path, examples_file: Path) -> None:
    out, other = tmp_path / "guide.jsonl", tmp_path / "other.jsonl"
    flags: dict[str, Any] = {"guide": f"hf:{tiny_gpt2}", "samples": 2, "max_new_tokens": 8, "guide__base_url": None}
    collect(None, examples_file, out, limit=3, guide__batch_size=2, **flags)
    collect(None, examples_file, out, "resume", limit=10, guide__batch_size=7, **flags)
    collect(None, examples_file, other, limit=10, **flags)
    texts = [{(r["id"], r["sample_index"], r["completion"]) for r in lines(path)} for path in (out, other)]
    assert texts[0] == texts[1] and len(texts[0]) == 20
    saved = manifest(out)
    assert saved["device"] and saved["result"]["cost_usd"] is None and saved["spend"]["usage"]["completion_tokens"]
    assert saved["parents"][-1] == {
        "path": str(tiny_gpt2), "run_id": None, "sha256": saved["settings"]["weights_sha256"],
    }  # fmt: skip


# --- the command line ---


def command(data: Path, out: Path, server: FakeOpenAI, *more: str) -> list[str]:
    return [
        "collect-guide", "--guide", "openai:m", "--base-url", server.url, "--data", str(data), "-o", str(out),
        "--max-retries", "0", "--samples", "2", *more,
    ]  # fmt: skip


def test_the_command(run_cli: Any, tmp_path: Path) -> None:
    data, out = prompts_file(tmp_path), tmp_path / "guide.jsonl"
    with FakeOpenAI() as server:
        done = run_cli(*command(data, out, server))
        assert (done.exit_code, done.stdout) == (0, f"{out}\n")
        done = run_cli(*command(data, out, server))
        assert done.exit_code == 2 and "--resume" in done.stderr and done.stdout == ""
        done = run_cli(*command(data, out, server, "--resume", "--json"))
        assert done.exit_code == 0 and json.loads(done.stdout)["records"] == 12
        assert len(server.requests) == 12
        server.plan = lambda n, seen: Reply(finish_reason="content_filter")
        done = run_cli(*command(data, tmp_path / "other.jsonl", server, "--seed", "1", "--concurrency", "1"))
        assert done.exit_code == 1 and "12 of 12 texts are still missing (content_filter: 12)" in done.stderr
    done = run_cli("collect-guide", "--guide", "gpt-3.6", "--data", str(data), "-o", str(tmp_path / "x.jsonl"))
    assert done.exit_code == 2 and "did you mean 'gpt-3.5'" in done.stderr
    done = run_cli("collect-guide", "--guide", "gpt-3.5", "--data", str(data), "--print-config", "-o", "x")
    assert done.exit_code == 0 and "name: gpt-3.5" in done.stdout


@pytest.mark.parametrize("status", [200, 401, 400])
def test_no_key_in_anything_that_a_run_leaves(tmp_path: Path, guide_cache: Path, status: int) -> None:
    """Not in an artifact, not on stdout or stderr, not in a traceback."""
    data, out = prompts_file(tmp_path, 3), tmp_path / "out" / "guide.jsonl"
    error = {"message": f"bad key {KEY}, sent as Bearer {KEY}", "code": "x"}
    with FakeOpenAI(lambda n, seen: Reply(status=status, error=error)) as server:
        done = subprocess.run(
            [sys.executable, "-m", "rlgf_cli", *command(data, out, server, "--debug")],
            capture_output=True, text=True, timeout=60, env={**os.environ, "OPENAI_API_KEY": KEY},
        )  # fmt: skip
        assert {request.headers["authorization"] for request in server.requests} == {f"Bearer {KEY}"}
    assert ("Traceback" in done.stderr) == (status != 200)
    assert ("***" in done.stderr) == (status != 200)
    left = done.stdout + done.stderr
    for path in [*tmp_path.rglob("*"), *guide_cache.rglob("*")]:
        left += path.read_text(errors="ignore") if path.is_file() else ""
    assert "prompt 1" in (guide_cache / "guide.sqlite").read_text(errors="ignore") or status != 200
    assert len(left) > 100 and "sk-planted" not in left


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_kill_9_at_any_moment_loses_nothing_that_was_on_disk(tmp_path: Path, seed: int) -> None:
    data = prompts_file(tmp_path, 30)
    out, undisturbed = tmp_path / "guide.jsonl", tmp_path / "undisturbed.jsonl"
    kill_after = [7, 23, 41][seed - 1]  # answers that the server has given
    with FakeOpenAI(lambda n, seen: Reply(delay_s=0.01 + 0.002 * (n * seed % 5))) as server:
        program = [sys.executable, "-m", "rlgf_cli", *command(data, out, server, "--concurrency", "4")]
        started = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while len(server.requests) - server.in_flight < kill_after:
            assert started.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        started.send_signal(signal.SIGKILL)
        started.communicate()
        assert manifest(out)["status"] == "running"
        kept = {line for line in out.read_bytes().split(b"\n")[:-1] if line}
        assert 0 < len(kept) < 60
        before = len(server.requests)
        done = subprocess.run([*program, "--resume"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert len(server.requests) - before <= 60 - len(kept)  # what came whole is in the cache
        collect(server, data, undisturbed, samples=2)
    seeds = {(request.prompt, request.body["seed"]) for request in server.requests}
    assert len(seeds) == 60 and len(server.requests) <= 60 + 4  # those on their way may be asked twice
    assert kept <= set(out.read_bytes().splitlines())
    assert texts_of(out) == texts_of(undisturbed) and len(lines(out)) == 60
