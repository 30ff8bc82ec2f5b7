"""Merges recipe files, ``--set`` and flags into one checked config, with the origin of every value.

Precedence: flag > ``--set`` > later ``--config`` > earlier ``--config`` > defaults. A ``null``,
``false`` or ``0`` that was given counts as given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from rlgf_cli.artifacts.secrets import hidden, hidden_argument
from rlgf_cli.config.common import as_parts
from rlgf_cli.config.keys import all_keys, field_model, nested, section_at, spelled, upwards
from rlgf_cli.config.recipes import Layer, place_of, read_layer, scalar
from rlgf_cli.errors import UserError, did_you_mean
from rlgf_cli.section import Refused, Strict

C = TypeVar("C", bound=Strict)
_FLAG, _SET = "flag", "--set "


@dataclass
class Resolved(Generic[C]):
    """A checked config, with ``origins``: dotted key -> where its value came from (defaults are left out).

    ``places`` has all keys that files hold, sections and list items included, as ``file:line``.
    """

    config: C
    origins: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The content of ``config.resolved.json``: ``{"values": nested, "origins": {dotted key: origin}}``.

        The values of headers are hidden in it.
        """
        values = hidden(self.config.model_dump(mode="json"))
        return {"values": values, "origins": {key: self._origin(key) for key in _leaves(values)}}

    def on_command_line(self, key: str) -> bool:
        """Whether a key's value was given by a flag or by ``--set``."""
        return self._origin(key).startswith((_FLAG, _SET))

    def _origin(self, key: str) -> str:
        return next((self.origins[k] for k in upwards(key) if k in self.origins), None) or "default"


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
        merged.add(nested(spelled(kind, key.strip()), scalar(raw)), f"{_SET}{hidden_argument(text)}")
    for key, value in (flags or {}).items():
        if value is not None:
            merged.add(nested(key, value), _FLAG)
    try:
        return Resolved(kind.model_validate(merged.values), merged.origins, merged.places)
    except ValidationError as error:
        raise _user_error(kind, error, merged) from None


def merge(kind: type[Strict], layers: Sequence[Layer], source: str) -> Layer:
    """Layers of a config laid over each other, unchecked."""
    merged = _Merged(kind)
    for layer in layers:
        merged.lay(layer)
    return Layer(merged.values, source, merged.places)


def one_key(kind: type[Strict], dotted: str, value: Any, place: str) -> Layer:
    """A layer that holds one key."""
    dotted = spelled(kind, dotted)
    return Layer(nested(dotted, value), place, dict.fromkeys(upwards(dotted), place))


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
            self.origins[key] = self.places[key] = place_of(key, places or {}, source)

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
    """Whether a mapping addresses places in a list, as ``--set reward.0.weight=2`` does."""
    return isinstance(value, dict) and bool(value) and all(str(k).isdigit() for k in value)


def _leaves(tree: Any, prefix: str = "") -> list[str]:
    """The dotted keys of all values. A list is one value, unless it holds sections."""
    if isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        tree = dict(enumerate(tree))
    if isinstance(tree, dict) and tree:
        return [key for k, v in tree.items() for key in _leaves(v, f"{prefix}{k}.")]
    return [prefix[:-1]] if prefix else []


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


def _user_error(kind: type[Strict], error: ValidationError, merged: _Merged) -> UserError:
    """The first validation error as a UserError with its place and a suggestion."""
    errors = error.errors()
    # an unknown key before a missing one: a misspelt key is both
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    loc = _real_keys(first["loc"], merged.values, whole=first["type"] in ("extra_forbidden", "missing"))
    key = ".".join(loc)
    where = next((merged.places[k] for k in upwards(key) if k in merged.places), None)
    where = None if where == _FLAG else where
    section = section_at(kind, loc[:-1])
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
