"""A hard cap on what a run may ask of its guide: charged before each call, put right after it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlgf_cli.config.guide import BudgetConfig
from rlgf_cli.errors import StoppedEarly
from rlgf_cli.guides.store import Store, Text

NANO = 1_000_000_000


def nano_usd(dollars: float) -> int:
    """Billionths of a US dollar: sums of whole numbers do not drift."""
    return round(dollars * NANO)


class BudgetSpent(StoppedEarly):
    """A cap was reached; what was bought is kept."""


class Meter:
    """One run's account in the store's books.

    Amounts are billionths of a US dollar. The charge for a call is made before it is sent, in one transaction
    with the check of the caps, so no number of calls or processes can go over them. A call whose outcome is
    never known stays charged at its upper bound.
    """

    def __init__(self, store: Store, run: str, budget: BudgetConfig | None = None) -> None:
        self.store = store
        self.run = run
        self.budget = budget or BudgetConfig()
        cost = self.budget.max_cost_usd
        self._max_nano_usd = None if cost is None else nano_usd(cost)
        self.cached = 0

    def at_least(self, spend: Mapping[str, Any]) -> None:
        """Take over what the manifest of an earlier session of this run says, should its cache be gone."""
        self.store.at_least(
            self.run,
            int(spend.get("calls") or 0),
            nano_usd(spend.get("charged_usd") or 0.0),
            unpriced=int(spend.get("unpriced") or 0),
        )

    def reserve(self, amount: int, calls: int = 1) -> int | None:
        """Charge calls with what they can cost at most. Returns the reservation; None where there is no room."""
        return self.store.reserve(
            self.run, amount, calls=calls, max_nano_usd=self._max_nano_usd, max_calls=self.budget.max_calls
        )

    def room(self) -> tuple[float, float]:
        """What the caps still leave: an amount and a number of calls; infinite where there is no cap."""
        totals, calls = self.store.totals(self.run), self.budget.max_calls
        left = math.inf if self._max_nano_usd is None else self._max_nano_usd - totals.nano_usd
        return left, math.inf if calls is None else calls - totals.calls

    def order_batch(self, id_: str, amount: int, requests: Sequence[tuple[bytes, str, int]], seconds: float) -> bool:
        """Charge a batch and note it, as :meth:`Store.order_batch`. Returns whether there was room for it."""
        return self.store.order_batch(
            id_, self.run, amount, requests, seconds,
            max_nano_usd=self._max_nano_usd, max_calls=self.budget.max_calls,
        )  # fmt: skip

    def settle(
        self,
        call: int,
        amount: int | None,
        usage: Mapping[str, int],
        texts: Iterable[tuple[bytes, Text]] = (),
        *,
        calls: int = 1,
        answered: int | None = None,
    ) -> None:
        """Put the real price in the place of a reservation and keep the texts, in one transaction."""
        self.store.settle(
            call,
            amount,
            calls=calls,
            answered=answered,
            prompt_tokens=usage.get("prompt_tokens", 0),
            completion_tokens=usage.get("completion_tokens", 0),
            texts=texts,
        )

    def refund(self, call: int, calls: int = 1) -> None:
        """Take a reservation back: the server refused the call, or never saw it."""
        self.store.refund(call, calls=calls)

    def spent(self) -> BudgetSpent:
        """The error for a call that no room is left for."""
        totals = self.store.totals(self.run)
        caps = []
        if self.budget.max_cost_usd is not None:
            caps.append(f"{totals.nano_usd / NANO:.4f} of {self.budget.max_cost_usd:g} USD")
        if self.budget.max_calls is not None:
            caps.append(f"{totals.calls} of {self.budget.max_calls} calls")
        return BudgetSpent(
            f"the budget leaves no room for another call ({', '.join(caps)} are charged)",
            hint="raise --max-cost-usd or --max-calls and use --resume; what was bought is kept",
        )

    def to_json(self) -> dict[str, Any]:
        """The run's spend for its manifest.

        ``charged_usd`` is what the caps are held against; it has the upper bounds of ``unknown_outcome`` calls in
        it. It is null where nothing has a price.
        """
        totals = self.store.totals(self.run)
        priced = totals.nano_usd or totals.calls - totals.unknown > totals.unpriced
        return {
            "calls": totals.calls,
            "cached": self.cached,
            "usage": {"prompt_tokens": totals.prompt_tokens, "completion_tokens": totals.completion_tokens},
            "charged_usd": round(totals.nano_usd / NANO, 9) if priced else None,
            "unknown_outcome": totals.unknown,
            "unpriced": totals.unpriced,
        }
