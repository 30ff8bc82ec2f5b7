"""The plan of a sweep: the checked config and the command of every step, before anything starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlgf_cli.artifacts.jsonl import read_json
from rlgf_cli.artifacts.resume import refuse_changed
from rlgf_cli.artifacts.secrets import refuse_written
from rlgf_cli.config import eval as eval_config
from rlgf_cli.config import train as train_config
from rlgf_cli.config.eval import EvalConfig
from rlgf_cli.config.guide import BudgetConfig
from rlgf_cli.config.loader import Resolved, merge, resolve
from rlgf_cli.config.recipes import Layer, as_set, read_layer
from rlgf_cli.config.sweep import SweepConfig
from rlgf_cli.config.train import TrainConfig
from rlgf_cli.errors import UserError
from rlgf_cli.guides.make import check_guide, describe, make_offline_guide
from rlgf_cli.guides.openai.keys import refuse_unnamed_hosts
from rlgf_cli.section import Strict
from rlgf_cli.sweep.grid import Expansion, Point, expand, safe_name
from rlgf_cli.sweep.work import Cell, Step, status_of

BASE, EVAL = "base.yaml", "eval.yaml"
"""Copies of the recipes from the beginning of the sweep, which its runs read: later changes have no effect."""
_SWEEPS_OWN = {"base": ("output",), "eval": ("output", "model", "predictions")}


@dataclass(frozen=True)
class Plan:
    """The cells in the order of the table, and the checked configs by the steps' folders."""

    output: Path
    base: Layer
    evaluation: Layer
    expansion: Expansion
    cells: list[Cell] = field(default_factory=list)
    trainings: dict[Path, Resolved[TrainConfig]] = field(default_factory=dict)
    evaluations: dict[Path, Resolved[EvalConfig]] = field(default_factory=dict)
    baselines: list[str] = field(default_factory=list)

    @property
    def systems(self) -> list[str]:
        return list(dict.fromkeys(cell.system for cell in self.cells))


def make_plan(resolved: Resolved[SweepConfig]) -> Plan:
    """Check the configs, inputs and guide of every point, and make its commands. Raises UserError; writes nothing."""
    config, places = resolved.config, resolved.places
    output = Path(config.output)
    base = _recipe(TrainConfig, config.base, "base", places)
    evaluation = _recipe(EvalConfig, config.eval, "eval", places)
    expansion = expand(config.grid, base=base, skip=config.skip, only=config.only, places=places)
    plan = Plan(output, base, evaluation, expansion)
    for point in expansion.points:
        _add_point(plan, point, config.budget_usd)
    for label, folders in config.systems.items():
        where = places.get(f"systems.{label}")
        if label.casefold() in {system.casefold() for system in plan.systems}:
            raise UserError(f"{label!r} is a system of the grid already", where=where, hint="give it another name")
        for n, folder in enumerate([folders] if isinstance(folders, str) else folders):
            _add_system(plan, label, n if isinstance(folders, list) else None, folder, where)
    _check_inputs(plan)
    if len(plan.systems) < 2:
        raise UserError(
            "there is one system alone, and a table compares",
            where=places.get("grid"),
            hint="add another to the grid, or one that is trained already: systems: {SFT: runs/sft}",
        )
    plan.baselines.extend(_baselines(config.baselines, plan.systems, places))
    return plan


def refuse_changed_points(plan: Plan) -> None:
    """Raise UserError for a run that was begun with another config than the sweep gives it now."""
    for folder, training in plan.trainings.items():
        if (folder / "run.json").is_file():
            refuse_changed(str(folder), training.to_json(), free=train_config.FREE_ON_RESUME)
    for folder, evaluation in plan.evaluations.items():
        if (folder / "run.json").is_file():
            refuse_changed(str(folder), evaluation.to_json(), free=eval_config.FREE_ON_RESUME)


def _recipe(kind: type[Strict], parts: Sequence[Any], what: str, places: Mapping[str, str]) -> Layer:
    """A stage's recipe from paths and keys, unchecked, with the line of each key."""
    layers = []
    for n, part in enumerate(parts):
        if isinstance(part, str):
            layers.append(read_layer(part))
            continue
        prefix = next((p for p in (f"{what}.{n}.", f"{what}.") if any(k.startswith(p) for k in places)), "")
        own = {key.removeprefix(prefix): place for key, place in places.items() if prefix and key.startswith(prefix)}
        layers.append(Layer(part, places.get(f"{what}.{n}") or places.get(what) or what, own))
    laid = merge(kind, layers, what)
    for key in _SWEEPS_OWN[what]:
        if key in laid.values:
            raise UserError(
                f"the sweep gives {key!r} to each run itself",
                where=laid.places.get(key),
                hint=f"leave it out of {what}",
            )
    return laid


def _add_point(plan: Plan, point: Point, budget: float | None) -> None:
    folder = plan.output / point.name
    try:
        training = resolve(TrainConfig, layers=[plan.base, *point.layers], flags={"output": str(folder)})
        _check_copied(training, BASE)
        config, spec = training.config, training.config.algorithm.spec()
        billed = any(part.name.partition(":")[0] == "judge" for part in config.reward)  # to the run
        if config.guide is not None and spec.needs_guide:
            check_guide(config.guide, spec)
            remote = describe(config.guide).remote
            billed = billed or remote
            if remote and budget is not None:
                guide = make_offline_guide(config.guide, seed=config.seed)
                with closing(guide):
                    guide.check_budget(BudgetConfig(max_cost_usd=budget))
    except UserError as error:
        raise UserError(f"{error.message} (in {point.title})", where=error.where, hint=error.hint) from None
    ordered = sorted(point.settings, key=lambda setting: setting[0].count("."))
    sets = [word for key, value in ordered for leaf in _leaves(key, value) for word in ("--set", as_set(*leaf))]
    train = Step(
        ("train", "-c", str(plan.output / BASE), *sets, "-o", str(folder)),
        folder,
        lambda: status_of(folder) == "done",
        billed,
        config.budget.max_cost_usd,
        config.max_steps,
    )
    plan.trainings[folder] = training
    evaluate = _evaluation(plan, folder / "eval", "model", str(folder))
    log = plan.output / "logs" / f"{point.name}.log"
    plan.cells.append(Cell(point.system, point.seed, point.name, (train, evaluate), log))


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The keys of a section one by one: sections are merged, and ``--set`` takes a mapping of nulls for a template."""
    if isinstance(value, dict) and value:
        for name, below in value.items():
            yield from _leaves(f"{key}.{name}", below)
    else:
        yield key, value


def _add_system(plan: Plan, label: str, seed: int | None, folder: str, where: str | None) -> None:
    kind = "predictions" if folder.endswith(".jsonl") else "model"
    if not Path(folder).exists():
        raise UserError(f"systems: there is no {folder}", where=where, hint="train it first, or leave it out")
    taken = {cell.name for cell in plan.cells}
    name = f"systems/{safe_name(label)}" + ("" if seed is None else f"/seed_{seed}")
    while name in taken:
        name += "_"
    evaluate = _evaluation(plan, plan.output / name / "eval", kind, folder)
    plan.cells.append(Cell(label, seed, name, (evaluate,), plan.output / "logs" / f"{name}.log"))


def _evaluation(plan: Plan, output: Path, kind: str, what: str) -> Step:
    resolved = resolve(EvalConfig, layers=[plan.evaluation], flags={kind: what, "output": str(output)})
    _check_copied(resolved, EVAL)
    plan.evaluations[output] = resolved
    wanted = {key.partition(".")[0] for key in eval_config.FREE_ON_RESUME} - {"budget"}

    def is_done() -> bool:
        """Whether the evaluation is finished, with the metrics of the current config."""
        stored = output / "config.resolved.json"
        if status_of(output) != "done" or not stored.is_file():
            return False
        try:  # keys that an older rlgf did not have are at their defaults
            before = EvalConfig.model_validate(read_json(stored)["values"])
        except ValidationError:
            return False
        return all(getattr(before, key) == getattr(resolved.config, key) for key in wanted)

    words = ("eval", "-c", str(plan.output / EVAL), f"--{kind}", what, "-o", str(output))
    return Step(words, output, is_done)


def _check_copied(resolved: Resolved[Any], name: str) -> None:
    """Refuse what a run that reads the copy of its recipe would refuse later, and secrets that the copy would hold."""
    refuse_written(resolved.config.model_dump(mode="json"), name)
    refuse_unnamed_hosts(resolved)


def _check_inputs(plan: Plan) -> None:
    """Raise UserError for a data file of a step that does not exist."""
    paths: dict[str, None] = {}
    for training in plan.trainings.values():
        paths.update(dict.fromkeys(filter(None, (training.config.data, training.config.eval.data))))
    for evaluation in plan.evaluations.values():
        paths.update(dict.fromkeys(filter(None, (evaluation.config.data,))))
    for path in paths:
        if not Path(path).is_file():
            raise UserError("no such file", where=path, hint="paths are relative to where rlgf runs")


def _baselines(wanted: Sequence[str], systems: Sequence[str], places: Mapping[str, str]) -> list[str]:
    """The systems that baselines name; case is ignored where the name is still unique."""
    chosen: dict[str, None] = {}
    for n, name in enumerate(wanted):
        alike = [name] if name in systems else [s for s in systems if s.casefold() == name.casefold()]
        if len(alike) != 1:
            raise UserError(
                f"baselines: no system is called {name!r}",
                where=places.get(f"baselines.{n}") or places.get("baselines"),
                hint=f"the systems are: {'; '.join(systems)}",
            )
        chosen[alike[0]] = None
    return list(chosen)
