"""How means and intervals look in the tables."""

from __future__ import annotations


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
