"""The environment that instructions evolve in: what a step asks, keeps, rewards and counts."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from evolving import OPERATIONS, SEEDS, FunctionGuide, environment_of, number_of
from rlgf_cli.errors import RlgfError
from rlgf_cli.evolve.environment import MAX_STEPS, Chain, RewardWeights, complete_all
from rlgf_cli.evolve.policies import PaperPolicy, RandomPolicy, RoundRobinPolicy, draws_for, rollout
from rlgf_cli.protocols import Completion, Example, Failure, GuideRequest


class Says:
    """A reviewer with one verdict for all; remembers what it was asked."""

    def __init__(self, verdict):
        self.verdict, self.asked = verdict, []

    def different(self, pairs):
        self.asked += pairs
        return [self.verdict] * len(pairs)


def chains():
    return [Chain(seed) for seed in SEEDS]


def test_a_kept_rewrite_is_the_chains_instruction_from_then_on():
    environment, made = environment_of(), chains()
    environment.step(made, [0, 1, 2])
    first = [chain.steps[0] for chain in made]
    assert [step.outcome for step in first] == ["kept"] * 3
    assert [chain.instruction for chain in made] == [step.text for step in first]
    assert [step.instruction for step in first] == [seed.prompt for seed in SEEDS]
    environment.step(made, [1, 1, 1])
    asked = {request.example.prompt for request in environment.guide.asked[3:]}
    assert asked == {f"Make it harder, please: {step.text}" for step in first}
    assert [chain.instruction for chain in made] == [chain.steps[1].text for chain in made]


def test_what_was_rejected_does_not_go_on_and_is_another_sample_the_second_time():
    environment, made = (
        environment_of(lambda request: "I'm sorry, but I cannot help with that."),
        [Chain(SEEDS[0], visit=2)],
    )
    for operation in (1, 1, 2):
        environment.step(made, [operation])
    assert [step.outcome for step in made[0].steps] == ["refusal"] * 3
    assert made[0].instruction == SEEDS[0].prompt
    first = 2 * MAX_STEPS
    assert [request.sample_index for request in environment.guide.asked] == [first, first + 1, first]


@pytest.mark.parametrize(
    ("reply", "outcome", "reward"),
    [
        ("", "empty", -0.5),
        ("Write a short poem about RAIN!", "unchanged", -0.5),
        ("word " * 51, "too_long", -0.5),
        (Completion("half a task that", "length", "function"), "cut", -0.5),
        (Failure("refusal", "no", final=True), "refusal", -0.5),
        (Failure("content_filter", "no", final=True), "refusal", -0.5),
        (Failure("bad_request", "too long for me", final=True), "unanswered", None),
        ("List the steps of baking bread at home.", "duplicate", -0.5),
    ],
)
def test_outcomes_and_their_rewards(reply, outcome, reward):
    environment, made = environment_of(lambda request: reply), [Chain(SEEDS[0])]
    environment.step(made, [1])
    assert (made[0].steps[0].outcome, made[0].steps[0].reward) == (outcome, reward)
    assert made[0].steps[0].queries == 1


def test_the_reward_is_novelty_and_the_reviewers_verdict():
    weights = RewardWeights(novelty=2.0, different=0.25, penalty=1.0)
    for verdict, outcome, extra in ((True, "kept", 0.25), (False, "equal", None), (None, "unreviewed", None)):
        environment, made = environment_of(reviewer=Says(verdict), weights=weights), [Chain(SEEDS[0])]
        environment.step(made, [1])
        step = made[0].steps[0]
        assert (step.outcome, step.different, step.queries) == (outcome, verdict, 2)
        assert 0.5 < step.novelty <= 1
        expected = 2 * step.novelty + 0.25 if extra else -1.0 if outcome == "equal" else None
        assert step.reward == (pytest.approx(expected) if expected is not None else None)


def test_the_reviewer_is_not_asked_about_what_is_rejected_already():
    reviewer = Says(True)
    replies = iter(["", SEEDS[0].prompt, "Paint seven clouds above an old harbour"])
    environment, made = environment_of(lambda request: next(replies), reviewer=reviewer), chains()
    environment.step(made, [1, 1, 1])
    assert [step.outcome for step in reversed([chain.steps[0] for chain in made])] == ["empty", "duplicate", "kept"]
    assert [text for _, text in reviewer.asked] == ["Paint seven clouds above an old harbour"]
    assert [chain.steps[0].queries for chain in made] == [2, 1, 1]


def test_equal_rewrites_of_one_step_are_kept_once_for_the_first_chain():
    environment, made = environment_of(lambda request: "Paint seven clouds above an old harbour"), chains()
    environment.step(made, [1, 1, 1])
    assert [chain.steps[0].outcome for chain in made] == ["kept", "duplicate", "duplicate"]


def test_copies_are_found_by_text_too_and_on_kept_is_called():
    kept: list[str] = []
    environment, made = (
        environment_of(find_copy=lambda text: "copy" if "copy" in text else None, on_kept=kept.append),
        chains(),
    )
    answers = {"rain": "a copy of it all", "tax": "Paint seven clouds", "bread": "Count old boats twice"}
    environment.guide = FunctionGuide(lambda request: answers[request.example.id])
    environment.step(made, [1, 1, 1])
    assert [chain.steps[0].outcome for chain in made] == ["copy", "kept", "kept"]
    assert kept == ["Paint seven clouds", "Count old boats twice"]


def test_a_guide_that_fails_stops_the_step_and_changes_no_chain():
    calls = []

    def answer(request):
        calls.append(request.example.id)
        return Failure("timeout", "nobody there") if request.example.id == "tax" else number_of(request)

    environment, made = environment_of(answer), chains()
    with pytest.raises(RlgfError, match=r"did not answer 1 of 3 requests \(timeout: 1\).*nobody there"):
        environment.step(made, [0, 1, 2])
    assert [chain.steps for chain in made] == [[], [], []]
    assert calls.count("tax") == 2 and calls.count("rain") == 1


def test_a_transient_failure_is_requested_again():
    replies = iter([Failure("timeout", "later"), "here it is"])
    request = GuideRequest(Example("a", "b"))
    assert [outcome.text for outcome in complete_all(FunctionGuide(lambda r: next(replies)), [request])] == [
        "here it is"
    ]


def test_a_step_has_text_outcome_novelty_reward_queries_and_cost():
    environment, made = environment_of(), [Chain(SEEDS[0])]
    environment.step(made, [2])
    assert asdict(made[0].steps[0]) == {
        "operation": "long",
        "instruction": SEEDS[0].prompt,
        "text": number_of(environment.guide.asked[0]),
        "outcome": "kept",
        "novelty": pytest.approx(1.0, abs=0.3),
        "different": None,
        "reward": made[0].steps[0].novelty,
        "queries": 1,
        "cost_usd": 0.25,
    }


def test_the_paper_s_schedule_forces_breadth_at_steps_one_and_four():
    made, policy = [Chain(SEEDS[0])], PaperPolicy(OPERATIONS)
    environment = environment_of()
    rollout(environment, made, policy, 6, seed=0)
    assert [step.operation == "wide" for step in made[0].steps] == [True, False, False, True, False, False]


def test_round_robin_goes_through_the_file():
    made = [Chain(SEEDS[0])]
    rollout(environment_of(), made, RoundRobinPolicy(OPERATIONS), 5, seed=0)
    assert [step.operation for step in made[0].steps] == ["wide", "deep", "long", "wide", "deep"]


def test_random_takes_every_operation_equally_often():
    draws = np.random.default_rng(0).random(6000)
    chosen = RandomPolicy(OPERATIONS).choose([Chain(SEEDS[0])] * 6000, draws)
    assert np.bincount(chosen, minlength=3) / 6000 == pytest.approx([1 / 3] * 3, abs=0.02)
    assert RandomPolicy(OPERATIONS).choose([Chain(SEEDS[0])] * 2, np.array([0.0, np.nextafter(1, 0)])) == [0, 2]


def test_a_chains_draws_depend_on_itself_alone():
    alone, visited = Chain(SEEDS[1]), Chain(SEEDS[1], visit=1)
    among = draws_for([Chain(SEEDS[0]), alone, visited], 7)
    assert among[1] == draws_for([alone], 7)[0]
    assert len({*among, draws_for([alone], 8)[0]}) == 4


def test_a_rollout_is_reproducible():
    def texts():
        made = chains()
        rollout(environment_of(), made, RandomPolicy(OPERATIONS), 4, seed=3)
        return [[step.text for step in chain.steps] for chain in made]

    assert texts() == texts()
