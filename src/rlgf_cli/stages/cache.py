"""``rlgf cache``: statistics, export, import and pruning of the guide cache."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rlgf_cli.artifacts.disk import cache_folder
from rlgf_cli.artifacts.jsonl import parse_record, read_objects, write_jsonl
from rlgf_cli.artifacts.records import SCHEMA_VERSION, CachedTextRecord
from rlgf_cli.errors import UserError
from rlgf_cli.ledger.meter import usd
from rlgf_cli.ledger.store import FILE, Store, StoredText

_WINDOW = 500
"""Texts that are stored in one transaction."""
_LARGEST = 2**53
_LATEST = 253402300799
"""The last second of the year 9999."""


def _open(*, make: bool = False, write: bool = False) -> Store:
    path = cache_folder() / FILE
    if not make and not path.is_file():
        raise UserError("there is no guide cache yet", where=str(path), hint="RLGF_CACHE_DIR names its folder")
    return Store(path, make=make or write)


def stats() -> dict[str, Any]:
    """Per guide: the number of texts and tokens, their cost, the first and the last day (UTC)."""
    with closing(_open()) as store:
        assert store.path is not None
        guides = []
        for row in store.summary():
            cost = usd(row.pop("nano_usd"))
            row["cost_usd"] = None if cost is None else round(cost, 6)
            for key in ("first", "last"):
                row[key] = datetime.fromtimestamp(row[key], timezone.utc).date().isoformat()
            guides.append(row)
        size = sum(path.stat().st_size for path in store.path.parent.glob(f"{FILE}*"))
        return {"path": str(store.path), "bytes": size, "guides": guides}


def export(output: str, *, guide: str | None = None) -> int:
    """Write all texts, or those of one guide, as JSONL. Returns their number."""
    path = Path(output)
    if path.exists():
        raise UserError("this file already exists", where=output, hint="choose another name")
    with closing(_open()) as store:
        return write_jsonl(path, (_line(key, text) for key, text in store.each(guide)))


def _line(key: bytes, text: StoredText) -> dict[str, Any]:
    return {"schema_version": SCHEMA_VERSION, "key": key.hex(), **text._asdict(), "request": json.loads(text.request)}


def import_(path: str) -> tuple[int, int]:
    """Store the texts of an exported file. Returns the number of its texts and of the new ones; known texts stay."""
    for _ in _read(path):
        pass  # of a damaged file no text is stored
    texts = _read(path)
    total = 0
    with closing(_open(make=True)) as store:
        before = store.count()
        while window := list(itertools.islice(texts, _WINDOW)):
            store.put(window)
            total += len(window)
        return total, store.count() - before


def _read(path: str) -> Iterator[tuple[bytes, StoredText]]:
    for number, value in read_objects(path):
        where = f"{path}:{number}"
        record = parse_record(CachedTextRecord, value, where)
        fields = record.model_dump(exclude={"schema_version", "key"})
        counts = [fields[name] for name in ("prompt_bytes", "prompt_tokens", "completion_tokens", "nano_usd")]
        if record.schema_version != SCHEMA_VERSION:
            hint = "export it again with this version of rlgf"
            raise UserError(
                f"schema version {record.schema_version}; this rlgf reads {SCHEMA_VERSION}", where=where, hint=hint
            )
        if any(abs(count or 0) > _LARGEST for count in counts) or record.created > _LATEST:
            raise UserError("a number is larger than any that rlgf writes", where=where)
        request = json.dumps(record.request, ensure_ascii=False)
        yield bytes.fromhex(record.key), StoredText(**{**fields, "request": request})


def prune(*, older_than_days: float | None = None, guide: str | None = None) -> int:
    """Delete texts by age or guide. Returns their number."""
    if older_than_days is None and guide is None:
        raise UserError("neither an age nor a guide is given", hint="give --older-than DAYS, --guide NAME, or both")
    if older_than_days is not None and not 0 <= older_than_days < math.inf:
        raise UserError(f"--older-than is a number of days, and not {older_than_days:g}")
    before = None if older_than_days is None else max(0, int(time.time() - 86400 * older_than_days))
    with closing(_open(write=True)) as store:
        return store.prune(before=before, guide=guide)
