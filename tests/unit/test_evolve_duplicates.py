"""Copies and near copies, against the definition of both."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlgf_cli.evolve.duplicates import Duplicates

WORDS = [f"w{i}" for i in range(400)]


def with_changes(words: list[str], changes: int, rng: random.Random) -> list[str]:
    found = list(words)
    for at in rng.sample(range(len(words)), changes):
        found[at] = f"x{rng.randrange(10**9)}"
    return found


def jaccard(a: list[str], b: list[str]) -> float:
    """Of the sets of three words in a row, by the definition."""
    sets = [{tuple(words[i : i + 3]) for i in range(len(words) - 2)} for words in (a, b)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60))
def test_a_text_is_a_copy_of_itself_whatever_its_space_and_case(text):
    there = Duplicates(0.8, 16)
    there.add(text)
    assert there.find_copy(text) == "copy"
    assert there.find_copy(f"  {text}\n") == "copy"
    assert there.find_copy(text.casefold()) == "copy"


def test_other_texts_are_nothing_seen():
    there = Duplicates(0.8, 128)
    assert there.find_copy("Write a poem about rain.") is None
    there.add("Write a poem about rain.")
    for text in ("Write a poem about snow.", "Rain.", "Write a poem about rain and snow, in the style of an old song."):
        assert there.find_copy(text) is None
    assert there.find_copy("write  a\tpoem, about RAIN") == "copy"
    assert there.find_copy("Wri\u200bte a poem about rain.") == "copy"  # a space that nobody sees


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_near_copies_are_those_above_the_threshold(threshold):
    """No text below it is called one; of those above it nearly all are."""
    rng, there = random.Random(0), Duplicates(threshold, 128)
    found = clear = 0
    for _ in range(300):
        words = rng.choices(WORDS, k=60)
        there.add(" ".join(words))
        other = with_changes(words, rng.randrange(1, 12), rng)
        similarity, near = jaccard(words, other), there.find_copy(" ".join(other)) == "near_copy"
        assert not near or similarity >= threshold
        if similarity >= threshold:
            clear += 1
            found += near
    assert clear > 15 and found >= 0.97 * clear


def test_a_near_copy_among_many():
    rng = random.Random(1)
    there, texts = Duplicates(0.8, 128), [rng.choices(WORDS, k=40) for _ in range(300)]
    for words in texts:
        there.add(" ".join(words))
    assert all(there.find_copy(" ".join(with_changes(words, 1, rng))) == "near_copy" for words in texts[::20])
    assert all(there.find_copy(" ".join(rng.choices(WORDS, k=40))) is None for _ in range(50))
