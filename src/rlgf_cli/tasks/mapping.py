"""Maps a row to the record of an example: columns, nested columns and templates."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rlgf_cli.artifacts.conversations import example_fields, is_messages, located, read_reply, split_last
from rlgf_cli.errors import UserError, did_you_mean
from rlgf_cli.protocols import ColumnMap, Prompt
from rlgf_cli.protocols.messages import to_json
from rlgf_cli.tasks.sources import Row

_COLUMN = re.compile(r"\{([^{}]+)\}")


@dataclass
class Draft:
    """An example before it is written, with the place of its first row."""

    where: str
    id: str
    prompt: Prompt
    references: list[str] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "prompt": to_json(self.prompt), "references": self.references, "meta": self.meta}


def draft(row: Row, columns: ColumnMap, *, need_references: bool) -> Draft:
    """One row as an example. Raises UserError that names the column and the row's place.

    The prompt's column may hold a conversation; its last turn, if it is the assistant's, is the reference. Without
    columns for prompt and references the formats of TRL are read (:func:`.conversations.example_fields`).
    """
    with located(row.where):
        if columns.prompt == ColumnMap.prompt and columns.references == ColumnMap.references:
            row = replace(row, values=example_fields(row.values))
        prompt, answer = _prompt(row, columns.prompt)
        if isinstance(prompt, str) and not prompt.strip():
            raise UserError("the prompt is empty", hint="--drop-bad drops such rows and counts them")
        optional = not need_references or answer is not None
        references = [text for name in columns.references for text in _texts(row, name, optional=optional)]
    if answer is not None and references:
        hint = "map another column to the prompt, or none to the references"
        raise UserError("the prompt's last turn is an answer, and there are references too", where=row.where, hint=hint)
    references = [text for text in [*references, *([answer] if answer else [])] if text.strip()]
    if need_references and not references:
        hint = "--drop-bad drops such rows; --allow-no-references keeps them"
        raise UserError("no reference that is not empty", where=row.where, hint=hint)
    made = Draft(row.where, _id(row, columns.id), prompt, list(dict.fromkeys(references)), _meta(row, columns.meta))
    try:
        json.dumps(made.to_json(), allow_nan=False, ensure_ascii=False).encode("utf-8")
    except (TypeError, ValueError) as error:
        raise UserError(f"this row is not JSON: {error}", where=row.where, hint="map other columns") from None
    return made


def has_column(values: Mapping[str, Any], name: str) -> bool:
    """Whether a row has a column, or all columns of a template."""
    try:
        for column in _COLUMN.findall(name) or [name]:
            _column(values, column)
    except KeyError:
        return False
    return True


def lookup(row: Row, name: str) -> Any:
    """A column's value; ``a.b`` looks into a nested one. Raises UserError with the nearest column."""
    try:
        return _column(row.values, name)
    except KeyError:
        hint = did_you_mean(name, row.values) + "; --map says which column is meant"
        raise UserError(f"there is no column {name!r}", where=row.where, hint=hint) from None


def _column(values: Any, name: str) -> Any:
    if isinstance(values, Mapping) and name in values:
        return values[name]
    head, dot, rest = name.partition(".")
    if not dot or not isinstance(values, Mapping) or head not in values:
        raise KeyError(name)
    return _column(values[head], rest)


def _prompt(row: Row, name: str) -> tuple[Prompt, str | None]:
    """The prompt in a column: a conversation, with its answer if it has one, or a text."""
    if not _COLUMN.search(name):
        value = lookup(row, name)
        if isinstance(value, tuple) or is_messages(value):
            return split_last(value, name)
    return _text(row, name), None


def _text(row: Row, name: str) -> str:
    """A column or a template as one text; the words of a list are joined with spaces."""
    if not _COLUMN.search(name):
        return _as_text(lookup(row, name), name, row, numbers=False)
    return _COLUMN.sub(lambda match: _as_text(lookup(row, match[1]), match[1], row, numbers=True), name)


def _as_text(value: Any, name: str, row: Row, *, numbers: bool) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return " ".join(value)
    if numbers and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise UserError(f"the column {name!r} is not a text, but {type(value).__name__}", where=row.where)


def _texts(row: Row, name: str, *, optional: bool) -> list[str]:
    """References: a column with a text or a list of texts, or a template."""
    if optional and not has_column(row.values, name):
        return []
    if _COLUMN.search(name):
        return [_text(row, name)]
    value = lookup(row, name)
    items = value if isinstance(value, list) else [value]
    return [_as_text(read_reply(item, name), name, row, numbers=False) for item in items]


def _id(row: Row, name: str | None) -> str:
    if name == "" or (name is None and "id" not in row.values):
        return ""
    if name is not None and _COLUMN.search(name):
        return _text(row, name)
    value = lookup(row, name or "id")
    if value is None:
        return ""
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value)
    raise UserError(f"the id is not a text or a whole number, but {type(value).__name__}", where=row.where)


def _meta(row: Row, columns: Mapping[str, str] | None) -> dict[str, Any]:
    if columns is None:
        value = row.values.get("meta")
        return dict(value) if isinstance(value, Mapping) else {}
    return {key: _text(row, name) if _COLUMN.search(name) else lookup(row, name) for key, name in columns.items()}
