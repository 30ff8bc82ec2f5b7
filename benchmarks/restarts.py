"""Restart curricula and the guide gate on the synthetic task: PPO++ with each, the same number of episodes.

    python benchmarks/restarts.py [FOLDER] [--seeds 0 1 2] [--arms uniform uniform+gate ...] [--steps 150]

Starting policy, guide and the guide's texts are made anew for each seed (recipes/synthetic); the training prompts are
few, so that each returns and the gate has something to compare. One process at a time: 45 minutes of a free core for
all. What is in FOLDER already is not made again, and an interrupted run goes on. Prints the held-out score of the
policy alone along the way, and at the end a paired comparison with the first arm on the held-out prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean

from rlgf_cli.console import table

RECIPE = Path("recipes/synthetic")


Arms = dict[str, list[str]]
"""What is compared: name -> options of ``rlgf train``."""


def arms(steps: int) -> Arms:
    """Every restart without and with the gate. The backward curriculum is over after half of the iterations.

    ``fewer`` is a control: the gate also leaves more episodes to the policy alone, as fewer roll-ins do.
    """
    restarts = {
        "uniform": [],
        "backward": ["--restart", "backward", "--restart-steps", str(steps // 2)],
        "uncertain": ["--restart", "uncertain"],
    }
    control = {"fewer": ["--max-steps", str(steps), "--rollin-prob", "0.5"]}
    length = ["--max-steps", str(steps)]
    plain = {name: [*length, *own] for name, own in restarts.items()}
    return plain | {f"{name}+gate": [*own, "--gate"] for name, own in plain.items()} | control


def rlgf(*words: object, shown: bool = False) -> None:
    """Run a command; its messages go to stderr."""
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **os.environ}
    out = None if shown else sys.stderr
    subprocess.run([sys.executable, "-m", "rlgf_cli", *map(str, words)], check=True, env=environment, stdout=out)


def made(folder: Path) -> bool:
    """Whether a stage is finished: the weights at a run's root are written last."""
    return (folder / "model.safetensors").exists()


def train(folder: Path, seed: int, compared: Arms, prompts: int) -> None:
    """Train and evaluate everything for one seed."""
    data, own = folder / "data", folder / f"seed_{seed}"
    again = ("--seed", seed, "--resume")
    for name in ("start", "guide"):
        if not made(own / name):
            rlgf("sft", "-c", RECIPE / "sft.yaml", "--data", data / f"{name}.jsonl", *again, "-o", own / name)
    guide = own / "guide.jsonl"
    if not guide.exists():
        rlgf(
            "collect-guide", "-c", RECIPE / "collect_guide.yaml", "--guide", f"hf:{own / 'guide'}", "--seed", seed,
            "--data", data / "train.jsonl", "--limit", prompts, "-o", guide,
        )  # fmt: skip
    for name, options in compared.items():
        run = own / name
        if not made(run):
            rlgf(
                "train", "-c", RECIPE / "train.yaml", "--alg", "ppo++", "--model", own / "start", "--guide", guide,
                "--data", data / "train.jsonl", "--limit", prompts, "--eval-data", data / "test.jsonl",
                "--set", "eval.every=10", *options, *again, "-o", run,
            )  # fmt: skip
        if not (run / "eval").exists():
            rlgf("eval", "-c", RECIPE / "eval.yaml", "--model", run, "--data", data / "test.jsonl", "-o", run / "eval")


def curve(run: Path) -> dict[int, float]:
    """Iteration -> held-out score of the policy alone."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["step"]: row["eval/score"] for row in rows if "eval/score" in row}


def gated(run: Path) -> str:
    """Share of the episodes that the gate left to the policy alone."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [row["guide/gated"] / row["episodes"] for row in rows if "guide/gated" in row]
    return f"{fmean(found):.2f}" if found else ""


def report(folder: Path, seeds: list[int], compared: Arms, steps: int) -> None:
    """The tables."""
    shown = [step for step in (10, 20, 40, 60, 100, steps) if step <= steps]
    rows = []
    for name in compared:
        for seed in seeds:
            run = folder / f"seed_{seed}" / name
            scores = curve(run)
            figures = [f"{scores[step]:.3f}" for step in shown]
            rows.append([name, str(seed), *figures, f"{fmean(scores.values()):.3f}", gated(run)])
    print(table(["restart", "seed", *map(str, shown), "mean of the curve", "gated"], rows), flush=True)
    for seed in seeds:
        print(f"\nseed {seed}, after {steps} iterations")
        sys.stdout.flush()
        own = folder / f"seed_{seed}"
        runs = [f"{name}={own / name}" for name in compared]
        rlgf("compare", *runs, "--metrics", "score", shown=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/restarts"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150, help="iterations of 128 episodes, a multiple of 10")
    parser.add_argument("--prompts", type=int, default=1000, help="training prompts")
    parser.add_argument("--arms", nargs="+", choices=arms(1), default=list(arms(1)), help="the first is compared with")
    options = parser.parse_args()
    compared = {name: arms(options.steps)[name] for name in options.arms}
    if not (options.folder / "data").exists():
        subprocess.run([sys.executable, RECIPE / "grammar.py", options.folder / "data"], check=True)
    for seed in options.seeds:
        train(options.folder, seed, compared, options.prompts)
    report(options.folder, options.seeds, compared, options.steps)


if __name__ == "__main__":
    main()
