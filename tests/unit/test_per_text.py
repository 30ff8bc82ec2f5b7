"""One number per text, from a reward or from one figure of a metric, and what is refused before a run starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.protocols import Example
from rlgf_cli.scorers.per_text import per_text

CAT = Example("cat", "cat mat", ("the cat sat on the mat",))
DOG = Example("dog", "dog", ("a dog runs",))
BARE = Example("bare", "a prompt")
TEXTS = ["the cat sat", "the dog"]


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("rouge1", {}, [2 / 3, 0.4]),
        ("rouge", {"figure": "rouge.rouge1"}, [2 / 3, 0.4]),  # the metric, because of its figure
        ("length", {"params": {"target": 2}}, [-1, 0]),  # the reward of that name
        ("length", {"figure": "length.words"}, [3, 2]),
    ],
)
def test_a_number_per_text(name: str, given: dict[str, Any], expected: list[float]) -> None:
    assert per_text(name, [CAT, DOG], **given)([CAT, DOG], TEXTS) == pytest.approx(expected)


def test_a_metric_of_one_figure_needs_no_name_for_it(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def size(text):\n    return len(text)\n")
    assert per_text(f"{tmp_path / 'mine.py'}:size", [CAT])([CAT], ["abc"]) == [3]
    assert per_text("reward:length", [CAT], figure="reward.length", params={"target": 2})([CAT], ["abc"]) == [-1]


def test_an_example_that_a_metric_skips_is_none() -> None:
    assert per_text("rouge", [BARE, CAT], figure="rouge.rouge1")([BARE, CAT], ["x", "cat"])[0] is None


@pytest.mark.parametrize(
    ("name", "figure", "examples", "message", "hint"),
    [
        ("rogue", None, [CAT], "unknown metric 'rogue'", "rouge"),
        ("rouge", None, [BARE, CAT], "needs references; 1 of 2", "references"),
        ("rouge", "rouge.rouge3", [CAT], "no figure 'rouge.rouge3'", "rouge.rouge1"),
        ("reward:rouge1", None, [CAT], "2 figures", "reward.total, reward.rouge1"),
        ("rouge", "rouge.rouge1", [BARE], "needs references", "references"),
    ],
)
def test_what_gives_no_number_is_refused(
    name: str, figure: str | None, examples: list[Example], message: str, hint: str
) -> None:
    with pytest.raises(UserError) as caught:
        per_text(name, examples, figure=figure)
    assert message in caught.value.message and hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("name", "figure"), [("judge", None), ("judge", "judge.consistent"), ("reward:judge", "reward.total")]
)
def test_a_judge_is_refused_before_it_is_asked(name: str, figure: str | None) -> None:
    # nobody would charge it to the run: --max-cost-usd would not hold
    section = {"name": "openai:gpt-4o-mini", "base_url": "http://localhost:9/v1", "mode": "live"}
    with pytest.raises(UserError) as caught:
        per_text(name, [CAT], figure=figure, params={"guide": section})
    assert "a judge cannot be watched" in caught.value.message and "rlgf eval" in (caught.value.hint or "")


def test_texts_that_are_all_skipped_are_a_letter() -> None:
    scored = per_text("distinct", [CAT, DOG], figure="distinct.3")
    assert scored([CAT, DOG], ["the cat sat", "dog"]) == [1, None]
    with pytest.raises(RlgfError) as caught:  # a policy that writes next to nothing
        scored([CAT, DOG], ["cat", ""])
    assert "none of the 2 texts has a value of distinct.3" in caught.value.message
