"""The callback of a Trainer that writes metrics.jsonl, shows progress and marks whole checkpoints.

Checkpoints are the Trainer's own (``checkpoints/checkpoint-N``). The file COMPLETE is written last; older checkpoints
are removed only after that.
"""

from __future__ import annotations

import math
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from rlgf_cli.artifacts.checkpoints import COMPLETE, is_complete, mark_complete
from rlgf_cli.artifacts.jsonl import Appender, write_jsonl
from rlgf_cli.errors import RlgfError

ROWS: dict[str, str] = {
    "step": "optimizer steps so far",
    "epoch": "passes over the data so far",
    "loss": "mean training loss since the last row (sft: nats per response token)",
    "accuracy": "share of training pairs in the right order since the last row (train-reward, pairwise)",
    "margin": "mean difference of the two scores of a training pair since the last row (train-reward, pairwise)",
    "learning_rate": "learning rate of this step",
    "grad_norm": "gradient norm of this step, before clipping",
    "entropy": "mean entropy of the next-token distribution on the response (nats)",
    "mean_token_accuracy": "share of response tokens that were the likeliest one",
    "eval_loss": "loss on the held-out data",
    "eval_accuracy": "accuracy on the held-out data (train-reward; pairwise: mean over batches)",
    "eval_entropy": "entropy, on the held-out data",
    "eval_mean_token_accuracy": "token accuracy, on the held-out data",
}
"""The keys of metrics.jsonl of sft and train-reward, without times and running totals: a resumed run writes the same
rows as an uninterrupted one."""


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; one without COMPLETE is ignored."""
    return max(_complete(folder), key=_step_of, default=None)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _complete(folder: Path) -> list[Path]:
    return [c for c in folder.glob("checkpoint-*") if is_complete(c)]


def remove_torn(folder: Path) -> None:
    """Remove the incomplete checkpoints of a killed or failed save."""
    for torn in set(folder.glob("checkpoint-*")) - set(_complete(folder)):
        shutil.rmtree(torn)


def mean_loss(rows: list[dict[str, Any]]) -> float:
    """The mean loss over all steps of a run, resumed or not. A row has the mean of the steps since the row before."""
    total, last = 0.0, 0
    for row in rows:
        if "loss" in row:
            total += row["loss"] * (row["step"] - last)
            last = row["step"]
    return total / last


class Reporter:
    """The progress of a training on the console: a bar on a terminal, some twenty lines elsewhere.

    ``progress(label, total, done=n)`` and ``log(text)`` are those of the console, which this layer does not import.
    """

    lines = 20

    def __init__(
        self, label: str, progress: Callable[..., AbstractContextManager[Any]], log: Callable[[str], None]
    ) -> None:
        self.label, self.log, self._progress = label, log, progress
        self._stack = ExitStack()
        self._bar: Any = None
        self._total, self._shown = 1, -1

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, done: int, total: int) -> None:
        self._total = total
        self._bar = self._stack.enter_context(self._progress(self.label, total, done=done))

    def step(self) -> None:
        self._bar.update(1)

    def row(self, row: Mapping[str, Any]) -> None:
        figures = "  ".join(f"{k} {row[k]:.4g}" for k in ("loss", "eval_loss", "eval_accuracy") if k in row)
        self._bar.update(0, figures)
        part = row["step"] * self.lines // self._total
        if not sys.stderr.isatty() and (part > self._shown or "eval_loss" in row):
            self._shown = part
            self.log(f"{self.label}: step {row['step']}/{self._total}  {figures}")


class ProgressCallback(TrainerCallback):
    """Writes metrics.jsonl, marks whole checkpoints, stops when asked to."""

    def __init__(
        self,
        folder: Path,
        metrics: Path,
        keep: int,
        reporter: Reporter,
    ) -> None:
        self.folder, self.metrics, self.keep, self.reporter = folder, metrics, keep, reporter
        self.rows: list[dict[str, Any]] = []
        self.stop: threading.Event = threading.Event()
        """Set: save a checkpoint after this step, and end."""
        self._appender: Appender | None = None

    def close(self) -> None:
        if self._appender is not None:
            self._appender.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.rows = [row for logs in state.log_history if (row := _row(logs, logs["step"]))]
        write_jsonl(self.metrics, self.rows)
        self._appender = Appender(self.metrics)
        self.reporter.start(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        last = state.global_step >= state.max_steps
        if last:
            control.should_save = False  # the model itself is saved next; a checkpoint always has steps left
        elif self.stop.is_set():
            control.should_save = control.should_training_stop = True
        if last or control.should_save:
            control.should_log = True  # so that no row spans a checkpoint
        self.reporter.step()

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        row = _row(given["logs"], state.global_step)
        if not row:
            return
        for name, value in row.items():
            if not math.isfinite(value):
                raise RlgfError(
                    f"training diverged: {name} is {value} at step {state.global_step}",
                    hint="lower optim.learning_rate, or look for damaged examples",
                )
        assert self._appender is not None
        self.rows.append(row)
        self._appender.write(row)
        self.reporter.row(row)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        mark_complete(self.folder / f"checkpoint-{state.global_step}")
        for old in sorted(_complete(self.folder), key=_step_of)[: -self.keep]:
            (old / COMPLETE).unlink()
            shutil.rmtree(old)


def _row(logs: Mapping[str, Any], step: int) -> dict[str, Any]:
    figures = {name: float(logs[name]) for name in ROWS if name in logs and name not in ("step", "epoch")}
    return {"step": step, "epoch": logs.get("epoch", 0.0), **figures} if figures else {}
