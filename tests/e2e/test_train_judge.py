"""``--reward judge:GUIDE``: a rating per text, paid from the run's budget, once for each text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Result, guide_rows, toy_examples, write_rows
from fake_openai import FakeOpenAI, Reply
from judging import rating
from rlgf_cli.config.common import PartConfig
from rlgf_cli.errors import RlgfError
from rlgf_cli.protocols import Example
from rlgf_cli.scorers.judge import JudgeReward, read_rating
from rlgf_cli.scorers.weighted_sum import make_reward

PRICES = {"usd_per_million_input": 1000.0, "usd_per_million_output": 1000.0}
EXAMPLES = [Example("a", "cat"), Example("b", "dog"), Example("c", "cat")]
TEXTS = ["a cat", "the dog runs", "a cat"]


def words(text: str) -> int:
    return min(10, 1 + len(text.split()))


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-0123456789abcdef")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def judge(url: str, **guide: Any) -> dict[str, Any]:
    return {"name": "judge:openai:m", "params": {"guide": {"base_url": url, "max_retries": 0, **PRICES, **guide}}}


class TestScores:
    def test_a_rating_becomes_a_number_from_0_to_1(self):
        with FakeOpenAI(rating(words)) as server:
            reward = make_reward([PartConfig(**judge(server.url))])
            scores = reward.score(EXAMPLES, TEXTS)
            assert [s.value for s in scores] == pytest.approx([2 / 9, 3 / 9, 2 / 9])
            assert scores[1].parts == {"judge": pytest.approx(3 / 9), "judge.rating": 4.0}
            assert len(server.requests) == 2  # the third asks what the first asks
            assert reward.score(EXAMPLES, TEXTS) == scores and len(server.requests) == 2
            assert [guide.meter.to_json()["calls"] for guide in reward.guides] == [2]
            assert "judge,model=m,temperature=0" in reward.signature and "scale=1-10" in reward.signature

    @pytest.mark.parametrize("said", [0, 11, "7/10", "7.5", "seven", "-3", ""])
    def test_what_is_no_rating_stops_the_run(self, said):
        with FakeOpenAI(rating(lambda text: said)) as server:
            reward = JudgeReward(**judge_params(server.url))
            with pytest.raises(RlgfError, match="gave no rating in 3 answers for the text of example 'a'"):
                reward.score(EXAMPLES[:1], TEXTS[:1])
            assert len(server.requests) == 3

    def test_a_refusal_stops_the_run(self):
        refused = pytest.raises(RlgfError, match="refused to rate the text of example 'a'")
        with FakeOpenAI(lambda n, request: Reply(finish_reason="content_filter")) as server, refused:
            JudgeReward(**judge_params(server.url)).score(EXAMPLES, TEXTS)

    def test_a_second_answer_counts_if_it_can_be_read(self):
        def plan(n: int, request: Any) -> Reply:
            return Reply(text="Good.\nRating: 10") if "Mind the last line" in request.prompt else Reply(text="Good.")

        with FakeOpenAI(plan) as server:
            assert [s.value for s in JudgeReward(**judge_params(server.url)).score(EXAMPLES, TEXTS)] == [1.0] * 3

    def test_only_the_last_line_is_read(self):
        assert [read_rating(f"Rating: 3\nRating: {n}\n") for n in (1, 10)] == [1, 10]
        assert read_rating("Rating: 3\nor more") is None and read_rating("Rating: 10!") is None


def judge_params(url: str) -> dict[str, Any]:
    return {"spec": "openai:m", **judge(url)["params"]}


@pytest.fixture
def train(
    run_cli: Callable[..., Result], tmp_path: Path, tiny_gpt2: Path, examples_file: Path
) -> Callable[..., Result]:
    def run(url: str, *more: object, out: str = "run", alg: str = "ppo", **guide: Any) -> Result:
        return run_cli(
            "train", "--alg", alg, "--model", tiny_gpt2, "--data", examples_file, "--set",
            f"reward={json.dumps([judge(url, **guide)])}", "--episodes", 8, "--batch-size", 4, "--epochs", 1,
            "--max-new-tokens", 6, "--max-steps", 2, "--device", "cpu", *more, "-o", tmp_path / out,
        )  # fmt: skip

    return run


def run_json(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_training_on_a_judges_ratings(train, tmp_path):
    with FakeOpenAI(rating(words), prices=(1000.0, 1000.0)) as server:
        done = train(server.url)
        assert done.exit_code == 0, done.stderr
        charged = sum(call.charge for call in server.ledger.calls())
        asked = len(server.requests)
        run, steps = run_json(tmp_path / "run"), rows(tmp_path / "run")
        assert run["spend"]["calls"] == asked and run["spend"]["charged_usd"] == pytest.approx(charged)
        assert run["judges"][0]["guide"] == "openai:m" and steps[-1]["guide/calls"] == asked
        assert steps[0]["score/mean"] == pytest.approx((steps[0]["score/part/judge.rating"] - 1) / 9)
        again = train(server.url, out="again")
        assert again.exit_code == 0 and len(server.requests) == asked
    figures = ("score/mean", "reward/sum", "loss/policy")
    assert [[row.get(f) for f in figures] for row in rows(tmp_path / "again")] == [
        [row.get(f) for f in figures] for row in steps
    ]


def test_a_spent_budget_ends_the_run_and_resume_goes_on_where_it_was(train, tmp_path):
    with FakeOpenAI(rating(words)) as server:
        whole = train(server.url, out="whole", mode="live")
        assert whole.exit_code == 0, whole.stderr
        before = len(server.requests)
        stopped = train(server.url, "--max-calls", 10, "--save-steps", 1, concurrency=1)
        assert stopped.exit_code == 3 and len(server.requests) - before == 10, stopped.stderr
        assert run_json(tmp_path / "run")["status"] == "stopped"
        resumed = train(server.url, "--max-calls", 100, "--save-steps", 1, "--resume", concurrency=1)
        assert resumed.exit_code == 0, resumed.stderr
    assert [row["score/mean"] for row in rows(tmp_path / "run")] == [
        row["score/mean"] for row in rows(tmp_path / "whole")
    ]
    assert run_json(tmp_path / "run")["spend"]["calls"] == run_json(tmp_path / "whole")["spend"]["calls"]


def test_a_budget_that_is_spent_in_the_held_out_evaluation_costs_no_row(train, tmp_path, examples_file):
    more = ["--eval-data", examples_file, "--set", "eval.limit=4", "--set", "eval.every=1", "--save-steps", 1]
    with FakeOpenAI(rating(words)) as server:
        assert train(server.url, *more, out="whole", mode="live").exit_code == 0
        whole = rows(tmp_path / "whole")
        last_of_the_step = whole[0]["guide/calls"] - 1
        stopped = train(server.url, *more, "--max-calls", last_of_the_step, mode="live", concurrency=1)
        assert stopped.exit_code == 3 and rows(tmp_path / "run") == [], stopped.stderr
        resumed = train(server.url, *more, "--max-calls", 100, "--resume", mode="live", concurrency=1)
        assert resumed.exit_code == 0, resumed.stderr
    figures = ("step", "score/mean", "eval/score", "reward/sum")
    assert [[row[f] for f in figures] for row in rows(tmp_path / "run")] == [[row[f] for f in figures] for row in whole]


def test_guide_and_judge_are_paid_from_one_budget(train, tmp_path):
    def plan(n: int, request: Any) -> Reply:
        return rating(words)(n, request) if "Rating" in request.prompt else Reply(text="the cat sees it")

    with FakeOpenAI(plan) as server:
        more = ["--guide", "openai:g", "--base-url", server.url]
        done = train(server.url, *more, alg="aggrevated")
        assert done.exit_code == 0, done.stderr
        asked = {name: sum(r.body["model"] == name for r in server.requests) for name in ("m", "g")}
        assert min(asked.values()) > 0 and run_json(tmp_path / "run")["spend"]["calls"] == sum(asked.values())
        stopped = train(server.url, *more, "--max-calls", 12, "--seed", 5, out="capped", alg="aggrevated")
        assert stopped.exit_code == 3 and run_json(tmp_path / "capped")["spend"]["calls"] <= 12


def test_a_rating_that_cannot_be_read_is_a_letter(train, tmp_path):
    with FakeOpenAI(rating(lambda text: "good")) as server:
        result = train(server.url)
    assert result.exit_code == 1 and "gave no rating in 3 answers" in result.stderr


def test_doctor_looks_at_it_within_its_budget(run_cli, tiny_gpt2, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", toy_examples(2))
    guide = write_rows(tmp_path / "guide.jsonl", guide_rows(toy_examples(2), 1))
    with FakeOpenAI(rating(words)) as server:
        result = run_cli(
            "doctor", "--alg", "ppo", "--model", tiny_gpt2, "--data", data, "--guide", guide, "--device", "cpu",
            "--max-new-tokens", 6, "--set", f"reward={json.dumps([judge(server.url)])}", "--max-calls", 3,
        )  # fmt: skip
        assert "3 of 3 calls" in result.stdout + result.stderr and len(server.requests) == 3
