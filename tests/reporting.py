"""Run folders in the real format, without training, for tests of ``rlgf report``."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conftest import toy_examples, write_rows
from rlgf_cli.artifacts.jsonl import write_jsonl
from rlgf_cli.artifacts.rundir import RunDir
from rlgf_cli.config.loader import resolve
from rlgf_cli.config.train import TrainConfig

CONFIG = {"model": "start", "data": "train.jsonl", "reward": "coverage", "eval.data": "test.jsonl", "max_steps": 40}
NASTY = '<script>alert(1)</script>"><img src=x onerror=alert(2)> {{ 7*7 }} \x1b[31m\u202egnp</td> ' + "w" * 3000
"""What a model might write, and a page must not obey."""


def rows(steps: int, *, lift: float = 0.02, every: int = 4, seed: int = 0, full: bool = False) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl with a score that rises by ``lift`` a step, and a held-out score every few steps.

    ``full``: with most of the figures that a training has, which takes a plot each.
    """
    rng = random.Random(seed)
    found = []
    for step in range(1, steps + 1):
        row: dict[str, Any] = {
            "step": step, "regime": "guide>policy", "episodes": 8, "score/mean": lift * step + rng.uniform(-0.05, 0.05),
            "kl/episode": 0.05 * step,
        }  # fmt: skip
        if full:
            row |= {
                "score/std": 0.3, "length/mean": 9.0 + rng.random(), "length/truncated": 0.0, "kl/mean": 0.005 * step,
                "kl/coef": 0.02, "policy/entropy": 2.0 - lift * step, "loss/policy": -0.01, "ppo/clip_fraction": 0.1,
                "value/explained_policy": 0.5, "tokens/policy": 0.6, "lr": 1e-4, "update/grad_norm": 1.0,
                "time/rollout": 0.2, "time/update": 0.1, "time/guide": 0.0,
            }  # fmt: skip
        if step % every == 0:
            row["eval/score"] = lift * step
            if full:
                row["eval/watch"] = 0.5 - lift * step / 2
        found.append(row)
    return found


def episode(prompt: str, *parts: tuple[str, str], score: float = 0.5) -> dict[str, Any]:
    """A line of rollouts/step_N.jsonl."""
    segments = [{"author": author, "text": text, "ids": [5] * len(text.split())} for author, text in parts]
    return {
        "schema_version": 1, "id": "e", "prompt": prompt, "segments": segments, "cut": 0, "finished": True,
        "text": "".join(text for _, text in parts), "score": score, "parts": {},
    }  # fmt: skip


def write_run(
    folder: Path,
    *,
    metrics: Sequence[Mapping[str, Any]] | None = None,
    episodes: Mapping[int, Sequence[Mapping[str, Any]]] | None = None,
    flags: Mapping[str, Any] | None = None,
    status: str = "done",
    seed: int = 0,
    **manifest: Any,
) -> Path:
    """A run of ``rlgf train``, written by the functions that write real ones."""
    given = {**CONFIG, **(flags or {}), "output": str(folder), "seed": seed}
    run = RunDir.claim(folder, "train", seed=seed)
    run.write_config(resolve(TrainConfig, flags=given).to_json())
    write_jsonl(run.file("metrics.jsonl"), rows(40, seed=seed) if metrics is None else metrics)
    for step, some in (episodes or {}).items():
        write_jsonl(run.file("rollouts") / f"step_{step}.jsonl", some)
    run.manifest.save(status=status, ended=None if status == "running" else "2026-01-01T00:10:00+00:00", **manifest)
    return folder


def evaluate(run_cli: Any, folder: Path, *, keep: float, metrics: str = "coverage,rouge", texts: Any = None) -> Path:
    """An evaluation of made texts by ``rlgf eval``: references whose words stay with probability ``keep``."""
    rng = random.Random(str(folder))
    examples = toy_examples(20)
    data = write_rows(folder.parent / f"{folder.name}-data" / "test.jsonl", examples)
    answers = [
        {"id": e["id"], "text": " ".join(w for w in e["references"][0].split() if rng.random() < keep)}
        for e in examples
    ]
    for i, text in enumerate(texts or ()):
        answers[i]["text"] = text
    predictions = write_rows(folder.parent / f"{folder.name}-data" / "texts.jsonl", answers)
    done = run_cli("eval", "--predictions", predictions, "--data", data, "--metrics", metrics, "-o", folder)
    assert done.exit_code == 0, done.stderr
    return folder


def comparison(systems: Sequence[str]) -> str:
    """The JSON of ``rlgf compare``."""
    difference = {
        "value": 0.2,
        "low": 0.1,
        "high": 0.3,
        "p_bootstrap": 0.01,
        "p_randomisation": 0.00001,
        "p_holm": 0.02,
    }
    found = [
        {"system": name, "seeds": 1, "value": 0.5, "low": 0.4, "high": 0.6, "difference": difference if i else None}
        for i, name in enumerate(systems)
    ]
    figures = {"coverage": {"n": 20, "n_skipped": 0, "aggregate": "mean", "rows": found}}
    tests = {"level": 0.95, "resamples": 10000, "seed": 0, "family": "coverage"}
    return json.dumps({"schema_version": 1, "base": systems[0], "systems": {}, "tests": tests, "figures": figures})
