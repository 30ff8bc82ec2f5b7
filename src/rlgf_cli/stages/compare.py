"""``rlgf compare``: systems scored on the same prompts, each against the first, paired."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlgf_cli import console, registry
from rlgf_cli.artifacts import jsonl
from rlgf_cli.artifacts.evaluations import Evaluation, System, every, read_systems
from rlgf_cli.artifacts.records import SCHEMA_VERSION
from rlgf_cli.artifacts.rundir import Existing, claim_file
from rlgf_cli.config.compare import CompareConfig
from rlgf_cli.config.loader import Resolved
from rlgf_cli.errors import UserError, did_you_mean
from rlgf_cli.metrics.bootstrap import Aggregate, Interval, resampled
from rlgf_cli.metrics.significance import (
    Seeds,
    estimate,
    holm,
    p_value,
    randomised,
    seed_permutation_p,
    smallest_seed_p,
)

_FEW_PROMPTS = 50
"""Below it the bootstrap calls noise significant noticeably too often (docs/significance.md)."""


@dataclass
class Comparison:
    """What is printed and written: ``figures[name]`` holds a row per system, the base first."""

    systems: dict[str, list[str]]
    tests: dict[str, Any]
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)

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
        }


def run(resolved: Resolved[CompareConfig], *, existing: Existing = "refuse") -> Comparison:
    """Compare each system with the first. Raises UserError where they are not comparable (see ``force``)."""
    config = resolved.config
    systems = read_systems(config.systems)
    if len(systems) < 2:
        hint = f"all folders are seeds of {systems[0].label!r}; rlgf compare BASE OTHER [MORE ...]"
        raise UserError("one system alone cannot be compared", hint=hint)
    names = _choose_figures(systems, config.metrics)
    ids = _common_ids(systems, config.force)
    _check_same_examples(systems, ids, config.force)
    _check_seeds(systems, config.force)
    for name in names:
        _check_signatures(systems, name, config.force)
    _warn_of_settings(systems)
    tables = {name: _rows(systems, name, ids) for name in _comparable(systems, names, ids)}
    comparison = Comparison(
        {system.label: [str(evaluation.folder) for evaluation in system.evaluations] for system in systems},
        _about_tests(systems, config),
    )
    with console.progress(
        "resampling", 2 * config.interval.resamples * sum(t is not None for t in tables.values())
    ) as bar:
        for name, table in tables.items():
            if table is None:
                comparison.figures[name] = _as_one(systems, name, len(ids))
            else:
                comparison.figures[name] = _compare(systems, name, table, config, bar.update)
    _correct(comparison)
    _note_figures(comparison)
    if config.output is not None:
        manifest = claim_file(config.output, "compare", existing=existing, seed=config.seed)
        with manifest.running():
            for _, evaluation in every(systems):
                manifest.add_parent(evaluation.folder / "predictions.jsonl")
            jsonl.write_json(config.output, comparison.to_json())
    return comparison


def _choose_figures(systems: Sequence[System], wanted: Sequence[str] | None) -> list[str]:
    """The figures to compare, in the base's order."""
    scored = list(every(systems))
    common = [name for name in scored[0][1].figures if all(name in e.figures for _, e in scored)]
    everywhere = {name for _, evaluation in scored for name in evaluation.figures}
    if wanted is None:
        for name in sorted(everywhere - set(common)):
            without = ", ".join(label for label, e in scored if name not in e.figures)
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
                lacks = ((label, e) for label, e in scored if not any(_is_of(name, want) for name in e.figures))
                label, lacking = next(lacks, scored[0])
                raise UserError(f"{label} was not scored with {want!r}", where=str(lacking.folder))
            known = everywhere | {name.partition(".")[0] for name in everywhere}
            raise UserError(f"no system was scored with {want!r}", hint=did_you_mean(want, known))
        chosen.update(dict.fromkeys(matching))
    return list(chosen)


def _is_of(figure: str, name: str) -> bool:
    """Whether ``name`` is the figure or its metric."""
    return figure == name or figure.startswith(f"{name}.")


def _common_ids(systems: Sequence[System], force: bool) -> list[str]:
    (base_name, base), *others = every(systems)
    for name, other in others:
        lacking = [i for i in base.records if i not in other.records]
        extra = [i for i in other.records if i not in base.records]
        if lacking or extra:
            message = (
                f"{name} and {base_name} were scored on other prompts: {len(lacking)} ids only in "
                f"{base_name}, {len(extra)} only in {name} (first: {(lacking + extra)[0]!r})"
            )
            _refuse(message, force, "--force compares on the prompts that all systems have", other)
    common = [i for i in base.records if all(i in other.records for _, other in others)]
    if not common:
        raise UserError("the systems have no prompt in common")
    return common


def _check_same_examples(systems: Sequence[System], ids: Sequence[str], force: bool) -> None:
    (base_name, base), *others = every(systems)
    for name, evaluation in others:
        for what in ("prompt", "references"):
            other = [i for i in ids if getattr(evaluation.records[i], what) != getattr(base.records[i], what)]
            if other:
                _refuse(
                    f"{name} and {base_name} have equal ids with different {what}: {len(other)} "
                    f"of {len(ids)} (first: {other[0]!r})",
                    force,
                    "score both on the same data; --force compares all the same",
                    evaluation,
                )


def _check_seeds(systems: Sequence[System], force: bool) -> None:
    """Seeds of a system are different trainings: one model evaluated twice says nothing about the spread of them."""
    for system in systems:
        seen: dict[str, Evaluation] = {}
        for evaluation in system.evaluations:
            weights = (evaluation.scores.model or {}).get("sha256")
            if weights and weights in seen:
                _refuse(
                    f"two seeds of {system.label} are one model, that of {seen[weights].folder} too",
                    force,
                    "give evaluations of different trainings; --force takes them as they are",
                    evaluation,
                )
            if weights:
                seen[weights] = evaluation


def _check_signatures(systems: Sequence[System], figure: str, force: bool) -> None:
    (base_name, base), *others = every(systems)
    first = base.figures[figure]
    for name, evaluation in others:
        other = evaluation.figures[figure]
        if other.aggregate != first.aggregate:
            raise UserError(
                f"{figure} is made in different ways: {first.aggregate} in {base_name}, {other.aggregate} in {name}",
                where=str(evaluation.folder),
                hint="run rlgf eval again with one version of rlgf",
            )
        if other.signature != first.signature:
            _refuse(
                f"{figure} was computed in different ways\n  {base_name}: {first.signature}\n"
                f"  {name}: {other.signature}",
                force,
                "run rlgf eval again with equal settings; --force compares all the same",
                evaluation,
            )


def _refuse(message: str, force: bool, hint: str, evaluation: Evaluation) -> None:
    if not force:
        raise UserError(message, where=str(evaluation.folder), hint=hint)
    console.warn(message)


def _warn_of_settings(systems: Sequence[System]) -> None:
    """Two ways of decoding may be what is compared, and a file's bytes may differ where its prompts do not."""
    (base_name, base), *others = every(systems)
    mine = base.scores.decoding
    for name, evaluation in others:
        theirs = evaluation.scores.decoding
        if mine is not None and theirs is not None:
            keys = [
                key for key in dict.fromkeys([*mine, *theirs]) if key != "seed" and mine.get(key) != theirs.get(key)
            ]
            if keys:
                values = [", ".join(f"{key} {decoding.get(key)}" for key in keys) for decoding in (mine, theirs)]
                console.warn(f"other decoding: {base_name} with {values[0]}; {name} with {values[1]}")
        data = [(e.scores.dataset or {}).get("sha256") for e in (base, evaluation)]
        if None not in data and data[0] != data[1]:
            console.warn(f"{name} and {base_name} were scored on files that differ (the prompts compared are equal)")


def _comparable(systems: Sequence[System], names: Sequence[str], ids: Sequence[str]) -> list[str]:
    """Without figures of the set as one where that set is not the prompts that are compared."""
    whole = all(len(evaluation.records) == len(ids) for _, evaluation in every(systems))
    kept = [name for name in names if whole or systems[0].evaluations[0].figures[name].aggregate is not None]
    for name in names:
        if name not in kept:
            console.log(f"left out: {name}, a figure of all prompts of a system, of which only some are compared")
    if not kept:
        raise UserError("no figure can be compared on these prompts alone")
    return kept


@dataclass(frozen=True)
class _Table:
    """A figure's rows [evaluations, prompts, k], without the prompts that one evaluation skipped."""

    rows: np.ndarray
    skipped: int
    aggregate: Aggregate
    figures: np.ndarray
    """Of each evaluation [evaluations]."""


def _rows(systems: Sequence[System], figure: str, ids: Sequence[str]) -> _Table | None:
    """None for a figure of the set as one. A prompt that one evaluation skipped is left out for all: all is paired."""
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
    systems: Sequence[System], figure: str, table: _Table, config: CompareConfig, told: Callable[[int], object]
) -> dict[str, Any]:
    """A row per system. All systems and seeds have the same resampled prompts."""
    settings = {"resamples": config.interval.resamples, "seed": config.seed}
    draws = resampled(table.rows, table.aggregate, told=told, **settings)
    if not np.isfinite(draws).all():
        raise UserError(f"{figure} is not finite for some choices of prompts", hint="leave it out with --metrics")
    of: dict[str, slice] = {}
    for system in systems:
        start = next(reversed(of.values())).stop if of else 0
        of[system.label] = slice(start, start + len(system.evaluations))
    seeds = {label: Seeds(table.figures[which], draws[which]) for label, which in of.items()}
    prompts, level = table.rows.shape[1], config.interval.level
    base = systems[0]
    by_randomisation = _randomisation(table, of, seeds, settings, told)
    rows = []
    for system in systems:
        own = estimate(seeds[system.label], prompts=prompts, level=level)
        difference = None
        if system is not base:
            found = estimate(seeds[system.label], seeds[base.label], prompts=prompts, level=level)
            difference = {
                **found.interval._asdict(),
                "p_bootstrap": found.p,
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
    told: Callable[[int], object],
) -> dict[str, float | None]:
    """Per system: sides of prompts for one seed against one, sides of seeds for several against several, else None."""
    base, *others = of
    prompts = table.rows.shape[1]
    found: dict[str, float | None] = {
        label: seed_permutation_p(seeds[label].figures, seeds[base].figures, **settings) for label in others
    }
    single = [label for label in others if len(seeds[label].figures) == len(seeds[base].figures) == 1]
    if single and prompts > 1:
        rows = np.concatenate([table.rows[of[label]] for label in single])
        null = randomised(rows, table.rows[of[base]][0], table.aggregate, told=told, **settings)
        observed = np.array([seeds[label].figures[0] - seeds[base].figures[0] for label in single])
        found.update(zip(single, map(float, p_value(null, observed)), strict=True))
    else:
        told(settings["resamples"])
    return found


def _as_one(systems: Sequence[System], figure: str, prompts: int) -> dict[str, Any]:
    """A figure of the set as one: values alone, the mean over seeds where there are several."""
    rows = []
    for system in systems:
        value = float(np.mean([evaluation.figures[figure].value for evaluation in system.evaluations]))
        interval = Interval(value, None, None)._asdict()
        rows.append({"system": system.label, "seeds": len(system.evaluations), **interval, "difference": None})
    return {"n": prompts, "n_skipped": 0, "aggregate": None, "rows": rows}


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
        "notes": _notes(systems),
    }


def _notes(systems: Sequence[System]) -> list[str]:
    """What the numbers speak of, and what they cannot say."""
    base = len(systems[0].evaluations)
    counts = {system.label: len(system.evaluations) for system in systems}
    single = [label for label, count in counts.items() if count == 1]
    if len(single) == len(counts):
        return [
            "one seed each: this speaks of these trained models on other prompts like these, not of another training"
        ]
    notes = ["several seeds: intervals over other prompts and other seeds (components of variance, Student's t)"]
    if single:
        notes.append(f"one seed: {', '.join(single)}; taken as that one model, not as a way of training")
        uneven = [label for label, count in list(counts.items())[1:] if (count == 1) != (base == 1)]
        if uneven:
            notes.append(
                f"no randomisation for {', '.join(uneven)}: one model and several trainings are not exchangeable"
            )
    pairs = dict.fromkeys((count, base) for count in list(counts.values())[1:] if count > 1 and base > 1)
    for first, second in pairs:
        smallest = smallest_seed_p(first, second)
        notes.append(f"dealing {first} and {second} seeds anew gives no p-value below {smallest:.2g}")
    return notes


def _note_figures(comparison: Comparison) -> None:
    names = [name for name, figure in comparison.figures.items() if figure["aggregate"] is None]
    if names:
        why = "a figure of the set as one, which no choice of prompts can be computed for: no interval, no test"
        comparison.tests["notes"].append(f"{', '.join(names)}: {why}")
    fewest = min(figure["n"] for figure in comparison.figures.values())
    if fewest < _FEW_PROMPTS and comparison.tests["test"] == "bootstrap":
        why = "the bootstrap's intervals are narrow and its p-values small; --test randomisation is exact"
        comparison.tests["notes"].append(f"{fewest} prompts are few: {why}")
