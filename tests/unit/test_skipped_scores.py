"""Texts without a score: their episodes are left out, and a group needs two episodes to compare."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from rlgf_cli.errors import RlgfError
from rlgf_cli.protocols import Example, Reward, Score
from rlgf_cli.scorers.checked import score_checked, score_or_skip
from rlgf_cli.scorers.weighted_sum import Part, SumReward
from rlgf_cli.training.episodes import Branch, Episode
from rlgf_cli.training.restarts import Gate, text_key
from rlgf_cli.training.skipped import comparable


def episode(index: int, group: int, score: float | None, *branches: float | None) -> Episode:
    made = Episode(index, Example("a", "p"), [1], group, "policy", segments=[("policy", [2, index])])
    made.score = None if score is None else Score(score)
    made.branches = [Branch("before", 0, [3], score=None if b is None else Score(b)) for b in branches]
    return made


def left(episodes: list[Episode], group_size: int) -> list[int]:
    counts: Counter[str] = Counter()
    kept = [e.index for e in comparable(episodes, group_size, counts)]
    assert len(kept) + counts["skipped"] == len(episodes)
    return kept


def test_an_episode_without_a_score_is_left_out():
    assert left([episode(0, 0, 1.0), episode(1, 1, None), episode(2, 2, 0.0)], 1) == [0, 2]


def test_so_is_one_with_a_branch_without_a_score():
    assert left([episode(0, 0, 1.0, 0.5, None), episode(1, 1, 1.0, 0.5)], 1) == [1]


def test_so_is_a_group_that_has_nothing_left_to_compare():
    episodes = [episode(0, 0, 1.0), episode(1, 0, None), episode(2, 1, 1.0), episode(3, 1, 0.0)]
    assert left(episodes, 2) == [2, 3] and left(episodes, 1) == [0, 2, 3]


def test_a_step_without_a_score_is_an_error():
    with pytest.raises(RlgfError, match="none of the step's episodes"):
        comparable([episode(0, 0, None), episode(1, 0, 1.0)], 2, Counter())


def test_a_guides_text_beside_a_group_needs_no_score():
    beside = replace(episode(2, 0, None), role="beside")
    assert left([episode(0, 0, 1.0), episode(1, 0, 0.0), beside], 2) == [0, 1, 2]
    member = replace(episode(2, 0, 1.0), role="member")
    assert left([episode(0, 0, 1.0), episode(1, 0, None), member], 2) == [0, 2]
    with pytest.raises(RlgfError):  # a text of the guide alone is nothing to learn on-policy from
        comparable([episode(0, 0, None), beside], 2, Counter())


def test_a_guides_text_without_a_score_is_not_rejected():
    def score(episodes: list[Episode]) -> None:
        for e in episodes:
            e.score = None if e.index == 0 else Score(0.1)

    gate = Gate({"a": 0.5}, {}, score)
    whole = [episode(0, 0, None), episode(1, 1, None)]
    assert gate.rejects(whole) == [False, True] and gate.new == {text_key(whole[1]): 0.1}


class _Odd(Reward):
    name = "odd"

    def score(self, examples, texts):
        return [Score(float(len(text))) if len(text) % 2 else None for text in texts]


class _One(Reward):
    name = "one"

    def score(self, examples, texts):
        return [Score(1.0) for _ in texts]


def test_a_sum_has_no_score_where_a_part_has_none():
    examples, texts = [Example("a", "p"), Example("b", "q")], ["x", "xx"]
    reward = SumReward([Part(2.0, _One()), Part(1.0, _Odd())])
    first, second = score_or_skip(reward, examples, texts)
    assert first is not None and first.value == 3.0 and second is None
    with pytest.raises(RlgfError, match=r"gave no score, on example 'b'"):
        score_checked(reward, examples, texts)
