"""Figures for the log, taken from the tensors that the losses used."""

from __future__ import annotations

import torch


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float | None:
    """1 - Var(returns - values) / Var(returns) over the mask; None where the returns do not vary. [B, T]"""
    if int(mask.sum()) < 2:
        return None
    target = returns[mask].double()
    spread = target.var()
    if float(spread) == 0.0:
        return None
    return float(1 - (target - values[mask].double()).var() / spread)
