"""Diversity of a set of vectors: what the figures must be where the answer is known, and what must not move them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlgf_cli.evolve.diversity import by_hash, leaders, spread, vendi_score
from rlgf_cli.evolve.novelty import NgramSpace, unit
from rlgf_cli.scorers.distinct import set_distinct


def vectors(seed: int, n: int, d: int) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(n, d)))


SETS = st.builds(vectors, st.integers(0, 10_000), st.integers(2, 12), st.integers(2, 12))


def direct(rows: np.ndarray) -> float:
    """Definition 3.1 word for word, on the matrix of similarities, without symmetry: numpy's general eigenvalues."""
    values = np.linalg.eigvals(np.array([[a @ b for b in rows] for a in rows]) / len(rows)).real
    return math.exp(-sum(value * math.log(value) for value in values if value > 1e-12))


@given(SETS)
def test_vendi_is_its_definition_whichever_matrix_is_smaller(rows):
    assert vendi_score(rows) == pytest.approx(direct(rows), rel=1e-6)


@pytest.mark.parametrize(("n", "d"), [(5, 5), (5, 40), (1, 3)])
def test_vendi_of_orthogonal_texts_is_their_number(n, d):
    assert vendi_score(np.eye(d)[:n]) == pytest.approx(n)


@pytest.mark.parametrize(("n", "d"), [(7, 3), (3, 7)])
def test_vendi_of_copies_is_one(n, d):
    assert vendi_score(np.repeat(vectors(0, 1, d), n, axis=0)) == pytest.approx(1)


def test_vendi_of_two_texts_by_hand():
    rows = np.array([[1.0, 0.0], [0.6, 0.8]])  # cosine 0.6: eigenvalues 0.8 and 0.2
    assert vendi_score(rows) == pytest.approx(0.8**-0.8 * 0.2**-0.2)


@given(SETS, st.randoms())
def test_vendi_knows_neither_order_nor_rotation_nor_the_set_twice(rows, random):
    score = vendi_score(rows)
    order = list(range(len(rows)))
    random.shuffle(order)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(rows.shape[1],) * 2))[0]
    for same in (rows[order], rows @ turn, np.concatenate([rows, rows])):
        assert vendi_score(same) == pytest.approx(score, rel=1e-6)
    assert 1 - 1e-9 <= score <= len(rows) + 1e-9


@given(SETS)
def test_spread_is_the_mean_over_pairs(rows):
    pairs = [1 - rows[i] @ rows[j] for i in range(len(rows)) for j in range(i)]
    assert spread(rows) == pytest.approx(np.mean(pairs), abs=1e-9)


def one_by_one(rows: np.ndarray, least: float) -> int:
    found: list[np.ndarray] = []
    for row in rows:
        if all(row @ leader < least for leader in found):
            found.append(row)
    return len(found)


@given(SETS, st.floats(-0.9, 0.9))
def test_leaders_block_by_block_are_leaders_one_by_one(rows, least):
    import rlgf_cli.evolve.diversity as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_AT_ONCE", 3)
        assert leaders(rows, least) == one_by_one(rows, least)


@given(SETS, st.floats(-0.9, 0.9), st.integers(0, 100))
def test_a_copy_never_makes_a_cluster_and_never_raises_distinct(rows, least, which):
    again = np.concatenate([rows, rows[which % len(rows)][None]])
    assert leaders(again, least) == leaders(rows, least)
    words = [[(f"{which * 7 % 5}",), (f"{int(row[0] * 3)}",)] for row in rows]
    assert set_distinct([*words, words[which % len(words)]]) <= set_distinct(words)


def test_leaders_count_groups_that_are_far_apart():
    centres = np.eye(6)[:4]
    rows = unit(np.repeat(centres, 5, axis=0) + 0.1 * np.random.default_rng(0).normal(size=(20, 6)))
    assert leaders(rows, 0.5) == 4


def test_the_order_by_hash_is_the_texts_own():
    texts = ["walk the dog", "bake bread", "write a poem", "sort a list"]
    shuffled = [texts[i] for i in (2, 0, 3, 1)]
    assert [texts[i] for i in by_hash(texts, 3)] == [shuffled[i] for i in by_hash(shuffled, 3)]
    assert [texts[i] for i in by_hash(texts, 3)] != [texts[i] for i in by_hash(texts, 4)]


@pytest.mark.parametrize("figure", [vendi_score, spread, lambda rows: leaders(rows, 0.5)])
def test_a_text_without_words_has_no_place(figure):
    with pytest.raises(ValueError, match="length 0, not 1"):
        figure(NgramSpace().embed(["walk the dog", "?!"]))
    with pytest.raises(ValueError, match="at least one text"):
        figure(np.zeros((0, 4)))


def test_one_text_has_no_spread():
    with pytest.raises(ValueError, match="no distance"):
        spread(np.eye(3)[:1])


def test_distinct_of_a_set_by_hand():
    assert set_distinct([[("a",), ("b",), ("a",)], [("b",)], []]) == 0.5
    assert set_distinct([[], []]) is None
