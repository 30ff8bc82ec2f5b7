"""A sweep's budget: what is left of it is lent to each run as its own hard cap, so that all together keep to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

_NANO = 1e-9
"""Dollars that are no more than rounding; the guide's books count in billionths too."""


class SharedBudget:
    """Dollars for all runs of a sweep. ``total`` None: no limit. ``books(run ids)``: what those runs were charged.

    A run at work counts with the cap that it was lent, any other with what it was charged: the caps of runs at work
    and the charges of the others never come to more than the total.
    """

    def __init__(self, total: float | None, books: Callable[[Collection[str]], float]) -> None:
        self.total = total
        self.books = books
        self.charged: dict[str, float] = {}
        self._lent: dict[str, float] = {}
        self._last: dict[str, float] = {}

    def settle(self, name: str, runs: Collection[str]) -> None:
        """A run is not at work any more: what it was lent and did not use is there again."""
        self.charged[name] = self.books(runs)
        self._lent.pop(name, None)

    def lend(self, name: str, sharers: int) -> float:
        """A cap for a run's charges from its beginning on; the rest is for ``sharers`` that are about to start."""
        share = round(self._left() / _NANO) // max(1, sharers)
        cap = round(self.charged.get(name, 0.0) + share * _NANO, 9)
        self._lent[name] = self._last[name] = cap
        return cap

    def has_more(self, name: str) -> bool:
        """Whether a run that its cap stopped could now be lent a higher one."""
        if self.total is None or name not in self._last:
            return False
        return self.charged.get(name, 0.0) + self._left() > self._last[name] + _NANO

    def spent(self) -> float:
        """What all were charged, as far as it is settled."""
        return sum(self.charged.values())

    def _left(self) -> float:
        if self.total is None:
            return math.inf
        names = {*self.charged, *self._lent}
        return max(0.0, self.total - sum(self._lent.get(name, self.charged.get(name, 0.0)) for name in names))
