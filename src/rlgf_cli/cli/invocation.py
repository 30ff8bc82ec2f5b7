"""One call of a command: the config keys and options that the command line gave, and the config that they make."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlgf_cli import console
from rlgf_cli.cli.options import option_of
from rlgf_cli.errors import UserError

if TYPE_CHECKING:
    from rlgf_cli.artifacts.rundir import Existing
    from rlgf_cli.config.loader import Resolved

FLAGS = Path(__file__).with_name("flags.json")
"""The flags of every command as ``docs/generate.py`` writes them: help needs no config model, and loads no pydantic."""
_TYPES = {"str": str, "int": int, "float": float, "bool": bool}


@dataclass
class Invocation:
    """The values of a command line. ``keys``: dotted config key -> value; ``options``: flag without dashes -> value."""

    config: str
    keys: dict[str, Any]
    options: dict[str, Any]

    @property
    def as_json(self) -> bool:
        return self.options["json"]

    @property
    def existing(self) -> Existing:
        """The treatment of an output that exists already."""
        resume, overwrite = self.options.get("resume"), self.options.get("overwrite")
        if resume and overwrite:
            raise UserError("--resume and --overwrite exclude each other", hint="choose one")
        return "resume" if resume else "overwrite" if overwrite else "refuse"

    def resolve(self) -> Resolved[Any]:
        """The checked config of the command. With ``--print-config`` it is printed, and the command ends here."""
        import importlib

        from rlgf_cli.config.loader import resolve

        module, _, name = self.config.partition(":")
        kind = getattr(importlib.import_module(f"rlgf_cli.config.{module}"), name)
        resolved = resolve(kind, files=self.options["config"] or (), sets=self.options["set"] or (), flags=self.keys)
        if self.options["print_config"]:
            print_config(resolved)
            raise typer.Exit
        from rlgf_cli.guides.openai.keys import refuse_unnamed_hosts

        refuse_unnamed_hosts(resolved)
        return resolved

    def estimate(self, dry_run: Callable[[Any], dict[str, Any]], resolved: Resolved[Any]) -> None:
        """With ``--dry-run``, print what ``dry_run`` finds, intervals as low, expected and high; the command ends."""
        if not self.options["dry_run"]:
            return
        estimate = dry_run(resolved)
        if self.as_json:
            console.result_json(estimate)
        else:
            for name, value in estimate.items():
                console.result(f"{name.replace('_', ' ')}: {shown(value)}")
        raise typer.Exit

    def print(self, data: dict[str, Any], text: object) -> None:
        """Print a command's result: ``data`` with ``--json``, else ``text``."""
        if self.as_json:
            console.result_json(data)
        else:
            console.result(str(text))


def shown(value: Any) -> str:
    """A value of a dry run: an interval as low, expected and high; figures with their names; ``unknown`` for None."""
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {part:,.7g}" for name, part in value.items())
    if isinstance(value, list):
        return " .. ".join(f"{part:,.7g}" for part in value)
    return "unknown" if value is None else str(value)


def with_flags(command: str, config: str, function: Callable[[Invocation], None]) -> Callable[..., None]:
    """A command's function with the signature that typer makes the command's flags from."""
    keys: dict[str, str] = {}
    parameters = []
    for row in json.loads(FLAGS.read_text(encoding="utf-8"))[command]:
        name, annotation, default = _option(command, row) if "option" in row else _flag(row)
        if "key" in row:
            keys[name] = row["key"]
        parameters.append(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )

    @functools.wraps(function)
    def run(**values: Any) -> None:
        given = {key: values[name] for name, key in keys.items() if values[name] not in (None, [])}
        function(Invocation(config, given, {name: value for name, value in values.items() if name not in keys}))

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _flag(row: dict[str, Any]) -> tuple[str, Any, Any]:
    """Name, annotation and default of the parameter for a config key."""
    kind, name = _TYPES[row["type"]], row["key"].replace(".", "__")
    if "many" in row:
        kind = list[kind] if row["many"] else kind  # type: ignore[valid-type]
        return name, Annotated[kind | None, typer.Argument(help=row["help"], show_default=False)], None
    option = typer.Option(*row["names"], help=row["help"], rich_help_panel=row["panel"] or None)
    return name, Annotated[kind | None, option], None


def _option(command: str, row: dict[str, Any]) -> tuple[str, Any, Any]:
    """Name, annotation and default of the parameter for an option that is no config key."""
    flag, option = row["option"], option_of(command, row["option"])
    name = flag.lstrip("-").replace("-", "_").lower()
    if not flag.startswith("-"):
        argument = typer.Argument(help=option.help, metavar=option.metavar, show_default=False)
        return name, Annotated[option.type | None, argument], None
    declared = typer.Option(
        flag, *option.names, help=option.help, show_default=option.show_default, rich_help_panel=row["panel"]
    )
    if option.type is bool:
        return name, Annotated[bool, declared], False
    return name, Annotated[option.type | None, declared], None


def print_config(resolved: Resolved[Any]) -> None:
    """The resolved config as YAML, each value with its origin behind it where it is not a default."""
    import yaml

    data = resolved.to_json()
    console.result(yaml.safe_dump(data["values"], sort_keys=False, allow_unicode=True).rstrip())
    for key, origin in data["origins"].items():
        if origin != "default":
            console.result(f"# {key}: {origin}")
