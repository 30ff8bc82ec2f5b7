"""The tables of a report: evaluations, comparison, spend, configuration and environment."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from rlgf_cli.artifacts import jsonl
from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.report.draw import Look
from rlgf_cli.report.read import Evaluation, Run, leaves
from rlgf_cli.report.systems import PER_RUN, System, algorithm, without_folders


@dataclass(frozen=True)
class EvaluationRow:
    """A row of the evaluation table: one system's evaluations of one name, one per seed. ``given``: by the user."""

    label: str
    look: Look
    evaluations: Sequence[Evaluation]
    given: bool = True

    def value(self, figure: str) -> float | None:
        """The figure, or its mean over the seeds; None where a seed lacks it."""
        values = self.values(figure)
        return math.fsum(values) / len(values) if len(values) == len(self.evaluations) else None

    def values(self, figure: str) -> list[float]:
        """The figure of each seed that has it."""
        return [e.figures[figure]["value"] for e in self.evaluations if figure in e.figures]


def evaluation_rows(systems: Sequence[tuple[System, Look]]) -> list[EvaluationRow]:
    """A row per system and name of its evaluations, ``eval`` first."""
    rows = []
    for system, look in systems:
        named: dict[str, list[Evaluation]] = {}
        for run in system.runs:
            main = run.evaluation
            for evaluation in run.evaluations:
                named.setdefault("" if evaluation is main else evaluation.name, []).append(evaluation)
        for name in sorted(named):
            rows.append(EvaluationRow(f"{system.label}, {name}" if name else system.label, look, named[name]))
    return rows


@dataclass(frozen=True)
class Column:
    """A figure of the evaluation table. ``signatures`` with the rows that have each; more than one: not comparable."""

    figure: str
    signatures: Mapping[str, Sequence[str]]

    @property
    def comparable(self) -> bool:
        return len(self.signatures) == 1


def columns(rows: Sequence[EvaluationRow]) -> list[Column]:
    """Every figure with its signatures, in order of first appearance."""
    figures: dict[str, dict[str, dict[str, None]]] = {}
    for row in rows:
        for evaluation in row.evaluations:
            for name, entry in evaluation.figures.items():
                figures.setdefault(name, {}).setdefault(str(entry.get("signature")), {})[row.label] = None
    return [Column(name, {s: list(labels) for s, labels in of.items()}) for name, of in figures.items()]


def data_notes(rows: Sequence[EvaluationRow]) -> list[str]:
    """Notes on evaluations of different data files or decoding, which signatures do not contain."""
    notes = []
    data: dict[str, list[str]] = {}
    decodings: dict[str, list[str]] = {}
    for row in rows:
        for evaluation in row.evaluations:
            dataset = evaluation.about.get("dataset") or {}
            data.setdefault(str(dataset.get("sha256")), []).append(row.label)
            if decoding := evaluation.about.get("decoding"):
                keys = ("temperature", "top_k", "top_p", "num_beams", "max_new_tokens")
                settings = {key: decoding.get(key) for key in keys}
                decodings.setdefault(compact(settings), []).append(row.label)
    for labels_of, what in ((data, "on different data files"), (decodings, "with different decoding")):
        if len(labels_of) > 1:
            groups = "; ".join(", ".join(dict.fromkeys(labels)) for labels in labels_of.values())
            notes.append(
                f"The evaluations were made {what}: {groups}. Differences between these groups may come from that."
            )
    return notes


class Difference(BaseModel):
    """The difference of a system to the base, with interval and p-values."""

    value: float
    low: float | None = None
    high: float | None = None
    p_bootstrap: float | None = None
    p_randomisation: float | None = None
    p_holm: float | None = None


class ComparedRow(BaseModel):
    """A system's figure."""

    system: str
    value: float
    low: float | None = None
    high: float | None = None
    difference: Difference | None = None


class ComparedFigure(BaseModel):
    """A figure of all systems."""

    n: int
    n_skipped: int = 0
    rows: list[ComparedRow]


class Compared(BaseModel):
    """The file of ``rlgf compare -o``. Pydantic ignores the keys that are not shown."""

    base: str
    figures: dict[str, ComparedFigure]
    tests: dict[str, Any] = Field(default_factory=dict)
    interval: dict[str, Any] = Field(default_factory=dict)

    @property
    def tested(self) -> bool:
        """Whether the comparison has p-values."""
        differences = [row.difference for figure in self.figures.values() for row in figure.rows if row.difference]
        return any(d.p_bootstrap is not None or d.p_randomisation is not None for d in differences)

    @property
    def settings(self) -> list[str]:
        """The settings of intervals and tests in sentences, as far as the file has them."""
        settings = {**self.interval, **self.tests}
        parts = []
        if "level" in settings and "resamples" in settings:
            level = f"{100 * settings['level']:g} %"
            parts.append(f"Intervals of {level}, {settings['resamples']} resamples, seed {settings.get('seed')}")
        if "family_size" in settings:
            test, size = settings.get("test"), settings["family_size"]
            parts.append(f"p, Holm: the p of the {test} after Holm, tests: {size}")
        return parts + [str(note)[:1].upper() + str(note)[1:] for note in settings.get("notes", ())]


def read_comparison(path: Path) -> Compared:
    """A comparison. Raises UserError where the file is none."""
    hint = "make one with: rlgf compare BASE OTHER -o comparison.json"
    try:
        return Compared.model_validate(jsonl.read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "it"
        raise UserError(f"this is no comparison: {place}: {first['msg'].lower()}", where=str(path), hint=hint) from None
    except UserError:
        raise
    except RlgfError as error:
        raise UserError(error.message, where=error.where, hint=hint) from None


def about(system: System) -> list[tuple[str, str]]:
    """Command, algorithm, model and data of a system, as pairs of a name and a text, as far as the config has them."""
    run = system.first
    facts = [("command", run.command if run.command != "train" else ""), ("algorithm", algorithm(run) or "")]
    for key in ("model", "guide", "reward", "data"):
        facts.append((key, short(run.values.get(key))))
    evaluation = run.values.get("eval")
    facts.append(("held-out data", short(evaluation.get("data")) if isinstance(evaluation, Mapping) else ""))
    return [(name, text) for name, text in facts if text]


def short(value: Any) -> str:
    """The name of a section, or the names of several with their weights."""
    if isinstance(value, Mapping):
        return short(value.get("name"))
    if isinstance(value, list):
        return ", ".join(short(v) + (f" (weight {v['weight']:g})" if v.get("weight", 1) != 1 else "") for v in value)
    return "" if value is None else str(value)


def spend(run: Run) -> dict[str, Any]:
    """Calls, cached texts, tokens and US dollars from the manifest, those of a running training from its last row.

    Unknown keys are missing; ``charged_usd`` is None where nothing had a price.
    """
    spent = _with_usage(run.manifest)
    names = {"calls": "guide/calls", "cached": "guide/cached", "charged_usd": "guide/usd"}
    if run.manifest.get("status") == "running" or not spent:
        spent |= {key: float(run.curves[name].values[-1]) for key, name in names.items() if name in run.curves}
    for key, name in (("episodes", "episodes"), ("requests", "guide/requests")):
        if name in run.curves:
            spent[key] = float(run.curves[name].values.sum())
    return spent


def _with_usage(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The spend of a manifest with the token counts among its keys."""
    spent = dict(manifest.get("spend") or {})
    usage = spent.pop("usage", None) or {}
    return {**spent, **usage}


def guide_file_spend(run: Run) -> dict[str, dict[str, Any]]:
    """The spend of the collection of a run's guide file, by its path; empty without a file or its manifest."""
    guide = run.values.get("guide")
    path = Path(str(guide.get("name"))) if isinstance(guide, Mapping) else None
    if path is None or not path.is_file() or not Path(f"{path}.run.json").is_file():
        return {}
    manifest = jsonl.read_json(Path(f"{path}.run.json"))
    return {str(path): {**_with_usage(manifest), "requests": (manifest.get("result") or {}).get("new")}}


def differing(systems: Sequence[System]) -> list[tuple[str, list[str]]]:
    """Config keys whose values differ between the systems' trainings, with each system's value.

    Defaults of a section that only some systems have (a guide's) are left out.
    """
    configs = [dict(leaves(system.first.values)) for system in systems]
    given = {key for system in systems for key, *_ in config_rows(system.first)[0]}
    rows = []
    for key in dict.fromkeys(key for config in configs for key in config if key not in PER_RUN):
        values = {compact(config[key]) for config in configs if key in config}
        if len(values) > 1 or (key in given and any(key not in config for config in configs)):
            rows.append((key, [compact(config[key]) if key in config else "–" for config in configs]))
    return rows


def unlike_seeds(system: System) -> list[str]:
    """Config keys in which the runs of one system differ, besides the seed and the folders of paths."""
    configs = [without_folders(run) for run in system.runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if len({config.get(key, "None") for config in configs}) > 1]


def config_rows(run: Run) -> tuple[list[tuple[str, str, str]], list[tuple[str, str]]]:
    """(key, value, origin) of the keys that were given, and (key, value) of those at their defaults."""
    given, defaults = [], []
    for key, value in leaves(run.values):
        origin = run.origins.get(key) or next((run.origins[k] for k in _upwards(key) if k in run.origins), "default")
        if origin == "default":
            defaults.append((key, compact(value)))
        else:
            given.append((key, compact(value), origin))
    return given, defaults


def _upwards(key: str) -> Iterator[str]:
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def environment(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Versions, device and commit, each with the distinct values of the runs."""
    facts: dict[str, dict[str, None]] = {}
    for run in runs:
        own = {"device": run.manifest.get("device"), "processes": run.manifest.get("processes")}
        own |= {"git commit": run.manifest.get("git_commit"), **(run.manifest.get("versions") or {})}
        for name, value in own.items():
            if value is not None:
                facts.setdefault(name, {})[str(value)] = None
    return [(name, list(values)) for name, values in facts.items()]


def warnings_of(run: Run) -> list[tuple[str, int]]:
    """The warnings of a training with the number of steps of each."""
    result = run.manifest.get("result") or {}
    return [(key.removeprefix("warning/"), n) for key, n in result.items() if key.startswith("warning/")]


def compact(value: Any) -> str:
    """A value on one line: a string as it is, another value as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
