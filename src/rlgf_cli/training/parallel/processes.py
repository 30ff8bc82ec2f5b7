"""The processes of a data-parallel run, and their communication.

Only the models' work is divided. Everything small - episodes, log-probabilities, values, counts - is gathered and is
the same on every process, so whitening, KL control, denominators and figures are global. A process writes the episodes
of its own prompts, scores its own texts, and takes its own part of every minibatch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from rlgf_cli.errors import RlgfError

T = TypeVar("T")

_BUCKET = 16 * 1024 * 1024
"""Numbers in one message of gradients."""


class Processes:
    """The processes that work on one run; by itself a single one, for which every method is trivial."""

    lockstep = False
    """Whether all processes must make the same forward and backward passes in the update."""

    loss_scale = 1
    """Factor of the loss, so that the processes' gradients add up."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def main(self) -> bool:
        """Whether this is the process that writes to disk and to the console."""
        return self.rank == 0

    def own(self, items: Sequence[T]) -> list[T]:
        """Every size-th item, from the rank-th on."""
        return list(items[self.rank :: self.size])

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """As :meth:`own`, of a tensor's first dimension."""
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

    # communication

    def gather(self, value: T) -> list[T]:
        """Every process's value, in order of rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """The main process's value."""
        if self.size == 1:
            return value
        box: list[Any] = [value if self.main else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def first(self, value: T | None) -> T | None:
        """The first value that is not None, in order of rank."""
        return next((one for one in self.gather(value) if one is not None), None)

    def raise_together(self, work: Callable[[], T]) -> T:
        """This process's result. An error in one process is raised by all of them, so that they end alike."""
        if self.size == 1:
            return work()
        error: Exception | None = None
        try:
            result = work()
        except (RlgfError, OSError) as caught:
            error = caught
        for raised in self.gather(error):
            if raised is not None:
                raise raised_by_all(raised)
        return result

    def on_main(self, work: Callable[[], T]) -> T | None:
        """The result of the main process while the others wait; None on those."""
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

    # states that may be in shards (see fsdp.py); here every process has the whole

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
        """Wait for the others at the end of a run, and leave the process group."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()


SINGLE = Processes()


def raised_by_all(error: Exception) -> Exception:
    """Mark an error that every process raises: one of them prints it."""
    error.shared = True  # type: ignore[attr-defined]
    return error


@contextmanager
def concluded(processes: Processes, record: Callable[[Processes], None]) -> Iterator[None]:
    """Call ``record`` however the block ends, with the processes that reach its end together and can gather their
    figures: all, or, after an error that only this one raises, this one alone."""
    together = SINGLE
    try:
        yield
        together = processes
    except RlgfError as error:
        together = processes if error.shared else SINGLE
        raise
    finally:
        record(together)


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
