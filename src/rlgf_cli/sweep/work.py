"""The processes of a sweep's runs: start, supervision, interruption, and the state of each.

Stages exchange data only on disk: a run's ``run.json`` decides what is left to do, and a crash concerns one run alone.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from rlgf_cli.artifacts.jsonl import read_json
from rlgf_cli.artifacts.rundir import now
from rlgf_cli.ledger.shared_budget import SharedBudget
from rlgf_cli.signals import Stop

RLGF = [sys.executable, "-m", "rlgf_cli"]
"""The beginning of every command: the rlgf of this interpreter."""
POLL_S = 0.1
_KILL_S = 60.0
"""Seconds that interrupted runs have to save when the sweep itself must end."""

State = Literal["waiting", "running", "done", "failed", "stopped", "interrupted"]


def status_of(folder: Path) -> str | None:
    """The status in a run folder's ``run.json``; None without one."""
    run_json = folder / "run.json"
    return read_json(run_json).get("status") if run_json.is_file() else None


@dataclass(frozen=True)
class Step:
    """One command of a cell: its arguments for ``rlgf``, its run folder, and whether it is done.

    ``billed``: a guide or judge costs money, at most ``cap`` dollars by its own config. ``iterations``: of a training.
    """

    words: tuple[str, ...]
    folder: Path
    is_done: Callable[[], bool]
    billed: bool = False
    cap: float | None = None
    iterations: int = 0

    def command(self) -> str:
        return shlex.join(["rlgf", *self.words])


@dataclass
class Cell:
    """One run of the table: a system with one seed. ``runs``: the ids of its runs in the spend ledger."""

    system: str
    seed: int | None
    name: str
    steps: Sequence[Step]
    log: Path
    state: State = "waiting"
    message: str = ""
    seconds: float = 0.0
    began: str | None = None
    ended: str | None = None
    runs: set[str] = field(default_factory=set)

    @property
    def title(self) -> str:
        return self.system if self.seed is None else f"{self.system}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """The folder of its last step, the evaluation."""
        return self.steps[-1].folder

    @property
    def is_done(self) -> bool:
        return all(step.is_done() for step in self.steps)

    def next_step(self) -> Step | None:
        return next((step for step in self.steps if not step.is_done()), None)

    def iterations_done(self) -> int:
        """The iterations of its training that have a row."""
        return sum(step.iterations if step.is_done() else rows(step.folder) for step in self.steps if step.iterations)


def rows(folder: Path) -> int:
    """The number of rows that a training run has written."""
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


class Child:
    """A running command of a cell; its output is appended to the cell's log."""

    def __init__(self, cell: Cell, step: Step, more: Sequence[str], environment: Mapping[str, str]) -> None:
        self.cell, self.step, self.interrupts = cell, step, 0
        self.began = time.monotonic()
        words = [*step.words, *more]
        cell.log.parent.mkdir(parents=True, exist_ok=True)
        with cell.log.open("ab") as log:
            log.write(f"$ {shlex.join(['rlgf', *words])}\n".encode())
            log.flush()
            self._from = log.tell()
            # a session of its own: Ctrl-C reaches the sweep alone, which interrupts each run once
            self.process = subprocess.Popen(
                [*RLGF, *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def interrupt(self, number: int = signal.SIGINT) -> None:
        self.interrupts += 1
        if self.process.poll() is None:
            self.process.send_signal(number)

    def error_message(self) -> str:
        """The first line of its error; the last line of its output where it ended without one."""
        with self.cell.log.open("rb") as log:
            log.seek(self._from)
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        kinds = ("error: ", "stopped: ", "interrupted: ")
        message = next((line for line in lines if line.startswith(kinds)), lines[-1] if lines else "no message")
        code = self.process.returncode
        killed = f"killed by {signal.Signals(-code).name}; " if code is not None and code < 0 else ""
        return killed + message.removeprefix("error: ").removeprefix("stopped: ")


def environment(jobs: int) -> dict[str, str]:
    """The environment of the runs: ``jobs`` at once share the cores, unless OMP_NUM_THREADS is set."""
    given = dict(os.environ)
    if jobs > 1:
        given.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    return given


def foreign_processes(folders: Iterable[Path]) -> dict[Path, psutil.Process]:
    """The processes of an earlier, killed sweep that still write to these folders."""
    wanted = {str(folder): folder for folder in folders}
    here = str(Path.cwd())
    processes: dict[Path, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            output = next((words[n + 1] for n, word in enumerate(words[:-1]) if word == "-o"), None)
            if output in wanted and process.cwd() == here and process.status() != psutil.STATUS_ZOMBIE:
                processes[wanted[output]] = process
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return processes


def run_cells(
    cells: Sequence[Cell],
    *,
    jobs: int,
    shared_budget: SharedBudget,
    stop: Stop,
    changed: Callable[[Cell], None],
    tick: Callable[[Sequence[Cell]], None],
) -> None:
    """Run the cells' steps, ``jobs`` at once, until all are done or have failed, or ``stop`` is set.

    ``changed`` is called with every cell whose state changes, ``tick`` ten times a second with the running ones. A cell
    that its share of the budget stopped is tried again when the others have left more. No child outlives this function.
    """
    queue = deque(cell for cell in cells if cell.state != "done")
    shared = environment(jobs)
    children: list[Child] = []

    def start(cell: Cell) -> None:
        step = cell.next_step()
        if step is None:
            cell.state, cell.ended = "done", now()
        else:
            more = ["--resume"] if status_of(step.folder) is not None else []
            if step.billed and shared_budget.total is not None:
                shared_budget.settle(cell.name, cell.runs)
                sharers = min(jobs - len(children), len(queue) + 1)
                lent = shared_budget.lend(cell.name, sharers)
                more += ["--max-cost-usd", f"{lent if step.cap is None else min(lent, step.cap):.9f}"]
            cell.state, cell.began, cell.message = "running", cell.began or now(), ""
            children.append(Child(cell, step, more, shared))
        changed(cell)

    def finish(child: Child) -> None:
        cell, code = child.cell, child.process.returncode
        cell.seconds = round(cell.seconds + time.monotonic() - child.began, 1)
        if child.step.billed:
            record_run_id(cell, child.step)
            shared_budget.settle(cell.name, cell.runs)
        if code == 0 and child.step.is_done():
            cell.state = "waiting"
            queue.appendleft(cell)
            return
        ended: dict[int, State] = {3: "stopped", 130: "interrupted"}
        cell.state, cell.message, cell.ended = ended.get(code, "failed"), child.error_message(), now()
        changed(cell)

    try:
        while queue or children:
            for child in [child for child in children if child.process.poll() is not None]:
                children.remove(child)
                finish(child)
            if stop.is_set():
                for child in children:
                    if not child.interrupts:
                        child.interrupt(signal.Signals[stop.received or "SIGINT"])
                if not children:
                    break
            else:
                while queue and len(children) < jobs:
                    start(queue.popleft())
                if not queue and not children:
                    queue.extend(
                        cell for cell in cells if cell.state == "stopped" and shared_budget.has_more(cell.name)
                    )
                    continue
            for child in children:
                if child.step.billed:
                    record_run_id(child.cell, child.step)
            tick([child.cell for child in children])
            time.sleep(POLL_S)
    finally:
        _end(children)


def record_run_id(cell: Cell, step: Step) -> None:
    """Record a run's id while its folder exists: its charges count even if the folder is removed."""
    run_json = step.folder / "run.json"
    if run_json.is_file():
        cell.runs.add(read_json(run_json)["run_id"])


def _end(children: Sequence[Child]) -> None:
    """Interrupt the children that still run, for example after an error in the sweep itself, and wait for them."""
    for child in children:
        child.interrupt()
    until = time.monotonic() + _KILL_S
    for child in children:
        try:
            child.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()


def summary(cells: Sequence[Cell]) -> dict[str, int]:
    """The number of cells in each state."""
    return dict(Counter(cell.state for cell in cells))


def as_json(cell: Cell) -> dict[str, Any]:
    """A cell as ``sweep.json`` has it."""
    return {
        "system": cell.system,
        "seed": cell.seed,
        "name": cell.name,
        "state": cell.state,
        "said": cell.message,
        "began": cell.began,
        "ended": cell.ended,
        "seconds": cell.seconds,
        "runs": sorted(cell.runs),
        "commands": [step.command() for step in cell.steps],
        "log": str(cell.log),
    }
