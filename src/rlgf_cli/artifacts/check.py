"""``rlgf prepare --check``: all bad lines of a JSONL file, not the first one only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rlgf_cli.artifacts.jsonl import parse_object, parse_record, read_lines
from rlgf_cli.artifacts.records import ExampleRecord, GuideRecord, LabelledRecord, PredictionRecord, Record
from rlgf_cli.errors import UserError

KINDS: dict[str, type[Record]] = {
    "examples": ExampleRecord,
    "guide": GuideRecord,
    "predictions": PredictionRecord,
    "labelled": LabelledRecord,
}
"""The values of ``--kind``."""


@dataclass
class Checked:
    """The kind of a file, the number of its good records, and one error per bad line."""

    path: Path
    kind: str = "examples"
    records: int = 0
    errors: list[UserError] = field(default_factory=list)


def check(path: str | Path, kind: str | None = None) -> Checked:
    """Read a whole file. Without a ``kind``, the first readable line decides."""
    checked = Checked(Path(path), kind or "")
    first_place: dict[str, str] = {}
    try:
        for item in _objects(checked.path):
            if isinstance(item, UserError):
                checked.errors.append(item)
                continue
            where, value = item
            checked.kind = checked.kind or _kind_of(value)
            try:
                record = parse_record(KINDS[checked.kind], value, where)
                name = record.id if isinstance(record, ExampleRecord) else ""
                if name and (first := first_place.setdefault(name, where)) != where:
                    raise UserError(f"the id {name!r} is here twice (first: {first})", where=where)
            except UserError as error:
                checked.errors.append(error)
            else:
                checked.records += 1
    except UserError as error:  # the file as a whole cannot be read on
        checked.errors.append(error)
    if not checked.records and not checked.errors:
        checked.errors.append(UserError("the file holds no records", where=str(path)))
    checked.kind = checked.kind or "examples"
    return checked


def _objects(path: Path) -> Iterator[tuple[str, dict] | UserError]:
    for number, line in read_lines(path):
        if line.strip():
            where = f"{path}:{number}"
            try:
                yield where, parse_object(line, where)
            except UserError as error:
                yield error


def _kind_of(value: dict) -> str:
    if "completion" in value and not isinstance(value["completion"], list):
        return "guide"
    if "prediction" in value:
        return "predictions"
    return "labelled" if "text" in value and "label" in value and "prompt" not in value else "examples"
