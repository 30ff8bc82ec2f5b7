"""The base class of every section of a config, and the flag that a field has on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo


class Refused(ValueError):
    """The error of a section's validator that has a hint for the user."""

    def __init__(self, message: str, hint: str | None) -> None:
        super().__init__(message)
        self.hint = hint


class Strict(BaseModel):
    """A section of a config. Unknown keys stop the run; ``scalar_key`` allows ``section: VALUE`` for one key."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), validate_default=True)
    scalar_key: ClassVar[str | None] = None
    usage: ClassVar[Mapping[str, str]] = {}
    """Hints for keys that are no flags of the command line but its arguments."""

    @classmethod
    def section_fields(cls) -> dict[str, FieldInfo]:
        """The fields of the section; where its values decide its class, those of every such class."""
        return cls.model_fields


@dataclass(frozen=True, init=False)
class Flag:
    """The flag of a config field: one sentence of help and its names; without names it is ``--field-name``.

    ``{default}`` in the help stands for the field's default.
    """

    help: str
    names: tuple[str, ...]

    def __init__(self, help: str, *names: str) -> None:
        object.__setattr__(self, "help", help)
        object.__setattr__(self, "names", names)
