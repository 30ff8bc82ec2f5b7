"""Shared by ``sft`` and ``train-reward``: the Trainer's settings, and a fit that logs, stops and resumes."""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainingArguments

from rlgf_cli import signals
from rlgf_cli.artifacts.checkpoints import is_complete, mark_complete
from rlgf_cli.artifacts.disk import os_errors
from rlgf_cli.config.supervised import SupervisedConfig
from rlgf_cli.errors import Interrupted, UserError
from rlgf_cli.models.device import warn_of_slow_bfloat16
from rlgf_cli.supervised.callback import ProgressCallback, Reporter, last_checkpoint, mean_loss, remove_torn


def check_settings(config: SupervisedConfig, device: torch.device) -> None:
    """Refuse settings that the Trainer would refuse late, or follow wrongly without a message."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("this stage runs in one process", hint="start it without torchrun or accelerate launch")
    if device.index:
        raise UserError(
            f"the Trainer uses the first visible GPU, not {device}",
            hint=f"CUDA_VISIBLE_DEVICES={device.index} and --device cuda",
        )
    if config.model.load_in_4bit and not config.trains_adapter:
        raise UserError("4-bit weights cannot be trained", hint="--use-peft trains a LoRA on top of them")
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
    warn_of_slow_bfloat16(device, dtype)
    optim = config.optim
    # "constant" ignores the warmup
    schedule = "constant_with_warmup" if optim.schedule == "constant" and optim.warmup_steps else optim.schedule
    checkpointing: dict[str, Any] = {"gradient_checkpointing": config.gradient_checkpointing}
    if "activation_checkpointing" in kind.__dataclass_fields__:  # the newer name; TRL reads the old one
        checkpointing["activation_checkpointing"] = config.gradient_checkpointing
    arguments = kind(
        output_dir=str(folder),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        **checkpointing,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        optim="adamw_torch",
        learning_rate=optim.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=optim.warmup_steps,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,  # True replaces a NaN loss by an older one
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


def cross_entropy(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Mean negative log-likelihood per label; over the accumulated batch, where its label count is given.

    logits [..., C], labels [...] with -100 where there is nothing to learn.
    """
    total = torch.nn.functional.cross_entropy(
        outputs.logits.float().flatten(0, -2), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    return total / (num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum())


class WithoutModelCard:
    """A mixin before a trainer of TRL, which writes a model card beside every checkpoint; the run has one card."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        pass


def save_start(folder: Path, save: Callable[[Path], None]) -> None:
    """Save random initial weights and a trained tokenizer once: a resumed run must not depend on making them again."""
    if not is_complete(folder):
        save(folder)
        mark_complete(folder)


@contextmanager
def _use_cache_restored(model: Any) -> Iterator[None]:
    """Restore ``use_cache`` in the model's config, which the Trainer sets to False: generating needs it."""
    before = getattr(model.config, "use_cache", None)
    try:
        yield
    finally:
        if before is not None:
            model.config.use_cache = before


def fit(
    model: Any,
    make_trainer: Callable[[], Any],
    checkpoints: Path,
    *,
    metrics: Path,
    keep: int,
    reporter: Reporter,
) -> dict[str, Any]:
    """Train to the end, from the newest whole checkpoint on, and evaluate on the held-out data, if there is any.

    ``metrics`` gets one row per logged step; ``keep`` checkpoints stay. Returns ``train_loss``, ``steps`` and
    the last ``eval_*`` figures. The first signal (see :mod:`rlgf_cli.signals`)
    saves a checkpoint and raises Interrupted or StoppedEarly; a loss that is not finite raises RlgfError.
    """
    with _use_cache_restored(model):
        return _fit(make_trainer(), checkpoints, metrics, keep, reporter)


def _fit(trainer: Any, folder: Path, metrics: Path, keep: int, reporter: Reporter) -> dict[str, Any]:
    resume = last_checkpoint(folder)
    remove_torn(folder)
    trainer.remove_callback(PrinterCallback)

    def announce(name: str) -> None:
        reporter.log(f"{name}: finishing this step and saving; a second one ends at once")

    with closing(ProgressCallback(folder, metrics, keep, reporter)) as callback:
        trainer.add_callback(callback)
        try:
            with (
                reporter,
                signals.stoppable(announce, heed_ignored=True) as callback.stop,
                _disk_errors(folder),
                _tied_head_filtered(trainer.model),
            ):
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
                state = trainer.state
                if callback.stop.is_set() and state.global_step < state.max_steps:
                    raise Interrupted(
                        f"stopped at step {state.global_step} of {state.max_steps}; a checkpoint was saved",
                        where=str(folder),
                        hint="the same command with --resume goes on",
                    )
        finally:
            remove_torn(folder)
        evaluated = any("eval_loss" in row and row["step"] == state.global_step for row in callback.rows)
        if trainer.eval_dataset is not None and not evaluated:
            trainer.evaluate()
    evals = [row for row in callback.rows if "eval_loss" in row]
    return {
        "train_loss": mean_loss(callback.rows),
        "steps": state.global_step,
        **({k: v for k, v in evals[-1].items() if k.startswith("eval_")} if evals else {}),
    }


@contextmanager
def _tied_head_filtered(model: Any) -> Iterator[None]:
    """Drop the Trainer's warning on resuming that the LM head is missing, where it shares the embeddings' weights."""
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    logger = logging.getLogger("transformers.trainer")

    def show(record: logging.LogRecord) -> bool:
        return not (tied and "missing keys in the checkpoint" in record.getMessage())

    logger.addFilter(show)
    try:
        yield
    finally:
        logger.removeFilter(show)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Raise OSError on a full disk, where torch.save inside the Trainer raises a RuntimeError about its position."""
    with os_errors(folder):
        try:
            yield
        except RuntimeError as error:
            writer = "inline_container" in str(error) or "PytorchStreamWriter" in str(error)
            if writer and shutil.disk_usage(folder).free < 1 << 20:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
            raise
