"""Novelty of an instruction: its distance to the nearest one of a collection.

Texts are unit vectors in a space, that of a local encoder or of word n-grams; the distance is 1 - cosine, clipped to
[0, 1].
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from rlgf_cli.evolve.words import words


class Space(Protocol):
    """A vector space of texts; ``signature`` identifies the embedding."""

    signature: str

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, float32, [texts, d]; zeros for a text without a word."""
        ...


class NgramSpace:
    """Words and pairs of words, hashed with a sign into ``dimensions`` (Weinberger et al. 2009); no model is needed.

    Each n-gram counts once. Two texts that share no word have cosine 0 but for collisions.
    """

    def __init__(self, dimensions: int = 2048) -> None:
        self.dimensions = dimensions
        self.signature = f"ngrams=1-2,hashed={dimensions}"

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        rows = np.zeros((len(texts), self.dimensions), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            tokens = words(text)
            grams = {*tokens, *(f"{a} {b}" for a, b in itertools.pairwise(tokens))}
            for gram in grams:
                digest = zlib.crc32(gram.encode())
                row[(digest >> 1) % self.dimensions] += 1 if digest & 1 else -1
            if grams and not row.any():  # two can cancel each other; a text with words has a vector
                row[(zlib.crc32(min(grams).encode()) >> 1) % self.dimensions] = 1
        return unit(rows)


def unit(rows: np.ndarray) -> np.ndarray:
    """The rows scaled to length one; a row of zeros stays."""
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1)


class Collection:
    """Vectors of texts: ``fixed`` ones, and the last ``capacity`` that were added (None: all)."""

    def __init__(self, fixed: np.ndarray, capacity: int | None = None) -> None:
        self.capacity = capacity
        self._fixed = len(fixed)
        self._rows = np.array(fixed, dtype=np.float32)
        self._used = self._next = len(fixed)

    def novelty(self, vectors: np.ndarray) -> np.ndarray:
        """1 - the largest cosine to a vector of the collection, in [0, 1]; 1 if it is empty. [..., d] -> [...]"""
        if not self._used:
            return np.ones(vectors.shape[:-1], dtype=np.float32)
        return np.clip(1 - (vectors @ self._rows[: self._used].T).max(axis=-1), 0, 1)

    def add(self, vector: np.ndarray) -> None:
        if self.capacity is not None and self._used == self._fixed + self.capacity:
            self._next = self._fixed if self._next == self._used else self._next
        elif self._used == len(self._rows):
            grown = np.empty((self._used + max(256, self._used), len(vector)), dtype=np.float32)
            grown[: self._used] = self._rows  # the other rows use memory only once they are written
            self._rows = grown
        self._rows[self._next] = vector
        self._next += 1
        self._used = max(self._used, self._next)

    def recent(self) -> np.ndarray:
        """The added vectors that are still there, the oldest first: adding them to a new collection gives this one."""
        added = self._rows[self._fixed : self._used]
        return np.roll(added, -(self._next - self._fixed), axis=0) if self._next < self._used else added.copy()

    def holding(self, recent: np.ndarray) -> Collection:
        """A new collection with the same fixed vectors and capacity, and ``recent`` added."""
        new = Collection(self._rows[: self._fixed], self.capacity)
        for vector in recent:
            new.add(vector)
        return new
