"""A filter of texts: which score is enough, what it refuses, and how answers are grouped to be scored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlgf_cli.config.collect_guide import CollectGuideConfig
from rlgf_cli.config.common import PartConfig
from rlgf_cli.config.loader import resolve
from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.guides.stream import in_groups
from rlgf_cli.protocols import Answer, Example, Failure, GuideRequest
from rlgf_cli.scorers.text_filter import TextFilter


def text_filter(keep_above: float | None, name: str = "ending", **params: Any) -> TextFilter:
    made = TextFilter.make([PartConfig(name=name, params=params)], keep_above, device="cpu")
    assert made is not None
    return made


def test_a_text_is_kept_from_the_threshold_on_and_an_empty_one_never() -> None:
    least = text_filter(0.3)
    assert [least.keeps("x", score) for score in (0.3, 0.31, 0.29999999)] == [True, True, False]
    assert not least.keeps(" \n", 5.0) and not least.keeps("", 5.0)
    assert text_filter(None).keeps("", -9.0)
    assert TextFilter.make([], None, device="cpu") is None


def test_the_settings_change_with_all_that_decides_the_choice(tmp_path: Path) -> None:
    different = [text_filter(0.3), text_filter(0.4), text_filter(None), text_filter(0.3, "repetition")]
    different.append(text_filter(0.3, "repetition", n=2))
    settings = [each.settings for each in different]
    assert all(a != b for i, a in enumerate(settings) for b in settings[:i])
    assert text_filter(0.3).settings == settings[0]


def test_every_example_is_checked() -> None:
    rouge = text_filter(0.3, "rouge")
    good = [Example(f"p{i}", "x", ("reference",)) for i in range(1200)]
    rouge.check(iter(good))
    with pytest.raises(UserError, match=r"needs references.*first: 'bad'"):
        rouge.check(iter([*good, Example("bad", "x")]))


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_threshold_is_a_finite_number(value: str) -> None:
    with pytest.raises(UserError, match="keep_above"):
        resolve(
            CollectGuideConfig,
            flags={
                "guide": "openai:m", "data": "x", "output": "y", "reward": "ending", "keep_above": float(value),
            },
        )  # fmt: skip


@given(count=st.integers(0, 20), size=st.integers(1, 6), fails=st.booleans())
def test_groups_have_every_answer_in_order_and_those_before_an_error(count: int, size: int, fails: bool) -> None:
    answers = [Answer(i, GuideRequest(Example(str(i), "x")), Failure("kind", "why")) for i in range(count)]

    def stream() -> Iterator[Answer]:
        yield from answers
        if fails:
            raise RlgfError("the budget is spent")

    groups: list[list[Answer]] = []
    try:
        for group in in_groups(stream(), size):
            groups.append(group)
    except RlgfError:
        assert fails
    else:
        assert not fails
    assert [answer for group in groups for answer in group] == answers
    assert all(len(group) == size for group in groups[:-1]) and all(groups)
