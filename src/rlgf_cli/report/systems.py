"""Runs grouped into systems by seed, the curves of a system, and the levels that curves are compared with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlgf_cli import registry
from rlgf_cli.artifacts import jsonl
from rlgf_cli.artifacts.evaluations import folder_label
from rlgf_cli.errors import UserError
from rlgf_cli.report.read import Curve, Evaluation, Run, evaluation_of, leaves

_PLAIN = {"weight": 1, "weight_steps": None, "shift": 0, "scale": 1, "clip": None}
"""Keys of a part of the reward, and their values where the part's score is the reward."""
_OTHER_SCALE = ("bleu", "cider")
"""Rewards whose metric of the same name has a figure of that name on another scale."""
PER_RUN = ("seed", "output")
"""Config keys that differ between the seeds of a system."""
FEW_SEEDS = 5
"""With fewer seeds a band is their range, else the mean plus and minus one standard deviation."""


@dataclass
class System:
    """The runs of one label, which differ in their seed: one line, one row and one colour of the report."""

    label: str
    runs: list[Run]

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def trained(self) -> list[Run]:
        """The system's runs of ``rlgf train``."""
        return [run for run in self.runs if run.command == "train"]


@dataclass(frozen=True)
class Band:
    """A figure's mean over seeds: ``mean``, ``low`` and ``high`` [n] at ``steps`` [n], each point of ``width`` rows.

    ``seeds`` are the seeds' own curves at the same steps. ``low`` and ``high`` are None for one seed.
    """

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None
    seeds: Sequence[Curve]
    width: int


@dataclass(frozen=True)
class Level:
    """A figure of an evaluation as a horizontal line in plots of curves, and its name."""

    name: str
    evaluation: Evaluation
    figure: str

    @property
    def value(self) -> float:
        return float(self.evaluation.figures[self.figure]["value"])


def group_systems(named: Sequence[tuple[str | None, Run]]) -> list[System]:
    """The systems in the order of their first runs.

    Runs of one label are seeds of one system. Of those without a label, trainings whose configs differ only in the seed
    and in folders are one system; the others are named after their folder. Raises UserError for a folder that is given
    twice, and for a label of runs of different commands.
    """
    seen: set[Path] = set()
    for _, run in named:
        if (resolved := run.folder.resolve()) in seen:
            raise UserError("this folder is named twice", where=str(run.folder), hint="leave one of them out")
        seen.add(resolved)
    systems: dict[tuple[Any, ...], System] = {}
    same: Counter[tuple[str, Any]] = Counter()
    for label, run in named:
        # a second run with the same seed begins another system
        twin = (_alike(run), run.seed)
        key = ("label", label) if label else ("config", twin[0], same[twin])
        same[twin] += 1
        systems.setdefault(key, System(label or "", [])).runs.append(run)
    for system in systems.values():
        if len({run.command for run in system.runs}) > 1:
            commands = ", ".join(sorted({run.command for run in system.runs}))
            raise UserError(
                f"the system {system.label!r} has runs of different commands: {commands}",
                hint="give them different names",
            )
    _name(list(systems.values()))
    return list(systems.values())


def _alike(run: Run) -> Any:
    """A key that is equal for runs that may be seeds of one system: the same data, and the same config without the seed
    and with the last parts of paths (each seed has its own start and guide).
    """
    if run.command != "train" or not run.values:
        return str(run.folder.resolve())
    data = {run.values.get("data"), run.values.get("eval_data")}
    hashes = sorted(
        str(parent.get("sha256")) for parent in run.manifest.get("parents", ()) if parent.get("path") in data
    )
    return repr((hashes, sorted(without_folders(run).items())))


def without_folders(run: Run) -> dict[str, str]:
    """A run's config without seed and output; of paths the last part."""
    return {
        key: Path(value).name if isinstance(value, str) and "/" in value else repr(value)
        for key, value in leaves(run.values)
        if key not in PER_RUN
    }


def _name(systems: Sequence[System]) -> None:
    """Label the systems without a label: by the algorithm where several runs share it, else by the folder."""
    taken = {system.label for system in systems if system.label}
    unlabelled = [system for system in systems if not system.label]
    labels = [algorithm(s.first) or "" if len(s.runs) > 1 else folder_label(s.first.folder) for s in unlabelled]
    for system, label in zip(unlabelled, labels, strict=True):
        unique = label and label not in taken and labels.count(label) == 1
        system.label = label if unique else str(system.first.folder)


def algorithm(run: Run) -> str | None:
    """The name of the algorithm that a run trains with."""
    section = run.values.get("algorithm")
    name = section.get("name") if isinstance(section, Mapping) else section
    return str(name) if name else None


def thinned(curve: Curve, width: int) -> Curve:
    """Means of ``width`` consecutive points, at their mean step; the last mean may be of fewer points."""
    if width <= 1 or not len(curve):
        return curve
    starts = np.arange(0, len(curve), width)
    sizes = np.diff(np.append(starts, len(curve)))
    return Curve(np.add.reduceat(curve.steps, starts) / sizes, np.add.reduceat(curve.values, starts) / sizes)


def band(curves: Sequence[Curve], most: int) -> Band:
    """The mean over seeds at the steps that all of them have, thinned to at most ``most`` points."""
    common = curves[0].steps
    for curve in curves[1:]:
        common = np.intersect1d(common, curve.steps)
    width = max(1, -(-max(map(len, curves)) // max(1, most)))
    shared = [thinned(Curve(common, c.values[np.isin(c.steps, common)]), width) for c in curves]
    seeds = [thinned(curve, width) for curve in curves]
    values = np.stack([curve.values for curve in shared])  # [seeds, n]
    mean = values.mean(axis=0)
    if len(curves) == 1:
        return Band(shared[0].steps, mean, None, None, seeds, width)
    if len(curves) < FEW_SEEDS:
        low, high = values.min(axis=0), values.max(axis=0)
    else:
        deviation = values.std(axis=0, ddof=1)
        low, high = mean - deviation, mean + deviation
    return Band(shared[0].steps, mean, low, high, seeds, width)


def curves_of(system: System, figure: str) -> list[Curve]:
    """The figure's curve of each training run that has one."""
    return [run.curves[figure] for run in system.trained if len(run.curves.get(figure, ()))]


def passing_step(curve: Curve, level: float) -> int | None:
    """The first step from which on every point up to the last is above ``level``; None where the last is not."""
    above = curve.values > level
    if not len(above) or not above[-1]:
        return None
    below = np.flatnonzero(~above)
    return int(curve.steps[below[-1] + 1 if len(below) else 0])


def score_figure(run: Run, evaluation: Evaluation) -> str | None:
    """The figure of an evaluation that measures the run's reward; None where there is none.

    It is ``reward.total`` where the metrics ``reward:SPEC`` are the parts of the run's reward. Where the reward is one
    part of weight 1, it is also ``reward.PART``, or the figure of the same Python function or metric.
    """
    parts = run.values.get("reward") or []
    measured = [
        {**part, "name": str(part["name"]).partition(":")[2]}
        for part in evaluation.metrics
        if str(part["name"]).startswith("reward:")
    ]
    if measured and measured == list(parts) and "reward.total" in evaluation.figures:
        return "reward.total"
    if len(parts) != 1 or any(parts[0].get(key, plain) != plain for key, plain in _PLAIN.items()):
        return None
    return _figure_of_reward(str(parts[0]["name"]), parts[0].get("params") or {}, evaluation)


def measures(run: Run) -> tuple[Any, ...]:
    """What a training optimises and what it watches; equal where their figures may be drawn on one pair of axes."""
    watch = run.values.get("watch")
    keys = ("name", "figure", "params")
    return run.values.get("reward"), [watch.get(key) for key in keys] if isinstance(watch, Mapping) else None


def watched_figure(run: Run, evaluation: Evaluation) -> str | None:
    """The figure of an evaluation that is the run's watched one; None where there is none, or where it is not certain.

    A reward is matched as in :func:`score_figure`; of a metric it is the named figure, or the only mean that it has.
    """
    watch = run.values.get("watch")
    if not isinstance(watch, Mapping):
        return None
    name, params, figure = str(watch["name"]), watch.get("params") or {}, watch.get("figure")
    if figure is None and (".py:" in name or name.partition(":")[0] in registry.entries("rewards")):
        return _figure_of_reward(name, params, evaluation)
    if not _is_only_metric(name, params, evaluation):
        return None
    metric = name.partition(":")[0]
    own = [key for key in evaluation.figures if key == metric or key.startswith(f"{metric}.")]
    if figure is not None:
        return str(figure) if figure in own else None
    means = [key for key in own if evaluation.figures[key].get("aggregate", "mean") == "mean"]
    return means[0] if len(means) == 1 else None


def _figure_of_reward(name: str, params: Mapping[str, Any], evaluation: Evaluation) -> str | None:
    """The figure of an evaluation that is the mean of this reward's scores."""
    base = _base(name)
    if _is_only_metric(f"reward:{name}", params, evaluation) and f"reward.{base}" in evaluation.figures:
        return f"reward.{base}"
    figure = base if ".py:" in name else name
    same = figure in evaluation.figures and figure not in _OTHER_SCALE
    return figure if same and _is_only_metric(name, params, evaluation) else None


def _is_only_metric(name: str, params: Mapping[str, Any], evaluation: Evaluation) -> bool:
    """Whether the evaluation has this metric, or reward as a metric, and no other that gives figures of its name."""

    def key(of: str) -> tuple[bool, str]:
        return of.startswith("reward:"), _base(of.removeprefix("reward:"))

    alike = [metric for metric in evaluation.metrics if key(str(metric["name"])) == key(name)]
    return len(alike) == 1 and (alike[0]["name"], alike[0].get("params") or {}) == (name, params)


def _base(name: str) -> str:
    """What figures are named after: the function of ``file.py:function``, else the name before a colon."""
    return name.rpartition(":")[2] if ".py:" in name else name.partition(":")[0]


def start_level(run: Run, others: Sequence[Run] = ()) -> Level | None:
    """The level of the model that the run started from, if it was evaluated with the run's reward.

    The evaluation of a folder is in that folder; that of a model which is no folder (a hub's, ``smollm2``) is one of
    ``others``.
    """
    name = _model(run)
    if name is None or Path(name).is_dir():
        return _level("start", run, Path(name)) if name else None
    for other in others:
        evaluation = other.evaluation if other.command == "eval" and _model(other) == name else None
        if evaluation is not None and (figure := score_figure(run, evaluation)) is not None:
            return Level("start", evaluation, figure)
    return None


def _model(run: Run) -> str | None:
    """The name or folder of the model that a run began with or evaluated."""
    model = run.values.get("model")
    name = model.get("name") if isinstance(model, Mapping) else model
    return str(name) if name else None


def guide_level(run: Run) -> Level | None:
    """The level of the run's guide, if it is a checkpoint that was evaluated with the run's reward.

    The guide of a guide file is the one that its manifest names.
    """
    guide = run.values.get("guide")
    name = str(guide.get("name")) if isinstance(guide, Mapping) else None
    if name and Path(name).is_file():
        manifest = Path(f"{name}.run.json")
        made = jsonl.read_json(manifest).get("guide") if manifest.is_file() else None
        name = str(made.get("guide")) if isinstance(made, Mapping) else None
    return _level("guide", run, Path(name.removeprefix("hf:"))) if name else None


def _level(name: str, run: Run, folder: Path) -> Level | None:
    evaluation = evaluation_of(folder) if folder.is_dir() and not _was_replaced(run, folder) else None
    figure = score_figure(run, evaluation) if evaluation is not None else None
    return Level(name, evaluation, figure) if evaluation is not None and figure is not None else None


def _was_replaced(run: Run, folder: Path) -> bool:
    """Whether the folder has another run than the one that ``run`` recorded among its inputs."""
    recorded = {parent.get("path"): parent.get("run_id") for parent in run.manifest.get("parents") or ()}
    now = jsonl.read_json(folder / "run.json").get("run_id") if (folder / "run.json").is_file() else None
    return recorded.get(str(folder), now) != now
