"""The store: one SQLite file with all texts that were bought, leases, and the tables of accounts and batch jobs.

The key of a text is a hash of everything that it depends on, so all stages and experiments share the texts. Processes
share the file (WAL); a request in flight is claimed with a lease, so that no other process pays for it too. Every
transaction is whole after a kill.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from rlgf_cli.artifacts.disk import cache_folder
from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.ledger.leases import boot, is_dead, monotonic, this_process
from rlgf_cli.protocols import Completion, FinishReason

FILE = "guide.sqlite"
VERSION = 2
_OPENING_S = 30.0
_AT_ONCE = 500
"""Keys in one statement: SQLite takes a limited number of parameters."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS texts (
    key BLOB PRIMARY KEY, guide TEXT NOT NULL, request TEXT NOT NULL, text TEXT NOT NULL, finish_reason TEXT NOT NULL,
    model TEXT NOT NULL, prompt_bytes INTEGER NOT NULL, prompt_tokens INTEGER, completion_tokens INTEGER,
    nano_usd INTEGER, seconds REAL, created INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS texts_by_guide ON texts (guide, created);
CREATE TABLE IF NOT EXISTS leases (
    key BLOB PRIMARY KEY, owner TEXT NOT NULL, until REAL NOT NULL, boot TEXT, ticks REAL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS runs (
    run TEXT PRIMARY KEY, calls INTEGER NOT NULL, nano_usd INTEGER NOT NULL, unknown INTEGER NOT NULL,
    unpriced INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS calls (
    id INTEGER PRIMARY KEY AUTOINCREMENT, run TEXT NOT NULL, nano_usd INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS calls_by_run ON calls (run);
CREATE TABLE IF NOT EXISTS batches (
    id TEXT PRIMARY KEY, server_id TEXT, run TEXT NOT NULL, call INTEGER NOT NULL, requests INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS batched (
    key BLOB PRIMARY KEY, batch TEXT NOT NULL, request TEXT NOT NULL, prompt_bytes INTEGER NOT NULL
);
"""
_FROM_VERSION_1 = "ALTER TABLE leases ADD COLUMN boot TEXT; ALTER TABLE leases ADD COLUMN ticks REAL;"
_COLUMNS = (
    "key, guide, request, text, finish_reason, model, prompt_bytes, prompt_tokens, completion_tokens, nano_usd, "
    "seconds, created"
)
_HINTS = {
    "full": "free some space",
    "locked": "another process is busy with it for long; run the same command again",
    "malformed": "the file is damaged; move it away: texts are then bought again",
    "not a database": "the file is damaged; move it away: texts are then bought again",
    "": "RLGF_CACHE_DIR names its folder",
}
"""Hints by a word of SQLite's message; the empty word is in every message."""
_INSERT = f"INSERT OR IGNORE INTO texts ({_COLUMNS}) VALUES ({', '.join('?' * 12)})"


class StoredText(NamedTuple):
    """A completion in the store, before any repair, with the request that it answers.

    ``request`` is the request's JSON and ``prompt_bytes`` its size in UTF-8; ``nano_usd`` the price in billionths of a
    US dollar (None: not known), ``seconds`` how long the guide took, ``created`` Unix time.
    """

    guide: str
    request: str
    text: str
    finish_reason: FinishReason
    model: str
    prompt_bytes: int
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    nano_usd: int | None = None
    seconds: float | None = None
    created: int = 0

    @classmethod
    def of(cls, guide: str, request: str, prompt_bytes: int, completion: Completion) -> StoredText:
        usage, created = completion.usage, completion.created
        return cls(
            guide=guide,
            request=request,
            text=completion.text,
            finish_reason=completion.finish_reason,
            model=completion.model,
            prompt_bytes=prompt_bytes,
            prompt_tokens=usage.get("prompt_tokens"),
            completion_tokens=usage.get("completion_tokens"),
            nano_usd=completion.nano_usd,
            seconds=completion.seconds,
            created=int(datetime.fromisoformat(created).timestamp()) if created else int(time.time()),
        )

    def completion(self) -> Completion:
        usage = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        return Completion(
            self.text,
            self.finish_reason,
            self.model,
            {name: count for name, count in usage.items() if count is not None},
            nano_usd=self.nano_usd,
            seconds=self.seconds,
            created=datetime.fromtimestamp(self.created, timezone.utc).isoformat(timespec="seconds"),
        )


def _make_file(path: Path) -> None:
    """An empty file for this user alone, and its folder likewise, where there is none. Raises UserError."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise UserError(
            f"the guide cache cannot be written: {error.strerror}",
            where=str(path),
            hint="RLGF_CACHE_DIR names its folder; --guide-mode replay reads a cache without writing to it",
        ) from None


def _end_of_lease(seconds: float) -> tuple[float, str | None, float | None]:
    """``(until, boot, ticks)`` of a lease that ends in so many seconds: in Unix time, and by the clock of this boot."""
    ticks = monotonic()
    return time.time() + seconds, boot(), None if ticks is None else ticks + seconds


def _has_ended(until: float, lease_boot: str | None, ticks: float | None) -> bool:
    """Whether a lease is over: by the clock of its boot, which nobody sets, where that is this boot."""
    now = monotonic()
    if ticks is None or now is None or lease_boot != boot():
        return until < time.time()
    return ticks < now


class Store:
    """The open file. With ``path`` None all tables are in memory, for guides that cost nothing.

    ``make`` False makes no file, and reads one that cannot be written: its texts are there, accounts are in memory.
    Where there is no file, the store is empty and in memory.
    """

    def __init__(self, path: Path | None = None, *, make: bool = True) -> None:
        self.path = path
        if not make and path is not None and not path.is_file():
            path = None
        self.owner = this_process()
        self._lock = threading.RLock()
        if path is not None and make:
            _make_file(path)
        read_only = path is not None and not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK))
        with self._explained():
            self._db = sqlite3.connect(
                ":memory:" if path is None or read_only else str(path),
                timeout=60,
                isolation_level=None,
                check_same_thread=False,
                uri=read_only,
            )
            if path is not None and read_only:
                self._attach(path)
            else:
                self._to_wal()
                self._db.execute("PRAGMA synchronous = NORMAL")
                self._make_tables()

    def _attach(self, path: Path) -> None:
        """Read the texts of a file that cannot be written; all other tables are in memory."""
        self._make_tables()
        try:
            self._db.execute("ATTACH ? AS file", (f"{path.absolute().as_uri()}?mode=ro",))
            self._db.execute("SELECT count(*) FROM file.sqlite_master")
        except sqlite3.OperationalError:
            # in a folder that cannot be written, SQLite opens a file in WAL mode only as one that nobody changes
            log = path.with_name(f"{path.name}-wal")
            if log.is_file() and log.stat().st_size:
                raise
            self._db.execute("ATTACH ? AS file", (f"{path.absolute().as_uri()}?mode=ro&immutable=1",))
        self._check_version(self._db.execute("PRAGMA file.user_version").fetchone()[0])
        self._db.executescript("DROP TABLE main.texts; CREATE TEMP VIEW texts AS SELECT * FROM file.texts;")

    def _make_tables(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        self._check_version(version)
        if version == VERSION:  # opening a file that is as it should be changes nothing in it
            return
        with self.writing() as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()  # another process may have made them
            for statement in {0: _SCHEMA, 1: _FROM_VERSION_1}.get(version, "").split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {VERSION}")

    def _check_version(self, version: int) -> None:
        if version not in range(VERSION + 1):
            raise UserError(
                f"this cache has version {version}; this rlgf reads {VERSION}",
                where=str(self.path),
                hint="set RLGF_CACHE_DIR to another folder, or use the rlgf that made it",
            )

    def _to_wal(self) -> None:
        """The change to WAL does not wait for another process that makes the same new file: try again."""
        until = time.monotonic() + _OPENING_S
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > until:
                    raise
            time.sleep(0.02)

    @classmethod
    def default(cls, *, make: bool = True) -> Store:
        return cls(cache_folder() / FILE, make=make)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            hint = next((hint for word, hint in _HINTS.items() if word in str(error)), None)
            raise RlgfError(f"the guide cache cannot be used: {error}", where=str(self.path), hint=hint) from error

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The connection, for this thread alone; SQLite's errors come as RlgfError."""
        with self._lock, self._explained():
            yield self._db

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """The connection in a transaction: all of it is done, or nothing."""
        with self.reading() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:  # a full disk ends it by itself
                    db.execute("ROLLBACK")
                raise

    # texts and leases

    def texts(self, keys: Sequence[bytes]) -> dict[bytes, StoredText]:
        """The stored texts among the keys."""
        with self.reading() as db:
            return self._texts(db, keys)

    def _texts(self, db: sqlite3.Connection, keys: Sequence[bytes]) -> dict[bytes, StoredText]:
        texts = {}
        for start in range(0, len(keys), _AT_ONCE):
            part = keys[start : start + _AT_ONCE]
            marks = ",".join("?" * len(part))
            for row in db.execute(f"SELECT {_COLUMNS} FROM texts WHERE key IN ({marks})", part):
                texts[row[0]] = StoredText(*row[1:])
        return texts

    def claim(self, keys: Sequence[bytes], seconds: float) -> tuple[dict[bytes, StoredText], set[bytes]]:
        """Claim the keys that nobody has requested: ``(texts that are stored by now, keys that are now leased to us)``.

        A key in neither is leased to another process or batch.
        """
        with self.writing() as db:
            texts = self._texts(db, keys)
            ours = {key for key in keys if key not in texts}
            dead: dict[str, bool] = {}
            for key in list(ours):
                row = db.execute("SELECT owner, until, boot, ticks FROM leases WHERE key = ?", (key,)).fetchone()
                if row is None or _has_ended(*row[1:]):
                    continue
                if row[0] not in dead:
                    dead[row[0]] = is_dead(row[0])
                if not dead[row[0]]:
                    ours.discard(key)
            end = _end_of_lease(seconds)
            db.executemany(
                "INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?, ?)", [(key, self.owner, *end) for key in ours]
            )
        return texts, ours

    def renew(self, keys: Iterable[bytes], seconds: float) -> None:
        """Prolong leases of this process."""
        end = _end_of_lease(seconds)
        with self.writing() as db:
            db.executemany(
                "UPDATE leases SET until = ?, boot = ?, ticks = ? WHERE key = ? AND owner = ?",
                [(*end, key, self.owner) for key in keys],
            )

    def release(self, keys: Iterable[bytes]) -> None:
        """Give leases of this process back."""
        with self.writing() as db:
            db.executemany("DELETE FROM leases WHERE key = ? AND owner = ?", [(key, self.owner) for key in keys])

    def put(self, texts: Iterable[tuple[bytes, StoredText]]) -> None:
        """Store texts, and end their leases."""
        with self.writing() as db:
            self.put_in(db, texts)

    def put_in(self, db: sqlite3.Connection, texts: Iterable[tuple[bytes, StoredText]]) -> None:
        """As :meth:`put`, in a transaction that goes on."""
        now = int(time.time())
        for key, text in texts:
            db.execute(_INSERT, (key, *text[:-1], text.created or now))
            db.execute("DELETE FROM leases WHERE key = ?", (key,))

    # maintenance

    def samples(self, guide: str, limit: int = 1000) -> list[tuple[int, int | None, int | None, float | None]]:
        """``(prompt bytes, prompt tokens, completion tokens, seconds)`` of a guide's newest texts."""
        with self.reading() as db:
            return db.execute(
                "SELECT prompt_bytes, prompt_tokens, completion_tokens, seconds FROM texts WHERE guide = ? "
                "ORDER BY created DESC LIMIT ?",
                (guide, limit),
            ).fetchall()

    def summary(self) -> list[dict[str, Any]]:
        """Per guide: texts, tokens, price, first and last day."""
        with self.reading() as db:
            rows = db.execute(
                "SELECT guide, count(*), sum(prompt_tokens), sum(completion_tokens), sum(nano_usd), min(created), "
                "max(created) FROM texts GROUP BY guide ORDER BY guide"
            ).fetchall()
        names = ("guide", "texts", "prompt_tokens", "completion_tokens", "nano_usd", "first", "last")
        return [dict(zip(names, row, strict=True)) for row in rows]

    def count(self) -> int:
        """The number of texts."""
        with self.reading() as db:
            return db.execute("SELECT count(*) FROM texts").fetchone()[0]

    def each(self, guide: str | None = None) -> Iterator[tuple[bytes, StoredText]]:
        """All texts, by key, a few at a time."""
        last = b""
        while True:
            with self.reading() as db:
                rows = db.execute(
                    f"SELECT {_COLUMNS} FROM texts WHERE key > ? AND (? IS NULL OR guide = ?) ORDER BY key LIMIT 1000",
                    (last, guide, guide),
                ).fetchall()
            if not rows:
                return
            yield from ((row[0], StoredText(*row[1:])) for row in rows)
            last = rows[-1][0]

    def prune(self, *, before: int | None = None, guide: str | None = None) -> int:
        """Delete texts older than a Unix time, or of one guide; the file shrinks. Returns how many."""
        with self.writing() as db:
            deleted = db.execute(
                "DELETE FROM texts WHERE (? IS NULL OR created < ?) AND (? IS NULL OR guide = ?)",
                (before, before, guide, guide),
            ).rowcount
        with self.reading() as db:
            db.execute("VACUUM")
        return deleted
