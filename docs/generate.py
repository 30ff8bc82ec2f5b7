"""Writes the generated parts of docs/, between ``<!-- generated: NAME -->`` and ``<!-- end -->``, and the flags of all
commands, which ``rlgf COMMAND --help`` shows (``src/rlgf_cli/cli/flags.json``).

python docs/generate.py            write them anew
python docs/generate.py --check    exit code 1 where a file would change
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any

from annotated_types import Ge, Gt, Le, Lt, MinLen

from rlgf_cli.algorithms.base import Algorithm, Mixture
from rlgf_cli.checks.invariants import INVARIANTS
from rlgf_cli.cli.commands import COMMANDS
from rlgf_cli.config.flags import flags_of
from rlgf_cli.config.keys import field_model
from rlgf_cli.evolve.iterations import ROW
from rlgf_cli.protocols import ColumnMap, Guide, Metric, Reward, Scorer, Task
from rlgf_cli.runs.alarms import ALARMS
from rlgf_cli.runs.metric_names import METRICS
from rlgf_cli.section import Flag, Strict

DOCS = Path(__file__).parent
FLAGS = DOCS.parent / "src/rlgf_cli/cli/flags.json"


def config_of(path: str) -> type[Strict]:
    """The config class that ``module:Class`` names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(f"rlgf_cli.config.{module}"), name)


STAGES = {name: config_of(target.config) for name, target in COMMANDS.items() if target.config is not None}
_BLOCK = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "anything"}
_BOUNDS = {Ge: ("ge", "at least"), Gt: ("gt", "above"), Le: ("le", "at most"), Lt: ("lt", "below")}


def config_keys() -> str:
    """A table of keys per command, then one per section that they use."""
    parts: list[str] = []
    sections: dict[type[Strict], str] = {}
    for command, model in STAGES.items():
        parts.append(f"### `rlgf {command}`\n\n{_table(model, sections)}")
    done: set[type[Strict]] = set()
    while left := [model for model in sections if model not in done]:
        for model in left:
            done.add(model)
            sections[model] += f"\n\n{_table(model, sections)}"
    return "\n\n".join(parts + [sections[model] for model in sorted(done, key=lambda m: _anchor(m))])


def _table(model: type[Strict], sections: dict[type[Strict], str]) -> str:
    lines = [_prose(model), "", "| key | value | default |", "|---|---|---|"]
    notes = _notes(model)
    other = next((base for base in model.__mro__[1:] if base in STAGES.values()), Strict)
    for name, field in model.section_fields().items():
        if name in other.model_fields and name not in model.__annotations__:
            continue  # another command's key, which its own table explains
        inner, in_list = field_model(model, name)
        if inner is not None:
            sections.setdefault(inner, f"### `{inner.__name__}`")
            value = f"{'a list of sections' if in_list else 'section'} [{inner.__name__}](#{_anchor(inner)})"
            if inner.scalar_key:
                value += f", or its `{inner.scalar_key}`"
            if type(None) in typing.get_args(field.annotation):
                value += ", or null"
        else:
            bounds = [text for text in map(_bound, field.metadata) if text]
            value = ", ".join([_type(field.annotation), *bounds])
        default = _default(field, inner)
        if model is Algorithm and name != "name":
            kinds = [kind for kind in (*Algorithm.named.values(), Mixture) if name in kind.model_fields]
            names = ["a mixture" if kind is Mixture else f"`{kind.model_fields['name'].default}`" for kind in kinds]
            notes[name] = f"{_notes(kinds[0]).get(name, '')} Of {', '.join(names)}.".strip()
            default = " or ".join(dict.fromkeys(_default(kind.model_fields[name], inner) for kind in kinds))
        note = f" {notes[name]}" if name in notes else ""
        lines.append(f"| `{name}` | {_cell(value + '.' + note if note else value)} | {default} |")
    return "\n".join(lines)


def _anchor(model: type[Strict]) -> str:
    return model.__name__.lower()


def _prose(model: type[Strict]) -> str:
    text = inspect.cleandoc(model.__doc__ or "").replace("``", "`")
    return re.sub(r"(?<!\n)\n(?!\n)", " ", text)


def _notes(model: type[Strict]) -> dict[str, str]:
    """The text that stands below a field in its class or a base of it; else the help of the field's flag."""
    notes: dict[str, str] = {}
    for base in reversed([base for base in model.__mro__ if issubclass(base, Strict)]):
        (tree,) = ast.parse(inspect.getsource(base)).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
                notes[field.target.id] = " ".join(str(below.value.value).split())  # type: ignore[attr-defined]
    for name, info in model.model_fields.items():
        help = next((item.help for item in info.metadata if isinstance(item, Flag)), "")
        if help and name not in notes:
            notes[name] = help.replace(" Default: {default}.", "")
    return notes


def _type(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    if annotation in _WORDS:
        return _WORDS[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return ", ".join([_type(arguments[0]), *filter(None, map(_bound, arguments[1:]))])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(option) for option in arguments)
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"mapping to {_type(arguments[1])}"
    raise TypeError(f"docs/generate.py has no words for {annotation}")


def _bound(value: Any) -> str:
    for kind, (attribute, words) in _BOUNDS.items():
        if isinstance(value, kind):
            return f"{words} {getattr(value, attribute)}"
    return "not empty" if isinstance(value, MinLen) else ""


def _default(field: Any, inner: type[Strict] | None) -> str:
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Strict):
        return "its defaults" if value == type(value)() else _cell(f"`{value.model_dump(exclude_defaults=True)}`")
    if inner is not None and value:
        return "its defaults"
    words = {None: "null", True: "true", False: "false"}
    return (
        words[value] if value is None or isinstance(value, bool) else _cell(f"`{value!r}`" if value != "" else "empty")
    )


def _cell(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|")


def metrics(names: dict[str, str]) -> str:
    rows = [f"| `{name}` | {_cell(meaning)} |" for name, meaning in names.items()]
    return "\n".join(["| name | meaning |", "|---|---|", *rows])


def commands() -> str:
    rows = [f"| `rlgf {name}` | {_cell(target.summary)} |" for name, target in COMMANDS.items()]
    return "\n".join(["| command | what it does |", "|---|---|", *rows])


def invariants() -> str:
    rows = [
        f"| `{name}` | {_cell(t.looks_at)} | {_cell(t.broken)} | {_cell(t.remedy)} |" for name, t in INVARIANTS.items()
    ]
    return "\n".join(
        ["| invariant | what is looked at | what it means when it breaks | remedy |", "|---|---|---|---|", *rows]
    )


def alarms() -> str:
    rows = [f"| `{name}` | {_cell(a.when)} | {_cell('; '.join(a.causes))} |" for name, a in ALARMS.items()]
    return "\n".join(["| warning | when | likely causes |", "|---|---|---|", *rows])


def members(cls: type[Any]) -> str:
    """A table of all that a base class declares: attributes of the class and of its instances, then methods."""
    (tree,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(tree, ast.ClassDef)
    rows: list[tuple[str, str, str]] = []
    methods = [part for part in tree.body if isinstance(part, ast.FunctionDef)]
    for body in (tree.body, *(method.body for method in methods if method.name == "__init__")):
        for part, below in zip(body, [*body[1:], None], strict=True):
            if isinstance(part, ast.AnnAssign):
                name = part.target.attr if isinstance(part.target, ast.Attribute) else ast.unparse(part.target)
                is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                text = below.value.value if is_text else ""  # type: ignore[union-attr, attr-defined]
                rows.append((name, f"`{ast.unparse(part.value)}`" if part.value else "needed", str(text)))
    for method in methods:
        if not method.name.startswith("_"):
            arguments = ", ".join(argument.arg for argument in (*method.args.args[1:], *method.args.kwonlyargs))
            abstract = any(ast.unparse(mark) == "abstractmethod" for mark in method.decorator_list)
            name = f"{method.name}({arguments})"
            rows.append((name, "needed" if abstract else "optional", ast.get_docstring(method) or ""))
    lines = [f"| `{name}` | {_cell(default)} | {_cell(_without_roles(text))} |" for name, default, text in rows]
    return "\n".join(["| member | default | meaning |", "|---|---|---|", *lines])


def _without_roles(text: str) -> str:
    return re.sub(r":\w+:`([^`]+)`", r"`\1`", " ".join(text.split()))


def example(file: str) -> str:
    """A file of examples/extension."""
    text = (DOCS.parent / "examples" / "extension" / file).read_text(encoding="utf-8")
    return f"```{'toml' if file.endswith('.toml') else 'python'}\n{text}```"


GENERATORS = {
    "config-keys": config_keys,
    "metrics": lambda: metrics(METRICS),
    "evolve-metrics": lambda: metrics(ROW),
    "commands": commands,
    "invariants": invariants,
    "alarms": alarms,
    "members-scorer": lambda: members(Scorer),
    "members-reward": lambda: members(Reward),
    "members-metric": lambda: members(Metric),
    "members-guide": lambda: members(Guide),
    "members-task": lambda: members(Task),
    "members-columns": lambda: members(ColumnMap),
    "example-project": lambda: example("pyproject.toml"),
    "example-reward": lambda: example("rlgf_example/reward.py"),
    "example-metric": lambda: example("rlgf_example/metric.py"),
    "example-guide": lambda: example("rlgf_example/guide.py"),
    "example-task": lambda: example("rlgf_example/task.py"),
}


def rendered(text: str) -> str:
    """A document with its generated parts made anew."""
    return _BLOCK.sub(lambda match: f"{match[1]}{GENERATORS[match[2]]()}\n{match[3]}", text)


def flags() -> str:
    """The flags of every command, one a line."""
    parts = [
        f"{json.dumps(command)}: [\n" + ",\n".join(json.dumps(row) for row in flags_of(model)) + "\n]"
        for command, model in STAGES.items()
    ]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    made = {path: rendered(path.read_text(encoding="utf-8")) for path in sorted(DOCS.glob("*.md"))} | {FLAGS: flags()}
    stale = [path for path, text in made.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    check = "--check" in sys.argv
    if not check:
        for path in stale:
            path.write_text(made[path], encoding="utf-8")
    if stale:
        print(f"{'stale' if check else 'written'}: {', '.join(path.name for path in stale)}")
    sys.exit(1 if stale and check else 0)


if __name__ == "__main__":
    main()
