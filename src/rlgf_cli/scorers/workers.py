"""A Python reward in worker processes: the texts of slow functions are divided among them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from rlgf_cli import signals
from rlgf_cli.errors import Interrupted, RlgfError
from rlgf_cli.protocols import Example, Reward, Score
from rlgf_cli.scorers.python import PythonReward

_mine: PythonReward | None = None
"""The reward of a worker process."""


class WorkersReward(Reward):
    """A :class:`PythonReward` in ``workers`` processes. Each imports the file once and has its own module state; a
    text's score must not depend on the texts before it.
    """

    prefetches = True

    def __init__(self, target: str, params: Mapping[str, Any], workers: int) -> None:
        self._here = PythonReward(target, params)  # its signature is checked where the user sees it
        self.name, self.signature = self._here.name, self._here.signature
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None
        self._made = (target, dict(params))
        self._begun: dict[tuple[str, str], deque[Future[Score]]] = {}

    def prefetch(self, examples: Sequence[Example], texts: Sequence[str]) -> None:
        """Begin with texts that the next :meth:`score` will be asked for; returns at once."""
        if self._pool is None:
            # not forked: this process has threads, and perhaps a GPU
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, spawn, initializer=_start, initargs=self._made)
        try:
            for example, text in zip(examples, texts, strict=True):
                begun = self._begun.setdefault((example.id, text), deque())
                begun.append(self._pool.submit(_score, example, text))
        except BrokenProcessPool:
            raise self._died() from None

    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> list[Score]:
        begun = Counter({key: len(futures) for key, futures in self._begun.items()})
        keys = [(example.id, text) for example, text in zip(examples, texts, strict=True)]
        missing = []
        for i, key in enumerate(keys):
            begun[key] -= 1
            if begun[key] < 0:
                missing.append(i)
        self.prefetch([examples[i] for i in missing], [texts[i] for i in missing])
        futures = [self._begun[key].popleft() for key in keys]
        self._begun = {key: left for key, left in self._begun.items() if left}
        try:
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise self._died() from None
        finally:
            for future in futures:  # those behind one that failed
                future.cancel()

    def _died(self) -> RlgfError:
        if signals.received():  # a scheduler sends it to every process
            return Interrupted("the processes of the reward were ended")
        return RlgfError(
            f"a process of the reward {self.name!r} ended while it scored",
            where=str(self._here.path),
            hint="the function ended it, or memory ran out: see the messages above, or use fewer reward_workers",
        )


def _start(target: str, params: Mapping[str, Any]) -> None:
    global _mine
    for number in {signal.SIGINT, *signals.ENDING} - {signal.SIGTERM}:  # by SIGTERM a pool ends its processes
        signal.signal(number, signal.SIG_IGN)  # they are for the process that saves
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _mine = PythonReward(target, params)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _score(example: Example, text: str) -> Score:
    assert _mine is not None
    return _mine.score([example], [text])[0]
