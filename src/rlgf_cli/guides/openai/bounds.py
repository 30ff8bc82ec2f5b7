"""The upper bounds of an endpoint's calls: what is reserved of the budget before a call is sent."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from rlgf_cli.ledger.meter import Meter

_POLL_S = 0.02


class CallBounds:
    """Reservations for calls, used in one event loop. Amounts are billionths of a US dollar.

    A bound is the price of the prompt and of as many tokens as were asked for, times the largest factor by which an
    answer has passed that price: a server may count tokens that it does not send, or keep to no limit. Under a cap in
    US dollars the first call goes alone, so that this factor is known before there are many in flight.
    """

    def __init__(self, meter: Callable[[], Meter], notify: Callable[[str], None]) -> None:
        self._meter, self._notify = meter, notify
        self._factor = 1.0
        self._answered = False
        self._in_flight: dict[int, int] = {}  # call: its price by the tokens that were asked for

    async def reserve(self, price: int) -> int:
        """Room in the budget for a call of this price; waits while calls in flight may still give some back. Raises
        BudgetSpent where there is none. The call is in flight until :meth:`ended`."""
        meter = self._meter()
        first_alone = price > 0 and meter.budget.max_cost_usd is not None
        while True:
            if not (first_alone and self._in_flight and not self._answered):
                if (call := meter.reserve(self.of(price))) is not None:
                    self._in_flight[call] = price
                    return call
                if not self._in_flight:
                    raise meter.spent()
            await asyncio.sleep(_POLL_S)

    def of(self, price: int) -> int:
        """The bound of a call with this price by the tokens that were asked for."""
        return round(price * self._factor)

    def answered(self, call: int, amount: int | None) -> None:
        """Note what an answer costs (None: not known). Where it passes its bound, those of the calls in flight rise
        too, past the cap if need be: no other call is sent then."""
        self._answered = True
        price = self._in_flight[call]
        if not price or amount is None or amount <= self.of(price):
            return
        self._factor = amount / price
        self._notify(
            f"an answer costs {self._factor:.3g} times the most that its limit of tokens allows: the server does not "
            "keep to it, or counts other tokens too; so much more is reserved for every call from now on"
        )
        self._meter().raise_to({other: self.of(price) for other, price in self._in_flight.items()})

    def ended(self, call: int) -> None:
        """Note that a call is no longer in flight."""
        del self._in_flight[call]
