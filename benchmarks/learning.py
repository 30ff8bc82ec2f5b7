"""Score of each algorithm on a task whose exact levels are known (tests/learning.py), over several seeds.

    python benchmarks/learning.py                              AggreVaTeD's variants, five seeds
    python benchmarks/learning.py --systems catalogue          every algorithm of the catalogue
    python benchmarks/learning.py --seeds 0,1 --systems inner  some of them

A value is the exact expected score of the policy alone, summed over all of its texts; nothing is sampled to measure it.
The interval is Student's, over seeds: what the mean of more seeds would be, not what one run would give.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from learning import GUIDE, IMPROVED, START, learned, start, value_of

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "cut: first, credit: prefix (default)": ("aggrevated", {}),
    "cut: inner": ("aggrevated", {"cut": "inner"}),
    "credit: cut": ("aggrevated", {"credit": "cut"}),
    "guide_mc, n = 1": ("aggrevated", {"advantage": "guide_mc"}),
    "guide_mc, n = 4": ("aggrevated", {"advantage": "guide_mc", "mc_samples": 4}),
}
CATALOGUE: dict[str, tuple[str, dict[str, Any]]] = {
    name: (name, parameters)
    for name, parameters in {
        "ppo": {}, "ppo++": {"rollin_prob": 0.5}, "aggrevated": {}, "lols": {"rollin_prob": 0.5},
        "d2lols": {"switch_step": 5, "rollin_prob": 0.5}, "grpo": {}, "rloo": {}, "grpo++": {"rollin_prob": 0.5},
        "rloo++": {"rollin_prob": 0.5}, "bc-guide": {}, "dagger": {},
    }.items()
}  # fmt: skip
_T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's two-sided 95 % quantile by the number of seeds."""


def interval(values: Sequence[float]) -> str:
    """The mean, and its 95 % interval within 0 to 1 where there are two to ten values."""
    if len(values) not in _T95:
        return f"{fmean(values):.3f}"
    half = _T95[len(values)] * stdev(values) / math.sqrt(len(values))
    low, high = max(0.0, fmean(values) - half), min(1.0, fmean(values) + half)
    return f"{fmean(values):.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--systems", default="variants", help="variants, catalogue, or a part of a name")
    parser.add_argument("--steps", type=int, default=40)
    asked = parser.parse_args()
    seeds = [int(seed) for seed in asked.seeds.split(",")]
    every = {"variants": VARIANTS, "catalogue": CATALOGUE}.get(asked.systems) or {
        name: how for name, how in (VARIANTS | CATALOGUE).items() if asked.systems in name
    }
    at = sorted({asked.steps // 4, asked.steps // 2, asked.steps})
    beginner = start()
    print(f"start {value_of(beginner):.3f} ({START:.3f} as meant), guide {GUIDE:.3f}, one step over it {IMPROVED}")
    print(f"seeds {asked.seeds}; {asked.steps} steps of 64 episodes\n")
    columns = [*(f"after {n}" for n in at[:-1]), f"after {at[-1]}, 95% interval", "least", "most", "guide texts a step"]
    print(f"| system | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    began = time.process_time()
    for name, (algorithm, parameters) in every.items():
        found = [learned(beginner, algorithm, seed, steps=asked.steps, at=at, **parameters) for seed in seeds]
        last = [values[-1] for values, _ in found]
        means = " | ".join(f"{fmean(values[i] for values, _ in found):.3f}" for i in range(len(at) - 1))
        texts = fmean(row.get("guide/requests", 0) for _, rows in found for row in rows)
        print(f"| {name} | {means} | {interval(last)} | {min(last):.3f} | {max(last):.3f} | {texts:.0f} |", flush=True)
    print(f"\n{time.process_time() - began:.0f} CPU seconds")


if __name__ == "__main__":
    main()
