"""A sweep's budget: each run gets a part of the remaining amount as its hard cap, so that their sum stays within it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

from rlgf_cli.ledger.meter import nano_usd, usd


class SharedBudget:
    """US dollars for all runs of a sweep; None: no limit. ``charged_usd(run ids)``: the charges of those runs.

    A run at work counts with the cap that it was lent, any other with its charges: the caps of the runs at work and
    the charges of the others never exceed the total. Amounts inside are billionths of a US dollar.
    """

    def __init__(self, total: float | None, charged_usd: Callable[[Collection[str]], float]) -> None:
        self.total = total
        self._charged_usd = charged_usd
        self._charged: dict[str, int] = {}
        self._lent: dict[str, int] = {}
        self._last_cap: dict[str, int] = {}

    def settle(self, name: str, runs: Collection[str]) -> None:
        """Note that a run is no longer at work: the part of its cap that it did not use is free again."""
        self._charged[name] = nano_usd(self._charged_usd(runs))
        self._lent.pop(name, None)

    def lend(self, name: str, sharers: int) -> float:
        """A cap for a run's charges from its beginning on; the rest is for ``sharers`` that are about to start."""
        cap = self._charged.get(name, 0) + int(self._left()) // max(1, sharers)
        self._lent[name] = self._last_cap[name] = cap
        return usd(cap)

    def has_more(self, name: str) -> bool:
        """Whether a run that its cap stopped could now be lent a higher one."""
        if self.total is None or name not in self._last_cap:
            return False
        return self._charged.get(name, 0) + self._left() > self._last_cap[name] + 1

    def spent(self) -> float:
        """The charges of all runs, as far as they are settled."""
        return usd(sum(self._charged.values()))

    def _left(self) -> float:
        if self.total is None:
            return math.inf
        names = {*self._charged, *self._lent}
        return max(0, nano_usd(self.total) - sum(self._lent.get(n, self._charged.get(n, 0)) for n in names))
