"""Recipe files: YAML with the line of every key, and environment variables filled in."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rlgf_cli.artifacts.secrets import SECTION
from rlgf_cli.config.keys import upwards
from rlgf_cli.errors import UserError

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
_MOST_VALUES = 100_000
_SECRET = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)


@dataclass(frozen=True)
class Layer:
    """Values of one source, unchecked. ``places``: dotted key -> ``file:line``; a key without one is of ``source``."""

    values: dict[str, Any]
    source: str
    places: Mapping[str, str] = field(default_factory=dict)


def read_layer(file: str | Path) -> Layer:
    """The mapping in a YAML file and the line of every dotted key."""
    path = Path(file)
    if not path.is_file():
        raise UserError("no such config file", where=str(path))
    try:
        text = path.read_text(encoding="utf-8-sig")
        node = yaml.compose(text, Loader=_Loader)
        tree = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"not YAML: {error.problem}", where=f"{path}:{line}") from None
    except RecursionError:
        raise UserError("not YAML that can be read: it is nested too deeply", where=str(path)) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"not YAML: {error}".splitlines()[0], where=str(path)) from None
    if tree is None:
        return Layer({}, str(file))
    if not isinstance(tree, dict):
        raise UserError("a config file holds keys and values at its top", where=f"{path}:1")
    lines: dict[str, int] = {}
    _note_lines(node, "", lines, path)
    places = {key: f"{file}:{line}" for key, line in lines.items()}
    return Layer(_fill_variables(tree, str(file), places, ""), str(file), places)


def as_yaml(values: Mapping[str, Any]) -> str:
    """Values as a file that :func:`read_layer` reads back."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def as_set(dotted: str, value: Any) -> str:
    """``key=value`` as ``--set`` reads it back."""
    plain = isinstance(value, str) and scalar(value) == value
    return f"{dotted}={value if plain else json.dumps(value, ensure_ascii=False)}"


def scalar(raw: str) -> Any:
    """The value of ``--set key=raw``, as YAML reads it; ``{prompt}`` is a template and no mapping."""
    try:
        value = yaml.load(raw, Loader=_Loader)
    except (yaml.YAMLError, RecursionError):
        return raw
    is_template = isinstance(value, dict) and bool(value) and all(v is None for v in value.values())
    return raw if is_template else value


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads ``1e-5`` as a number (YAML 1.1 takes it for text) and a date as text, and refuses aliases
    that repeat values without end."""

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _values_in(node, {}) > _MOST_VALUES:
            problem = f"its aliases (*name) make more than {_MOST_VALUES:,} values of it"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return node


def _values_in(node: Any, known: dict[int, float]) -> float:
    """The number of values in a node, those behind aliases once for each alias; infinite where it holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        below = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = (part for entry in below for part in (entry if isinstance(entry, tuple) else (entry,)))
        known[id(node)] = 1 + sum(_values_in(part, known) for part in parts)
    return known[id(node)]


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes the texts which ``_Loader`` would read as numbers."""


_Dumper.yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def _note_lines(node: Any, prefix: str, lines: dict[str, int], path: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            key = f"{prefix}{key_node.value}"
            if key in lines:
                raise UserError(
                    f"the key {key!r} is here twice (first on line {lines[key]})",
                    where=f"{path}:{key_node.start_mark.line + 1}",
                )
            lines[key] = key_node.start_mark.line + 1
            _note_lines(value_node, f"{key}.", lines, path)
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            lines[f"{prefix}{i}"] = item.start_mark.line + 1
            _note_lines(item, f"{prefix}{i}.", lines, path)


def _fill_variables(value: Any, file: str, places: Mapping[str, str], key: str) -> Any:
    """``${NAME}`` and ``${NAME:-default}`` in strings come from the environment, but for headers: they are secrets,
    and are filled when they are sent."""
    if isinstance(value, dict):
        if key.rpartition(".")[2] == SECTION:
            return value
        return {k: _fill_variables(v, file, places, f"{key}.{k}".strip(".")) for k, v in value.items()}
    if isinstance(value, list):
        return [_fill_variables(v, file, places, f"{key}.{i}".strip(".")) for i, v in enumerate(value)]
    if not isinstance(value, str):
        return value

    def fill(match: re.Match[str]) -> str:
        if _SECRET.search(match[1]):
            raise UserError(
                f"${{{match[1]}}} would write a secret into the run's files",
                where=place_of(key, places, file),
                hint="leave it out: keys are read from the environment where they are used",
            )
        value = os.environ.get(match[1], match[2])
        if value is None:
            raise UserError(
                f"the environment variable {match[1]} is not set",
                where=place_of(key, places, file),
                hint=f"export {match[1]}=..., or give the value as a flag",
            )
        return value

    return _VARIABLE.sub(fill, value)


def place_of(key: str, places: Mapping[str, str], source: str) -> str:
    return next((places[k] for k in upwards(key) if k in places), source)
