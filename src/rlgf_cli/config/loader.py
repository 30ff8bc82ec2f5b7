"""From recipe files, ``--set`` and flags to one checked config that knows where every value came from.

Precedence: flag > ``--set`` > later ``--config`` > earlier ``--config`` > defaults. A ``null``,
``false`` or ``0`` that was given counts as given.
"""

from __future__ import annotations

import json
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from pydantic import ValidationError

from rlgf_cli.config.common import as_parts
from rlgf_cli.errors import UserError, did_you_mean
from rlgf_cli.section import Refused, Strict

C = TypeVar("C", bound=Strict)
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
_SECRET = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE)
_FLAG = "flag"


@dataclass(frozen=True)
class Layer:
    """Values of one source, unchecked. ``places``: dotted key -> ``file:line``; a key without one is of ``source``."""

    values: dict[str, Any]
    source: str
    places: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Resolved(Generic[C]):
    """A checked config, with ``origins``: dotted key -> where its value came from (defaults are left out).

    ``places`` has all keys that files hold, sections and list items included, as ``file:line``.
    """

    config: C
    origins: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What ``config.resolved.json`` holds: ``{"values": nested, "origins": {dotted key: origin}}``."""
        values = self.config.model_dump(mode="json")
        return {"values": values, "origins": {key: self._origin(key) for key in _leaves(values)}}

    def _origin(self, key: str) -> str:
        found = next((self.origins[k] for k in _upwards(key) if k in self.origins), None)
        return found or "default"


def resolve(
    kind: type[C],
    *,
    files: Sequence[str | Path] = (),
    layers: Sequence[Layer] = (),
    sets: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
) -> Resolved[C]:
    """Merge all sources and check the result. ``layers`` are laid over the files.

    ``flags`` maps dotted keys to values; ``None`` means "not given". Raises UserError that names the key,
    where it was written, and the nearest key that exists.
    """
    merged = _Merged(kind)
    for layer in (*map(read_layer, files), *layers):
        merged.lay(layer)
    for text in sets:
        key, equals, raw = text.partition("=")
        if not equals or not key.strip():
            hint = "for example --set optim.learning_rate=1e-5"
            raise UserError(f"--set {text!r} is not key=value", hint=hint)
        merged.add(_tree(_spell(kind, key.strip()), _scalar(raw)), f"--set {text}")
    for key, value in (flags or {}).items():
        if value is not None:
            merged.add(_tree(key, value), _FLAG)
    try:
        return Resolved(kind.model_validate(merged.values), merged.origins, merged.places)
    except ValidationError as error:
        raise _letter(kind, error, merged) from None


def merge(kind: type[Strict], layers: Sequence[Layer], source: str) -> Layer:
    """Layers of a config laid over each other, unchecked."""
    merged = _Merged(kind)
    for layer in layers:
        merged.lay(layer)
    return Layer(merged.values, source, merged.places)


def one_key(kind: type[Strict], dotted: str, value: Any, place: str) -> Layer:
    """A layer that holds one key."""
    dotted = _spell(kind, dotted)
    return Layer(_tree(dotted, value), place, dict.fromkeys(_upwards(dotted), place))


def as_set(dotted: str, value: Any) -> str:
    """``key=value`` as ``--set`` reads it back."""
    plain = isinstance(value, str) and _scalar(value) == value
    return f"{dotted}={value if plain else json.dumps(value, ensure_ascii=False)}"


def as_yaml(values: Mapping[str, Any]) -> str:
    """Values as a file that :func:`read_layer` reads back."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Merged:
    """The values so far; ``origins`` of the values, and ``places`` of all keys, sections included."""

    def __init__(self, kind: type[Strict]) -> None:
        self.kind = kind
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self.places: dict[str, str] = {}

    def lay(self, layer: Layer) -> None:
        """Lay a layer over the values."""
        self.add(layer.values, layer.source, layer.places)
        self.places.update(layer.places)

    def add(self, tree: dict[str, Any], source: str, places: Mapping[str, str] | None = None) -> None:
        """Lay a tree over the values. What it replaces loses its origin."""
        tree = _expand_shorthand(self.kind, tree)
        self._merge(self.values, tree, "", source)
        for key in _leaves(tree):
            self.origins[key] = self.places[key] = _place_of(key, places or {}, source)

    def _merge(self, base: dict[str, Any], update: Mapping[str, Any], prefix: str, source: str) -> None:
        for name, value in update.items():
            key, held = f"{prefix}{name}", base.get(name)
            if isinstance(held, dict) and isinstance(value, dict):
                self._merge(held, value, f"{key}.", source)
            elif isinstance(held, list) and _is_places(value):
                by_place = {str(n): item for n, item in enumerate(held)}
                if unknown := set(value) - set(by_place):
                    message = f"{key!r} is a list of {len(held)}: there is no place {min(unknown)} in it"
                    raise UserError(message, where=source, hint="places count from 0")
                self._merge(by_place, value, f"{key}.", source)
                base[name] = list(by_place.values())
            else:
                base[name] = value
                for known in (self.origins, self.places):
                    for old in [k for k in known if k == key or k.startswith(f"{key}.")]:
                        del known[old]


def _is_places(value: Any) -> bool:
    """Whether a mapping speaks of places in a list, as ``--set rewards.0.weight=2`` does."""
    return isinstance(value, dict) and bool(value) and all(str(k).isdigit() for k in value)


def _tree(dotted: str, value: Any) -> dict[str, Any]:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def _spell(kind: type[Strict], dotted: str) -> str:
    """``optim.learning-rate`` is ``optim.learning_rate``; names below an open mapping stay as they are."""
    spelled: list[str] = []
    model: type[Strict] | None = kind
    for part in dotted.split("."):
        if model is not None and not part.isdigit():
            part = part.replace("-", "_")
            model = field_model(model, part)[0]
        spelled.append(part)
    return ".".join(spelled)


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


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads ``1e-5`` as a number, as everyone who writes it means, and a date as text."""


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


def _scalar(raw: str) -> Any:
    """The value of ``--set key=raw``, as YAML reads it; ``{prompt}`` is a template and no mapping."""
    try:
        value = yaml.load(raw, Loader=_Loader)
    except yaml.YAMLError:
        return raw
    is_template = isinstance(value, dict) and bool(value) and all(v is None for v in value.values())
    return raw if is_template else value


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
    """``${NAME}`` and ``${NAME:-default}`` in strings come from the environment."""
    if isinstance(value, dict):
        return {k: _fill_variables(v, file, places, f"{key}.{k}".strip(".")) for k, v in value.items()}
    if isinstance(value, list):
        return [_fill_variables(v, file, places, f"{key}.{i}".strip(".")) for i, v in enumerate(value)]
    if not isinstance(value, str):
        return value

    def fill(match: re.Match[str]) -> str:
        if _SECRET.search(match[1]):
            raise UserError(
                f"${{{match[1]}}} would write a secret into the run's files",
                where=_place_of(key, places, file),
                hint="leave it out: keys are read from the environment where they are used",
            )
        found = os.environ.get(match[1], match[2])
        if found is None:
            raise UserError(
                f"the environment variable {match[1]} is not set",
                where=_place_of(key, places, file),
                hint=f"export {match[1]}=..., or give the value as a flag",
            )
        return found

    return _VARIABLE.sub(fill, value)


def _place_of(key: str, places: Mapping[str, str], source: str) -> str:
    return next((places[k] for k in _upwards(key) if k in places), source)


def _upwards(key: str) -> Iterator[str]:
    """The key, then its sections from the inside out: ``a.b.c``, ``a.b``, ``a``."""
    while key:
        yield key
        key = key.rpartition(".")[0]


def _leaves(tree: Any, prefix: str = "") -> list[str]:
    """The dotted keys of all values. A list is one value, unless it holds sections."""
    if isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        tree = dict(enumerate(tree))
    if isinstance(tree, dict) and tree:
        return [key for k, v in tree.items() for key in _leaves(v, f"{prefix}{k}.")]
    return [prefix[:-1]] if prefix else []


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
            if (found := _section(option, in_list or origin is list))[0] is not None:
                return found
    return None, False


def _expand_shorthand(kind: type[Strict], tree: dict[str, Any]) -> dict[str, Any]:
    """``guide: PATH`` means ``guide: {name: PATH}`` where the section says so (``scalar_key``)."""
    expanded: dict[str, Any] = {}
    for key, value in tree.items():
        inner, in_list = field_model(kind, key)
        if inner is not None and in_list:
            if inner.scalar_key and not _is_places(value):
                value = as_parts(value, inner.scalar_key)
        elif inner is not None:
            if inner.scalar_key and value is not None and not isinstance(value, dict):
                value = {inner.scalar_key: value}
            if isinstance(value, dict):
                value = _expand_shorthand(inner, value)
        expanded[key] = value
    return expanded


def _letter(kind: type[Strict], error: ValidationError, merged: _Merged) -> UserError:
    """The first validation error as a UserError with its place and a suggestion."""
    errors = error.errors()
    # an unknown key before a missing one: a misspelt key is both
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    loc = _real_keys(first["loc"], merged.values, whole=first["type"] in ("extra_forbidden", "missing"))
    key = ".".join(loc)
    where = next((merged.places[k] for k in _upwards(key) if k in merged.places), None)
    where = None if where == _FLAG else where
    section = _section_at(kind, loc[:-1])
    if first["type"] == "extra_forbidden":
        hint = did_you_mean(loc[-1], section.section_fields() if section else [])
        elsewhere = [k for k in all_keys(kind) if k.rpartition(".")[2] == loc[-1]]
        if elsewhere and "did you mean" not in hint:
            hint = did_you_mean(elsewhere[0], elsewhere)
        return UserError(f"unknown config key {key!r}", where=where, hint=hint)
    if first["type"] == "missing":
        flag = loc[:-1] if section is not None and loc[-1] == section.scalar_key else loc
        hint = f"set it in a recipe, or with --set {key}=..."
        if len(flag) == 1:
            hint = kind.usage.get(flag[0], f"give --{flag[0].replace('_', '-')} or set it in a recipe")
        return UserError(f"{key!r} is needed and was not given", where=where, hint=hint)
    refused = first.get("ctx", {}).get("error")
    if isinstance(refused, Refused):
        return UserError(str(refused), where=where, hint=refused.hint)
    message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    given = first.get("input")
    shown = f" (given: {given!r})" if isinstance(given, str | int | float | bool) else ""
    return UserError(f"{key}: {message}{shown}" if key else message, where=where)


def _real_keys(loc: Sequence[str | int], values: Any, *, whole: bool) -> list[str]:
    """A validation error's place without the names of types that stand in it for the branches of a union.

    ``whole``: its last part is a key, though the values do not hold it.
    """
    keys: list[str] = []
    for n, part in enumerate(loc):
        if isinstance(part, int):
            values = values[part] if isinstance(values, list) and part < len(values) else None
        elif isinstance(values, dict) and part in values:
            values = values[part]
        elif not (whole and n == len(loc) - 1):
            continue
        keys.append(str(part))
    return keys


def _section_at(kind: type[Strict], loc: Sequence[str]) -> type[Strict] | None:
    section: type[Strict] | None = kind
    for part in loc:
        if section is not None and not part.isdigit():
            section = field_model(section, part)[0]
    return section


def all_keys(kind: type[Strict], prefix: str = "") -> list[str]:
    """Every dotted key of a config, sections left out; a list of sections counts as place 0."""
    found = []
    for name in kind.section_fields():
        inner, in_list = field_model(kind, name)
        key = f"{prefix}{name}"
        found += all_keys(inner, f"{key}.0." if in_list else f"{key}.") if inner is not None else [key]
    return found
