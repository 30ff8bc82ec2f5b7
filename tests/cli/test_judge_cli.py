"""``--metrics judge:GUIDE``: win rates by an LLM, through the cache, the budget and the modes of the guide layer."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import Result, write_rows
from fake_openai import FakeOpenAI, Plan, Reply, Request
from judging import longer, texts_in, verdict
from rlgf_cli import console

ROWS = [
    {"id": f"e{i}", "prompt": f"prompt {i}", "references": [f"reference {i} is this long"]} for i in range(6)
]  # fmt: skip
TEXTS = [
    "short",
    "this is longer than reference 1",
    "as long as reference two",
    "x",
    "",
    "reference 5 is the longer one",
]
WINS = [0.0, 1.0, 0.5, 0.0, 0.0, 1.0]
PRICES = {"usd_per_million_input": 1000.0, "usd_per_million_output": 1000.0}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-0123456789abcdef")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def judged(run_cli: Callable[..., Result], tmp_path: Path) -> Callable[..., tuple[Result, dict[str, Any]]]:
    """Run an evaluation with a judge; its result and its scores.json, {} where there is none."""
    data = write_rows(tmp_path / "data.jsonl", ROWS)
    texts = write_rows(tmp_path / "texts.jsonl", [{"id": r["id"], "text": t} for r, t in zip(ROWS, TEXTS, strict=True)])

    def run(url: str, *more: object, out: str = "out", guide: dict | None = None, **params: object):
        about = {"guide": {"base_url": url, "max_retries": 1, **PRICES, **(guide or {})}, **params}
        metrics = json.dumps([{"name": "judge:openai:m", "params": about}])
        result = run_cli(
            "eval", "--predictions", texts, "--data", data, "--set", f"metrics={metrics}", "-o", tmp_path / out, *more
        )
        path = tmp_path / out / "scores.json"
        return result, json.loads(path.read_text()) if path.is_file() else {}

    return run


def values(folder: Path, figure: str = "judge") -> list[float | None]:
    return [json.loads(line)["scores"][figure] for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_both_orders_are_asked_and_the_longer_text_wins(judged, tmp_path):
    with FakeOpenAI(verdict(longer), prices=(1000.0, 1000.0)) as server:
        result, scores = judged(server.url)
        assert result.exit_code == 0, result.stderr
        pairs = {texts_in(request) for request in server.requests}
        assert pairs == {pair for r, t in zip(ROWS, TEXTS, strict=True) for pair in ((t, r["references"][0]),)} | {
            (r["references"][0], t) for r, t in zip(ROWS, TEXTS, strict=True)
        }
        body = server.requests[0].body
        assert body["temperature"] == 0 and "seed" not in body
    assert values(tmp_path / "out") == WINS and values(tmp_path / "out", "judge.consistent") == [1.0] * 6
    entry = scores["metrics"]["judge"]
    assert entry["value"] == pytest.approx(sum(WINS) / 6) and entry["low"] <= entry["value"] <= entry["high"]
    assert scores["counts"]["judge.answers"] == 12 == scores["spend"]["calls"]
    charged = sum(call.charge for call in server.ledger.calls())
    assert scores["spend"]["charged_usd"] == pytest.approx(charged) and charged > 0
    assert json.loads((tmp_path / "out" / "run.json").read_text())["spend"] == scores["spend"]
    for part in ("model=m,temperature=0", "template=", "criterion=", "opponent=references,orders=both"):
        assert part in entry["signature"]


def test_a_judge_with_a_bias_for_the_first_place_says_nothing(judged, tmp_path):
    with FakeOpenAI(verdict(lambda a, b: "A")) as server:
        _, scores = judged(server.url)
    assert scores["metrics"]["judge"]["value"] == 0.5
    assert scores["metrics"]["judge.consistent"]["value"] == 0.0


@pytest.mark.parametrize(
    ("first", "second", "score", "agree"),
    [("A", "B", 1.0, 1.0), ("B", "A", 0.0, 1.0), ("A", "A", 0.5, 0.0), ("tie", "tie", 0.5, 1.0), ("A", "tie", 0.5, 0.0),
     ("tie", "A", 0.5, 0.0)],
)  # fmt: skip
def test_what_two_verdicts_come_to(judged, tmp_path, first, second, score, agree):
    def rule(a: str, b: str) -> str:
        return first if b.startswith("reference 0") else second

    with FakeOpenAI(verdict(rule)) as server:
        judged(server.url, "-L", 1)
    assert values(tmp_path / "out") == [score] and values(tmp_path / "out", "judge.consistent") == [agree]


def test_its_progress_is_shown(judged, monkeypatch):
    shown: list[tuple[str, int | None, int]] = []

    @contextlib.contextmanager
    def progress(label: str, total: int | None) -> Iterator[Any]:
        done: list[int] = []
        yield SimpleNamespace(update=done.append)
        shown.append((label, total, sum(done)))

    monkeypatch.setattr(console, "progress", progress)
    with FakeOpenAI(verdict(longer)) as server:
        assert judged(server.url)[0].exit_code == 0
    assert shown == [("scoring: judge", 6, 6)]


class TestCache:
    def test_a_second_evaluation_asks_nobody(self, judged, tmp_path):
        with FakeOpenAI(verdict(longer)) as server:
            _, first = judged(server.url)
            asked = len(server.requests)
            result, second = judged(server.url, "--seed", 7, out="again")
            assert result.exit_code == 0 and len(server.requests) == asked
        assert second["counts"]["judge.cached"] == 12 and second["spend"]["calls"] == 0
        assert values(tmp_path / "again") == values(tmp_path / "out")
        assert second["metrics"]["judge"]["signature"] == first["metrics"]["judge"]["signature"]
        assert "12 answers from the cache" in result.stderr

    def test_replay_needs_no_server_and_fails_closed(self, judged, tmp_path, monkeypatch):
        monkeypatch.delenv("OPENAI_API_KEY")
        with FakeOpenAI(verdict(longer)) as server:
            judged(server.url, "-L", 3)
        replayed, scores = judged(server.url, "-L", 3, out="replayed", guide={"mode": "replay"})
        assert replayed.exit_code == 0 and scores["metrics"]["judge"]["n"] == 3
        missed, _ = judged(server.url, out="missed", guide={"mode": "replay"})
        assert missed.exit_code == 2 and "the cache has no text of openai:m" in missed.stderr
        assert not (tmp_path / "missed").exists()

    def test_other_words_are_other_questions(self, judged, tmp_path):
        with FakeOpenAI(verdict(longer)) as server:
            _, first = judged(server.url)
            _, second = judged(server.url, out="other", criterion="The shorter, the better.")
            assert len(server.requests) == 24 and "The shorter, the better." in server.requests[-1].prompt
        assert first["metrics"]["judge"]["signature"] != second["metrics"]["judge"]["signature"]


class TestBudget:
    def test_a_spent_budget_is_exit_3_and_resume_goes_on(self, judged, tmp_path):
        with FakeOpenAI(verdict(longer)) as server:
            stopped, scores = judged(server.url, "--max-calls", 5, guide={"concurrency": 1})
            assert stopped.exit_code == 3 and "5 of 5 calls" in stopped.stderr and scores == {}
            assert len(server.requests) == 5
            run = json.loads((tmp_path / "out" / "run.json").read_text())
            assert run["status"] == "stopped" and run["spend"]["calls"] == 5
            resumed, scores = judged(server.url, "--max-calls", 50, "--resume", guide={"concurrency": 1})
            assert resumed.exit_code == 0, resumed.stderr
            assert len(server.requests) == 12 == scores["spend"]["calls"] and scores["spend"]["cached"] == 5
        assert values(tmp_path / "out") == WINS

    def test_a_cap_in_dollars_without_a_price_is_refused(self, judged, tmp_path):
        with FakeOpenAI() as server:
            no_price = {"usd_per_million_input": None, "usd_per_million_output": None}
            result, _ = judged(server.url, "--max-cost-usd", 1, guide=no_price)
            assert result.exit_code == 2 and "needs a price" in result.stderr and not server.requests
        assert not (tmp_path / "out").exists()

    def test_the_cap_holds_over_all_judges(self, run_cli, tmp_path):
        data = write_rows(tmp_path / "data.jsonl", [{**row, "prediction": "x"} for row in ROWS])
        with FakeOpenAI(verdict(longer)) as server:
            judge = {"name": "judge:openai:m", "params": {"guide": {"base_url": server.url, "concurrency": 1}}}
            other = {**judge, "params": {**judge["params"], "criterion": "another"}}
            metrics = json.dumps([judge, other])
            arguments = ["--predictions", data, "--set", f"metrics={metrics}", "-o", tmp_path / "out"]
            result = run_cli("eval", *arguments, "--max-calls", 15)
            assert result.exit_code == 3 and len(server.requests) == 15


class TestUnreadable:
    def babble(self, readable: Callable[[int, Request], bool]) -> Plan:
        def plan(n: int, request: Request) -> Reply:
            fine = readable(n, request)
            return Reply(text=f"Verdict: A\n{'Verdict: ' + longer(*texts_in(request)) if fine else 'or maybe not'}")

        return plan

    def test_it_is_asked_again_and_told_how_to_end(self, judged, tmp_path):
        again = "Mind the last line"
        with FakeOpenAI(self.babble(lambda n, request: again in request.prompt)) as server:
            _, scores = judged(server.url)
            assert len(server.requests) == 24
        assert values(tmp_path / "out") == WINS and scores["counts"]["judge.asked_again"] == 12

    def test_then_the_example_is_skipped_and_counted(self, judged, tmp_path):
        with FakeOpenAI(self.babble(lambda n, request: "prompt 1" not in request.prompt)) as server:
            result, scores = judged(server.url)
            assert len(server.requests) == 10 + 2 * 2  # a greedy judge is asked again once
        assert values(tmp_path / "out") == [WINS[0], None, *WINS[2:]]
        assert scores["counts"]["judge.unparseable"] == 1 and scores["metrics"]["judge"]["n_skipped"] == 1
        assert "judge.unparseable 1" in result.stderr

    def test_none_at_all_is_a_letter(self, judged, tmp_path):
        with FakeOpenAI(self.babble(lambda n, request: False)) as server:
            result, scores = judged(server.url)
        assert result.exit_code == 1 and scores == {}
        assert "no verdict that could be read" in result.stderr and "or maybe not" in result.stderr

    def test_an_answer_that_was_cut_is_not_read(self, judged, tmp_path):
        def cut(n: int, request: Request) -> Reply:
            return Reply(text="Verdict: A", finish_reason="length")

        with FakeOpenAI(cut) as server:
            result, _ = judged(server.url)
        assert result.exit_code == 1 and "cut at its limit" in result.stderr

    @pytest.mark.parametrize("answer", ["", "A", "Verdict: C", "Verdict: A or B", "Verdict: A\nAs I said."])
    def test_only_the_last_line_counts_and_only_a_verdict(self, answer):
        from rlgf_cli.scorers.judge import read_verdict

        assert read_verdict(answer) is None

    def test_what_can_be_read(self):
        from rlgf_cli.scorers.judge import read_verdict

        assert [read_verdict(f"So:\nVerdict: {w} \n\n") for w in ("A", "B", "tie")] == ["A", "B", "tie"]

    def test_it_may_count_as_a_tie_or_end_the_evaluation(self, judged, tmp_path):
        with FakeOpenAI(self.babble(lambda n, request: "prompt 1" not in request.prompt)) as server:
            _, scores = judged(server.url, out="tie", on_unreadable="value", unreadable_value=0.5)
            result, none = judged(server.url, on_unreadable="error")
        assert values(tmp_path / "tie") == [WINS[0], 0.5, *WINS[2:]]
        assert values(tmp_path / "tie", "judge.consistent")[1] is None
        assert (
            scores["counts"]["judge.unparseable"] == 1 and "unreadable=0.5" in scores["metrics"]["judge"]["signature"]
        )
        assert result.exit_code == 1 and none == {}
        assert "gave no verdict in 2 answers for the text of example 'e1'" in result.stderr

    def test_ten_answers_without_a_text_at_first_end_it(self, judged, tmp_path):
        with FakeOpenAI(lambda n, request: Reply(finish_reason="length", message={"content": None})) as server:
            result, scores = judged(server.url, guide={"concurrency": 1})
            assert result.exit_code == 3 and scores == {} and len(server.requests) == 10
        assert "hold no usable text (reasoning: 10)" in result.stderr


class TestFailures:
    def test_a_server_that_fails_is_no_number(self, judged, tmp_path):
        def plan(n: int, request: Request) -> Reply:
            return Reply(status=500) if "prompt 1" in request.prompt else verdict(longer)(n, request)

        with FakeOpenAI(plan) as server:
            result, scores = judged(server.url)
            assert result.exit_code == 1 and scores == {}
            assert "did not answer 2 of 12 questions (server: 2)" in result.stderr and "--resume" in result.stderr
            server.plan = verdict(longer)
            before = len(server.requests)
            resumed, scores = judged(server.url, "--resume")
            assert resumed.exit_code == 0 and len(server.requests) - before == 2
        assert values(tmp_path / "out") == WINS

    def test_a_refusal_is_skipped_and_counted(self, judged, tmp_path):
        def plan(n: int, request: Request) -> Reply:
            return (
                Reply(finish_reason="content_filter") if "prompt 3" in request.prompt else verdict(longer)(n, request)
            )

        with FakeOpenAI(plan) as server:
            _, scores = judged(server.url)
        assert values(tmp_path / "out") == [*WINS[:3], None, *WINS[4:]] and scores["counts"]["judge.refused"] == 1

    def test_ctrl_c_keeps_what_was_said(self, judged, tmp_path):
        def plan(n: int, request: Request) -> Reply:
            if n == 4:
                os.kill(os.getpid(), signal.SIGINT)
            return verdict(longer)(n, request)

        with FakeOpenAI(plan) as server:
            stopped, scores = judged(server.url, guide={"concurrency": 2})
            asked = len(server.requests)
            assert stopped.exit_code == 130 and scores == {} and 5 <= asked < 12
            resumed, scores = judged(server.url, "--resume")
            assert resumed.exit_code == 0, resumed.stderr
            assert len(server.requests) == 12 and scores["counts"]["judge.cached"] == asked
        assert values(tmp_path / "out") == WINS


class TestAgainst:
    def test_another_systems_texts(self, judged, tmp_path):
        rows = [{"id": f"e{i}", "prompt": f"prompt {i}", "prediction": "12345"} for i in range(5)]
        other = write_rows(tmp_path / "other.jsonl", rows)
        with FakeOpenAI(verdict(longer)) as server:
            result, scores = judged(server.url, against=str(other))
        assert result.exit_code == 0, result.stderr
        assert values(tmp_path / "out") == [0.5, 1.0, 1.0, 0.0, 0.0, None]
        assert scores["counts"]["judge.no_opponent"] == 1
        assert "opponent=sha256:" in scores["metrics"]["judge"]["signature"]

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([{"id": "e0", "prompt": "another", "text": "x"}], "'e0' answers another prompt"),
            ([{"id": "other", "text": "x"}], "none of these texts has the id"),
            ([{"id": "e0", "text": "x"}] * 2, "other.jsonl:2: the id 'e0' is here twice"),
            ([], "holds no predictions"),
        ],
    )
    def test_a_file_that_does_not_fit(self, judged, tmp_path, rows, message):
        other = write_rows(tmp_path / "other.jsonl", rows)
        with FakeOpenAI() as server:
            result, _ = judged(server.url, against=str(other))
            assert result.exit_code == 2 and message in result.stderr and not server.requests
        assert not (tmp_path / "out").exists()


def test_a_template_of_ones_own(judged, tmp_path):
    with FakeOpenAI(lambda n, request: Reply(text="Verdict: tie")) as server:
        _, scores = judged(server.url, "-L", 1, template="{a} or {b}? {prompt} {c}")
        prompts = {request.prompt.partition("\n\n")[0] for request in server.requests}
        assert prompts == {
            "short or reference 0 is this long? prompt 0 {c}",
            "reference 0 is this long or short? prompt 0 {c}",
        }
        assert all(request.prompt.endswith("Verdict: tie") for request in server.requests)
    assert scores["metrics"]["judge"]["value"] == 0.5


@pytest.mark.parametrize(
    ("params", "message", "hint"),
    [
        ({"template": "only {a}"}, "must hold {b}", ""),
        ({"template": "{a}{b}", "criterion": "kind"}, "no place for the criterion", "{criterion}"),
        ({"guide": {"modus": "replay"}}, "guide.modus", "did you mean 'mode'"),
        ({"guide": {"name": "gpt-4o"}}, "named twice", ""),
        ({"guide": {"clean": "all"}}, "guide.clean is not for a judge", "template"),
        ({"guide": {"sampling": {"temperature": -1}}}, "guide.sampling.temperature", ""),
        ({"max_new_tokens": 0}, "max_new_tokens", ""),
        ({"guides": {}}, "unknown parameter 'guides'", "'guide'"),
    ],
)
def test_bad_parameters(judged, tmp_path, params, message, hint):
    with FakeOpenAI() as server:
        result, _ = judged(server.url, **params)
        assert result.exit_code == 2 and message in result.stderr and hint in result.stderr, result.stderr
        assert not server.requests and not (tmp_path / "out").exists()


def test_it_needs_a_guide_that_writes(run_cli, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", [{**row, "prediction": "x"} for row in ROWS])
    for name, message in (("judge", "needs a guide"), (f"judge:{data}", "this guide is recorded")):
        result = run_cli("eval", "--predictions", data, "--metrics", name, "-o", tmp_path / "out")
        assert result.exit_code == 2 and message in result.stderr and not (tmp_path / "out").exists()


def test_a_local_checkpoint_judges_too(tiny_gpt2, run_cli, tmp_path):
    """It cannot: it babbles. That it was asked shows in the letter."""
    data = write_rows(tmp_path / "data.jsonl", [{**ROWS[0], "prediction": "x"}])
    params = {"template": "{a}{b}", "max_new_tokens": 4, "guide": {"on_overlong": "truncate"}}
    metrics = json.dumps([{"name": f"judge:hf:{tiny_gpt2}", "params": params}])
    arguments = ["--predictions", data, "--set", f"metrics={metrics}", "--device", "cpu", "-o", tmp_path / "out"]
    result = run_cli("eval", *arguments)
    assert result.exit_code == 1 and "no verdict that could be read, in 2 answers" in result.stderr
