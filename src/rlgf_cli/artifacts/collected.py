"""The texts of a collection and the missing ones, in a database on disk, so that memory does not grow."""

from __future__ import annotations

import hashlib
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlgf_cli.artifacts.jsonl import example_records, id_twice, read_records
from rlgf_cli.artifacts.records import GuideRecord
from rlgf_cli.errors import UserError
from rlgf_cli.protocols import Example, Prompt
from rlgf_cli.protocols.messages import prompt_key

_AT_ONCE = 500

_SCHEMA = """
CREATE TABLE examples (id TEXT PRIMARY KEY, prompt BLOB, line INTEGER) WITHOUT ROWID;
CREATE TABLE records (id TEXT, prompt BLOB, sample INTEGER, text BLOB, score REAL, dropped INTEGER);
"""
_SORTED = """
CREATE TABLE own AS SELECT DISTINCT id, sample, prompt FROM records JOIN examples USING (id, prompt);
CREATE INDEX own_key ON own (id, sample);
CREATE TABLE spare AS
    SELECT prompt, sample, sum(n) AS unused FROM (
        SELECT prompt, sample, count(*) AS n FROM records GROUP BY prompt, sample
        UNION ALL SELECT prompt, sample, -count(*) FROM own GROUP BY prompt, sample
    ) GROUP BY prompt, sample HAVING sum(n) > 0;
CREATE UNIQUE INDEX spare_key ON spare (prompt, sample);
"""
"""``own``: texts of an example in the data. ``spare``: per prompt, how many texts belong to no such example."""


class CollectedTexts:
    """A table of a guide file's texts and the examples they were asked for, in a temporary file of SQLite's own.

    A text counts for the example with its id and prompt. Where ids have changed, because lines were moved or the
    data has none, a text that belongs to no such example counts for any with the same prompt, so that no text is
    bought twice.
    """

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._db.executescript(f"PRAGMA synchronous = OFF; BEGIN; {_SCHEMA}")
        self._new: list[tuple[Any, ...]] = []
        self.records = self.dropped = self.empty = self.cut = self.unpriced = 0
        self.cost_usd = 0.0
        self._count = 0
        self.usage: Counter[str] = Counter()
        self.models: Counter[str] = Counter()
        self._has_spare = self._has_records = False

    def close(self) -> None:
        self._db.close()

    def examples(self, path: str | Path, *, limit: int | None = None) -> Iterator[Example]:
        """Read and store the examples. Missing ids become ``line-N``; an id twice is refused."""
        rows: list[tuple[str, bytes, int]] = []
        empty = True
        for number, record in example_records(path, limit=limit):
            empty = False
            rows.append((record.id, _digest(record.prompt), number))
            if len(rows) == _AT_ONCE:
                self._store_examples(rows, path)
            yield record.to_example()
        self._store_examples(rows, path)
        if empty:
            raise UserError("the file holds no records", where=str(path))

    def count(self) -> int:
        """The number of examples."""
        return self._count

    def _store_examples(self, rows: list[tuple[str, bytes, int]], path: str | Path) -> None:
        try:
            self._db.executemany("INSERT INTO examples VALUES (?, ?, ?)", rows)
            self._count += len(rows)
        except sqlite3.IntegrityError:
            seen: dict[str, int] = {}
            for id_, _, line in rows:
                stored = self._db.execute("SELECT line FROM examples WHERE id = ?", (id_,)).fetchone()
                first = seen.setdefault(id_, line)
                if stored is not None and stored[0] != line:
                    first = stored[0]
                if first != line:
                    raise id_twice(id_, first, f"{path}:{line}") from None
            raise
        rows.clear()

    def read(self, path: Path, dropped: Path | None = None) -> None:
        """Store the records of a guide file, and those of the file of its dropped texts. A missing file has none."""
        for file in (path, dropped):
            if file is not None and file.is_file():
                for record in read_records(file, GuideRecord, torn_tail=True):
                    self.add(record, dropped=file is dropped)
        self._flush()
        self._db.executescript(_SORTED)
        self._has_records = self.records > 0
        self._has_spare = self._db.execute("SELECT 1 FROM spare LIMIT 1").fetchone() is not None

    def add(self, record: GuideRecord, *, dropped: bool = False) -> None:
        """Count a record. A continuation of a prefix is counted and answers no example."""
        text = record.completion
        self.records += 1
        self.dropped += dropped
        self.empty += not text.strip()
        self.cut += record.finish_reason == "length"
        self.models[record.model] += 1
        for name, count in record.usage.items():
            self.usage[name] += count
        if record.cost_usd is None:
            self.unpriced += 1
        else:
            self.cost_usd += record.cost_usd
        if not record.prefix:
            digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
            row = (record.id, _digest(record.prompt), record.sample_index, digest, record.score, dropped)
            self._new.append(row)
            if len(self._new) >= _AT_ONCE:
                self._flush()

    def _flush(self) -> None:
        self._db.executemany("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?)", self._new)
        self._new.clear()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Restore, at the end of the block, the texts that :meth:`missing` used up in it."""
        self._db.execute("SAVEPOINT counting")
        try:
            yield
        finally:
            self._db.execute("ROLLBACK TO counting")
            self._db.execute("RELEASE counting")

    def missing(self, example: Example, samples: int) -> list[int]:
        """The sample indices of an example that the file does not hold. A text of another example is used up."""
        if not self._has_records:
            return list(range(samples))
        own = {row[0] for row in self._db.execute("SELECT sample FROM own WHERE id = ?", (example.id,))}
        wanted = [index for index in range(samples) if index not in own]
        if not (self._has_spare and wanted):
            return wanted
        prompt = _digest(example.given)
        return [
            index
            for index in wanted
            if not self._db.execute(
                "UPDATE spare SET unused = unused - 1 WHERE prompt = ? AND sample = ? AND unused > 0", (prompt, index)
            ).rowcount
        ]

    def summary(self) -> dict[str, Any]:
        """Counts, models and cost of all texts, dropped ones included."""
        prompts, same = self.same_text()
        return {
            "records": self.records,
            "prompts": prompts,
            "empty": self.empty,
            "cut_at_length": self.cut,
            "same_text": same,
            "models": dict(self.models),
            "usage": dict(self.usage),
            "cost_usd": round(self.cost_usd, 8) if self.records > self.unpriced else None,
        }

    def same_text(self) -> tuple[int, int]:
        """The number of prompts, and of those whose several samples are all the same text."""
        self._flush()
        return self._db.execute(
            "SELECT count(*), sum(n > 1 AND lowest = highest) FROM "
            "(SELECT count(*) AS n, min(text) AS lowest, max(text) AS highest FROM records GROUP BY prompt)"
        ).fetchone()

    def score_summary(self) -> dict[str, Any]:
        """Texts that were kept and dropped, examples for whose prompt none was kept, and the mean score of the texts
        and of each prompt's best text (None where none has a score)."""
        self._flush()
        without = "SELECT count(*) FROM examples WHERE prompt NOT IN (SELECT prompt FROM records WHERE NOT dropped)"
        best = "SELECT avg(best) FROM (SELECT max(score) AS best FROM records GROUP BY prompt)"
        return {
            "kept": self.records - self.dropped,
            "dropped": self.dropped,
            "prompts_without_text": self._db.execute(without).fetchone()[0],
            "mean_score": self._db.execute("SELECT avg(score) FROM records").fetchone()[0],
            "mean_best_score": self._db.execute(best).fetchone()[0],
        }


def _digest(prompt: Prompt) -> bytes:
    return hashlib.blake2b(prompt_key(prompt).encode(), digest_size=16).digest()
