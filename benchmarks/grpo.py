"""GRPO on a pretrained chat model (workload W2): iterations of rlgf against TRL's GRPOTrainer.

    python benchmarks/grpo.py [--pairs 2] [--steps 4] [--only 1,2] [--eos] [--quick] [--data FILE] [-o results.json]

SmolLM2-135M-Instruct (``smollm2``), 16 episodes in groups of 8, 24 new tokens, one optimizer step an iteration; the
words of CommonGen's training prompts (``--data``, default ``commongen/train.jsonl.gz`` in the folder RLGF_REAL_DATA).
Both sides run in processes of their own, in turn, on one thread, with the TRL that is installed. Times are CPU seconds
of an iteration; the first of a process is not measured. EOS is blocked on both sides, so that both write 24 tokens for
every episode; ``--eos`` lets texts end before. Ratios are medians over pairs, and the script stops where a side made
other optimizer steps or other tokens than were meant.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from grpo_workload import EPISODES, GrpoCase, write_prompts
from speed import HERE, run

from rlgf_cli.console import table
from rlgf_cli.models.gguf import plain_checkpoint
from rlgf_cli.models.load import load_tokenizer

CASES = {
    "float32, all weights": GrpoCase(),
    "LoRA r 16, bfloat16": GrpoCase(lora=True),
    "float32, all weights, prompts of 300 tokens": GrpoCase(prompt=300),
    "LoRA r 16, bfloat16, prompts of 300 tokens": GrpoCase(lora=True, prompt=300),
    "float32, all weights, gradient checkpointing": GrpoCase(checkpointing=True),
    "LoRA r 16, bfloat16, gradient checkpointing": GrpoCase(lora=True, checkpointing=True),
}
HEADER = [
    "case", "prompt tokens", "side", "CPU s per step", "episodes per CPU s", "times TRL", "peak MB", "of TRL's",
    "parts",
]  # fmt: skip


def compare(case: GrpoCase, model: str, folder: Path, pairs: int) -> dict[str, Any]:
    """``pairs`` pairs of runs, the order turned round from pair to pair."""
    found: dict[str, list[dict[str, Any]]] = {"rlgf": [], "trl": []}
    for pair in range(pairs):
        for side in ("rlgf", "trl") if pair % 2 == 0 else ("trl", "rlgf"):
            result = run(HERE / f"grpo_{side}.py", Path(sys.executable), case.to_json(), model, str(folder))
            check_work(side, case, result)
            found[side].append(result)
            print(f"{side}: {' '.join(f'{s:.1f}' for s in result['seconds'])} CPU s", file=sys.stderr, flush=True)
    seconds = {side: [statistics.median(r["seconds"]) for r in results] for side, results in found.items()}
    peaks = {side: max(r["peak_mb"] for r in results) for side, results in found.items()}
    return {
        "seconds": seconds,
        "ratio": statistics.median(t / r for t, r in zip(seconds["trl"], seconds["rlgf"], strict=True)),
        "peak_mb": peaks,
        "peak ratio": peaks["rlgf"] / peaks["trl"],
        "runs": found,
    }


def check_work(side: str, case: GrpoCase, result: dict[str, Any]) -> None:
    """Stop where a run did other work than was meant: its comparison would be meaningless."""
    tokens = EPISODES * case.response
    right = 0 < result["tokens"] <= tokens if case.eos else result["tokens"] == tokens
    if result["optimizer_steps"] != 1 or not right:
        sys.exit(f"{side} {case.to_json()}: one step and {tokens} tokens were meant, but {result}")


def parts_of(side: str, runs: list[dict[str, Any]]) -> dict[str, float]:
    """CPU seconds of rollout, scoring, update and the rest, medians over runs."""
    split = []
    for result in runs:
        whole, parts = statistics.mean(result["seconds"]), result["parts"]
        if side == "trl":
            both = parts["rollout and scoring"]
            split.append({"rollout": parts["rollout"], "scoring": both - parts["rollout"], "update": whole - both})
        else:
            named = {"rollout": parts["rollout"], "scoring": parts["annotate"], "update": parts["update"]}
            split.append({**named, "rest": whole - sum(named.values())})
    return {name: statistics.median(s[name] for s in split) for name in split[0]}


def rows_of(name: str, result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for side in ("trl", "rlgf"):
        seconds = statistics.median(result["seconds"][side])
        parts = ", ".join(f"{k} {v:.2f}" for k, v in parts_of(side, result["runs"][side]).items())
        ratios = [f"{result['ratio']:.2f}", f"{result['peak ratio']:.2f}"] if side == "rlgf" else ["", ""]
        peak = f"{result['peak_mb'][side]:,.0f}"
        speed = [f"{seconds:.2f}", f"{EPISODES / seconds:.2f}", ratios[0]]
        rows.append([name, str(result["prompt"]), side, *speed, peak, ratios[1], parts])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=2, help="pairs of runs per case")
    parser.add_argument("--steps", type=int, default=4, help="measured iterations of a run")
    parser.add_argument("--only", help=f"cases, by number from 1 to {len(CASES)}, with commas")
    parser.add_argument("--eos", action="store_true", help="let texts end before 24 tokens")
    parser.add_argument("--quick", action="store_true", help="one pair of one measured iteration, to see that it works")
    parser.add_argument("--data", type=Path, help="CommonGen's training prompts")
    parser.add_argument("-o", "--output", type=Path, help="all figures as JSON")
    options = parser.parse_args()
    if options.quick:
        options.pairs = options.steps = 1
    if options.data is None and "RLGF_REAL_DATA" not in os.environ:
        sys.exit("give --data FILE (rlgf prepare commongen makes it), or set RLGF_REAL_DATA")
    data = options.data or Path(os.environ["RLGF_REAL_DATA"], "commongen", "train.jsonl.gz")
    names = list(CASES)
    if options.only:
        names = [names[int(number) - 1] for number in options.only.split(",")]
    model, _ = plain_checkpoint("smollm2")
    tokenizer = load_tokenizer(model)
    results: dict[str, Any] = {"trl": version("trl"), "torch": version("torch"), "model": Path(model).name, "cases": {}}
    rows: list[list[str]] = []
    for name in names:
        case = replace(CASES[name], eos=options.eos, iterations=options.steps)
        print(f"== {name}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            prompt = write_prompts(case, tokenizer, data, Path(folder, "train.jsonl"))
            result = {"prompt": prompt, **compare(case, model, Path(folder), options.pairs)}
        results["cases"][name] = result
        rows += rows_of(name, result)
        if options.output:
            options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"TRL {results['trl']}, torch {results['torch']}, one thread, EOS {'free' if options.eos else 'blocked'}")
    print(table(HEADER, rows))


if __name__ == "__main__":
    main()
