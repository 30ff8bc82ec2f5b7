"""Answers of every shape through ``rlgf collect-guide``, with the number of calls that each of them costs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import Result, write_rows
from fake_openai import FakeOpenAI, Plan, Reply, Request

THOUGHT = "<think>\nThe user wants a sentence.\n</think>\n\n"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-0123456789abcdef")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("RLGF_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as running:
        yield running


@pytest.fixture
def collect(
    run_cli: Callable[..., Result], server: FakeOpenAI, tmp_path: Path
) -> Callable[..., tuple[Result, int, list[dict[str, Any]]]]:
    """Collect texts for some prompts: the result, the number of calls, and the lines of the file."""

    def run(plan: Plan | Reply, *more: object, prompts: int = 3, out: str = "guide.jsonl"):
        rows = [{"id": f"p{i}", "prompt": f"prompt {i}"} for i in range(prompts)]
        data = write_rows(tmp_path / f"data{prompts}.jsonl", rows)
        server.plan = plan if callable(plan) else lambda n, request: plan
        before = len(server.requests)
        done = run_cli(
            "collect-guide", "--guide", "openai:m", "--base-url", server.url, "--data", data, "--concurrency", 1,
            "--set", "guide.usd_per_million_input=1", "--set", "guide.usd_per_million_output=1", *more, "-o",
            tmp_path / out,
        )  # fmt: skip
        path = tmp_path / out
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        return done, len(server.requests) - before, lines

    return run


@pytest.mark.parametrize("reason", ["eos", "eos_token", "end_turn", "STOP", "stop_sequence", None, "weary"])
def test_an_ending_by_any_name_is_bought_once(collect, reason):
    done, calls, lines = collect(Reply(finish_reason=reason))
    assert (done.exit_code, calls) == (0, 3), done.stderr
    assert [line["finish_reason"] for line in lines] == ["stop"] * 3
    assert ("unknown finish reason: 3" in done.stderr) == (reason == "weary")
    assert done.stderr.count("ends answers with the reason 'weary'") == (reason == "weary")


def test_a_content_of_parts_is_one_text(collect):
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "A "}, {"type": "text", "text": "cat."}]
    done, calls, lines = collect(Reply(message={"content": parts}))
    assert (done.exit_code, calls) == (0, 3) and {line["completion"] for line in lines} == {"A cat."}
    assert "parts left out: 3" in done.stderr


WITHOUT_TEXT = {
    "reasoning": (Reply(finish_reason="length", message={"content": None}), "enable_thinking: false"),
    "reasoning, empty": (Reply(text="", finish_reason="length"), "enable_thinking: false"),
    "reasoning, cut": (Reply(text="<think>I wonder", finish_reason="length"), "enable_thinking: false"),
    "tool_call": (Reply(finish_reason="tool_calls", message={"content": None, "tool_calls": [{}]}), "turn off"),
    "refusal": (Reply(message={"content": None, "refusal": "No."}), "guide.system"),
    "empty": (Reply(message={"content": None}), "check guide.api"),
    "stream": (Reply(raw=b'data: {"choices": []}\n\n', headers={"Content-Type": "text/event-stream"}), "unasked"),
    "html": (Reply(raw=b"<html>welcome</html>", headers={"Content-Type": "text/html"}), "check the base URL"),
    "content_filter": (Reply(finish_reason="content_filter"), ""),
}  # fmt: skip


@pytest.mark.parametrize("case", WITHOUT_TEXT)
def test_an_answer_without_a_text_is_bought_once_and_counted(collect, tmp_path, case):
    reply, remedy = WITHOUT_TEXT[case]
    kind = case.partition(",")[0]
    done, calls, lines = collect(reply)
    assert (done.exit_code, calls, lines) == (1, 3, []), done.stderr
    assert f"3 of 3 texts are still missing ({kind}: 3)" in done.stderr and remedy in done.stderr
    run = json.loads((tmp_path / "guide.jsonl.run.json").read_text())
    assert run["result"]["failed"] == {kind: 3} and run["spend"]["calls"] == 3
    assert run["spend"]["unknown_outcome"] == 0


@pytest.mark.parametrize("case", [case for case in WITHOUT_TEXT if case != "content_filter"])
def test_ten_of_them_at_first_end_the_command(collect, tmp_path, case):
    reply, remedy = WITHOUT_TEXT[case]
    done, calls, lines = collect(reply, prompts=30)
    assert (done.exit_code, calls, lines) == (3, 10, []), done.stderr
    kind = case.partition(",")[0]
    assert f"the first 10 answers of openai:m hold no usable text ({kind}: 10)" in done.stderr
    assert remedy in done.stderr
    assert json.loads((tmp_path / "guide.jsonl.run.json").read_text())["status"] == "stopped"


def test_half_bodies_count_among_the_first_ten(collect):
    done, calls, _ = collect(Reply(raw=b'{"choices": [{"mess'), "--set", "guide.deadline_s=0.1", prompts=30)
    assert (done.exit_code, calls) == (3, 10) and "(malformed: 10)" in done.stderr


def test_one_text_among_the_first_ten_and_the_command_goes_on(collect):
    def plan(n: int, request: Request) -> Reply:
        return Reply() if n == 5 else WITHOUT_TEXT["reasoning"][0]

    done, calls, lines = collect(plan, prompts=30)
    assert (done.exit_code, calls, len(lines)) == (1, 30, 1) and "29 of 30 texts" in done.stderr
    # the file has a text: --resume requests all others, though none of them comes
    done, calls, lines = collect(WITHOUT_TEXT["reasoning"][0], "--resume", prompts=30)
    assert (done.exit_code, calls, len(lines)) == (1, 29, 1)


def test_thinking_is_removed_counted_and_kept_in_the_cache(collect):
    def plan(n: int, request: Request) -> Reply:
        if request.prompt == "prompt 0":
            return Reply(text=f"{THOUGHT}A cat sleeps.")
        if request.prompt == "prompt 1":
            return Reply(text="So.</think>A dog runs.")  # the template of the prompt has the opening tag
        return Reply(text="<think>I wonder", finish_reason="length")

    done, calls, lines = collect(plan)
    assert (done.exit_code, calls) == (1, 3) and "1 of 3 texts are still missing (reasoning: 1)" in done.stderr
    assert {(line["completion"], *line["mended"]) for line in lines} == {
        ("A cat sleeps.", "thinking_removed"), ("A dog runs.", "thinking_removed"),
    }  # fmt: skip
    assert "repaired: thinking removed: 2" in done.stderr
    # what was bought is in the cache as the server sent it, thinking that was cut off too
    done, calls, lines = collect(plan, "--set", "guide.clean=none", out="raw.jsonl")
    assert (done.exit_code, calls) == (0, 0), done.stderr
    assert {line["completion"] for line in lines} == {
        f"{THOUGHT}A cat sleeps.", "So.</think>A dog runs.", "<think>I wonder",
    }  # fmt: skip
    done, calls, _ = collect(plan, out="again.jsonl")
    assert (done.exit_code, calls) == (1, 0) and "(reasoning: 1)" in done.stderr


FILTERS = {
    "openai": (400, {"message": "no", "code": "content_policy_violation", "type": "invalid_request_error"}),
    "azure": (
        400,
        {"message": "no", "code": "content_filter", "innererror": {"code": "ResponsibleAIPolicyViolation"}},
    ),
    "openrouter": (403, {"message": "flagged", "code": 403, "metadata": {"reasons": ["violence"]}}),
    "moderation": (403, {"message": "no", "type": "moderation"}),
}


@pytest.mark.parametrize("case", FILTERS)
def test_a_filtered_prompt_is_one_refusal_and_not_the_end(collect, tmp_path, case):
    status, error = FILTERS[case]

    def plan(n: int, request: Request) -> Reply:
        return Reply(status=status, error=error) if int(request.prompt.split()[1]) < 20 else Reply()

    done, calls, lines = collect(plan, prompts=22)
    assert (done.exit_code, calls) == (1, 22), done.stderr
    assert [line["id"] for line in lines] == ["p20", "p21"]
    assert "20 of 22 texts are still missing (content_filter: 20)" in done.stderr
    assert json.loads((tmp_path / "guide.jsonl.run.json").read_text())["spend"]["calls"] == 2  # refusals cost nothing


def test_a_filtered_prompt_with_status_200(collect):
    error = {"error": {"message": "no", "code": "content_filter"}}

    def plan(n: int, request: Request) -> Reply:
        return Reply(raw=json.dumps(error).encode()) if request.prompt == "prompt 1" else Reply()

    done, calls, lines = collect(plan)
    assert (done.exit_code, calls, len(lines)) == (1, 3, 2) and "(content_filter: 1)" in done.stderr


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": "spent", "code": "insufficient_quota"}}, "quota is spent"),
        ({"error": {"message": "who?", "type": "authentication_error"}}, "refused the key"),
        ([{"error": {"message": "no such model", "code": 404}}], "has no model 'm'"),
    ],
)
def test_an_error_with_status_200_that_no_request_survives_ends_the_command(collect, body, message):
    done, calls, _ = collect(Reply(raw=json.dumps(body).encode()))
    assert done.exit_code != 0 and calls == 1 and message in done.stderr


def test_an_error_with_status_200_that_passes_is_tried_again_and_costs_nothing(collect, tmp_path):
    busy = [{"error": {"message": "slow down", "code": 429}}]
    down = {"error": {"message": "overloaded", "type": "overloaded_error"}}

    def plan(n: int, request: Request) -> Reply:
        body = {0: busy, 2: down}.get(n)
        return Reply() if body is None else Reply(raw=json.dumps(body).encode(), headers={"Retry-After": "0.05"})

    done, calls, lines = collect(plan)
    assert (done.exit_code, calls, len(lines)) == (0, 5, 3), done.stderr
    spend = json.loads((tmp_path / "guide.jsonl.run.json").read_text())["spend"]
    assert (spend["calls"], spend["unknown_outcome"]) == (3, 0)
