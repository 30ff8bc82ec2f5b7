"""A Python reward in processes of its own: for functions that take long, texts are divided among them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from rlgf_cli.errors import RlgfError
from rlgf_cli.protocols import Example, Score
from rlgf_cli.rewards.python import PythonReward

_PARTS = 4
"""Pieces of work per process: texts take different times."""

_mine: PythonReward | None = None
"""The reward of a worker process."""


class WorkersReward:
    """As :class:`PythonReward`, which it is made of. Each of ``workers`` processes imports the file once and keeps its
    module's state to itself; a text's score must not depend on the texts before it.

    :meth:`begin` returns at once, so that what comes next goes on meanwhile.
    """

    def __init__(self, target: str, params: Mapping[str, Any], workers: int) -> None:
        self._here = PythonReward(target, params)  # its signature is checked where the user sees it
        self.name, self.signature = self._here.name, self._here.signature
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None
        self._made = (target, dict(params))

    def begin(self, examples: Sequence[Example], texts: Sequence[str]) -> Callable[[], list[Score]]:
        """Start scoring; what is returned waits for the scores."""
        size = max(1, -(-len(texts) // (self._workers * _PARTS)))
        if self._pool is None:
            # not forked: this process has threads, and perhaps a GPU
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._workers, spawn, initializer=_start, initargs=self._made)
        pending: list[Future[list[Score]]] = []
        try:
            for at in range(0, len(texts), size):
                pending.append(self._pool.submit(_score, examples[at : at + size], texts[at : at + size]))
        except BrokenProcessPool:
            raise self._died() from None

        def scores() -> list[Score]:
            try:
                return [score for part in pending for score in part.result()]
            except BrokenProcessPool:
                raise self._died() from None
            finally:
                for part in pending:
                    part.cancel()

        return scores

    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> list[Score]:
        return self.begin(examples, texts)()

    def _died(self) -> RlgfError:
        return RlgfError(
            f"a process of the reward {self.name!r} ended while it scored",
            where=str(self._here.path),
            hint="the function ended it, or memory ran out: see the messages above, or use fewer reward_workers",
        )


def _start(target: str, params: Mapping[str, Any]) -> None:
    global _mine
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that saves
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _mine = PythonReward(target, params)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _score(examples: Sequence[Example], texts: Sequence[str]) -> list[Score]:
    assert _mine is not None
    return _mine.score(examples, texts)
