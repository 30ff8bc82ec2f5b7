"""The keys of a config: which sections hold them, how they are spelled, and trees made of them."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from rlgf_cli.section import Strict


def all_keys(kind: type[Strict], prefix: str = "") -> list[str]:
    """Every dotted key of a config, sections left out; a list of sections counts as place 0."""
    keys: list[str] = []
    for name in kind.section_fields():
        inner, in_list = field_model(kind, name)
        key = f"{prefix}{name}"
        keys += all_keys(inner, f"{key}.0." if in_list else f"{key}.") if inner is not None else [key]
    return keys


def field_model(kind: type[Strict], name: str) -> tuple[type[Strict] | None, bool]:
    """The config section that a field holds (``X``, ``X | None``, ``list[X]``), and whether it is a list."""
    fields = kind.section_fields()
    return _section(fields[name].annotation, False) if name in fields else (None, False)


def _section(annotation: Any, in_list: bool) -> tuple[type[Strict] | None, bool]:
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return (annotation, in_list) if issubclass(annotation, Strict) else (None, False)
    origin = typing.get_origin(annotation)
    if origin in (list, typing.Union, types.UnionType, typing.Annotated):
        for option in typing.get_args(annotation):
            if (section := _section(option, in_list or origin is list))[0] is not None:
                return section
    return None, False


def section_at(kind: type[Strict], loc: Sequence[str]) -> type[Strict] | None:
    """The section at a path of keys; places in lists are skipped. None where there is no such section."""
    section: type[Strict] | None = kind
    for part in loc:
        if section is not None and not part.isdigit():
            section = field_model(section, part)[0]
    return section


def spelled(kind: type[Strict], dotted: str) -> str:
    """``optim.learning-rate`` is ``optim.learning_rate``; names below an open mapping stay as they are."""
    parts: list[str] = []
    model: type[Strict] | None = kind
    for part in dotted.split("."):
        if model is not None and not part.isdigit():
            part = part.replace("-", "_")
            model = field_model(model, part)[0]
        parts.append(part)
    return ".".join(parts)


def nested(dotted: str, value: Any) -> dict[str, Any]:
    """``{"a": {"b": value}}`` for the dotted key ``a.b``."""
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def upwards(key: str) -> Iterator[str]:
    """The key, then its sections from the inside out: ``a.b.c``, ``a.b``, ``a``."""
    while key:
        yield key
        key = key.rpartition(".")[0]
