"""The flags of a command, as data, from the fields of its config. ``docs/generate.py`` writes them for the help."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from rlgf_cli.config.keys import field_model, section_at
from rlgf_cli.section import Argument, Flag, Strict


def flags_of(kind: type[Strict]) -> list[dict[str, Any]]:
    """One row per flag in the order of the help: its panel, and its key, names, type and help, or the option's flag."""
    panels = {panel: words.split() for panel, words in kind.panels.items()}
    named = {word for words in panels.values() for word in words}
    rows: list[dict[str, Any]] = []
    for panel, words in panels.items():
        for word in words:
            if is_option(word):
                rows.append({"panel": panel, "option": word})
            elif word.endswith(".*"):
                rows += [_row(kind, panel, key) for key in flagged_keys(kind, word[:-1]) if key not in named]
            else:
                rows.append(_row(kind, panel, word))
    return rows


def is_option(word: str) -> bool:
    """Whether a word of a config's ``panels`` is no key: ``--resume``, or an argument in capitals."""
    return word.startswith("-") or word[0].isupper()


def flagged_keys(kind: type[Strict], prefix: str = "") -> Iterator[str]:
    """The dotted keys below ``prefix`` whose fields declare a flag."""
    section = _section(kind, prefix.split(".")[:-1])
    for name, field in section.section_fields().items():
        if any(isinstance(item, Flag) for item in field.metadata):
            yield f"{prefix}{name}"
        inner, in_list = field_model(section, name)
        if inner is not None and not in_list:
            yield from flagged_keys(kind, f"{prefix}{name}.")


def _row(kind: type[Strict], panel: str, key: str) -> dict[str, Any]:
    section, field = _field_at(kind, key)
    flag = kind.flags.get(key) or next((item for item in field.metadata if isinstance(item, Flag)), None)
    if flag is None:
        raise LookupError(f"{kind.__name__}.panels names {key!r}, and its field has no flag")
    help = flag.help.replace("{default}", _shown(section, field))
    if isinstance(flag, Argument):
        return {"panel": panel, "key": key, "type": "str", "many": _type(field.annotation) is list, "help": help}
    names = flag.names or (f"--{key.rpartition('.')[2].replace('_', '-')}",)
    scalar = {int: "int", float: "float", bool: "bool"}.get(_type(field.annotation), "str")
    return {"panel": panel, "key": key, "names": list(names), "type": scalar, "help": help}


def _field_at(kind: type[Strict], key: str) -> tuple[type[Strict], FieldInfo]:
    """The section that holds a dotted key, and the key's field."""
    *sections, name = key.split(".")
    section = _section(kind, sections)
    return section, section.section_fields()[name]


def _section(kind: type[Strict], path: list[str]) -> type[Strict]:
    section = section_at(kind, path)
    if section is None:
        raise LookupError(f"{kind.__name__} has no section {'.'.join(path)!r}")
    return section


def _type(annotation: Any) -> Any:
    """``int`` for ``int | None``, ``list`` for ``list[str]``."""
    options = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else ()
    plain = next((option for option in options if option is not type(None)), annotation)
    return typing.get_origin(plain) or plain


def _shown(section: type[Strict], field: FieldInfo) -> str:
    """A default as the help shows it; of a section its main value."""
    value = field.get_default(call_default_factory=True)
    values = value if isinstance(value, list) else [value]
    return ", ".join(
        f"{getattr(item, item.scalar_key) if isinstance(item, Strict) and item.scalar_key else item}" for item in values
    )
