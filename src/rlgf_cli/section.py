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


@dataclass(frozen=True, init=False)
class Flag:
    """The flag of a config field: one sentence of help, and its names; without names it is ``--field-name``.

    ``{default}`` in the help stands for the field's default. The flag of a section gives the section's main value.
    """

    help: str
    names: tuple[str, ...]

    def __init__(self, help: str, *names: str) -> None:
        object.__setattr__(self, "help", help)
        object.__setattr__(self, "names", names)


class Argument(Flag):
    """An argument of the command line that gives a config field."""


class Strict(BaseModel):
    """A section of a config. Unknown keys stop the run; ``scalar_key`` allows ``section: VALUE`` for one key.

    A command's config says in ``panels`` what ``rlgf COMMAND --help`` shows: panel -> words, each a dotted key, a
    section's ``.*`` for all of its flags that are not named elsewhere, or the flag of an option that is no config key
    (cli/options.py). ``flags``: dotted key -> the flag that this command has instead of the one at the field.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), validate_default=True)
    scalar_key: ClassVar[str | None] = None
    usage: ClassVar[Mapping[str, str]] = {}
    """Hints for keys that are arguments of the command line and no flags."""
    panels: ClassVar[Mapping[str, str]] = {}
    flags: ClassVar[Mapping[str, Flag]] = {}

    @classmethod
    def section_fields(cls) -> dict[str, FieldInfo]:
        """The fields of the section; where its values decide its class, those of every such class."""
        return cls.model_fields
