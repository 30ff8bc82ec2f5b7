"""``rlgf compare``: systems scored on the same prompts, each against the first, paired."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlgf_cli import console
from rlgf_cli.artifacts import jsonl
from rlgf_cli.artifacts.records import SCHEMA_VERSION, PredictionRecord
from rlgf_cli.artifacts.rundir import Existing, claim_file
from rlgf_cli.config.compare import CompareConfig
from rlgf_cli.config.loader import Resolved
from rlgf_cli.errors import UserError, did_you_mean
from rlgf_cli.metrics.bootstrap import Interval, mean_interval, paired_interval


@dataclass(frozen=True)
class System:
    """An evaluated system: its predictions by id and the signature of each figure."""

    label: str
    folder: Path
    records: Mapping[str, PredictionRecord]
    signatures: Mapping[str, str]


@dataclass
class Comparison:
    """What is printed and written: ``figures[name]`` holds a row per system, the base first."""

    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    systems: dict[str, str] = field(default_factory=dict)
    level: float = 0.95
    resamples: int = 0
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "systems": self.systems,
            "base": next(iter(self.systems)),
            "interval": {
                "method": "paired percentile bootstrap over prompts",
                "level": self.level,
                "resamples": self.resamples,
                "seed": self.seed,
            },
            "figures": self.figures,
        }


def run(resolved: Resolved[CompareConfig], *, existing: Existing = "refuse") -> Comparison:
    """Compare each system with the first. Raises UserError where they are not comparable (see ``force``)."""
    config = resolved.config
    systems = _read_systems(config.systems)
    names = _choose_figures(systems, config.metrics)
    ids = _common_ids(systems, config.force)
    _check_same_examples(systems, ids, config.force)
    for name in names:
        _check_signatures(systems, name, config.force)
    interval = config.interval
    comparison = Comparison(
        systems={system.label: str(system.folder) for system in systems},
        level=interval.level,
        resamples=interval.resamples,
        seed=config.seed,
    )
    settings = {"level": interval.level, "resamples": interval.resamples, "seed": config.seed}
    for name in names:
        comparison.figures[name] = _compare(systems, name, ids, settings)
    if config.output is not None:
        manifest = claim_file(config.output, "compare", existing=existing, seed=config.seed)
        with manifest.running():
            for system in systems:
                manifest.add_parent(system.folder / "predictions.jsonl")
            jsonl.write_json(config.output, comparison.to_json())
    return comparison


def _read_systems(given: Sequence[str]) -> list[System]:
    named = [_split_label(text) for text in given]
    labels = [label or _label_of(folder) for label, folder in named]
    for i, (label, folder) in enumerate(named):
        if label is None and labels.count(labels[i]) > 1:
            labels[i] = str(folder)
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"two systems have the name {label!r}", hint="give names of your own: name=folder")
    return [_read_system(label, folder) for label, (_, folder) in zip(labels, named, strict=True)]


def _split_label(text: str) -> tuple[str | None, Path]:
    """``name=folder``; a folder whose own name has a = in it is taken as it is."""
    label, equals, folder = text.partition("=")
    if equals and label and not Path(text).exists():
        return label, Path(folder)
    return None, Path(text)


def _label_of(folder: Path) -> str:
    resolved = folder.resolve()
    return resolved.parent.name if resolved.name == "eval" else resolved.name


def _read_system(label: str, folder: Path) -> System:
    found = next((f for f in (folder, folder / "eval") if (f / "predictions.jsonl").is_file()), None)
    if found is None:
        raise UserError(
            "there is no evaluation in it" if folder.is_dir() else "no such folder",
            where=str(folder),
            hint="run `rlgf eval` first; its output folder (or the run folder with eval/ in it) is meant",
        )
    if not (found / "scores.json").is_file():
        raise UserError("this evaluation did not finish: it has no scores.json", where=str(found))
    path = found / "predictions.jsonl"
    records: dict[str, PredictionRecord] = {}
    for record in jsonl.read_records(path, PredictionRecord):
        if not record.id or record.id in records:
            raise UserError(f"the id {record.id!r} is empty or here twice", where=str(path))
        records[record.id] = record
    metrics = jsonl.read_json(found / "scores.json").get("metrics", {})
    return System(label, found, records, {name: entry["signature"] for name, entry in metrics.items()})


def _choose_figures(systems: Sequence[System], wanted: Sequence[str] | None) -> list[str]:
    """The figures to compare, in the base's order."""
    common = [name for name in systems[0].signatures if all(name in s.signatures for s in systems)]
    everywhere = {name for system in systems for name in system.signatures}
    if wanted is None:
        for name in sorted(everywhere - set(common)):
            without = ", ".join(s.label for s in systems if name not in s.signatures)
            console.log(f"left out: {name}, which {without} does not have")
        if not common:
            hint = "run rlgf eval with the same --metrics"
            raise UserError("the systems have no figure in common", hint=hint)
        return common
    chosen: dict[str, None] = {}
    for want in wanted:
        matching = [name for name in common if _is_of(name, want)]
        if not matching:
            if any(_is_of(name, want) for name in everywhere):
                lacking = next(s for s in systems if not any(_is_of(name, want) for name in s.signatures))
                raise UserError(f"{lacking.label} was not scored with {want!r}", where=str(lacking.folder))
            known = everywhere | {name.partition(".")[0] for name in everywhere}
            raise UserError(f"no system was scored with {want!r}", hint=did_you_mean(want, known))
        chosen.update(dict.fromkeys(matching))
    return list(chosen)


def _is_of(figure: str, name: str) -> bool:
    """Whether ``name`` is the figure or its metric."""
    return figure == name or figure.startswith(f"{name}.")


def _common_ids(systems: Sequence[System], force: bool) -> list[str]:
    base = systems[0]
    common = [name for name in base.records if all(name in s.records for s in systems)]
    for system in systems[1:]:
        lacking = [name for name in base.records if name not in system.records]
        extra = [name for name in system.records if name not in base.records]
        if lacking or extra:
            message = (
                f"{system.label} and {base.label} were scored on other prompts: {len(lacking)} ids only in "
                f"{base.label}, {len(extra)} only in {system.label} (first: {(lacking + extra)[0]!r})"
            )
            _refuse(message, force, "--force compares on the prompts that all systems have", str(system.folder))
    if not common:
        raise UserError("the systems have no prompt in common")
    return common


def _check_same_examples(systems: Sequence[System], ids: Sequence[str], force: bool) -> None:
    base = systems[0]
    for system in systems[1:]:
        for what in ("prompt", "references"):
            other = [i for i in ids if getattr(system.records[i], what) != getattr(base.records[i], what)]
            if other:
                _refuse(
                    f"{system.label} and {base.label} have equal ids with different {what}: {len(other)} "
                    f"of {len(ids)} (first: {other[0]!r})",
                    force,
                    "score both on the same data; --force compares all the same",
                    str(system.folder),
                )


def _check_signatures(systems: Sequence[System], name: str, force: bool) -> None:
    base = systems[0]
    for system in systems[1:]:
        if system.signatures[name] != base.signatures[name]:
            _refuse(
                f"{name} was computed in different ways\n  {base.label}: {base.signatures[name]}\n"
                f"  {system.label}: {system.signatures[name]}",
                force,
                "run rlgf eval again with equal settings; --force compares all the same",
                str(system.folder),
            )


def _refuse(message: str, force: bool, hint: str, where: str) -> None:
    if not force:
        raise UserError(message, where=where, hint=hint)
    console.warn(message)


def _compare(systems: Sequence[System], name: str, ids: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """One row per system. A prompt that one system skipped is left out for all: every mean is paired."""
    values = [[_value(system, i, name) for system in systems] for i in ids]  # [prompts, systems]
    paired = [row for row in values if None not in row]
    if not paired:
        raise UserError(f"no prompt has a value of {name} in every system")
    columns = np.asarray(paired, dtype=np.float64).T  # [systems, prompts]
    rows = []
    for i, system in enumerate(systems):
        row: dict[str, Any] = {"system": system.label, **_as_dict(mean_interval(columns[i], **settings))}
        if i:
            difference = paired_interval(columns[i], columns[0], **settings)
            row["difference"] = {**_as_dict(difference), "excludes_zero": difference.excludes_zero}
        rows.append(row)
    return {"n": len(paired), "n_skipped": len(ids) - len(paired), "rows": rows}


def _value(system: System, name: str, figure: str) -> float | None:
    record = system.records[name]
    if figure not in record.scores:
        raise UserError(f"the prediction {name!r} has no score {figure}", where=str(system.folder))
    value = record.scores[figure]
    if value is not None and not math.isfinite(value):
        raise UserError(f"{figure} of {name!r} is {value}", where=str(system.folder))
    return value


def _as_dict(interval: Interval) -> dict[str, float | None]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}
