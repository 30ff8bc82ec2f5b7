"""From summed rows to a figure: the functions that ``protocols.CorpusFigure`` names.

Each takes sums of per-text rows, ``[..., k]``, and returns the figures ``[...]``: one set of texts, or as many
resamples as the leading axes hold, in one call.
"""

from __future__ import annotations

import numpy as np


def mean(sums: np.ndarray) -> np.ndarray:
    """Rows of ``[value, 1]``: sum of values by their number."""
    return np.asarray(sums[..., 0] / sums[..., 1])


def exp_mean(sums: np.ndarray) -> np.ndarray:
    """Rows of ``[value, count]``: e to the power of sum by count. Perplexity, where a value is in nats."""
    return np.asarray(np.exp(sums[..., 0] / sums[..., 1]))
