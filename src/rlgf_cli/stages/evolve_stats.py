"""``rlgf evolve stats``: a set of instructions in figures, or two of them and their difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlgf_cli import console
from rlgf_cli.artifacts.jsonl import write_bytes, write_json
from rlgf_cli.artifacts.records import SCHEMA_VERSION
from rlgf_cli.artifacts.rundir import Existing
from rlgf_cli.config.evolve import NoveltyConfig
from rlgf_cli.config.evolve_stats import EvolveStatsConfig
from rlgf_cli.config.loader import Resolved
from rlgf_cli.errors import UserError
from rlgf_cli.evolve import describe
from rlgf_cli.evolve.contrast import Draws, by_seed, difference, draw
from rlgf_cli.evolve.dataset import STEPS
from rlgf_cli.evolve.make import make_space
from rlgf_cli.evolve.measure import TextMeasures, figures, measure_texts
from rlgf_cli.evolve.sets import TextSet, read_set
from rlgf_cli.report import evolution
from rlgf_cli.stages.session import StageSession

COMMAND = "evolve stats"
_COSINE = {True: 0.5, False: 0.3}
"""Where clusters begin, with an encoder and without: by words, texts are farther from each other."""
_FEW_SEEDS = 20


@dataclass(frozen=True)
class EvolveStatsResult:
    """What is printed and written, and the folder, if one was asked for."""

    stats: dict[str, Any]
    folder: Path | None


def run(resolved: Resolved[EvolveStatsConfig], *, existing: Existing = "refuse") -> EvolveStatsResult:
    """Measure, compare where there are two, and write where there is an output. Raises UserError for sets that cannot
    be measured; nothing is written then.
    """
    config = resolved.config
    session = None
    if config.output is not None:
        session = StageSession(COMMAND, resolved, existing, can_resume=False)
        session.open(*config.sets)
    sets = [read_set(path) for path in config.sets]
    space = make_space(NoveltyConfig(encoder=config.encoder), config.device)
    cosine = config.cosine or _COSINE[config.encoder is not None]
    measures = [measure_texts(found.texts, space.embed(found.texts)) for found in sets]
    described = [_described(found, of, cosine) for found, of in zip(sets, measures, strict=True)]
    stats = {
        "schema_version": SCHEMA_VERSION,
        "space": space.signature,
        "cosine": cosine,
        "seed": config.seed,
        "sets": described,
        "comparison": _compared(sets, measures, cosine, config) if len(sets) == 2 else None,
    }
    if session is None:
        return EvolveStatsResult(stats, None)
    plots = [plot for i, of in enumerate(described) for plot in evolution.plots(of, f"-{i + 1}" * (len(sets) - 1))]
    with session.running(*(file for found in sets for file in found.files)) as folder:
        write_json(folder.file("stats.json"), stats)
        for plot in plots:
            write_bytes(folder.file("plots") / f"{plot.name}.svg", plot.svg.encode())
            write_bytes(folder.file("plots") / f"{plot.name}.png", plot.png)
    return EvolveStatsResult(stats, folder.path)


def _described(found: TextSet, of: TextMeasures, cosine: float) -> dict[str, Any]:
    """All of a set's texts: diversity depends on their number."""
    rewrites = None if found.rows is None else describe.totals(found.rows)
    notes = list(found.notes)
    if rewrites is not None and rewrites["kept"] != len(found.texts) + found.wordless:
        told = f"{len(found.texts) + found.wordless} instructions, {rewrites['kept']} kept in {STEPS}"
        notes.append(f"{told}: the run that writes them has not ended, or one of the files was changed")
    return {
        "path": found.path,
        "texts": len(found.texts),
        "seeds": len(set(found.seeds)),
        "wordless": found.wordless,
        "notes": notes,
        "figures": figures(of, np.arange(len(found.texts)), cosine),
        "rewrites": rewrites,
        "by_step": None if found.steps is None else describe.by_step(found, of.complexity),
        "over_time": None if found.rows is None else describe.over_time(found.rows),
    }


def _compared(
    sets: Sequence[TextSet], measures: Sequence[TextMeasures], cosine: float, config: EvolveStatsConfig
) -> dict[str, Any]:
    """The first set minus the second, in every figure that both have in all draws."""
    of = _draws(sets, config)
    spent = [None if found.rows is None else describe.by_seed_totals(found.rows) for found in sets]
    values: list[list[dict[str, float]]] = [[], []]
    with console.progress("comparing", len(of.each)) as bar:
        for one in of.each:
            for side in (0, 1):
                row = figures(measures[side], one.texts[side], cosine)
                if (known := spent[side]) is not None:
                    row |= describe.per_kept(known, one.seeds[side])
                values[side].append(row)
            bar.update()
    rows = values[0] + values[1]
    found = {}
    for name in [name for name in rows[0] if all(name in row for row in rows)]:
        first, second = (np.array([row[name] for row in values[side]]) for side in (0, 1))
        interval = difference(first, second, of, config.draws.level)
        low, high = interval.low, interval.high
        means = {"first": float(first.mean()), "second": float(second.mean())}
        found[name] = {**means, "difference": interval.value, "low": low, "high": high}
    return {
        "texts": of.texts,
        "seeds": of.seeds,
        "of_seeds": list(of.seed_counts),
        "paired": of.paired,
        "draws": len(of.each),
        "level": config.draws.level,
        "figures": found,
    }


def _draws(sets: Sequence[TextSet], config: EvolveStatsConfig) -> Draws:
    first, second = (by_seed(found.seeds, (row.seed_id for row in found.rows or ())) for found in sets)
    for found, seeds in zip(sets, (first, second), strict=True):
        if len(seeds) < 2:
            message = "all texts come from one seed: nothing is known of other seeds, and so there is no interval"
            raise UserError(message, where=found.path, hint="measure the sets one by one")
    of = draw(first, second, most=config.draws.texts, count=config.draws.count, seed=config.seed)
    if of.texts < 2:
        message = f"{of.seeds} seeds do not always have two texts in both sets: too few to be compared"
        raise UserError(message, where=f"{sets[0].path} and {sets[1].path}", hint="take more seeds")
    if min(of.seed_counts) < _FEW_SEEDS:
        console.warn(f"{min(of.seed_counts)} seeds are few: the intervals are rough")
    return of
