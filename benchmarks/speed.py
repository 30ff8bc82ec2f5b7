"""Training iterations of rlgf against TRL 1.12.0's experimental PPOTrainer, the last TRL that has one.

    python benchmarks/speed.py [--pairs 5] [--env FOLDER] [--only 1,2] [-o results.json]

The first run makes the peer's environment (``--env``, by default in the user's cache; about 1.5 GB). Both sides load
one random checkpoint and run in processes of their own, in turn, on one thread. Times are CPU seconds, user and system,
of an iteration: the first of a process is not measured. The rate of a 1024-cubed matrix product is taken beside every
pair, and the floor is the sum of an iteration's matrix products at that rate. Ratios are medians over pairs; every
figure is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from speed_workload import EPOCHS, Case

from rlgf_cli.console import table

HERE = Path(__file__).parent
PEER = ("torch==2.13.0", "trl==1.12.0", "transformers==5.23.0", "rich")
"""The peer's packages; this transformers is the one that rlgf is tested with."""

SHARED, SEPARATE = Case(), Case(critic="separate")
LARGE = Case(vocabulary=50_257, iterations=1)
T5 = Case(family="t5")
SIDES: dict[str, tuple[tuple[str, Case], tuple[str, Case]]] = {
    "defaults against TRL": (("rlgf", SHARED), ("trl", SEPARATE)),
    "separate critic against TRL": (("rlgf", SEPARATE), ("trl", SEPARATE)),
    "PPO++ against PPO": (("rlgf", Case(algorithm="ppo++")), ("rlgf", SHARED)),
    "AggreVaTeD against PPO": (("rlgf", Case(algorithm="aggrevated")), ("rlgf", SHARED)),
    "vocabulary 50,257: defaults against TRL": (("rlgf", LARGE), ("trl", LARGE)),
    "T5: PPO++ against PPO": (("rlgf", Case(family="t5", algorithm="ppo++")), ("rlgf", T5)),
    "128 trajectories against 64": (("rlgf", Case(episodes=128)), ("rlgf", SHARED)),
    "64 generated tokens against 32": (("rlgf", Case(response=64)), ("rlgf", SHARED)),
    "8 layers against 4": (("rlgf", Case(layers=8)), ("rlgf", SHARED)),
}
"""What is compared: a run of the first and a run of the second make a pair."""


def environment(folder: Path) -> Path:
    """The peer's interpreter; its environment is made if it does not exist."""
    python, done = folder / "bin" / "python", folder / "made"
    if not done.is_file():
        print(f"making {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PEER], check=True)
        done.touch()
    return python


def flops(case: Case) -> dict[str, float]:
    """Multiplications and additions of the matrix products with weights in an iteration.

    2 per weight and token forwards, 4 backwards. The LM head counts where logprobs are computed; attention between
    tokens is left out. Iteration: generation; the policy and the ref_model (and a separate critic) once over the
    episodes; the update.
    """
    body, head = 12 * case.layers * case.width**2, case.vocabulary * case.width
    tokens, scored = case.episodes * (case.prompt + case.response), case.episodes * case.response
    policy, critic = body * tokens + head * scored, body * tokens if case.critic == "separate" else 0
    update = 6 * EPOCHS * (policy + critic)
    return {"update": update, "iteration": update + 2 * policy + 2 * (2 * policy + critic)}


def run(program: Path, python: Path, *arguments: str) -> Any:
    """A process on one thread; its last line is its result."""
    settings = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    settings |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run(
        [str(python), str(program), *arguments], env={**os.environ, **settings}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{program.name} {' '.join(arguments)} failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().split("\n")[-1])


class Runs:
    """Runs of both sides; a checkpoint is made once for each set of sizes."""

    def __init__(self, folder: Path, peer: Callable[[], Path]) -> None:
        self.folder, self.peer = folder, peer
        self.made: dict[tuple[Any, ...], Path] = {}

    def __call__(self, side: str, case: Case) -> dict[str, Any]:
        size = (case.family, case.layers, case.width, case.vocabulary, case.prompt, case.response)
        if size not in self.made:
            where = self.folder / str(len(self.made))
            where.mkdir()
            done = [sys.executable, str(HERE / "speed_workload.py"), case.to_json(), str(where)]
            subprocess.run(done, check=True, capture_output=True)
            self.made[size] = where
        python = self.peer() if side == "trl" else Path(sys.executable)
        result = run(HERE / f"speed_{side}.py", python, case.to_json(), str(self.made[size]))
        check_work(side, case, result)
        return result

    def rate(self) -> float:
        return float(run(HERE / "speed_workload.py", Path(sys.executable), "--rate"))


def check_work(side: str, case: Case, result: dict[str, Any]) -> None:
    """Stop where a run did other work than intended: its comparison would be meaningless."""
    steps = EPOCHS * case.episodes // 16
    tokens = case.episodes * case.response
    # a guide's EOS is not blocked: one text in 8192 / 32 ends early
    fewest = 0.97 * tokens if case.algorithm == "aggrevated" else tokens
    if result["optimizer_steps"] != steps or not fewest <= result["tokens"] <= tokens:
        sys.exit(f"{side} {case.to_json()}: {steps} steps and {tokens} tokens were meant, but {result}")


def compare(name: str, runs: Runs, pairs: int) -> dict[str, Any]:
    """``pairs`` pairs of runs, the order turned round from pair to pair."""
    sides = SIDES[name]
    found: list[list[dict[str, Any]]] = [[], []]
    rates = []
    for pair in range(pairs):
        rates.append(runs.rate())
        for n in (0, 1) if pair % 2 == 0 else (1, 0):
            found[n].append(runs(*sides[n]))
    seconds = [[statistics.median(r["seconds"]) for r in side] for side in found]
    ratios = [b / a for a, b in zip(*seconds, strict=True)]
    result = {
        "name": name,
        "seconds": seconds,
        "times the first is faster": ratios,
        "median": statistics.median(ratios),
        "peak_mb": [[round(r["peak_mb"]) for r in side] for side in found],
        "parts": [
            {part: statistics.median(r["parts"][part] for r in side) for part in side[0]["parts"]} for side in found
        ],
        "gflops": [rate / 1e9 for rate in rates],
        "flops": [flops(case)["iteration"] for _, case in sides],
    }
    side, case = sides[0]
    if side == "rlgf" and case.family == "gpt2" and case.algorithm == "ppo":
        for what, floor in flops(case).items():
            took = [r["parts"]["update"] for r in found[0]] if what == "update" else seconds[0]
            result[f"{what} / floor"] = [t / (floor / r) for t, r in zip(took, rates, strict=True)]
    return result


def show(result: dict[str, Any]) -> None:
    def figures(values: list[float], digits: int = 2) -> str:
        return " ".join(f"{v:.{digits}f}" for v in values)

    rows = []
    for (side, case), seconds, peak, parts in zip(
        SIDES[result["name"]], result["seconds"], result["peak_mb"], result["parts"], strict=True
    ):
        split = ", ".join(f"{name} {value:.2f}" for name, value in parts.items() if value >= 0.005)
        label = f"{side} {case.algorithm}" + (f", {case.critic} critic" if side == "rlgf" else "")
        rows.append([label, figures(seconds), f"{statistics.median(seconds):.2f}", f"{max(peak)}", split])
    print(f"\n== {result['name']}")
    print(table(["run", "CPU s per iteration", "median", "peak MB", "median of its parts"], rows))
    first, second = result["seconds"]
    print(f"second / first: {figures(result['times the first is faster'])}; median {result['median']:.2f}")
    inverse = [a / b for a, b in zip(first, second, strict=True)]
    flop_ratio = result["flops"][0] / result["flops"][1]
    print(f"first / second: {figures(inverse)}; median {statistics.median(inverse):.2f} (FLOPs {flop_ratio:.2f})")
    for what in ("update", "iteration"):
        if values := result.get(f"{what} / floor"):
            print(f"{what} / its floor: {figures(values)}; median {statistics.median(values):.2f}")
    print(f"matrix product, GFLOP/s: {figures(result['gflops'], 0)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of runs per comparison")
    parser.add_argument("--env", type=Path, default=cache / "rlgf-bench" / "trl-1.12.0", help="the peer's environment")
    parser.add_argument("--only", help=f"comparisons, by number from 1 to {len(SIDES)}, with commas")
    parser.add_argument("-o", "--output", type=Path, help="all figures as JSON")
    options = parser.parse_args()
    names = list(SIDES)
    if options.only:
        names = [names[int(number) - 1] for number in options.only.split(",")]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder), lambda: environment(options.env))
        for name in names:
            results.append(compare(name, runs, options.pairs))
            show(results[-1])
            if options.output:
                options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
