"""Values of ``headers`` in configs: what a run's files and messages may hold of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from rlgf_cli.errors import UserError

HIDDEN = "***"
SECTION = "headers"
_REFERENCE = re.compile(r"\$\{(\w+)\}")
_ASSIGNED = re.compile(r"(?s)(--set=)?(.*?)=(.*)")


def hidden(values: Any) -> Any:
    """A config's values with those of headers hidden; one that is made of ``${NAME}`` alone stays."""
    if isinstance(values, Mapping):
        return {
            key: {name: _shown(header) for name, header in value.items()}
            if key == SECTION and isinstance(value, Mapping)
            else hidden(value)
            for key, value in values.items()
        }
    return [hidden(value) for value in values] if isinstance(values, list) else values


def hidden_argument(text: str) -> str:
    """``key=value`` of a ``--set``, with the value hidden where it gives headers."""
    match = _ASSIGNED.fullmatch(text)
    if match is None or not re.search(rf"\b{SECTION}\b", text):
        return text
    return f"{match[1] or ''}{match[2]}={_shown(match[3])}"


def hidden_arguments(arguments: Iterable[str]) -> list[str]:
    """A command line as files may hold it."""
    return [hidden_argument(argument) for argument in arguments]


def filled(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers with every ``${NAME}`` filled from the environment. Raises UserError for a variable that is not set."""

    def fill(name: str, value: str) -> str:
        for variable in _REFERENCE.findall(value):
            if variable not in os.environ:
                raise UserError(
                    f"the environment variable {variable} is not set, and the header {name!r} is made of it",
                    hint=f"export {variable}=...",
                )
        return _REFERENCE.sub(lambda match: os.environ[match[1]].strip(), value)

    return {name: fill(name, value) for name, value in headers.items()}


def refuse_written(values: Any, where: str) -> None:
    """Refuse headers with values of their own, where a copy of the config is to be written as it is."""
    if values != hidden(values):
        raise UserError(
            "the value of a header is written out, and this command copies its recipes",
            where=where,
            hint="export the value, and write ${NAME} with the name of the variable",
        )


def _shown(value: Any) -> Any:
    return value if isinstance(value, str) and _REFERENCE.fullmatch(value) else HIDDEN
