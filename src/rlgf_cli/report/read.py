"""Run and evaluation folders read into plain data. Missing files are noted, without a value in their place."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rlgf_cli.artifacts import jsonl
from rlgf_cli.artifacts.evaluations import read_scores
from rlgf_cli.artifacts.records import EvaluatedRecord
from rlgf_cli.errors import RlgfError, UserError

_HINT = "name folders that rlgf train, sft, train-reward or eval wrote"


@dataclass(frozen=True)
class Curve:
    """A figure over the steps of one run: ``steps`` [n], rising, and ``values`` [n]."""

    steps: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.steps)


@dataclass
class Evaluation:
    """A folder of ``rlgf eval``: ``figures`` are those of scores.json, ``about`` is the rest of it.

    ``metrics`` is the config's list of metrics; by it the figure of a training's reward is identified.
    """

    folder: Path
    figures: Mapping[str, Mapping[str, Any]]
    about: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]] = ()
    run_id: str | None = None

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def records(self) -> dict[str, EvaluatedRecord]:
        """The records of predictions.jsonl by id; empty without the file."""
        path = self.folder / "predictions.jsonl"
        return {record.id: record for record in jsonl.read_records(path, EvaluatedRecord)} if path.is_file() else {}

    @cached_property
    def texts(self) -> dict[str, str]:
        """The texts by id; empty where no metric needed texts."""
        return {name: r.prediction for name, r in self.records.items() if r.prediction is not None}

    def values(self, figure: str) -> list[float]:
        """The figure's value of each text that has one."""
        values = (record.scores.get(figure) for record in self.records.values())
        return [value for value in values if value is not None]


@dataclass
class Run:
    """One run folder. ``values`` and ``origins`` are those of config.resolved.json, ``curves`` those of metrics.jsonl.

    ``missing`` names expected files and evaluations that are not there.
    """

    folder: Path
    manifest: Mapping[str, Any]
    values: Mapping[str, Any] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)
    curves: Mapping[str, Curve] = field(default_factory=dict)
    regimes: Sequence[str] = ()
    written: str | None = None
    evaluations: list[Evaluation] = field(default_factory=list)
    rollouts: Sequence[Path] = ()
    missing: list[str] = field(default_factory=list)

    @property
    def command(self) -> str:
        return str(self.manifest.get("command"))

    @property
    def seed(self) -> Any:
        return self.manifest.get("seed")

    @property
    def step(self) -> int:
        """The last step that metrics.jsonl has a row of."""
        return max((int(curve.steps[-1]) for curve in self.curves.values() if len(curve)), default=0)

    @property
    def evaluation(self) -> Evaluation | None:
        """The evaluation of the run itself: ``eval/``, or the only one."""
        named = [e for e in self.evaluations if e.name == "eval"]
        return named[0] if named else self.evaluations[0] if len(self.evaluations) == 1 else None

    def status(self) -> str:
        """The manifest's status, with the step of a training that is not done."""
        status = str(self.manifest.get("status", "unknown"))
        if self.command == "eval" or status == "done":
            return status
        steps = self.values.get("max_steps")
        at = f"step {self.step}" + (f" of {steps}" if steps else "") if self.step else "before its first row"
        return f"{status}, {at}"


def read_run(folder: Path) -> Run:
    """A folder that a stage of rlgf wrote. Raises UserError where it is none."""
    if not folder.exists():
        seeds = "; each seed is named by itself: NAME=FOLDER NAME=FOLDER" if "," in str(folder) else ""
        raise UserError("no such folder", where=str(folder), hint=f"{_HINT}{seeds}")
    if not folder.is_dir():
        raise UserError(
            "this is a file; a run folder is needed", where=str(folder), hint=f"{_HINT}; --guide takes a file"
        )
    if not (folder / "run.json").is_file():
        raise UserError("this folder holds no run: it has no run.json", where=str(folder), hint=_HINT)
    run = Run(folder, _mapping(folder / "run.json"))
    if (folder / "config.resolved.json").is_file():
        config = _mapping(folder / "config.resolved.json")
        run.values, run.origins = config.get("values") or {}, config.get("origins") or {}
    else:
        run.missing.append("config.resolved.json")
    if run.command == "eval":
        evaluation = read_evaluation(folder)
        run.evaluations = [evaluation] if evaluation else []
        if not evaluation:
            run.missing.append("scores.json: the evaluation did not finish")
        return run
    metrics = folder / "metrics.jsonl"
    if metrics.is_file():
        run.curves, run.regimes = read_curves(metrics)
        run.written = datetime.fromtimestamp(metrics.stat().st_mtime, timezone.utc).isoformat(timespec="seconds")
    if not run.curves:
        run.missing.append("rows of metrics.jsonl")
    run.rollouts = sorted((folder / "rollouts").glob("step_*.jsonl"), key=step_of)
    evaluations = map(read_evaluation, sorted(path.parent for path in folder.glob("*/scores.json")))
    run.evaluations = [evaluation for evaluation in evaluations if evaluation is not None]
    if not run.evaluations:
        run.missing.append(f"an evaluation (rlgf eval --model {folder} ...)")
    return run


def read_evaluation(folder: Path) -> Evaluation | None:
    """The evaluation in a folder; None where there is none, or it did not finish."""
    if not (folder / "scores.json").is_file():
        return None
    scores = _mapping(folder / "scores.json")
    checked = read_scores(folder / "scores.json").metrics
    config = folder / "config.resolved.json"
    manifest = folder / "run.json"
    return Evaluation(
        folder,
        {name: {**scores["metrics"][name], "low": entry.low, "high": entry.high} for name, entry in checked.items()},
        {name: value for name, value in scores.items() if name != "metrics"},
        (_mapping(config).get("values") or {}).get("metrics") or () if config.is_file() else (),
        _mapping(manifest).get("run_id") if manifest.is_file() else None,
    )


def evaluation_of(folder: Path) -> Evaluation | None:
    """The evaluation in a folder or in its ``eval/``."""
    return read_evaluation(folder) or read_evaluation(folder / "eval")


def read_curves(path: Path) -> tuple[dict[str, Curve], list[str]]:
    """Every number of metrics.jsonl by name, and the regimes in order of first use. A torn last line is dropped."""
    columns: dict[str, tuple[array[float], array[float]]] = {}
    regimes: dict[str, None] = {}
    for number, row in jsonl.read_objects(path, torn_tail=True):
        step = row.get("step")
        if not isinstance(step, int):
            raise UserError("this row has no step", where=f"{path}:{number}", hint="rlgf writes one in every row")
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                steps, values = columns.setdefault(name, (array("d"), array("d")))
                steps.append(step)
                values.append(value)
        if isinstance(regime := row.get("regime"), str):
            regimes[regime] = None
    curves = {name: Curve(np.array(steps), np.array(values)) for name, (steps, values) in columns.items()}
    return curves, list(regimes)


def step_of(path: Path) -> int:
    """The N of ``rollouts/step_N.jsonl``."""
    match = re.search(r"step_(\d+)", path.name)
    return int(match[1]) if match else -1


def read_episodes(path: Path) -> list[dict[str, Any]]:
    """The episodes of a rollouts file; none while another process replaces it."""
    return [value for _, value in jsonl.read_objects(path, torn_tail=True)] if path.is_file() else []


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a nested config; a list is one value."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _mapping(path: Path) -> dict[str, Any]:
    try:
        value = jsonl.read_json(path)
    except UserError:
        raise
    except RlgfError as error:
        raise UserError(error.message, where=error.where, hint="was this file edited or cut short?") from None
    if not isinstance(value, dict):
        raise UserError("this is not a JSON object", where=str(path), hint="was this file edited?")
    return value
