"""Detection of copies and near copies among instructions, by their words."""

from __future__ import annotations

import zlib

import numpy as np
from datasketch import MinHash, MinHashLSH

from rlgf_cli.evolve.words import essence, words
from rlgf_cli.noise import short_hash

COPY, NEAR_COPY = "copy", "near_copy"
_SHINGLE = 3
_RECALL = 0.99
"""The probability that a text at the threshold becomes a candidate, where the permutations suffice for it."""


class Duplicates:
    """An index of texts that finds copies of them.

    ``copy``: equal but for case, space and punctuation. ``near_copy``: the Jaccard similarity of the sets of word
    trigrams is at least ``threshold``. Candidates come from MinHash signatures of ``permutations`` values in bands
    (Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3) and are compared exactly: no
    false near copy is reported, and hardly any is missed.
    """

    def __init__(self, threshold: float, permutations: int) -> None:
        self._threshold = threshold
        self._empty = MinHash(permutations, scheme="affine32", hashfunc=int)
        self._lsh = MinHashLSH(num_perm=permutations, params=_bands(threshold, permutations))
        self._exact: set[str] = set()
        self._sets: list[np.ndarray] = []

    def find_copy(self, text: str) -> str | None:
        """``copy``, ``near_copy``, or None."""
        if short_hash(essence(text)) in self._exact:
            return COPY
        shingles = _shingles(text)
        near = any(_jaccard(shingles, self._sets[i]) >= self._threshold for i in self._lsh.query(self._sign(shingles)))
        return NEAR_COPY if near else None

    def add(self, text: str) -> None:
        shingles = _shingles(text)
        self._exact.add(short_hash(essence(text)))
        self._lsh.insert(len(self._sets), self._sign(shingles))
        self._sets.append(shingles)

    def _sign(self, shingles: np.ndarray) -> MinHash:
        signature = self._empty.copy()
        signature.update_batch(shingles.tolist())
        return signature


def _bands(threshold: float, permutations: int) -> tuple[int, int]:
    """Number and length of the bands: the longest bands, which give the fewest candidates, that reach the recall
    (a pair of similarity s is a candidate with probability 1 - (1 - s^r)^b)."""
    fitting = [r for r in range(1, permutations // 2 + 1) if 1 - (1 - threshold**r) ** (permutations // r) >= _RECALL]
    length = max(fitting, default=1)
    return permutations // length, length


def _shingles(text: str) -> np.ndarray:
    """The sorted distinct hashes of word trigrams; of all words where there are fewer. uint32, [shingles]"""
    tokens = words(text)
    runs = [" ".join(tokens[i : i + _SHINGLE]) for i in range(max(1, len(tokens) - _SHINGLE + 1))]
    return np.unique(np.array([zlib.crc32(run.encode()) for run in runs], dtype=np.uint32))


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)
