"""``rlgf evolve stats``: figures of a set of instructions, or of two sets and their difference."""

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
"""The least cosine inside a cluster, with an encoder and without: cosines of word vectors are smaller."""
_FEW_SEEDS = 20


@dataclass(frozen=True)
class EvolveStatsResult:
    """The statistics, and the folder that they were written to, if any."""

    stats: dict[str, Any]
    folder: Path | None


def run(resolved: Resolved[EvolveStatsConfig], *, existing: Existing = "refuse") -> EvolveStatsResult:
    """Measure each set, compare two of them, and write the result where there is an output. Raises UserError for sets
    that cannot be measured; nothing is written then.
    """
    config = resolved.config
    session = None
    if config.output is not None:
        session = StageSession(COMMAND, resolved, existing, can_resume=False)
        session.open(*config.sets)
    sets = [read_set(path) for path in config.sets]
    space = make_space(NoveltyConfig(encoder=config.encoder), config.device)
    cosine = config.cosine or _COSINE[config.encoder is not None]
    measures = [measure_texts(text_set.texts, space.embed(text_set.texts)) for text_set in sets]
    described = [_described(text_set, of, cosine) for text_set, of in zip(sets, measures, strict=True)]
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
    with session.running(*(file for text_set in sets for file in text_set.files)) as folder:
        write_json(folder.file("stats.json"), stats)
        for plot in plots:
            write_bytes(folder.file("plots") / f"{plot.name}.svg", plot.svg.encode())
            write_bytes(folder.file("plots") / f"{plot.name}.png", plot.png)
    return EvolveStatsResult(stats, folder.path)


def _described(text_set: TextSet, of: TextMeasures, cosine: float) -> dict[str, Any]:
    """The figures of all texts of a set. Diversity depends on their number."""
    rewrites = None if text_set.rows is None else describe.totals(text_set.rows)
    notes = list(text_set.notes)
    if rewrites is not None and rewrites["kept"] != len(text_set.texts) + text_set.wordless:
        counts = f"{len(text_set.texts) + text_set.wordless} instructions, {rewrites['kept']} kept in {STEPS}"
        notes.append(f"{counts}: the run that writes them has not ended, or one of the files was changed")
    return {
        "path": text_set.path,
        "texts": len(text_set.texts),
        "seeds": len(set(text_set.seeds)),
        "wordless": text_set.wordless,
        "notes": notes,
        "figures": figures(of, np.arange(len(text_set.texts)), cosine),
        "rewrites": rewrites,
        "by_step": None if text_set.steps is None else describe.by_step(text_set, of.complexity),
        "over_time": None if text_set.rows is None else describe.over_time(text_set.rows),
    }


def _compared(
    sets: Sequence[TextSet], measures: Sequence[TextMeasures], cosine: float, config: EvolveStatsConfig
) -> dict[str, Any]:
    """The difference of the first set and the second, in every figure that both have in all draws."""
    of = _draws(sets, config)
    spent = [None if text_set.rows is None else describe.by_seed_totals(text_set.rows) for text_set in sets]
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
    contrasts = {}
    for name in [name for name in rows[0] if all(name in row for row in rows)]:
        first, second = (np.array([row[name] for row in values[side]]) for side in (0, 1))
        interval = difference(first, second, of, config.draws.level)
        low, high = interval.low, interval.high
        means = {"first": float(first.mean()), "second": float(second.mean())}
        contrasts[name] = {**means, "difference": interval.value, "low": low, "high": high}
    return {
        "texts": of.texts,
        "seeds": of.seeds,
        "of_seeds": list(of.seed_counts),
        "paired": of.paired,
        "draws": len(of.each),
        "level": config.draws.level,
        "figures": contrasts,
    }


def _draws(sets: Sequence[TextSet], config: EvolveStatsConfig) -> Draws:
    first, second = (by_seed(text_set.seeds, (row.seed_id for row in text_set.rows or ())) for text_set in sets)
    for text_set, seeds in zip(sets, (first, second), strict=True):
        if len(seeds) < 2:
            message = "all texts come from one seed: nothing is known of other seeds, and so there is no interval"
            raise UserError(message, where=text_set.path, hint="measure the sets one by one")
    of = draw(first, second, most=config.draws.texts, count=config.draws.count, seed=config.seed)
    if of.texts < 2:
        message = f"{of.seeds} seeds do not always have two texts in both sets: too few to be compared"
        raise UserError(message, where=f"{sets[0].path} and {sets[1].path}", hint="take more seeds")
    if min(of.seed_counts) < _FEW_SEEDS:
        console.warn(f"{min(of.seed_counts)} seeds are few: the intervals are rough")
    return of
