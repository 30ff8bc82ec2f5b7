"""The formats of means, intervals and p-values in tables."""

from __future__ import annotations

import math


def number(value: float | None, *, signed: bool = False) -> str:
    """Four decimals; ``-`` where there is no number."""
    if value is None:
        return "-"
    return f"{value:+.4f}" if signed else f"{value:.4f}"


def interval(low: float | None, high: float | None, *, signed: bool = False) -> str:
    """``low to high``; ``-`` where there is no interval."""
    if low is None or high is None:
        return "-"
    return f"{number(low, signed=signed)} to {number(high, signed=signed)}"


def percent(share: float) -> str:
    """``95%`` for 0.95."""
    return f"{100 * share:.6g}%"


def p_value(p: float | None, smallest: float) -> str:
    """Four decimals; ``<0.0001`` for ``smallest`` and below: the resamples cannot show a smaller one."""
    if p is None:
        return "-"
    if p < 1 and p <= smallest * (1 + 1e-9):
        unit = 10.0 ** (math.floor(math.log10(smallest)) - 1)  # two digits, rounded up, so that the bound holds
        return f"<{math.ceil(smallest / unit) * unit:.2g}"
    return "<0.0001" if p < 0.00005 else f"{p:.4f}"


def stars(p: float | None) -> str:
    """``*`` below 0.05, ``**`` below 0.01, ``***`` below 0.001."""
    return "" if p is None else "*" * sum(p < limit for limit in (0.05, 0.01, 0.001))
