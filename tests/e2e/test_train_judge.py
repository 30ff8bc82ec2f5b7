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
from rlgf_cli.errors import RlgfError, UserError
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

    @pytest.mark.parametrize("said", [0, 11, "7.5", "seven", "-3", ""])
    def test_a_text_without_a_rating_has_no_score_and_is_counted(self, said):
        with FakeOpenAI(rating(lambda text: said if "dog" in text else 7)) as server:
            reward = make_reward([PartConfig(**judge(server.url)), PartConfig(name="length", params={"target": 3})])
            first, second, third = reward.score(EXAMPLES, TEXTS)
            assert second is None and first == third and first.parts["judge.rating"] == 7.0
            assert len(server.requests) == 3  # of the unreadable one: once more with a reminder, and no third time
            assert reward.counts["judge.unparseable"] == 1

    def test_a_judge_that_samples_is_asked_a_third_time(self):
        with FakeOpenAI(rating(lambda text: "good")) as server:
            reward = JudgeReward(**judge_params(server.url, sampling={"temperature": 1.0}))
            assert reward.score(EXAMPLES[:1], TEXTS[:1]) == [None] and len(server.requests) == 3

    @pytest.mark.parametrize(
        ("reply", "count"),
        [
            (Reply(finish_reason="content_filter"), "refused"),
            (Reply(status=400, error={"message": "no", "code": "content_filter"}), "refused"),
            (Reply(message={"content": None, "refusal": "No."}), "refused"),
            (Reply(finish_reason="length", message={"content": None}), "no_text"),
            (Reply(text="<think>It is", finish_reason="length"), "no_text"),
            (Reply(raw=b"<html>"), "no_text"),
            (Reply(raw=b'{"choices": [{"mess'), "no_text"),
        ],
    )
    def test_a_judge_that_gives_no_text_is_asked_once(self, reply, count):
        with FakeOpenAI(lambda n, request: reply) as server:
            reward = JudgeReward(**judge_params(server.url))
            assert reward.score(EXAMPLES[:1], TEXTS[:1]) == [None]
            assert len(server.requests) == 1 and reward.counts[count] == 1

    def test_a_rating_behind_thinking_is_read(self):
        thought = "<think>\nRating: 1\n</think>\nRating: 10"
        with FakeOpenAI(lambda n, request: Reply(text=thought)) as server:
            reward = JudgeReward(**judge_params(server.url))
            assert reward.score(EXAMPLES[:1], TEXTS[:1])[0].value == 1.0

    def test_a_rating_may_be_set_for_it_or_it_ends_the_run(self):
        with FakeOpenAI(rating(lambda text: "good")) as server:
            reward = JudgeReward(**judge_params(server.url), on_unreadable="value", unreadable_value=1.0)
            assert [(s.value, s.parts) for s in reward.score(EXAMPLES[:1], TEXTS[:1])] == [(0.0, {})]
            assert reward.counts["unparseable"] == 1 and "unreadable=1" in reward.signature
            reward = JudgeReward(**judge_params(server.url), on_unreadable="error")
            with pytest.raises(RlgfError, match="gave no rating in 2 answers for the text of example 'a'"):
                reward.score(EXAMPLES[:1], TEXTS[:1])
            with pytest.raises(UserError, match="go together"):
                JudgeReward(**judge_params(server.url), on_unreadable="value")

    def test_a_second_answer_counts_if_it_can_be_read(self):
        def plan(n: int, request: Any) -> Reply:
            return Reply(text="Good.\nRating: 10") if "Mind the last line" in request.prompt else Reply(text="Good.")

        with FakeOpenAI(plan) as server:
            assert [s.value for s in JudgeReward(**judge_params(server.url)).score(EXAMPLES, TEXTS)] == [1.0] * 3

    def test_only_the_last_line_is_read(self):
        assert [read_rating(f"Rating: 3\nRating: {n}\n") for n in (1, 10)] == [1, 10]
        assert read_rating("Rating: 3\nor more") is None


def judge_params(url: str, **guide: Any) -> dict[str, Any]:
    return {"spec": "openai:m", **judge(url, **guide)["params"]}


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


def unread_share(text: str) -> object:
    return "good" if len(text) % 3 == 0 else 1 + len(text) % 7


@pytest.mark.parametrize("alg", ["ppo", "grpo", "rloo"])
def test_an_episode_without_a_rating_is_left_out_counted_and_warned_of(train, tmp_path, examples_file, alg):
    more = ["--eval-data", examples_file, "--set", "eval.limit=6", "--set", "eval.every=1", "--episodes", 16]
    with FakeOpenAI(rating(unread_share)) as server:
        done = train(server.url, *more, alg=alg)
        assert done.exit_code == 0, done.stderr
        asked = len(server.requests)
        assert train(server.url, *more, alg=alg, out="again").exit_code == 0
        assert len(server.requests) == asked  # the answers without a rating are in the cache too
    steps = rows(tmp_path / "run")
    assert all(row["episodes"] + row.get("score/skipped", 0) == 16 for row in steps)
    assert sum(row.get("score/skipped", 0) for row in steps) > 0 and any(row.get("eval/skipped") for row in steps)
    assert "the judge's rating could not be read for" in done.stderr
    assert run_json(tmp_path / "run")["result"]["warning/skipped-scores"] >= 1
    assert [row["score/mean"] for row in rows(tmp_path / "again")] == [row["score/mean"] for row in steps]


def test_a_step_without_any_rating_ends_the_run(train, tmp_path):
    with FakeOpenAI(rating(lambda text: "good")) as server:
        result = train(server.url)
    assert result.exit_code == 1 and "gave none of the step's episodes a score" in result.stderr


def test_the_reward_as_a_metric_skips_and_counts(run_cli, tmp_path):
    texts = [{"id": str(i), "prompt": "p", "prediction": text} for i, text in enumerate(["good", "bad one", "fine"])]
    data = write_rows(tmp_path / "texts.jsonl", texts)
    with FakeOpenAI(rating(lambda text: "**7/10**" if text != "bad one" else "awful")) as server:

        def evaluate(out: str, **guide: Any) -> Result:
            metrics = json.dumps([{**judge(server.url, **guide), "name": "reward:judge:openai:m"}])
            return run_cli("eval", "--predictions", data, "--set", f"metrics={metrics}", "-o", tmp_path / out)

        done = evaluate("out")
        assert done.exit_code == 0, done.stderr
        server.plan = rating(lambda text: "awful")
        none = evaluate("none", mode="live")
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["metrics"]["reward.total"]["n"] == 2 and scores["counts"]["reward.judge.unparseable"] == 1
    assert none.exit_code == 1 and "gave none of 3 texts a score (judge.answers: 6, " in none.stderr


def test_doctor_looks_at_it_within_its_budget(run_cli, tiny_gpt2, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", toy_examples(2))
    guide = write_rows(tmp_path / "guide.jsonl", guide_rows(toy_examples(2), 1))
    with FakeOpenAI(rating(words)) as server:
        result = run_cli(
            "doctor", "--alg", "ppo", "--model", tiny_gpt2, "--data", data, "--guide", guide, "--device", "cpu",
            "--max-new-tokens", 6, "--set", f"reward={json.dumps([judge(server.url)])}", "--max-calls", 3,
        )  # fmt: skip
        assert "3 of 3 calls" in result.stdout + result.stderr and len(server.requests) == 3
