"""The account of a run: each call is charged before it is sent, within hard caps, and settled after it.

Money is counted in whole billionths of a US dollar (``nano_usd``): sums of whole numbers do not drift. Configs, JSON
and messages have US dollars, which :func:`nano_usd` and :func:`usd` convert.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any, overload

from rlgf_cli.config.guide import BudgetConfig
from rlgf_cli.errors import StoppedEarly
from rlgf_cli.ledger.account_file import AccountFile, Totals
from rlgf_cli.ledger.store import Store, StoredText

NANO = 1_000_000_000
_COLUMNS = [field.name for field in fields(Totals)]


def nano_usd(dollars: float) -> int:
    """US dollars as whole billionths."""
    return round(dollars * NANO)


@overload
def usd(nano_usd: float) -> float: ...
@overload
def usd(nano_usd: None) -> None: ...
def usd(nano_usd: float | None) -> float | None:
    """Billionths of a US dollar as US dollars; None stays None."""
    return None if nano_usd is None else nano_usd / NANO


def totals_of(spend: Mapping[str, Any]) -> Totals:
    """The charges that a manifest records (:meth:`Meter.to_json`)."""
    usage = spend.get("usage") or {}
    return Totals(
        calls=spend.get("calls") or 0,
        nano_usd=nano_usd(spend.get("charged_usd") or 0.0),
        unknown=spend.get("unknown_outcome") or 0,
        unpriced=spend.get("unpriced") or 0,
        prompt_tokens=usage.get("prompt_tokens") or 0,
        completion_tokens=usage.get("completion_tokens") or 0,
    )


class BudgetSpent(StoppedEarly):
    """A cap is reached. The texts that were bought are in the cache."""


class Meter:
    """One run's account, in the tables ``runs`` and ``calls`` of the store.

    Amounts are billionths of a US dollar. The charge for a call is made before it is sent, in one transaction with the
    check of the caps, so no number of calls or processes can exceed them. A call whose outcome is never known stays
    charged at its upper bound. ``cached`` counts this process's texts from the cache. With :meth:`keep_in`, the run's
    folder has the account too.
    """

    def __init__(self, store: Store, run: str, budget: BudgetConfig | None = None) -> None:
        self.store = store
        self.run = run
        self.budget = budget or BudgetConfig()
        cost = self.budget.max_cost_usd
        self._max_nano_usd = None if cost is None else nano_usd(cost)
        self.cached = 0
        self._resumed = False
        self._file: AccountFile | None = None

    @property
    def begun(self) -> bool:
        """Whether a run can be resumed: it has a folder (:meth:`keep_in`), and an earlier session or a text that
        was answered or cached."""
        totals = self.totals()
        return self._file is not None and (self._resumed or self.cached > 0 or totals.calls > totals.unknown)

    def at_least(self, spend: Mapping[str, Any]) -> None:
        """Take over the spend in the manifest of an earlier session of this run, should its cache be gone."""
        self._resumed = True
        self._take_over(totals_of(spend))

    def keep_in(self, path: Path) -> None:
        """Write the account to a file of the run's folder too, and take over what an earlier session wrote there."""
        self._file = AccountFile(path, self.run)
        if (totals := self._file.read()) is not None:
            self._take_over(totals)

    def _take_over(self, totals: Totals) -> None:
        larger = ", ".join(f"{name} = max({name}, ?)" for name in _COLUMNS)
        with self.store.writing() as db:
            self._open(db)
            db.execute(f"UPDATE runs SET {larger} WHERE run = ?", (*astuple(totals), self.run))

    def _keep(self, db: sqlite3.Connection) -> None:
        """Write the account to the run's folder, in the transaction that changes it: several processes take turns."""
        if self._file is not None:
            self._file.write(self._totals(db))

    def _open(self, db: sqlite3.Connection) -> None:
        db.execute("INSERT OR IGNORE INTO runs VALUES (?, 0, 0, 0, 0, 0, 0)", (self.run,))

    def reserve(self, amount: int, calls: int = 1) -> int | None:
        """Charge calls at their upper bound. Returns the reservation; None where a cap leaves no room.

        The charge stands until :meth:`settle` or :meth:`refund`, even if this process is killed.
        """
        with self.store.writing() as db:
            return self.reserve_in(db, amount, calls)

    def reserve_in(self, db: sqlite3.Connection, amount: int, calls: int) -> int | None:
        """As :meth:`reserve`, in a transaction that goes on."""
        self._open(db)
        made, charged = db.execute("SELECT calls, nano_usd FROM runs WHERE run = ?", (self.run,)).fetchone()
        if self._max_nano_usd is not None and charged + amount > self._max_nano_usd:
            return None
        if self.budget.max_calls is not None and made + calls > self.budget.max_calls:
            return None
        db.execute(
            "UPDATE runs SET calls = calls + ?, nano_usd = nano_usd + ?, unknown = unknown + ? WHERE run = ?",
            (calls, amount, calls, self.run),
        )
        self._keep(db)
        return db.execute("INSERT INTO calls (run, nano_usd) VALUES (?, ?)", (self.run, amount)).lastrowid

    def settle(
        self,
        call: int,
        amount: int | None,
        usage: Mapping[str, int],
        texts: Iterable[tuple[bytes, StoredText]] = (),
        *,
        calls: int = 1,
        answered: int | None = None,
    ) -> None:
        """Replace a reservation by the real price (None: none is known) and store the texts, in one
        transaction. ``answered`` of the reserved ``calls`` were answered; the others were not made."""
        answered = calls if answered is None else answered
        with self.store.writing() as db:
            if (reserved := self._end(db, call)) is None:
                return
            db.execute(
                "UPDATE runs SET calls = calls + ?, nano_usd = nano_usd + ?, unknown = unknown - ?, "
                "unpriced = unpriced + ?, prompt_tokens = prompt_tokens + ?, "
                "completion_tokens = completion_tokens + ? WHERE run = ?",
                (
                    answered - calls,
                    (amount or 0) - reserved,
                    calls,
                    answered if amount is None else 0,
                    usage.get("prompt_tokens", 0),
                    usage.get("completion_tokens", 0),
                    self.run,
                ),
            )
            self.store.put_in(db, texts)
            self._keep(db)

    def raise_to(self, amounts: Mapping[int, int]) -> None:
        """Raise reservations to higher amounts, past the cap if need be: their calls are sent already."""
        with self.store.writing() as db:
            for call, amount in amounts.items():
                row = db.execute("SELECT nano_usd FROM calls WHERE id = ? AND run = ?", (call, self.run)).fetchone()
                if row is not None and amount > row[0]:
                    db.execute("UPDATE calls SET nano_usd = ? WHERE id = ?", (amount, call))
                    db.execute("UPDATE runs SET nano_usd = nano_usd + ? WHERE run = ?", (amount - row[0], self.run))
            self._keep(db)

    def refund(self, call: int, calls: int = 1) -> None:
        """Take a reservation back: the server refused the call, or never received it."""
        with self.store.writing() as db:
            if (reserved := self._end(db, call)) is not None:
                db.execute(
                    "UPDATE runs SET calls = calls - ?, nano_usd = nano_usd - ?, unknown = unknown - ? WHERE run = ?",
                    (calls, reserved, calls, self.run),
                )
                self._keep(db)

    def _end(self, db: sqlite3.Connection, call: int) -> int | None:
        """End a reservation of this run; its amount, or None where it has ended before."""
        row = db.execute("SELECT nano_usd FROM calls WHERE id = ? AND run = ?", (call, self.run)).fetchone()
        db.execute("DELETE FROM calls WHERE id = ? AND run = ?", (call, self.run))
        return row[0] if row is not None else None

    def totals(self) -> Totals:
        """The run's charges so far."""
        with self.store.reading() as db:
            return self._totals(db)

    def _totals(self, db: sqlite3.Connection) -> Totals:
        row = db.execute(f"SELECT {', '.join(_COLUMNS)} FROM runs WHERE run = ?", (self.run,)).fetchone()
        return Totals(*row) if row else Totals()

    def room(self) -> tuple[float, float]:
        """The room that the caps leave: an amount and a number of calls; infinite where there is no cap."""
        totals, calls = self.totals(), self.budget.max_calls
        left = math.inf if self._max_nano_usd is None else self._max_nano_usd - totals.nano_usd
        return left, math.inf if calls is None else calls - totals.calls

    def spent(self) -> BudgetSpent:
        """The error for a call that no room is left for."""
        totals = self.totals()
        caps = []
        if self.budget.max_cost_usd is not None:
            caps.append(f"{usd(totals.nano_usd):.4f} of {self.budget.max_cost_usd:g} USD")
        if self.budget.max_calls is not None:
            caps.append(f"{totals.calls} of {self.budget.max_calls} calls")
        return BudgetSpent(
            f"the budget leaves no room for another call ({', '.join(caps)} are charged)",
            hint="raise --max-cost-usd or --max-calls and use --resume; what was bought is kept",
        )

    def to_json(self) -> dict[str, Any]:
        """The run's spend for its manifest.

        ``charged_usd`` is compared with the caps; it includes the upper bounds of ``unknown_outcome`` calls. It is null
        where nothing has a price.
        """
        totals = self.totals()
        priced = totals.nano_usd or totals.calls - totals.unknown > totals.unpriced
        return {
            "calls": totals.calls,
            "cached": self.cached,
            "usage": {"prompt_tokens": totals.prompt_tokens, "completion_tokens": totals.completion_tokens},
            "charged_usd": round(usd(totals.nano_usd), 9) if priced else None,
            "unknown_outcome": totals.unknown,
            "unpriced": totals.unpriced,
        }
