"""Diversity of a set of texts from their vectors in a space (:mod:`.novelty`).

All of these figures depend on the number of texts: compare sets at equal numbers (:mod:`.contrast`). Vectors are unit
vectors [n, d], as ``Space.embed`` gives them; a row of zeros, that of a text without a word, is refused with
ValueError.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlgf_cli.noise import short_hash

_AT_ONCE = 512
"""Texts that are compared with the leaders at a time."""


def vendi_score(vectors: np.ndarray) -> float:
    """The effective number of different texts, in [1, n] (Friedman and Dieng 2023, "The Vendi Score: A Diversity
    Evaluation Metric for Machine Learning", arXiv 2210.02410, definition 3.1, with the cosine as similarity).

    exp(-sum_i l_i ln l_i) over the eigenvalues l_i of K / n, K = V V^T [n, n]; V^T V [d, d] has the same nonzero ones,
    and is used where it is smaller. n for orthogonal vectors, 1 for n equal ones. Order, rotation and duplication of
    the whole set do not change it.
    """
    rows = _checked(vectors).astype(np.float64)
    n, d = rows.shape
    values = np.linalg.eigvalsh((rows @ rows.T if n <= d else rows.T @ rows) / n)
    values = values[values > 0]  # rounding puts zeros on either side of 0
    return float(np.exp(-(values * np.log(values)).sum()))


def spread(vectors: np.ndarray) -> float:
    """The mean distance, 1 - cosine, of two different texts of the set, in [0, 2]; n >= 2."""
    rows = _checked(vectors)
    n = len(rows)
    if n < 2:
        raise ValueError("one text has no distance to another")
    total = rows.sum(axis=0, dtype=np.float64)
    own = (rows.astype(np.float64) ** 2).sum()
    return float(1 - (total @ total - own) / (n * (n - 1)))


def leaders(vectors: np.ndarray, least: float) -> int:
    """The number of clusters by greedy leaders (Hartigan 1975, chapter 3): in the given order, a text whose cosine to
    every leader so far is below ``least`` becomes one; the others belong to a leader.

    The count depends somewhat on the order: use that of :func:`by_hash`. A copy of an earlier text never raises it.
    """
    rows = _checked(vectors)
    chosen = np.zeros((0, rows.shape[1]), dtype=rows.dtype)
    for start in range(0, len(rows), _AT_ONCE):
        block = rows[start : start + _AT_ONCE]
        near = np.asarray(block @ block.T >= least)
        taken = np.asarray((block @ chosen.T >= least).any(axis=1))
        new = []
        for i in range(len(block)):
            if not taken[i]:
                new.append(i)
                taken |= near[i]
        chosen = np.concatenate([chosen, block[new]])
    return len(chosen)


def by_hash(texts: Sequence[str], seed: int = 0) -> list[int]:
    """An order of the texts by their hashes, which does not depend on their order in the file."""
    return sorted(range(len(texts)), key=lambda i: short_hash(f"{seed} {texts[i]}"))


def _checked(vectors: np.ndarray) -> np.ndarray:
    if vectors.ndim != 2 or not len(vectors):
        raise ValueError(f"vectors [n, d] of at least one text are needed, not {vectors.shape}")
    lengths = np.linalg.norm(vectors, axis=1)
    if not np.allclose(lengths, 1, atol=1e-3):
        raise ValueError(f"a vector has length {lengths[np.argmax(np.abs(lengths - 1))]:.3g}, not 1")
    return vectors
