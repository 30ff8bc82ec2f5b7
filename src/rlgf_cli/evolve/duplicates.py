"""Copies and near copies among instructions, found by their words."""

from __future__ import annotations

import zlib

import numpy as np
from datasketch import MinHash, MinHashLSH

from rlgf_cli.evolve.words import essence, words
from rlgf_cli.noise import short_hash

COPY, NEAR_COPY = "copy", "near_copy"
_SHINGLE = 3
_FOUND = 0.99
"""How surely a text that is just similar enough becomes a candidate, where the permutations are enough for it."""


class Duplicates:
    """What is there, and whether a text is a copy of some of it.

    ``copy``: the same but for case, space and punctuation. ``near_copy``: the Jaccard similarity of the sets of three
    words in a row is ``threshold`` or more. Candidates come from MinHash signatures of ``permutations`` values in bands
    (Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3) and are held against the sets
    themselves, so that nothing is taken for a near copy that is none, and hardly any is missed.
    """

    def __init__(self, threshold: float, permutations: int) -> None:
        self._threshold = threshold
        self._empty = MinHash(permutations, scheme="affine32", hashfunc=int)
        self._lsh = MinHashLSH(num_perm=permutations, params=_bands(threshold, permutations))
        self._exact: set[str] = set()
        self._sets: list[np.ndarray] = []

    def seen(self, text: str) -> str | None:
        """``copy``, ``near_copy``, or None for a text that is neither."""
        if short_hash(essence(text)) in self._exact:
            return COPY
        shingles = _shingles(text)
        near = any(_jaccard(shingles, self._sets[i]) >= self._threshold for i in self._lsh.query(self._sign(shingles)))
        return NEAR_COPY if near else None

    def add(self, text: str) -> None:
        """The text is there from now on."""
        shingles = _shingles(text)
        self._exact.add(short_hash(essence(text)))
        self._lsh.insert(len(self._sets), self._sign(shingles))
        self._sets.append(shingles)

    def _sign(self, shingles: np.ndarray) -> MinHash:
        signature = self._empty.copy()
        signature.update_batch(shingles.tolist())
        return signature


def _bands(threshold: float, permutations: int) -> tuple[int, int]:
    """Number of bands and their length: the longest, and so the fewest candidates, that still find what is to be found
    (chance 1 - (1 - s^r)^b at a similarity of s)."""
    fitting = [r for r in range(1, permutations // 2 + 1) if _chance(threshold, permutations // r, r) >= _FOUND]
    length = max(fitting, default=1)
    return permutations // length, length


def _chance(similarity: float, bands: int, length: int) -> float:
    return 1 - (1 - similarity**length) ** bands


def _shingles(text: str) -> np.ndarray:
    """Hashes of three words in a row, each once, in order; of all words where there are fewer. uint32, [shingles]"""
    found = words(text)
    runs = [" ".join(found[i : i + _SHINGLE]) for i in range(max(1, len(found) - _SHINGLE + 1))]
    return np.unique(np.array([zlib.crc32(run.encode()) for run in runs], dtype=np.uint32))


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)
