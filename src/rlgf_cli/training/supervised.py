"""What ``sft`` and ``train-reward`` share: transformers' Trainer, made to log, stop and resume as rlgf does.

Checkpoints are the Trainer's own (``checkpoints/checkpoint-N``). A file COMPLETE, written last, says that one
is whole; older ones are removed only after that.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from rlgf_cli.artifacts.jsonl import Appender, write_json, write_jsonl
from rlgf_cli.config.supervised import SupervisedConfig
from rlgf_cli.errors import Interrupted, RlgfError, UserError
from rlgf_cli.training.checkpoint import is_complete

COMPLETE = "COMPLETE"
ROWS: dict[str, str] = {
    "step": "optimizer steps so far",
    "epoch": "passes over the data so far",
    "loss": "mean training loss since the last row (sft: nats per response token)",
    "learning_rate": "learning rate of this step",
    "grad_norm": "gradient norm of this step, before clipping",
    "entropy": "mean entropy of the next-token distribution on the response (nats)",
    "mean_token_accuracy": "share of response tokens that were the likeliest one",
    "eval_loss": "loss on the held-out data",
    "eval_accuracy": "accuracy on the held-out data (train-reward)",
    "eval_entropy": "entropy, on the held-out data",
    "eval_mean_token_accuracy": "token accuracy, on the held-out data",
}
"""What a row of a supervised stage's metrics.jsonl may hold. Times and running totals are left out: a resumed
run writes the rows of an undisturbed one."""


def check_settings(config: SupervisedConfig, device: torch.device) -> None:
    """Refuse what the Trainer would refuse late or do silently wrong."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("this stage runs in one process", hint="start it without torchrun or accelerate launch")
    if device.index:
        raise UserError(
            f"the Trainer uses the first visible GPU, not {device}",
            hint=f"CUDA_VISIBLE_DEVICES={device.index} and --device cuda",
        )
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise UserError(f"{config.report_to} is not installed", hint="pip install 'rlgf-cli[trackers]'")


def training_arguments(
    kind: type[TrainingArguments],
    config: SupervisedConfig,
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    **more: Any,
) -> Any:
    """The Trainer's arguments for a stage's config. ``folder`` receives the checkpoints."""
    optim = config.optim
    # "constant" ignores the warmup
    schedule = "constant_with_warmup" if optim.schedule == "constant" and optim.warmup_steps else optim.schedule
    arguments = kind(
        output_dir=str(folder),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        gradient_checkpointing=config.gradient_checkpointing,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        optim="adamw_torch",
        learning_rate=optim.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=optim.warmup_steps,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,  # it would replace a loss that is not a number by an older one
        eval_strategy="steps" if config.eval_steps else "no",
        eval_steps=config.eval_steps,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        seed=config.seed,
        data_seed=config.seed,
        bf16=dtype == torch.bfloat16,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        report_to=config.report_to,
        run_name=Path(config.output).name,
        disable_tqdm=True,
        **more,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several visible GPUs would mean nn.DataParallel
    return arguments


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; one without COMPLETE does not exist."""
    return max(_complete(folder), key=_step_of, default=None)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _complete(folder: Path) -> list[Path]:
    return [c for c in folder.glob("checkpoint-*") if is_complete(c)]


def mark_complete(folder: Path) -> None:
    """Write COMPLETE: every file of the folder with its size."""
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    write_json(folder / COMPLETE, {"files": files})


def fit(
    trainer: Any,
    *,
    metrics: Path,
    keep: int,
    resume: Path | None,
    reporter: Reporter,
) -> dict[str, Any]:
    """Train to the end and score the held-out data, if the trainer has any.

    ``metrics`` gets one row per logged step; ``keep`` checkpoints stay. Returns ``train_loss``, ``steps`` and
    the last ``eval_*`` figures. The first Ctrl-C saves a checkpoint and raises Interrupted; a loss that is
    not finite raises RlgfError.
    """
    folder = Path(trainer.args.output_dir)
    for torn in set(folder.glob("checkpoint-*")) - set(_complete(folder)):
        shutil.rmtree(torn)
    watch = _Watch(folder, metrics, keep, reporter)
    trainer.add_callback(watch)
    trainer.remove_callback(PrinterCallback)
    with reporter, _first_interrupt(watch.ask_to_stop):
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    state = trainer.state
    if watch.stop and state.global_step < state.max_steps:
        raise Interrupted(
            f"interrupted at step {state.global_step} of {state.max_steps}; a checkpoint was saved",
            where=str(folder),
            hint="the same command with --resume goes on",
        )
    if trainer.eval_dataset is not None and not any(
        "eval_loss" in row and row["step"] == state.global_step for row in watch.rows
    ):
        trainer.evaluate()
    watch.close()
    evals = [row for row in watch.rows if "eval_loss" in row]
    return {
        "train_loss": _mean_loss(watch.rows),
        "steps": state.global_step,
        **({k: v for k, v in evals[-1].items() if k.startswith("eval_")} if evals else {}),
    }


def _mean_loss(rows: list[dict[str, Any]]) -> float:
    """The mean over all steps of a run, resumed or not. A row stands for the steps since the last one."""
    total, last = 0.0, 0
    for row in rows:
        if "loss" in row:
            total += row["loss"] * (row["step"] - last)
            last = row["step"]
    return total / last


class Reporter:
    """What a person sees of the training: a bar on a terminal, some twenty lines elsewhere.

    ``progress(label, total)`` and ``log(text)`` are the console's; this layer knows no console.
    """

    lines = 20

    def __init__(
        self, label: str, progress: Callable[..., AbstractContextManager[Any]], log: Callable[[str], None]
    ) -> None:
        self.label, self._progress, self._log = label, progress, log
        self._stack = ExitStack()
        self._bar: Any = None
        self._total, self._shown = 1, -1

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, done: int, total: int) -> None:
        self._total = total
        self._bar = self._stack.enter_context(self._progress(self.label, total))
        self._bar.update(done)

    def step(self) -> None:
        self._bar.update(1)

    def row(self, row: Mapping[str, Any]) -> None:
        figures = "  ".join(f"{k} {row[k]:.4g}" for k in ("loss", "eval_loss", "eval_accuracy") if k in row)
        self._bar.update(0, figures)
        part = row["step"] * self.lines // self._total
        if not sys.stderr.isatty() and (part > self._shown or "eval_loss" in row):
            self._shown = part
            self._log(f"{self.label}: step {row['step']}/{self._total}  {figures}")


class _Watch(TrainerCallback):
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
        self.stop = False
        self._appender: Appender | None = None

    def ask_to_stop(self) -> None:
        self.stop = True

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
        elif self.stop:
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
    found = {name: float(logs[name]) for name in ROWS if name in logs and name not in ("step", "epoch")}
    return {"step": step, "epoch": logs.get("epoch", 0.0), **found} if found else {}


@contextmanager
def _first_interrupt(tell: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C calls ``tell``; the second one is a KeyboardInterrupt as ever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(*_: Any) -> None:
        signal.signal(signal.SIGINT, before)
        tell()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
