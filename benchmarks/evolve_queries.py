"""Queries of a learned policy for a set as diverse as that of evolving everything at random.

    python benchmarks/evolve_queries.py FOLDER --data alpaca/train.jsonl.gz [--seeds 0 1 2 3 4]

On the scripted guide of recipes/teams_rl, in this process. For each seed: ``rlgf evolve train`` on training seeds; then
``rlgf evolve generate`` over held-out seeds, led by that policy and by ``random``: every instruction of the pool is
rewritten by a random operation in every round, and failures are eliminated, as WizardLM does it. Every rewrite is a
query, kept or not; answers are not asked for, since both would need one per instruction. After six rounds, random goes
on with other chains of the same seeds.

A set's diversity after q queries is that of what was kept of the first q rewrites, round after round. Looked for are
the queries after which one set is as diverse as the other after its six rounds. What is in FOLDER already is not made
again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from rlgf_cli import noise, registry
from rlgf_cli.artifacts.jsonl import read_objects, read_records, write_json, write_jsonl
from rlgf_cli.artifacts.records import AnsweredStepRecord
from rlgf_cli.config.evolve_generate import EvolveGenerateConfig
from rlgf_cli.config.evolve_train import EvolveTrainConfig
from rlgf_cli.config.loader import resolve
from rlgf_cli.console import table
from rlgf_cli.evolve.dataset import is_in_set
from rlgf_cli.evolve.diversity import leaders, vendi_score
from rlgf_cli.evolve.novelty import NgramSpace
from rlgf_cli.evolve.operations import read_operations
from rlgf_cli.guides.local import LocalGuide
from rlgf_cli.protocols import Completion, GuideRequest
from rlgf_cli.stages import evolve_generate, evolve_train

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "teams_rl"))

import scripted_server

OPERATIONS = read_operations(None)
TRAINING, STEPS, PASSES = 300, 6, 3
COSINE = 0.3
"""Where clusters begin, as in ``rlgf evolve stats``."""
FIGURES: dict[str, Callable[[np.ndarray], float]] = {
    "Vendi score": vendi_score,
    "clusters": lambda vectors: float(leaders(vectors, COSINE)),
}


class Scripted(LocalGuide):
    """The scripted guide as a kind of its own, ``scripted:1``. Seed, example, prompt and sample decide a text."""

    kind = "scripted"

    def _write(self, requests: Sequence[GuideRequest]) -> list[Completion]:
        found = []
        for request in requests:
            seed = zlib.crc32(f"{self._seed} {request.example.id} {request.sample_index}".encode())
            found.append(
                Completion(scripted_server.text_for(request.example.prompt, seed, OPERATIONS), "stop", self.name)
            )
        return found


registry.BUILTIN["guides"]["scripted"] = registry.Entry("__main__:Scripted", "the guide of recipes/teams_rl")


def pools(data: Path, folder: Path, seed: int, pool: int) -> tuple[Path, Path]:
    """Training seeds, the last of the file, and held-out ones of a seed."""
    rows = [{"id": str(row["id"]), "prompt": row["prompt"]} for _, row in read_objects(data)]
    training, held_out = folder / "train.jsonl", folder / f"pool_{seed}.jsonl"
    if not training.exists():
        write_jsonl(training, rows[-TRAINING:])
    if not held_out.exists():
        order = noise.generator(seed, "pool").permutation(len(rows) - TRAINING)
        write_jsonl(held_out, [rows[i] for i in order[:pool]])
    return training, held_out


class Curve:
    """A set's rewrites, round after round, and its diversity after some of its queries."""

    def __init__(self, folder: Path) -> None:
        rows = list(read_records(folder / "steps.jsonl", AnsweredStepRecord))
        rows.sort(key=lambda row: (row.visit, row.step))  # of a round, the order of the seeds stays
        kept = [row for row in rows if is_in_set(row)]
        self.queries = np.cumsum([row.queries for row in rows])
        self.kept = np.cumsum([is_in_set(row) for row in rows])
        self.vectors = NgramSpace().embed([row.text for row in kept])

    def at(self, figure: str, rows: int) -> float:
        """A figure of the kept rewrites among the first ``rows``."""
        kept = int(self.kept[rows - 1])
        return FIGURES[figure](self.vectors[:kept]) if kept else 0.0

    def needed(self, figure: str, level: float) -> int | None:
        """Queries after which the figure first is at ``level``, found by halving; None where it never is."""
        low, high = 1, len(self.queries)
        if self.at(figure, high) < level:
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.at(figure, middle) >= level else (middle + 1, high)
        return int(self.queries[low - 1])


def measured(place: Path, pool: int) -> dict[str, dict[str, float | None]]:
    """By figure: both policies' queries at the level of evolve-everything's first pass, and of the learned one's."""
    learned, everything = Curve(place / "learned"), Curve(place / "random")
    first = pool * STEPS
    found = {}
    for figure in FIGURES:
        level, higher = everything.at(figure, first), learned.at(figure, first)
        found[figure] = {
            "level": level,
            "everything": int(everything.queries[first - 1]),
            "learned": learned.needed(figure, level),
            "higher": higher,
            "learned_higher": int(learned.queries[first - 1]),
            "everything_higher": everything.needed(figure, higher),
        }
    return found


def geometric(ratios: Sequence[float]) -> str:
    """Geometric mean and 95 % t interval over seeds, in percent."""
    logs = np.log(ratios)
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs))
    mean, low, high = (100 * math.exp(logs.mean() + shift) for shift in (0, -half, half))
    return f"{mean:.1f} % ({low:.1f} to {high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="JSONL of instructions, alpaca's as they are")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--pool", type=int, default=48)
    parser.add_argument("--iterations", type=int, default=80)
    parser.add_argument("--memory", type=int, default=200)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    os.environ["RLGF_CACHE_DIR"] = str(given.folder / "cache")
    results, training_queries = [], []
    for seed in given.seeds:
        place = given.folder / f"seed_{seed}"
        training, held_out = pools(given.data, given.folder, seed, given.pool)
        common = {"guide": "scripted:1", "steps": STEPS, "seed": seed}
        policy = {**common, "data": str(training), "iterations": given.iterations, "memory": given.memory}
        trained = evolve_train.run(
            resolve(EvolveTrainConfig, flags={**policy, "output": str(place / "policy")}), existing="resume"
        )
        for name, leader, passes in (("learned", str(trained.folder), 1), ("random", "random", PASSES)):
            flags = {
                **common, "data": str(held_out), "policy": leader, "passes": passes, "answers": False,
                "batch_size": given.pool, "output": str(place / name),
            }  # fmt: skip
            evolve_generate.run(resolve(EvolveGenerateConfig, flags=flags), existing="resume")
        results.append(measured(place, given.pool))
        training_queries.append(trained.summary["queries"])
        print(seed, json.dumps(results[-1]), file=sys.stderr, flush=True)
    write_json(given.folder / "results.json", {"training_queries": training_queries, "seeds": results})
    report(results, training_queries)


def report(results: Sequence[dict[str, dict[str, float | None]]], training: Sequence[int]) -> None:
    """A row for each figure and level: queries of both, their ratio, and the ratio with the training's queries."""
    rows = []
    for figure in FIGURES:
        for ours, theirs, level in (
            ("learned", "everything", "level"),
            ("learned_higher", "everything_higher", "higher"),
        ):
            found = [seed[figure] for seed in results]
            pairs = [(one[ours], one[theirs]) for one in found]
            reached = [(a, b, extra) for (a, b), extra in zip(pairs, training, strict=True) if a and b]
            whole = len(reached) == len(pairs) and len(pairs) > 1
            rows.append(
                [
                    f"{figure} {np.mean([one[level] for one in found]):.0f}",
                    f"{np.mean([a for a, _, _ in reached]):.0f}" if whole else "-",
                    f"{np.mean([b for _, b, _ in reached]):.0f}" if whole else "-",
                    geometric([a / b for a, b, _ in reached])
                    if whole
                    else f"reached in {len(reached)} of {len(pairs)}",
                    geometric([(a + extra) / b for a, b, extra in reached]) if whole else "-",
                ]
            )
    header = ["equal diversity", "learned: queries", "evolve-everything: queries", "ratio", "with training's queries"]
    print(table(header, rows))
    print(f"queries of a training: {np.mean(training):.0f}")


if __name__ == "__main__":
    main()
