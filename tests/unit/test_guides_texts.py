"""Templates, stop texts, and the mending of a chat model's continuation."""

from __future__ import annotations

from collections import Counter

import pytest

from rlgf_cli.guides.texts import cut_at_stop, fill, mend_continuation


def test_templates_are_filled_at_once() -> None:
    assert fill("Q: {prompt}\nA: {prefix}", "what is {prefix}?", "{prompt} {x}") == (
        "Q: what is {prefix}?\nA: {prompt} {x}"
    )


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one\ntwo", ["\n"], ("one", True)),
        ("one two", ["\n"], ("one two", False)),
        ("a END b STOP", ["STOP", "END"], ("a ", True)),
        ("anything", [], ("anything", False)),
    ],
)
def test_stop_texts(text: str, stops: list[str], expected: tuple[str, bool]) -> None:
    assert cut_at_stop(text, stops) == expected


@pytest.mark.parametrize(
    ("prefix", "text", "mended", "repairs"),
    [
        # a word follows a word: the space that chat models drop
        ("the dog", "runs home.", " runs home.", {"space_added": 1}),
        ("the dog,", "which runs", " which runs", {"space_added": 1}),
        ("the dog ", "runs home.", "runs home.", {}),
        ("the dog", ", which runs", ", which runs", {}),
        ("the dog", ".", ".", {}),
        ("twenty-", "one", "one", {}),
        ("犬は", "走る", "走る", {}),
        # the whole text again
        ("the dog", "the dog runs home.", " runs home.", {"prefix_removed": 1}),
        ("the dog ", "The  dog runs home.", "runs home.", {"prefix_removed": 1}),
        ("the dog", "the dogs run", "s run", {"prefix_removed": 1}),
        ("the", "the dog", " the dog", {"space_added": 1}),
        # quotes around it
        ("the dog", '"runs home."', " runs home.", {"quotes_removed": 1, "space_added": 1}),
        ("the dog", "“the dog runs”", " runs", {"quotes_removed": 1, "prefix_removed": 1}),
        ("he said", '"no" and "yes"', '"no" and "yes"', {}),
        ("the dog", "", "", {}),
    ],
)
def test_continuations_are_mended_and_counted(prefix: str, text: str, mended: str, repairs: dict[str, int]) -> None:
    counts: Counter[str] = Counter()
    assert mend_continuation(prefix, text, counts) == mended
    assert counts == repairs
