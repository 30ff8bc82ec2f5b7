"""``rlgf compare``: compare systems with the first one, paired by prompt."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlgf_cli import console, registry
from rlgf_cli.artifacts import jsonl
from rlgf_cli.artifacts.evaluations import System, every, read_systems
from rlgf_cli.artifacts.records import SCHEMA_VERSION
from rlgf_cli.artifacts.rundir import Existing
from rlgf_cli.config.compare import CompareConfig
from rlgf_cli.config.loader import Resolved
from rlgf_cli.errors import UserError
from rlgf_cli.protocols.messages import to_json
from rlgf_cli.stages.session import StageSession
from rlgf_cli.stats.bootstrap import Aggregate, Interval, resampled
from rlgf_cli.stats.comparable import comparable
from rlgf_cli.stats.significance import (
    Seeds,
    estimate,
    holm,
    p_value,
    pair_flip_p,
    randomised,
    seed_permutation_p,
    smallest_flip_p,
    smallest_seed_p,
)

_FEW_PROMPTS = 50
"""With fewer prompts the bootstrap calls too many chance differences significant (docs/significance.md)."""


@dataclass
class Comparison:
    """The result that is printed and written: ``figures[name]`` holds a row per system, the base first.

    ``texts``: a few prompts with the text of each system.
    """

    systems: dict[str, list[str]]
    tests: dict[str, Any]
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    texts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def base(self) -> str:
        return next(iter(self.systems))

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "base": self.base,
            "systems": self.systems,
            "tests": self.tests,
            "figures": self.figures,
            "texts": self.texts,
        }


def run(resolved: Resolved[CompareConfig], *, existing: Existing = "refuse") -> Comparison:
    """Compare each system with the first. Raises UserError where they are not comparable (see ``force``)."""
    config = resolved.config
    systems = read_systems(config.systems)
    if len(systems) < 2:
        hint = f"all folders are seeds of {systems[0].label!r}; rlgf compare BASE OTHER [MORE ...]"
        raise UserError("one system alone cannot be compared", hint=hint)
    if config.pair_seeds:
        _refuse_unpaired(systems)
    names, ids = comparable(systems, config.metrics, force=config.force, log=console.log, warn=console.warn)
    tables = {name: _rows(systems, name, ids) for name in names}
    comparison = Comparison(
        {system.label: [str(evaluation.folder) for evaluation in system.evaluations] for system in systems},
        _about_tests(systems, config),
    )
    with console.progress(
        "resampling", 2 * config.interval.resamples * sum(t is not None for t in tables.values())
    ) as bar:
        for name, table in tables.items():
            if table is None:
                comparison.figures[name] = _as_one(systems, name, len(ids), config.interval.level)
            else:
                comparison.figures[name] = _compare(systems, name, table, config, bar.update)
    _correct(comparison)
    _note_figures(comparison)
    comparison.texts = _texts(systems, ids, config)
    if config.output is not None:
        parents = [evaluation.folder / "predictions.jsonl" for _, evaluation in every(systems)]
        session = StageSession("compare", resolved, existing, can_resume=False)
        with session.writing_file(*parents, seed=config.seed, config=False):
            jsonl.write_json(config.output, comparison.to_json())
    return comparison


def _texts(systems: Sequence[System], ids: Sequence[str], config: CompareConfig) -> list[dict[str, Any]]:
    """``config.texts`` of the prompts, drawn with the seed, with the text of each system's first evaluation."""
    firsts = {system.label: system.evaluations[0].records for system in systems}
    base = firsts[systems[0].label]
    return [
        {
            "id": name,
            "prompt": to_json(base[name].prompt),
            "texts": {label: records[name].prediction for label, records in firsts.items()},
        }
        for name in random.Random(config.seed).sample(ids, min(config.texts, len(ids)))
    ]


def _refuse_unpaired(systems: Sequence[System]) -> None:
    base, *others = systems
    for system in others:
        if len(system.evaluations) != len(base.evaluations):
            counts = [f"{s.label} has {len(s.evaluations)}" for s in (system, base)]
            raise UserError(
                f"seeds cannot be paired: {counts[0]}, {counts[1]}",
                hint="give as many folders for each system, in one order of seeds, or leave --pair-seeds out",
            )


@dataclass(frozen=True)
class _Table:
    """A figure's rows [evaluations, prompts, k], without the prompts that one evaluation skipped."""

    rows: np.ndarray
    skipped: int
    aggregate: Aggregate
    figures: np.ndarray
    """The figure of each evaluation [evaluations]."""


def _rows(systems: Sequence[System], figure: str, ids: Sequence[str]) -> _Table | None:
    """The rows of a figure; None for one of the whole set. A prompt that one evaluation skipped is left out for all."""
    scored = list(every(systems))
    made_by = scored[0][1].figures[figure].aggregate
    if made_by is None:
        return None
    aggregate = registry.load("aggregates", made_by)
    columns = [evaluation.rows(figure, ids) for _, evaluation in scored]
    paired = [prompt for prompt in zip(*columns, strict=True) if None not in prompt]
    if not paired:
        raise UserError(f"no prompt has a value of {figure} in every system")
    widths = [len(row) for row in paired[0] if row is not None]
    for (name, evaluation), width in zip(scored, widths, strict=True):
        if width != widths[0]:
            message = f"the rows of {figure} have {width} numbers in {name}, {widths[0]} in {scored[0][0]}"
            raise UserError(message, where=str(evaluation.folder), hint="run rlgf eval again")
    rows = np.asarray(paired, dtype=np.float64).transpose(1, 0, 2)
    try:
        with np.errstate(all="ignore"):  # what is not finite is refused below
            figures = aggregate(rows.sum(axis=1))
    except (IndexError, ValueError) as error:
        message = f"rows of {widths[0]} numbers do not make the figure {figure} ({made_by}): {error}"
        raise UserError(message, where=str(scored[0][1].folder), hint="run rlgf eval again") from error
    if not np.isfinite(figures).all():
        name, evaluation = scored[int(np.argmin(np.isfinite(figures)))]
        raise UserError(f"{figure} of {name} is not finite", where=str(evaluation.folder))
    return _Table(rows, len(ids) - len(paired), aggregate, figures)


def _compare(
    systems: Sequence[System], figure: str, table: _Table, config: CompareConfig, progress: Callable[[int], object]
) -> dict[str, Any]:
    """A row per system. All systems and seeds have the same resampled prompts."""
    settings = {"resamples": config.interval.resamples, "seed": config.seed}
    draws = resampled(table.rows, table.aggregate, progress=progress, **settings)
    if not np.isfinite(draws).all():
        raise UserError(f"{figure} is not finite for some choices of prompts", hint="leave it out with --metrics")
    of: dict[str, slice] = {}
    for system in systems:
        start = next(reversed(of.values())).stop if of else 0
        of[system.label] = slice(start, start + len(system.evaluations))
    seeds = {label: Seeds(table.figures[which], draws[which]) for label, which in of.items()}
    prompts, level = table.rows.shape[1], config.interval.level
    base = systems[0]
    by_randomisation = _randomisation(table, of, seeds, settings, progress, paired=config.pair_seeds)
    rows = []
    for system in systems:
        own = estimate(seeds[system.label], prompts=prompts, level=level)
        difference = None
        if system is not base:
            both = (seeds[system.label], seeds[base.label])
            contrast = estimate(*both, prompts=prompts, level=level, paired=config.pair_seeds)
            difference = {
                **contrast.interval._asdict(),
                "p_bootstrap": contrast.p,
                "p_randomisation": by_randomisation[system.label],
                "p_holm": None,
            }
        count = {"system": system.label, "seeds": len(system.evaluations)}
        rows.append({**count, **own.interval._asdict(), "difference": difference})
    made_by = systems[0].evaluations[0].figures[figure].aggregate
    return {"n": prompts, "n_skipped": table.skipped, "aggregate": made_by, "rows": rows}


def _randomisation(
    table: _Table,
    of: Mapping[str, slice],
    seeds: Mapping[str, Seeds],
    settings: Mapping[str, int],
    progress: Callable[[int], object],
    *,
    paired: bool,
) -> dict[str, float | None]:
    """The p-value of each system: permuting prompts for one seed against one, seeds for several against several."""
    base, *others = of
    prompts = table.rows.shape[1]
    first = seeds[base].figures
    p_values: dict[str, float | None] = {
        label: pair_flip_p(seeds[label].figures - first, **settings)
        if paired
        else seed_permutation_p(seeds[label].figures, first, **settings)
        for label in others
    }
    single = [label for label in others if len(seeds[label].figures) == len(seeds[base].figures) == 1]
    if single and prompts > 1:
        rows = np.concatenate([table.rows[of[label]] for label in single])
        null = randomised(rows, table.rows[of[base]][0], table.aggregate, progress=progress, **settings)
        observed = np.array([seeds[label].figures[0] - seeds[base].figures[0] for label in single])
        p_values.update(zip(single, map(float, p_value(null, observed)), strict=True))
    else:
        progress(settings["resamples"])
    return p_values


def _as_one(systems: Sequence[System], figure: str, prompts: int, level: float) -> dict[str, Any]:
    """A figure of the whole set: its mean over seeds.

    A single seed has the interval that ``rlgf eval`` wrote, where there is one at the same ``level``.
    """
    rows = []
    for system in systems:
        entries = [evaluation.figures[figure] for evaluation in system.evaluations]
        mean = Interval(float(np.mean([entry.value for entry in entries])), None, None)
        levels = [evaluation.scores.interval.get("level") for evaluation in system.evaluations]
        if len(entries) == 1 and entries[0].method is not None and levels[0] == level:
            mean = mean._replace(low=entries[0].low, high=entries[0].high)
        rows.append({"system": system.label, "seeds": len(entries), **mean._asdict(), "difference": None})
    first = systems[0].evaluations[0].figures[figure]
    counted = prompts if first.n is None else first.n
    return {"n": counted, "n_skipped": prompts - counted, "aggregate": None, "method": first.method, "rows": rows}


def _correct(comparison: Comparison) -> None:
    """Holm's correction over all tests of the comparison, in place."""
    raw = f"p_{comparison.tests['test']}"
    family = [
        row["difference"]
        for figure in comparison.figures.values()
        for row in figure["rows"]
        if row["difference"] is not None and row["difference"][raw] is not None
    ]
    for difference, adjusted in zip(family, holm([difference[raw] for difference in family]), strict=True):
        difference["p_holm"] = adjusted
    comparison.tests["family_size"] = len(family)


def _about_tests(systems: Sequence[System], config: CompareConfig) -> dict[str, Any]:
    resamples = config.interval.resamples
    return {
        "test": config.test,
        "level": config.interval.level,
        "resamples": resamples,
        "seed": config.seed,
        "smallest_p": 1 / (1 + resamples),
        "correction": "holm",
        "family": "every test of a system against the base, over all figures of this comparison",
        "family_size": 0,
        "pair_seeds": config.pair_seeds,
        "notes": _notes(systems, resamples, paired=config.pair_seeds),
    }


def _notes(systems: Sequence[System], resamples: int, *, paired: bool) -> list[str]:
    """Notes on the validity of the figures, and on the limits of the tests."""
    base = len(systems[0].evaluations)
    counts = {system.label: len(system.evaluations) for system in systems}
    single = [label for label, count in counts.items() if count == 1]
    if len(single) == len(counts):
        return [
            "one seed each: the results hold for these models on other prompts like these, not for another training"
        ]
    if paired:
        note = (
            "seeds in pairs, in the order given: differences within the pairs, their intervals and p of the bootstrap "
            "test over other prompts and other pairs (components of variance, Student's t); randomisation swaps the "
            "sides of pairs"
        )
        every = 2**base <= resamples
        return [note, f"{base} pairs give randomisation no p-value below {smallest_flip_p(base):.2g}"][: 1 + every]
    notes = [
        "several seeds: intervals, and p of the bootstrap test, over other prompts and other seeds (components of "
        "variance, Student's t); randomisation permutes the seeds"
    ]
    if single:
        notes.append(f"one seed: {', '.join(single)}; its results hold for that one model, not for its way of training")
        uneven = [label for label, count in list(counts.items())[1:] if (count == 1) != (base == 1)]
        if uneven:
            notes.append(
                f"no randomisation for {', '.join(uneven)}: one model and several trainings are not exchangeable"
            )
    pairs = dict.fromkeys((count, base) for count in list(counts.values())[1:] if count > 1 and base > 1)
    for first, second in pairs:
        if math.comb(first + second, first) > resamples:
            continue  # drawn, not counted: 1 / (1 + resamples) is the smallest p-value, as of every test
        smallest = smallest_seed_p(first, second)
        notes.append(f"permuting {first} and {second} seeds gives no p-value below {smallest:.2g}")
    return notes


def _note_figures(comparison: Comparison) -> None:
    as_one = {name: figure["method"] for name, figure in comparison.figures.items() if figure["aggregate"] is None}
    why = "a figure of the set as one, which no choice of prompts can be computed for"
    for method in dict.fromkeys(as_one.values()):
        names = ", ".join(name for name in as_one if as_one[name] == method)
        own = f"the interval of one seed is that of rlgf eval at the same level ({method})" if method else "no interval"
        comparison.tests["notes"].append(f"{names}: {why}: {own}, no test")
    if all(len(folders) > 1 for folders in comparison.systems.values()):
        return  # Student's t accounts for few prompts and few seeds
    tested = [figure["n"] for figure in comparison.figures.values() if figure["aggregate"] is not None]
    fewest = min(tested, default=_FEW_PROMPTS)
    if fewest < _FEW_PROMPTS and comparison.tests["test"] == "bootstrap":
        why = "the bootstrap's intervals are narrow and its p-values small; --test randomisation is exact"
        comparison.tests["notes"].append(f"{fewest} prompts are few: {why}")
