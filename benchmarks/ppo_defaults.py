"""Candidates for PPO's defaults, on tasks that each test another weakness. docs/results.md has the table.

    python benchmarks/ppo_defaults.py [FOLDER] [--tasks flat levels synthetic imdb] [--seeds 0 1 2] [--candidates ...]

- flat: every text scores 1 +- 0.1 (or -1, 10) whatever it says; mean length after 30 iterations as a share of the
  start's. Nothing is to be learned, so 1 is best (tests/flat.py).
- levels: the exact value of the policy after 40 iterations on a task whose optimum is 1 (tests/learning.py).
- synthetic: held-out score after 20, 60 and 100 iterations of 128 episodes on the synthetic task (recipes/synthetic);
  FOLDER/seed_N/sft is its starting policy, made where it is absent.
- imdb: the same after 20 and 60 iterations of recipes/imdb/small; FOLDER/imdb/{sft,classifier,data} must be there
  (the first stages of its run.sh).

One process, one thread. What is in FOLDER already is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch

import flat
import learning
from rl import configured_trainer
from rlgf_cli.console import table

CANDIDATES: dict[str, list[str]] = {
    "default": [],
    "KL in the reward": ["kl.where=reward"],
    "whitened batch": ["ppo.advantage_scale=batch"],
    "reward's own scale": ["ppo.advantage_scale=none"],
    "lambda 1": ["ppo.gae_lambda=1"],
    "lambda by length, alpha 1": ["ppo.adaptive_lambda=1"],
    "shared critic": ["ppo.critic=shared"],
    "separate critic": ["ppo.critic=separate"],
    "critic always trusted": ["ppo.critic_min_explained=-1000000"],
    "former": [
        "kl.where=reward", "ppo.advantage_scale=batch", "ppo.critic=shared", "ppo.critic_lambda=0.95",
        "ppo.critic_min_explained=-1000000", "ppo.value_clip_range=0.2",
    ],
}  # fmt: skip
"""Name -> what it sets, over the defaults of ``rlgf train``. ``former``: what the defaults were, but for a value head
that started at 0 there; with that, lengths on ``flat`` go to a third or to three times (tests/unit/test_flat.py)."""


def on_flat(folder: Path, seed: int, sets: Sequence[str]) -> dict[str, float]:
    start = flat.start()
    return {
        f"length, mean {mean:g}": flat.drift(start, mean, seed, sets=["optim.learning_rate=1e-4", *sets])
        for mean in (1, -1, 10)
    }


def on_levels(folder: Path, seed: int, sets: Sequence[str]) -> dict[str, float]:
    start = learning.start()
    loaded = replace(start, model=deepcopy(start.model))
    sizes = ["rollout.episodes=64", "ppo.minibatch_size=64", "ppo.epochs=2", f"lengths.max_new_tokens={learning.LIMIT}"]
    own = [*sizes, "optim.learning_rate=2e-3", "kl=0"]
    trainer = configured_trainer(
        loaded, learning.encoded(loaded), learning.scorer, seed=seed, sets=[*own, *sets, "max_steps=40"]
    )
    for _ in range(40):
        trainer.step()
    return {"value": learning.value_of(loaded)}


def on_synthetic(folder: Path, seed: int, sets: Sequence[str]) -> dict[str, float]:
    recipe, data, start = Path("recipes/synthetic"), folder / "data", folder / f"seed_{seed}/sft"
    if not data.exists():
        subprocess.run([sys.executable, recipe / "grammar.py", data], check=True)
    if not (start / "model.safetensors").exists():
        rlgf("sft", "-c", recipe / "sft.yaml", "--data", data / "start.jsonl", "--seed", seed, "-o", start)
    files = ("-c", recipe / "train.yaml", "--data", data / "train.jsonl", "--eval-data", data / "test.jsonl")
    return trained(folder / f"seed_{seed}", (*files, "--model", start), seed, sets, at=(20, 60, 100))


def on_imdb(folder: Path, seed: int, sets: Sequence[str]) -> dict[str, float]:
    recipe, own = Path("recipes/imdb/small"), folder / "imdb"
    files = ("-c", recipe / "train.yaml", "--data", own / "data/train.jsonl", "--eval-data", own / "data/test.jsonl")
    reward = ("--reward", f"classifier:{own / 'classifier'}")
    return trained(own / f"seed_{seed}", (*files, *reward, "--model", own / "sft"), seed, sets, at=(20, 60))


def trained(
    folder: Path, words: Sequence[object], seed: int, sets: Sequence[str], at: Sequence[int]
) -> dict[str, float]:
    """Train through the command line; the held-out score after so many iterations, and how far the policy went."""
    run = folder / ("ppo" + "".join(f"_{part}" for part in sets)).replace("/", "-")
    options = [word for part in sets for word in ("--set", part)]
    if not (run / "model.safetensors").exists():
        rlgf("train", *words, "--max-steps", at[-1], *options, "--seed", seed, "--resume", "-o", run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = {row["step"]: row["eval/score"] for row in rows if "eval/score" in row}
    far = {"nats per episode": rows[-1]["kl/episode"]} if "kl/episode" in rows[-1] else {}
    return {f"after {step}": scores[step] for step in at} | far


def rlgf(*words: object) -> None:
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **os.environ}
    subprocess.run([sys.executable, "-m", "rlgf_cli", *map(str, words)], check=True, env=environment, stdout=sys.stderr)


TASKS: dict[str, Callable[[Path, int, Sequence[str]], dict[str, float]]] = {
    "flat": on_flat, "levels": on_levels, "synthetic": on_synthetic, "imdb": on_imdb,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/ppo_defaults"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for task in asked.tasks:
        rows: list[list[str]] = []
        header: list[str] = []
        for name in asked.candidates:
            found = [known(asked.folder, task, name, seed) for seed in asked.seeds]
            header = ["candidate", *(f"{key} (seeds)" for key in found[0])]
            columns = [[each[key] for each in found] for key in found[0]]
            rows.append([name, *(f"{fmean(c):.3f} ({', '.join(f'{v:.2f}' for v in c)})" for c in columns)])
            print(task, rows[-1], file=sys.stderr, flush=True)
        print(f"\n{task}\n" + table(header, rows), flush=True)


def known(folder: Path, task: str, name: str, seed: int) -> dict[str, float]:
    """The figures of one cell, from FOLDER/cells where they are stored."""
    cell = folder / "cells" / f"{task}_{name.replace(' ', '-').replace('/', '-')}_{seed}.json"
    if not cell.exists():
        cell.parent.mkdir(parents=True, exist_ok=True)
        cell.write_text(json.dumps(TASKS[task](folder, seed, CANDIDATES[name])), encoding="utf-8")
    return json.loads(cell.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
