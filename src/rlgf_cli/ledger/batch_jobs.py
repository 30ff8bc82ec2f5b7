"""Batch jobs of a run: recorded before the server receives them, so that a kill between the two loses nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from rlgf_cli.ledger.meter import Meter


class BatchJob(NamedTuple):
    """A batch that is not collected yet. ``server_id`` is None until the server has confirmed it; ``call`` is its
    reservation."""

    id: str
    server_id: str | None
    call: int
    requests: int


class BatchJobs:
    """The open batch jobs of a run, in the file of its meter's store."""

    def __init__(self, meter: Meter) -> None:
        self._meter, self._store = meter, meter.store

    def open(self) -> list[BatchJob]:
        """The batches that are not collected yet."""
        with self._store.reading() as db:
            rows = db.execute("SELECT id, server_id, call, requests FROM batches WHERE run = ?", (self._meter.run,))
            return [BatchJob(*row) for row in rows]

    def place(self, id_: str, amount: int, requests: Sequence[tuple[bytes, str, int]], seconds: float) -> bool:
        """Charge and record a batch of ``(key, request, prompt bytes)``, and let it hold their leases.

        False, and nothing is done, where a cap leaves no room for it.
        """
        until = time.time() + seconds
        with self._store.writing() as db:
            if (call := self._meter.reserve_in(db, amount, len(requests))) is None:
                return False
            db.execute("INSERT INTO batches VALUES (?, NULL, ?, ?, ?)", (id_, self._meter.run, call, len(requests)))
            db.executemany(
                "INSERT OR REPLACE INTO batched VALUES (?, ?, ?, ?)",
                [(key, id_, request, size) for key, request, size in requests],
            )
            db.executemany(
                "INSERT OR REPLACE INTO leases (key, owner, until) VALUES (?, ?, ?)",
                [(key, f"batch:{id_}", until) for key, _, _ in requests],
            )
            return True

    def confirm(self, id_: str, server_id: str) -> None:
        """Record the id that the server has given to a batch."""
        with self._store.writing() as db:
            db.execute("UPDATE batches SET server_id = ? WHERE id = ?", (server_id, id_))

    def requests(self, id_: str, keys: Sequence[bytes]) -> dict[bytes, tuple[str, int]]:
        """``(request, prompt bytes)`` of a batch's keys."""
        query = "SELECT request, prompt_bytes FROM batched WHERE key = ? AND batch = ?"
        with self._store.reading() as db:
            rows = {key: db.execute(query, (key, id_)).fetchone() for key in keys}
        return {key: row for key, row in rows.items() if row is not None}

    def end(self, id_: str) -> None:
        """Forget a batch that is collected or given up, and release its leases."""
        with self._store.writing() as db:
            db.execute("DELETE FROM leases WHERE owner = ?", (f"batch:{id_}",))
            db.execute("DELETE FROM batched WHERE batch = ?", (id_,))
            db.execute("DELETE FROM batches WHERE id = ?", (id_,))
