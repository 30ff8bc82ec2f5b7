"""The points of a sweep's grid: its runs, their names, and the combinations that are one run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from rlgf_cli.algorithms.base import Algorithm, parameters_of
from rlgf_cli.config.keys import all_keys, field_model
from rlgf_cli.config.loader import merge, one_key
from rlgf_cli.config.recipes import Layer
from rlgf_cli.config.train import TrainConfig
from rlgf_cli.errors import UserError, did_you_mean
from rlgf_cli.noise import short_hash
from rlgf_cli.section import Strict

SEED = "seed"
_ALIASES = {"alg": "algorithm"}
_FOR_GUIDES = ("guide", "budget", "rollout.on_uncovered")
"""Keys and sections without a meaning for an algorithm that asks no guide."""
_GIVEN = ("output",)
"""Keys that the sweep sets itself."""
_RESERVED = ("logs", "systems", "eval")
"""Names in the sweep's folder that no point may have."""
_MAX_NAME = 80
"""Characters of a folder's name."""
Choice = tuple[int | None, ...]
"""The index of each axis' value; None where the axis has no meaning for the algorithm."""


@dataclass(frozen=True)
class Axis:
    """One key of the grid: ``key`` as in the config of train, ``name`` as in labels, ``places`` of its values."""

    key: str
    name: str
    values: tuple[Any, ...]
    places: tuple[str, ...]


@dataclass(frozen=True)
class Point:
    """One run: its system (a row of the table), its seed, its folder's name, and its settings over the base."""

    system: str
    seed: int
    name: str
    settings: tuple[tuple[str, Any], ...]
    layers: tuple[Layer, ...]

    @property
    def title(self) -> str:
        return f"{self.system}, seed {self.seed}"


@dataclass(frozen=True)
class Expansion:
    """The points in the order of the grid; the number of combinations ``left_out`` by rules or ``folded`` into equal
    ones.
    """

    points: tuple[Point, ...]
    left_out: int
    folded: int


def expand(
    grid: Mapping[str, Sequence[Any]],
    *,
    base: Layer,
    skip: Sequence[Mapping[str, Any]] = (),
    only: Sequence[Mapping[str, Any]] = (),
    places: Mapping[str, str] | None = None,
) -> Expansion:
    """The points of a grid over a base. ``places``: the lines of ``grid.KEY``, ``grid.KEY.n``, ``skip.n`` ...

    The last axis varies fastest. Axes that an algorithm does not take (other algorithms' parameters; the guide, if it
    asks none) are left out for it, and combinations that are then equal are one point. Raises UserError with the place.
    """
    places = places or {}
    axes = _axes(grid, places)
    rules = [(_rules(skip, "skip", axes, places), False), (_rules(only, "only", axes, places), True)]
    choices: dict[Choice, None] = {}
    left_out = folded = 0
    for choice in itertools.product(*(range(len(axis.values)) for axis in axes)):
        values = {axis.key: axis.values[n] for axis, n in zip(axes, choice, strict=True)}
        if any(given and _matches(given, values) != keeps for given, keeps in rules):
            left_out += 1
            continue
        without = _meaningless(axes, choice, base)
        effective = tuple(None if axis.key in without else n for axis, n in zip(axes, choice, strict=True))
        folded += effective in choices
        choices[effective] = None
    if not choices:
        raise UserError("the rules leave no combination of the grid", where=places.get("only") or places.get("skip"))
    for n, axis in enumerate(axes):
        if all(choice[n] is None for choice in choices):
            raise UserError(
                f"no algorithm of the grid takes {axis.name!r}", where=axis.places[0], hint="leave it out of the grid"
            )
    return Expansion(tuple(_points(axes, list(choices), base)), left_out, folded)


def train_key(written: str, where: str | None = None) -> str:
    """The config key of train for a key of a grid. A section with a main value has the section's own name."""
    key = _ALIASES.get(written, written).replace("-", "_")
    known = all_keys(TrainConfig)
    sections = {k.rpartition(".")[0] for k in known if ".0." not in k} - {""}
    if key not in known and key not in sections and key not in TrainConfig.section_fields():
        ends = [k for k in known if k.rpartition(".")[2] == key]
        if len(ends) > 1:
            hint = "it is one of " + ", ".join(ends)
            raise UserError(f"the key {written!r} in the grid has more than one meaning", where=where, hint=hint)
        if not ends:
            last = {k.rpartition(".")[2] for k in known}
            hint = did_you_mean(key, {*known} if "." in key else {*known, *sections, *last})
            raise UserError(f"unknown config key {written!r} in the grid", where=where, hint=hint)
        (key,) = ends
    if key.partition(".")[0] in _GIVEN:
        raise UserError(f"the sweep gives {key!r} to each run itself", where=where, hint="leave it out of the grid")
    section, _, last_part = key.rpartition(".")
    return section if section and last_part == _main_key(section) else key


def _main_key(section: str) -> str | None:
    """The key for which a section's plain value stands."""
    model: type[Strict] | None = TrainConfig
    for part in section.split("."):
        model = field_model(model, part)[0] if model is not None else None
    return model.scalar_key if model is not None else None


def _axes(grid: Mapping[str, Sequence[Any]], places: Mapping[str, str]) -> list[Axis]:
    axes: dict[str, Axis] = {}
    for written, values in grid.items():
        where = places.get(f"grid.{written}")
        key = train_key(written, where)
        if key in axes:
            raise UserError(f"{written!r} is in the grid twice, as {key!r}", where=where)
        if not values:
            raise UserError(f"{written!r} has no values in the grid", where=where)
        for n, value in enumerate(values):
            place = places.get(f"grid.{written}.{n}", where)
            if value in values[:n] and any(type(value) is type(v) for v in values[:n] if v == value):
                raise UserError(f"the value {value!r} of {written!r} is here twice", where=place)
            if key == SEED and (type(value) is not int or value < 0):
                raise UserError(f"{value!r} is no seed", where=place, hint="seeds are whole numbers from 0")
        at = tuple(places.get(f"grid.{written}.{n}") or where or "grid" for n in range(len(values)))
        axes[key] = Axis(key, key, tuple(values), at)
    last = [key.rpartition(".")[2] for key in axes]
    return [
        Axis(axis.key, short if last.count(short) == 1 else axis.key, axis.values, axis.places)
        for axis, short in zip(axes.values(), last, strict=True)
    ]


def _rules(
    given: Sequence[Mapping[str, Any]], what: str, axes: Sequence[Axis], places: Mapping[str, str]
) -> list[dict[str, list[Any]]]:
    """Rules with train's keys. Keys and values that are not in the grid are refused: they would never match."""
    by_key = {axis.key: axis for axis in axes}
    rules = []
    for n, rule in enumerate(given):
        checked: dict[str, list[Any]] = {}
        for written, wanted in rule.items():
            where = places.get(f"{what}.{n}.{written}", places.get(f"{what}.{n}"))
            axis = by_key.get(train_key(written, where))
            if axis is None:
                raise UserError(f"{what}: {written!r} is not in the grid", where=where)
            checked[axis.key] = wanted if isinstance(wanted, list) else [wanted]
            for value in checked[axis.key]:
                if value not in axis.values:
                    shown = ", ".join(map(_shown, axis.values))
                    raise UserError(f"{what}: {written!r} is never {value!r}", where=where, hint=f"it is {shown}")
        if checked:
            rules.append(checked)
    return rules


def _matches(rules: Sequence[Mapping[str, Sequence[Any]]], values: Mapping[str, Any]) -> bool:
    """Whether one of the rules is met in all of its keys."""
    return any(all(values[key] in wanted for key, wanted in rule.items()) for rule in rules)


def _layers(axes: Sequence[Axis], choice: Choice) -> list[Layer]:
    """The settings of a choice, sections before their keys."""
    chosen = [(axis, n) for axis, n in zip(axes, choice, strict=True) if n is not None]
    chosen.sort(key=lambda pair: pair[0].key.count("."))
    return [one_key(TrainConfig, axis.key, axis.values[n], axis.places[n]) for axis, n in chosen]


def _meaningless(axes: Sequence[Axis], choice: Choice, base: Layer) -> set[str]:
    """The keys without a meaning for the algorithm of a combination."""
    laid = merge(TrainConfig, [base, *_layers(axes, choice)], "grid")
    section = laid.values.get("algorithm") or {}
    algorithm = dict(section) if isinstance(section, dict) else {}
    name, own_regimes = algorithm.get("name", "ppo"), algorithm.get("regimes") is not None
    without: set[str] = set()
    if not own_regimes and isinstance(name, str):
        try:
            taken = {"name", "regimes", "schedule", *parameters_of(name)}
        except UserError as error:
            where = laid.places.get("algorithm.name", laid.places.get("algorithm"))
            raise UserError(error.message, where=where, hint=error.hint) from None
        parts = {axis.key: axis.key.partition("algorithm.")[2] for axis in axes if axis.key.startswith("algorithm.")}
        without = {key for key, parameter in parts.items() if parameter not in taken}
        for key in without:
            algorithm.pop(parts[key], None)
    if not asks_guide(algorithm):
        without |= {a.key for a in axes if any(a.key == k or a.key.startswith(f"{k}.") for k in _FOR_GUIDES)}
    return without


def asks_guide(algorithm: Mapping[str, Any]) -> bool:
    """Whether an algorithm asks a guide; True for an invalid section, which is refused when it is checked."""
    try:
        return Algorithm.model_validate(algorithm).spec().needs_guide
    except ValidationError:
        return True


def _points(axes: Sequence[Axis], choices: Sequence[Choice], base: Layer) -> Iterator[Point]:
    systems: dict[Choice, str] = {}
    names: dict[str, str] = {}
    for choice in choices:
        layers = _layers(axes, choice)
        laid = merge(TrainConfig, [base, *layers], "grid").values
        settings = [(axis.key, axis.values[n]) for axis, n in zip(axes, choice, strict=True) if n is not None]
        algorithm = laid.get("algorithm") or {}
        if laid.get("guide") is not None and not asks_guide(algorithm):
            layers.append(one_key(TrainConfig, "guide", None, "grid"))
            settings.append(("guide", None))
        system = tuple(n for axis, n in zip(axes, choice, strict=True) if axis.key != SEED)
        if system not in systems:
            label = _unique(_label(axes, choice, algorithm.get("name", "ppo")), systems.values(), " #{}")
            systems[system] = label
            names[label] = _unique(safe_name(label), [*names.values(), *_RESERVED], "-{}")
        seed = laid.get(SEED, 0)
        yield Point(systems[system], seed, f"{names[systems[system]]}/seed_{seed}", tuple(settings), tuple(layers))


def _label(axes: Sequence[Axis], choice: Choice, algorithm: str) -> str:
    """``aggrevated, rollin_prob 0.5``: the algorithm, then the axes in the order of the grid. It holds no ``=``."""
    parts = [str(algorithm)]
    for axis, n in zip(axes, choice, strict=True):
        if n is None or axis.key == SEED:
            continue
        shown = [_shown(value) for value in axis.values]
        if axis.key == "algorithm":
            if isinstance(axis.values[n], dict):
                parts += [_shown({k: v for k, v in axis.values[n].items() if k != "name"})]
            continue
        one = shown[n] if shown[n] not in shown[:n] else str(axis.values[n])
        parts.append(f"{axis.name} {one}")
    return re.sub(r"\s+", " ", ", ".join(filter(None, parts)).replace("=", ":")).strip()


def _shown(value: Any) -> str:
    """A value in a label; of a path the last part."""
    if isinstance(value, dict):
        return " ".join(f"{key} {_shown(below)}" for key, below in value.items())
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    if isinstance(value, str):
        return value.rstrip("/").rpartition("/")[2] or value
    if isinstance(value, float):
        return f"{value:g}"
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def safe_name(label: str) -> str:
    """A label as a folder name for any file system; a long one is cut, and a hash of the label is added."""
    name = re.sub(r"[^A-Za-z0-9._+]+", "-", label).strip("-.") or "system"
    if len(name) > _MAX_NAME:
        name = f"{name[: _MAX_NAME - 9]}-{short_hash(label, 8)}"
    return name


def _unique(name: str, taken: Collection[str], form: str) -> str:
    """The name, or the first numbered one that is not taken; case is ignored, as some file systems do."""
    folded = {other.casefold() for other in taken}
    numbered = itertools.chain([name], (name + form.format(n) for n in itertools.count(2)))
    return next(candidate for candidate in numbered if candidate.casefold() not in folded)
