"""Diversity of a learned policy's set at equal numbers of queries, on the scripted guide of recipes/teams_rl.

    python benchmarks/evolve.py FOLDER --data alpaca/train.jsonl.gz [--seeds 0 1 2 3 4] [--iterations 40]
    python benchmarks/evolve.py FOLDER --data alpaca/train.jsonl.gz --sweep

For each seed: ``rlgf evolve train`` on training seeds; then learned policy, random, round-robin and the paper's
schedule walk the same held-out seeds, each in a fresh environment, with equally many queries. Training seeds are the
last 300 records of the file; the held-out ones are drawn from the others, anew for each seed. ``--sweep`` tries
learning rates and entropy coefficients with seeds of its own (100 and 101), and prints a table; the benchmark proper
takes what it is given. What is in FOLDER already is not made again.

The ceiling is a bound on the reward of any policy, found by search over all orders of operations on the first 4
held-out seeds, each chain alone in the environment with all the seeds: what other chains keep can only lower a novelty.
Of the tasks that breadth knows, each of which is kept once at most, these chains have their share of all the held-out
ones.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from scipy import stats

from rlgf_cli import noise
from rlgf_cli.artifacts.jsonl import read_json, read_objects, write_json, write_jsonl
from rlgf_cli.config.evolve_train import EvolveTrainConfig
from rlgf_cli.config.loader import resolve
from rlgf_cli.console import table
from rlgf_cli.evolve.diversity import vendi_score
from rlgf_cli.evolve.environment import KEPT, Chain, Environment, RewardWeights
from rlgf_cli.evolve.learned import load_policy
from rlgf_cli.evolve.make import make_environment
from rlgf_cli.evolve.novelty import Collection
from rlgf_cli.evolve.operations import Operation, read_operations
from rlgf_cli.evolve.policies import rollout
from rlgf_cli.protocols import Completion, Example, Guide, GuideRequest
from rlgf_cli.stages import evolve_train

RECIPE = Path(__file__).parents[1] / "recipes" / "teams_rl"
sys.path[:0] = [str(RECIPE), str(Path(__file__).parents[1] / "tests")]

import scripted  # noqa: E402 - a recipe is no package
import scripted_server  # noqa: E402 - a recipe is no package

from server_process import server_process  # noqa: E402 - shared with the tests

TRAINING, HELD_OUT, STEPS, SEARCHED = 300, 48, 6, 4
BASELINES = ("random", "round-robin", "paper")
FIGURES = {
    "kept": "kept per query",
    "effective": "effective number per query",
    "reward": "reward per query",
}
RATES, ENTROPIES, SWEPT = (1e-3, 3e-3, 1e-2), (0.003, 0.01, 0.03), (100, 101)


def guide() -> AbstractContextManager[str]:
    """The scripted guide in a process of its own; its URL, which is part of the cache's key."""
    return server_process(RECIPE / "scripted_server.py", "--port", "8712")


def split(data: Path, folder: Path, seed: int) -> tuple[Path, list[Example]]:
    """The training instructions, and the held-out ones of a random seed."""
    examples = [Example(row["id"], row["prompt"]) for _, row in read_objects(data)]
    train = folder / "train.jsonl"
    if not train.exists():
        write_jsonl(train, [{"id": e.id, "prompt": e.prompt} for e in examples[-TRAINING:]])
    order = noise.generator(seed, "held out").permutation(len(examples) - TRAINING)
    return train, [examples[i] for i in order[:HELD_OUT]]


def train(folder: Path, data: Path, url: str, seed: int, options: Sequence[str]) -> Path:
    """Train the policy of a random seed."""
    out = folder / "policy"
    if not (out / "run.json").exists() or read_json(out / "run.json")["status"] != "done":
        config = resolve(
            EvolveTrainConfig,
            sets=options,
            flags={
                "data": str(data), "guide": "openai:scripted", "guide.base_url": url, "output": str(out), "seed": seed,
                "steps": STEPS, "memory": 200,
            },
        )  # fmt: skip
        evolve_train.run(config, existing="resume")
    return out


def fresh(url: str, seed: int, held_out: Sequence[Example]) -> Environment:
    """An environment of the held-out seeds alone, as ``rlgf evolve train`` makes it."""
    flags = {"data": "-", "output": "-", "guide": "openai:scripted", "guide.base_url": url, "seed": seed}
    config = resolve(EvolveTrainConfig, flags=flags).config
    return make_environment(config, read_operations(None), held_out, weights=RewardWeights())


def walked(url: str, seed: int, held_out: Sequence[Example], policy: str) -> dict[str, Any]:
    """A policy's rewrites of the held-out seeds."""
    environment = fresh(url, seed, held_out)
    with closing(environment.guide):
        chains = [Chain(example) for example in held_out]
        rollout(environment, chains, load_policy(policy, environment.operations), STEPS, seed)
    steps = [step for chain in chains for step in chain.steps]
    queries = sum(step.queries for step in steps)
    kept = [step.text for step in steps if step.outcome == KEPT]
    return {
        "queries": queries,
        "kept": len(set(kept)) / queries,
        "effective": vendi_score(environment.space.embed(kept)) / queries,
        "reward": sum(step.reward or 0.0 for step in steps) / queries,
    }


class InProcess(Guide):
    """The scripted guide's answers to requests, without the network."""

    def __init__(self, guide: Any, operations: Sequence[Operation]) -> None:
        super().__init__(guide.name, guide.abilities)
        self._guide, self._operations = guide, operations

    def complete(self, requests: Sequence[GuideRequest]) -> list[Completion]:
        completions = []
        for request in requests:
            seed = self._guide.builder.body(request)["seed"]
            text = scripted_server.text_for(request.example.prompt, seed, self._operations)
            completions.append(Completion(text, "stop", "scripted"))
        return completions


def ceiling(url: str, seed: int, held_out: Sequence[Example]) -> float:
    """The highest reward per query of any order of operations on the first ``SEARCHED`` held-out seeds."""
    environment = fresh(url, seed, held_out)
    with closing(environment.guide):
        environment.guide = InProcess(environment.guide, environment.operations)  # type: ignore[assignment]
        chains = [_best(environment, environment.collection, Chain(e), STEPS) for e in held_out[:SEARCHED]]
    share = len(scripted.FIELDS.split()) * scripted.TOPICS * SEARCHED // HELD_OUT
    together = [0.0] * (share + 1)  # the most that the chains so far earn with so many kept breadths among them
    for best in chains:
        together = [max(together[n - k] + best[min(k, STEPS)] for k in range(n + 1)) for n in range(share + 1)]
    return together[share] / (STEPS * SEARCHED)


def _best(environment: Environment, collection: Collection, chain: Chain, left: int) -> list[float]:
    """The highest reward of the rest of a chain with at most 0, 1, ... STEPS kept breadths. Rejected rewrites are not
    followed: the chain is where it was then, and the operation is rejected again, as the scripted guide's effects
    depend on the state alone."""
    found = [-environment.weights.penalty * left] * (STEPS + 1)
    for index, operation in enumerate(environment.operations if left else ()):
        environment.collection = collection.holding(collection.recent())
        after = Chain(chain.seed, chain.visit, list(chain.steps))
        environment.step([after], [index])
        step = after.steps[-1]
        if step.outcome == KEPT and step.reward is not None:
            rest = _best(environment, environment.collection, after, left - 1)
            for n in range(operation.breadth, STEPS + 1):
                found[n] = max(found[n], step.reward + rest[n - operation.breadth])
    return found


def paired(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % t interval of paired differences over seeds."""
    mean = fmean(differences)
    half = stats.t.ppf(0.975, len(differences) - 1) * np.std(differences, ddof=1) / np.sqrt(len(differences))
    return mean, mean - half, mean + half


def compare(found: Sequence[dict[str, Any]]) -> str:
    """A row for each policy: its means over seeds, and the learned policy's difference to it."""
    rows = []
    for policy in ("learned", *BASELINES):
        row = [policy]
        for figure in FIGURES:
            row.append(f"{fmean(seed[policy][figure] for seed in found):.3f}")
            if policy == "learned":
                row.append("")
            else:
                mean, low, high = paired([seed["learned"][figure] - seed[policy][figure] for seed in found])
                row.append(f"{mean:+.3f} ({low:+.3f} to {high:+.3f})")
        rows.append(row)
    header = ["policy", *itertools.chain(*((label, "learned less this") for label in FIGURES.values()))]
    return table(header, rows)


def sweep(folder: Path, data: Path, url: str, options: Sequence[str]) -> None:
    """Held-out reward and effective number per query for learning rates and entropy coefficients."""
    rows = []
    for rate, entropy in itertools.product(RATES, ENTROPIES):
        own = [*options, f"ppo.learning_rate={rate}", f"ppo.entropy_coef={entropy}"]
        results = []
        for seed in SWEPT:
            place = folder / f"sweep_{rate:g}_{entropy:g}_{seed}"
            training, held_out = split(data, folder, seed)
            results.append(walked(url, seed, held_out, str(train(place, training, url, seed, own))))
        rows.append(
            [f"{rate:g}", f"{entropy:g}", *(" ".join(f"{r[figure]:.3f}" for r in results) for figure in FIGURES)]
        )
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    print(table(["learning rate", "entropy", *FIGURES.values()], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="JSONL of instructions, alpaca's as they are")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--set", action="append", default=[], help="key=value of rlgf evolve train")
    parser.add_argument("--sweep", action="store_true")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    os.environ["RLGF_CACHE_DIR"] = str(given.folder / "cache")
    options = [f"iterations={given.iterations}", *given.set]
    with guide() as url:
        if given.sweep:
            sweep(given.folder, given.data, url, options)
            return
        found = []
        for seed in given.seeds:
            place = given.folder / f"seed_{seed}"
            training, held_out = split(given.data, given.folder, seed)
            names = {
                "learned": str(train(place, training, url, seed, options)),
                **dict(zip(BASELINES, BASELINES, strict=True)),
            }
            result: dict[str, Any] = {name: walked(url, seed, held_out, policy) for name, policy in names.items()}
            assert len({r["queries"] for r in result.values()}) == 1
            if not (place / "result.json").exists():
                result["ceiling"] = ceiling(url, seed, held_out)
                write_json(place / "result.json", result)
            found.append(json.loads((place / "result.json").read_text()))
            print(seed, json.dumps(found[-1]), file=sys.stderr, flush=True)
    print(compare(found))
    print(f"queries of each walk: {found[0]['learned']['queries']}")
    print(f"ceiling of the reward per query: {fmean(seed['ceiling'] for seed in found):.3f}")


if __name__ == "__main__":
    main()
