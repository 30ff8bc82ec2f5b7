"""Figures for the log, taken from the tensors that the losses used."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

MEMORY = 100
"""Batches after which running moments forget: each weighs 1 / MEMORY from then on."""


def running_moments(before: Sequence[float] | None, values: Sequence[float]) -> list[float]:
    """Batches so far, mean, and mean square of ``values`` over all of them.

    The first ``MEMORY`` batches weigh the same. ``before``: what this function returned for the batches before; None:
    there were none.
    """
    count, mean, square = before if before is not None else (0.0, 0.0, 0.0)
    weight = 1 / min(count + 1, MEMORY)
    new_mean = math.fsum(values) / len(values)
    new_square = math.fsum(v * v for v in values) / len(values)
    return [count + 1, mean + weight * (new_mean - mean), square + weight * (new_square - square)]


def spread_of(moments: Sequence[float]) -> float:
    """The standard deviation that running moments stand for; 0 where it is within rounding of 0."""
    _, mean, square = moments
    variance = square - mean * mean
    return math.sqrt(variance) if variance > 1e-12 * square else 0.0


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float | None:
    """1 - Var(returns - values) / Var(returns) over the mask; None where the returns vary by rounding alone. [B, T]"""
    if int(mask.sum()) < 2:
        return None
    target, predicted = returns[mask].double(), values[mask].double()
    spread = target.var()
    # returns are sums with the values in float32: where all are equal, what is left of the values' digits differs
    if float(spread) <= 1e-12 * float(torch.maximum(target.square().max(), predicted.square().max())):
        return None
    return float(1 - (target - predicted).var() / spread)
