"""Novelty: distances in the space of words, and the collection that they are measured to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlgf_cli.evolve.novelty import Collection, NgramSpace, unit

SPACE = NgramSpace()
ROWS = unit(np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32))


def test_texts_without_a_common_word_are_new_and_copies_are_not():
    there = Collection(SPACE.embed(["Write a poem about rain."]))
    new, copy, half = SPACE.embed(["Explain how tax works", "write a poem about RAIN", "Write a poem about snow"])
    assert there.novelty(new) == 1.0
    assert there.novelty(copy) == pytest.approx(0, abs=1e-6)
    # four of five words and three of four pairs are shared: 7 of 9 n-grams
    assert there.novelty(half) == pytest.approx(1 - 7 / 9, abs=1e-6)


def test_the_order_of_words_is_seen():
    there = Collection(SPACE.embed(["dogs chase cats"]))
    assert there.novelty(SPACE.embed(["cats chase dogs"])[0]) == pytest.approx(1 - 3 / 5, abs=1e-6)


def test_nothing_there_and_no_words():
    empty = Collection(SPACE.embed([]))
    assert empty.novelty(SPACE.embed(["a text"])[0]) == 1.0
    assert Collection(SPACE.embed(["a text"])).novelty(SPACE.embed(["?!"])[0]) == 1.0


@given(st.lists(st.text(max_size=30), min_size=1, max_size=5))
def test_rows_have_length_one_or_hold_nothing(texts):
    rows = SPACE.embed(texts)
    assert rows.shape == (len(texts), 2048) and rows.dtype == np.float32
    lengths = np.linalg.norm(rows, axis=1)
    assert np.all((np.abs(lengths - 1) < 1e-5) | (lengths == 0))


@given(fixed=st.integers(0, 3), capacity=st.none() | st.integers(1, 5), added=st.integers(0, 30))
def test_a_collection_is_its_fixed_rows_and_the_last_ones(fixed, capacity, added):
    there = Collection(ROWS[:fixed], capacity)
    for row in ROWS[fixed : fixed + added]:
        there.add(row)
    kept = ROWS[fixed : fixed + added][-capacity:] if capacity else ROWS[fixed : fixed + added]
    assert np.array_equal(there.recent(), kept)
    probe = ROWS[-1]
    known = np.concatenate([ROWS[:fixed], kept])
    expected = np.clip(1 - (known @ probe).max(), 0, 1) if len(known) else 1.0
    assert there.novelty(probe) == pytest.approx(expected, abs=1e-6)
    again = Collection(ROWS[:fixed], capacity)
    for row in there.recent():
        again.add(row)
    again.add(ROWS[-2])
    there.add(ROWS[-2])
    assert np.array_equal(again.recent(), there.recent())


def test_a_text_whose_n_grams_cancel_each_other_lies_somewhere():
    text = "bdwxo bdwxo"  # the word and the pair fall on one place, with unlike signs
    assert np.linalg.norm(NgramSpace().embed([text])[0]) == pytest.approx(1)
    assert not NgramSpace().embed(["..."]).any()
