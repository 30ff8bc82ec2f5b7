"""The processes of a run: who they are, and what they tell each other.

Only the models' work is divided. Everything small - episodes, log-probabilities, values, counts - is put together
again and is the same on every process, so whitening, KL control, denominators and figures are global without further
ado. A process writes the episodes of its own prompts, scores its own rows, and takes its own share of every minibatch.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
from torch import distributed as dist

from rlgf_cli.config.train import ParallelConfig
from rlgf_cli.errors import RlgfError, UserError

T = TypeVar("T")

_PATIENCE = timedelta(hours=6)
"""How long a process waits for the others: a guide that is out may keep one of them busy for long."""
_BUCKET = 16 * 1024 * 1024
"""Numbers in one message of gradients."""


class Processes:
    """The processes that work on one run; by itself a single one, for which every method is trivial."""

    lockstep = False
    """Whether all processes must make the same forward and backward passes in the update."""

    loss_scale = 1
    """What a loss is multiplied by, so that the gradients that come of it add up."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def main(self) -> bool:
        """Whether this is the one that writes to disk and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Every size-th item, from the rank-th on."""
        return list(items[self.rank :: self.size])

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """As :meth:`share`, of a tensor's first dimension."""
        return index[self.rank :: self.size]

    def prompts(self, keys: Sequence[str]) -> list[int]:
        """This process's positions of a step's prompts.

        All episodes of one prompt are with one process: a group shares its roll-in, and the number of the next guide
        text follows from how often this prompt used the guide before.
        """
        loads, owners = [0] * self.size, dict.fromkeys(keys, -1)
        for key in owners:
            owners[key] = loads.index(min(loads))
            loads[owners[key]] += keys.count(key) if len(owners) < len(keys) else 1
        return [i for i, key in enumerate(keys) if owners[key] == self.rank]

    # telling

    def gather(self, value: T) -> list[T]:
        """Every process's value, in order of rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def broadcast(self, value: T) -> T:
        """The main process's value."""
        if self.size == 1:
            return value
        box: list[Any] = [value if self.main else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def any(self, flag: bool) -> bool:
        """Whether it holds on one of the processes at least."""
        return any(self.gather(flag))

    def raise_together(self, work: Callable[[], T]) -> T:
        """This process's result. What goes wrong on one process is raised by all of them, so that they end alike."""
        if self.size == 1:
            return work()
        error: Exception | None = None
        try:
            result = work()
        except (RlgfError, OSError) as caught:
            error = caught
        for found in self.gather(error):
            if found is not None:
                raise shared(found)
        return result

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Let the main process work while the others wait; None on those."""
        return self.raise_together(lambda: work() if self.main else None)

    # tensors

    def add_up(self, tensors: Iterable[torch.Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def add_gradients(self, parameters: Sequence[torch.Tensor]) -> None:
        """Replace gradients by their sum over the processes: each differentiated its share of one global loss.

        A parameter that has a gradient on no process keeps none: the optimizer leaves it alone, as in one process.
        """
        if self.size == 1:
            return
        has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
        dist.all_reduce(has)
        for bucket in _buckets([p for p, n in zip(parameters, has.tolist(), strict=True) if n]):
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
            dist.all_reduce(flat)
            parts = flat.split([p.numel() for p in bucket])
            for parameter, part in zip(bucket, parts, strict=True):
                parameter.grad = part.view_as(parameter).clone()

    def spread(self, model: torch.nn.Module) -> None:
        """Give every process the main one's weights."""
        if self.size > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.detach(), src=0)

    # states that may be in shards (see training.sharding); here every process has the whole

    def prepare(self, model: Any) -> None:
        """Shard a model in place, before its optimizer is made."""

    def gathered(self, model: Any) -> AbstractContextManager[None]:
        """Within it, forward passes without a gradient need no other process."""
        return nullcontext()

    def whole(self, value: T) -> T:
        """A state without shards, where the main process can save it."""
        return value

    def like(self, value: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
        """A whole tensor, sharded as ``current`` is."""
        return value

    def leave(self) -> None:
        """The end of a run that all processes came to."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()


SINGLE = Processes()


def shared(error: Exception) -> Exception:
    """Mark an error that every process raises: one of them tells it."""
    error.shared = True  # type: ignore[attr-defined]
    return error


def join(config: ParallelConfig, device: str) -> Processes:
    """Meet the other processes that ``torchrun``, ``accelerate launch`` or ``--num-processes`` started.

    Raises UserError where another number of processes runs than was asked for.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started == 1:
        _check_count(config.num_processes or _asked_of_accelerate(), 1)
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
    from rlgf_cli.training.parallel.fsdp import ShardedProcesses

    return ShardedProcesses(state.process_index, state.num_processes)


def _asked_of_accelerate() -> int | None:
    """What the command line of ``accelerate launch`` asked for, where it started this process as the only one."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return None
    try:
        parent = psutil.Process().parent()
        words = [word.replace("-", "_") for word in parent.cmdline()] if parent is not None else []
    except psutil.Error:
        return None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "_m" and following == "rlgf_cli":
            return None
        name, _, value = word.partition("=")
        if name in ("__num_processes", "_n") and (value or following).isdigit():
            return int(value or following)
    return None


def _check_count(asked: int | None, running: int) -> None:
    if asked is not None and asked != running:
        raise UserError(
            f"{asked} processes were asked for and {running} run{'s' if running == 1 else ''}",
            hint="accelerate's launcher starts only one on a CPU, or several that do not know each other; "
            f"rlgf train --num-processes {asked}, or torchrun --nproc_per_node {asked} -m rlgf_cli train, starts them",
        )


def _end_with_launcher() -> None:
    """Where our own launcher is killed, its processes end too (Linux alone can do this)."""
    if "RLGF_LAUNCHER" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _buckets(parameters: Iterable[torch.Tensor]) -> Iterable[list[torch.Tensor]]:
    """Parameters of one type, some 16 million numbers at a time."""
    bucket: list[torch.Tensor] = []
    for p in parameters:
        if bucket and (p.dtype != bucket[0].dtype or sum(q.numel() for q in bucket) + p.numel() > _BUCKET):
            yield bucket
            bucket = []
        bucket.append(p)
    if bucket:
        yield bucket
