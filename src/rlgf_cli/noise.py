"""Random numbers that are a function of a key, such as ``(seed, "sample", step, episode)``.

Batch size, bucketing and the number of processes do not change a draw, and a resumed run draws what the uninterrupted
run would have drawn.
"""

from __future__ import annotations

import hashlib

import numpy as np


def generator(*key: int | str) -> np.random.Generator:
    """A counter-based generator (Philox) whose stream is fixed by ``key``."""
    digest = hashlib.sha256("\x1f".join(f"{type(k).__name__}:{k}" for k in key).encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64)))


def uniforms(n: int, *key: int | str) -> np.ndarray:
    """``n`` draws in [0, 1), float64, shape [n]; the first m of n are the same for every n >= m."""
    return generator(*key).random(n)


def short_hash(text: str, digits: int = 16) -> str:
    """The first hexadecimal digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:digits]
