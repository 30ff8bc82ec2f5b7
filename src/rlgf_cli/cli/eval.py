"""The command ``rlgf eval``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlgf_cli import console
from rlgf_cli.cli.invocation import Invocation
from rlgf_cli.cli.numbers import interval, number, percent

if TYPE_CHECKING:
    from rlgf_cli.stages.eval import EvalResult


def evaluate(invocation: Invocation) -> None:
    """Score a model or predictions.

    Figures come with their intervals; the values of each example are saved, too.

    ```
    rlgf eval --model runs/sft --data test.jsonl --metrics rouge,bleu,bertscore
    rlgf eval --model t5 --data test.jsonl --metrics reward:coverage -o out/
    rlgf eval --predictions guide.jsonl --data test.jsonl -o runs/guide/eval
    ```
    """
    resolved, existing = invocation.resolve(), invocation.existing
    from rlgf_cli.stages import eval as stage

    done = stage.run(resolved, existing=existing)
    if invocation.as_json:
        console.result_json(done.scores)
    else:
        console.result(_table(done))
    _log_counts(done)


def _table(done: EvalResult) -> str:
    rows = [
        [name, number(entry["value"]), interval(entry["low"], entry["high"]), str(entry["n"])]
        for name, entry in done.scores["metrics"].items()
    ]
    return console.table(["metric", "value", f"{percent(done.scores['interval']['level'])} interval", "n"], rows)


def _log_counts(done: EvalResult) -> None:
    """Log the counts of texts that were skipped or are unusual, and the output folder."""
    counts: dict[str, Any] = {key: n for key, n in done.scores["counts"].items() if n}
    skipped = {f"{name}.skipped": e["n_skipped"] for name, e in done.scores["metrics"].items() if e["n_skipped"]}
    console.log(", ".join(f"{key} {n}" for key, n in {**counts, **skipped}.items()))
    console.log(f"wrote {done.folder}")
