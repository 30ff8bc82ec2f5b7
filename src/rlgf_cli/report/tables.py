"""The tables of a report: what was run, how it was scored, what it cost, how it was configured."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlgf_cli.artifacts import jsonl
from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.report.draw import Look
from rlgf_cli.report.read import Evaluation, Run, leaves
from rlgf_cli.report.systems import System, algorithm

_PER_RUN = ("seed", "output")
"""Config keys that differ between the seeds of a system."""


@dataclass(frozen=True)
class Scored:
    """A row of the evaluation table: one system's evaluations of one name, one per seed."""

    label: str
    look: Look
    evaluations: Sequence[Evaluation]
    given: bool = True

    def value(self, figure: str) -> float | None:
        """The figure, or its mean over the seeds; None where a seed lacks it."""
        found = self.values(figure)
        return math.fsum(found) / len(found) if len(found) == len(self.evaluations) else None

    def values(self, figure: str) -> list[float]:
        """The figure of each seed that has it."""
        return [e.figures[figure]["value"] for e in self.evaluations if figure in e.figures]


def scored_rows(systems: Sequence[tuple[System, Look]]) -> list[Scored]:
    """A row per system and name of its evaluations, ``eval`` first."""
    rows = []
    for system, look in systems:
        named: dict[str, list[Evaluation]] = {}
        for run in system.runs:
            main = run.evaluation
            for evaluation in run.evaluations:
                named.setdefault("" if evaluation is main else evaluation.name, []).append(evaluation)
        for name in sorted(named):
            rows.append(Scored(f"{system.label}, {name}" if name else system.label, look, named[name]))
    return rows


def figures_of(rows: Sequence[Scored]) -> list[str]:
    """The figures of all rows, in their first order."""
    return list(dict.fromkeys(name for row in rows for e in row.evaluations for name in e.figures))


@dataclass(frozen=True)
class Column:
    """A figure of the evaluation table. ``signatures`` with the rows that have each; more than one: not comparable."""

    figure: str
    signatures: Mapping[str, Sequence[str]]

    @property
    def comparable(self) -> bool:
        return len(self.signatures) == 1


def columns(rows: Sequence[Scored]) -> list[Column]:
    """Every figure with its signatures."""
    found = []
    for figure in figures_of(rows):
        signatures: dict[str, list[str]] = {}
        for row in rows:
            for evaluation in row.evaluations:
                if figure in evaluation.figures:
                    labels = signatures.setdefault(str(evaluation.figures[figure].get("signature")), [])
                    if row.label not in labels:
                        labels.append(row.label)
        found.append(Column(figure, signatures))
    return found


def data_notes(rows: Sequence[Scored]) -> list[str]:
    """Where evaluations are of different prompts or were decoded differently, which the signatures do not say."""
    notes = []
    data: dict[str, list[str]] = {}
    drawn: dict[str, list[str]] = {}
    for row in rows:
        for evaluation in row.evaluations:
            made_of = evaluation.about.get("dataset") or {}
            data.setdefault(str(made_of.get("sha256")), []).append(row.label)
            if decoding := evaluation.about.get("decoding"):
                told = {k: decoding.get(k) for k in ("temperature", "top_k", "top_p", "num_beams", "max_new_tokens")}
                drawn.setdefault(compact(told), []).append(row.label)
    for found, what in ((data, "on different data files"), (drawn, "with different decoding")):
        if len(found) > 1:
            groups = "; ".join(", ".join(dict.fromkeys(labels)) for labels in found.values())
            notes.append(
                f"The evaluations were made {what}: {groups}. Differences between these groups may come from that."
            )
    return notes


class Difference(BaseModel):
    """What ``rlgf compare`` says of a system and the base."""

    model_config = ConfigDict(extra="ignore")
    value: float
    low: float | None = None
    high: float | None = None
    p_bootstrap: float | None = None
    p_randomisation: float | None = None
    p_holm: float | None = None


class ComparedRow(BaseModel):
    model_config = ConfigDict(extra="ignore")
    system: str
    value: float
    low: float | None = None
    high: float | None = None
    difference: Difference | None = None


class ComparedFigure(BaseModel):
    model_config = ConfigDict(extra="ignore")
    n: int
    n_skipped: int = 0
    rows: list[ComparedRow]


class Compared(BaseModel):
    """The file of ``rlgf compare -o``."""

    model_config = ConfigDict(extra="ignore")
    base: str
    figures: dict[str, ComparedFigure]
    tests: dict[str, Any] = Field(default_factory=dict)
    interval: dict[str, Any] = Field(default_factory=dict)

    @property
    def tested(self) -> bool:
        """Whether it has p-values."""
        differences = [row.difference for figure in self.figures.values() for row in figure.rows if row.difference]
        return any(d.p_bootstrap is not None or d.p_randomisation is not None for d in differences)

    @property
    def settings(self) -> list[str]:
        """How the numbers were made, in sentences; none where the file does not say."""
        told = {**self.interval, **self.tests}
        found = []
        if "level" in told and "resamples" in told:
            found.append(
                f"Intervals of {100 * told['level']:g} %, {told['resamples']} resamples, seed {told.get('seed')}"
            )
        if "family_size" in told:
            found.append(f"p, Holm: the p of the {told.get('test')} after Holm, tests: {told['family_size']}")
        return found + [str(note)[:1].upper() + str(note)[1:] for note in told.get("notes", ())]


def read_comparison(path: Path) -> Compared:
    """A comparison. Raises UserError where the file is none."""
    hint = "make one with: rlgf compare BASE OTHER -o comparison.json"
    try:
        return Compared.model_validate(jsonl.read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        what = ".".join(map(str, first["loc"])) or "it"
        raise UserError(f"this is no comparison: {what}: {first['msg'].lower()}", where=str(path), hint=hint) from None
    except UserError:
        raise
    except RlgfError as error:
        raise UserError(error.message, where=error.where, hint=hint) from None


def about(system: System) -> list[tuple[str, str]]:
    """What a system is: pairs of a name and a text. What the config does not have is left out."""
    run = system.first
    found = [("command", run.command if run.command != "train" else ""), ("algorithm", algorithm(run) or "")]
    for key in ("model", "guide", "reward", "data"):
        found.append((key, _short(run.values.get(key))))
    evaluation = run.values.get("eval")
    found.append(("held-out data", _short(evaluation.get("data")) if isinstance(evaluation, Mapping) else ""))
    return [(name, text) for name, text in found if text]


def _short(value: Any) -> str:
    """A section by its name; several by theirs with their weights."""
    if isinstance(value, Mapping):
        return _short(value.get("name"))
    if isinstance(value, list):
        return ", ".join(_short(v) + (f" (weight {v['weight']:g})" if v.get("weight", 1) != 1 else "") for v in value)
    return "" if value is None else str(value)


def spend(run: Run) -> dict[str, Any]:
    """Calls, cached texts, tokens and US dollars: of the manifest, and of a run that goes on the last row's.

    A key that is not there is not known; ``charged_usd`` None: nothing had a price.
    """
    told = dict(run.manifest.get("spend") or {})
    usage = told.pop("usage", None) or {}
    told.update(usage)
    names = {"calls": "guide/calls", "cached": "guide/cached", "charged_usd": "guide/usd"}
    if run.manifest.get("status") == "running" or not told:
        told |= {key: float(run.curves[name].values[-1]) for key, name in names.items() if name in run.curves}
    for key, name in (("episodes", "episodes"), ("requests", "guide/requests")):
        if name in run.curves:
            told[key] = float(run.curves[name].values.sum())
    return told


def guide_file_spend(run: Run) -> tuple[str, dict[str, Any]] | None:
    """What the guide file of a run cost when it was collected: its path and spend; None where nothing says so."""
    guide = run.values.get("guide")
    path = Path(str(guide.get("name"))) if isinstance(guide, Mapping) else None
    manifest = Path(f"{path}.run.json") if path is not None else None
    if path is None or manifest is None or not path.is_file() or not manifest.is_file():
        return None
    told = jsonl.read_json(manifest)
    found = dict(told.get("spend") or {})
    found.update(found.pop("usage", None) or {})
    found["requests"] = (told.get("result") or {}).get("new")
    return str(path), found


def differing(systems: Sequence[System]) -> list[tuple[str, list[str]]]:
    """Config keys of the trainings whose values differ between systems, with each system's value.

    The defaults of a section that only some of them have (a guide's) are left out.
    """
    configs = [dict(leaves(system.first.values)) for system in systems]
    given = {key for system in systems for key, *_ in config_rows(system.first)[0]}
    rows = []
    for key in dict.fromkeys(key for config in configs for key in config if key not in _PER_RUN):
        told = {compact(config[key]) for config in configs if key in config}
        if len(told) > 1 or (key in given and any(key not in config for config in configs)):
            rows.append((key, [compact(config[key]) if key in config else "–" for config in configs]))
    return rows


def unlike_seeds(system: System) -> list[str]:
    """Config keys in which the runs of one system differ, beside the seed and the folders of paths."""
    configs = [dict(leaves(run.values)) for run in system.runs]
    keys = dict.fromkeys(key for config in configs for key in config if key not in _PER_RUN)
    return [key for key in keys if len({_last_part(config.get(key)) for config in configs}) > 1]


def _last_part(value: Any) -> str:
    return Path(value).name if isinstance(value, str) and "/" in value else compact(value)


def config_rows(run: Run) -> tuple[list[tuple[str, str, str]], list[tuple[str, str]]]:
    """(key, value, origin) of what was given, and (key, value) of what is default."""
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
    """Versions, device and commit, each with the values that the runs have."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        told = {"device": run.manifest.get("device"), "processes": run.manifest.get("processes")}
        told |= {"git commit": run.manifest.get("git_commit"), **(run.manifest.get("versions") or {})}
        for name, value in told.items():
            if value is not None:
                found.setdefault(name, {})[str(value)] = None
    return [(name, list(values)) for name, values in found.items()]


def warned(run: Run) -> list[tuple[str, int]]:
    """The warnings that a training counted."""
    result = run.manifest.get("result") or {}
    return [(key.removeprefix("warning/"), n) for key, n in result.items() if key.startswith("warning/")]


def compact(value: Any) -> str:
    """A value on one line: texts as they are, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
