"""Joins the processes that a launcher started into one run."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from datetime import timedelta

import psutil
import torch

from rlgf_cli.config.train import ParallelConfig
from rlgf_cli.errors import UserError
from rlgf_cli.training.parallel.fsdp import ShardedProcesses
from rlgf_cli.training.parallel.processes import SINGLE, Processes

_PATIENCE = timedelta(hours=6)
"""The longest wait of a process for the others: a guide that does not answer may keep one of them busy for long."""


def join(config: ParallelConfig, device: str) -> Processes:
    """Join the other processes that ``torchrun``, ``accelerate launch`` or ``--num-processes`` started.

    Raises UserError where another number of processes runs than was asked for.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started == 1:
        _check_count(config.num_processes or _requested_of_accelerate(), 1)
        return SINGLE
    if device == "mps":
        raise UserError("several processes need cuda or the cpu", hint="--device cpu, or one process")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UserError(
            "DeepSpeed is not one of the ways to shard here", hint="--set parallel.strategy=fsdp shards the same states"
        )
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if on_cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    _end_with_launcher()
    from accelerate import PartialState

    state = PartialState(cpu=on_cpu, timeout=_PATIENCE)
    _check_count(started, state.num_processes)
    _check_count(config.num_processes, state.num_processes)
    if config.strategy == "ddp":
        return Processes(state.process_index, state.num_processes)
    return ShardedProcesses(state.process_index, state.num_processes)


def _requested_of_accelerate() -> int | None:
    """The number of processes on the command line of ``accelerate launch``, where it started this process alone."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return None
    try:
        parent = psutil.Process().parent()
        arguments = [word.replace("-", "_") for word in parent.cmdline()] if parent is not None else []
    except psutil.Error:
        return None
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if word == "_m" and following == "rlgf_cli":
            return None
        name, _, value = word.partition("=")
        if name in ("__num_processes", "_n") and (value or following).isdigit():
            return int(value or following)
    return None


def _check_count(requested: int | None, running: int) -> None:
    if requested is not None and requested != running:
        raise UserError(
            f"{requested} processes were asked for and {running} run{'s' if running == 1 else ''}",
            hint="accelerate's launcher starts only one on a CPU, or several that do not know each other; "
            f"rlgf train --num-processes {requested}, or torchrun --nproc_per_node {requested} -m rlgf_cli train, "
            "starts them",
        )


def _end_with_launcher() -> None:
    """End this process when rlgf's launcher is killed (on Linux alone)."""
    if "RLGF_LAUNCHER" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
