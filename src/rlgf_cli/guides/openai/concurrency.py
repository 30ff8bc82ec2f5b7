"""How many requests an endpoint is sent at once."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable


class Concurrency:
    """At most ``most`` requests at once, in one event loop; fewer where the server is too slow for so many.

    ``async with`` is a place. Requests that time out halve the number of places, those of one burst once; as many
    answers in a row as there are places, each within half of ``timeout_s`` seconds, add one.
    """

    def __init__(self, most: int, timeout_s: float, notify: Callable[[str], None]) -> None:
        self.most, self.places = most, most
        self._timeout_s, self._notify = timeout_s, notify
        self._taken = 0
        self._free = asyncio.Condition()
        self._halved = -math.inf
        self._quick = 0  # answers in a row

    async def __aenter__(self) -> None:
        async with self._free:
            await self._free.wait_for(lambda: self._taken < self.places)
            self._taken += 1

    async def __aexit__(self, *_: object) -> None:
        async with self._free:
            self._taken -= 1
            self._free.notify_all()

    def timed_out(self, sent: float) -> bool:
        """Note a request without an answer in time, ``sent`` at this monotonic time. Returns whether the number of
        requests at once may be the reason: then the request is not to blame."""
        self._quick = 0
        if sent < self._halved:
            return True
        if (at_once := min(self._taken, self.places)) <= 1:
            return False
        self.places, self._halved = at_once // 2, time.monotonic()
        self._notify(
            f"no answer within {self._timeout_s:g} s with {at_once} requests at once: at most {self.places} from now "
            "on (--timeout waits longer, --concurrency sends fewer)"
        )
        return True

    def answered(self, seconds: float) -> None:
        """Note an answer that took so long."""
        self._quick = self._quick + 1 if seconds < self._timeout_s / 2 else 0
        if self._quick >= self.places and self.places < self.most:
            self.places, self._quick = self.places + 1, 0
