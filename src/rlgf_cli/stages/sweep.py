"""``rlgf sweep``: run the points of a grid as processes, and compare their systems in a table."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rlgf_cli import console
from rlgf_cli.artifacts.jsonl import atomic_text, read_json, write_json
from rlgf_cli.artifacts.records import SCHEMA_VERSION
from rlgf_cli.artifacts.resume import refuse_used
from rlgf_cli.artifacts.rundir import Existing, RunDir
from rlgf_cli.config.loader import Resolved
from rlgf_cli.config.recipes import Layer, as_yaml
from rlgf_cli.config.sweep import SweepConfig
from rlgf_cli.errors import Interrupted, RlgfError, StoppedEarly, UserError
from rlgf_cli.ledger.leases import this_process
from rlgf_cli.ledger.shared_budget import SharedBudget
from rlgf_cli.ledger.spend import charged_usd
from rlgf_cli.signals import Stop
from rlgf_cli.stages.session import StageSession
from rlgf_cli.sweep import work
from rlgf_cli.sweep.comparison import comparison_file, write_table
from rlgf_cli.sweep.plan import BASE, EVAL, Plan, make_plan, refuse_changed_points
from rlgf_cli.sweep.work import Cell

SWEEP = "sweep.json"
_POLL_S = 1.0
"""Seconds between two looks at the running points for the progress bar."""


@dataclass
class SweepResult:
    """The folder, the table in Markdown (None: nothing can be compared yet), and the error of the sweep, if any."""

    folder: Path
    cells: Sequence[Cell]
    markdown: str | None = None
    problem: RlgfError | None = None
    spent_usd: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "output": str(self.folder),
            "states": work.summary(self.cells),
            "spent_usd": self.spent_usd,
            "points": [work.as_json(cell) for cell in self.cells],
        }


def run(resolved: Resolved[SweepConfig], *, existing: Existing = "refuse") -> SweepResult:
    """Train and evaluate every point that is not done, then write the table.

    All configs and inputs are checked before the first run starts. A failed run does not stop the others: the result's
    ``problem`` names it. Raises Interrupted or StoppedEarly after a signal, when the running points have saved.
    """
    plan = make_plan(resolved)
    output = plan.output
    session = StageSession("sweep", resolved, existing, output=output)
    refuse_used(str(output), session.command, existing)
    if existing == "resume":
        refuse_changed_points(plan)
    orphans = work.foreign_processes(step.folder for cell in plan.cells for step in cell.steps)
    if orphans and existing != "resume":
        where, process = next(iter(orphans.items()))
        raise UserError(f"process {process.pid} still writes to this folder", where=str(where), hint="end it first")
    folder = session.claim()
    result = SweepResult(output, plan.cells)
    try:
        with folder.manifest.running():
            _begin(folder, resolved, plan)
            _run_points(folder, resolved.config, plan, result, orphans)
            result.markdown, failure = _try_table(resolved.config, plan)
            result.problem = _problem(plan) or failure
            folder.manifest.save(result=work.summary(plan.cells), spend={"charged_usd": result.spent_usd})
            if result.problem is not None:
                raise result.problem
    except RlgfError as error:
        if error is not result.problem:
            raise
    return result


def table(resolved: Resolved[SweepConfig]) -> SweepResult:
    """Write the table of the points that are done; no run is started, and a running sweep is not disturbed."""
    plan = make_plan(resolved)
    if not (plan.output / SWEEP).is_file():
        raise UserError("there is no sweep in it", where=str(plan.output), hint="rlgf sweep starts one")
    _restore(plan)
    return SweepResult(plan.output, plan.cells, write_table(resolved.config, plan, log=console.log))


def dry_run(resolved: Resolved[SweepConfig]) -> dict[str, Any]:
    """The commands of all points, and an estimate of guide texts and their cost; nothing is written."""
    plan = make_plan(resolved)
    calls, usd, known = 0, [0.0, 0.0, 0.0], True
    for training in plan.trainings.values():
        if not training.config.algorithm.spec().needs_guide:
            continue
        from rlgf_cli.runs.guide_costs import training_estimate

        estimate = training_estimate(training.config)
        calls += estimate["guide_calls"]
        if estimate["guide_calls"] and "usd" in estimate:
            known = known and estimate["usd"] is not None
            usd = [a + b for a, b in zip(usd, estimate["usd"] or usd, strict=True)]
    return {
        "runs": len(plan.trainings),
        "systems": len(plan.systems),
        "combinations_left_out": plan.expansion.left_out,
        "combinations_folded": plan.expansion.folded,
        "guide_calls_at_most": calls,
        "guide_usd": usd if known else None,
        "points": [{"name": c.name, "title": c.title, "commands": [s.command() for s in c.steps]} for c in plan.cells],
    }


def _begin(folder: RunDir, resolved: Resolved[SweepConfig], plan: Plan) -> None:
    """Record the files and the settings of the sweep, and restore the state of an earlier session."""
    tops = dict.fromkeys(Path(cell.name).parts[0] for cell in plan.cells)
    comparisons = [comparison_file(base) for base in plan.systems]
    for name in (SWEEP, "logs", *tops, "table.md", "table.csv", "table.html", *comparisons):
        folder.file(name)
    folder.write_config(resolved.to_json())
    for name, layer in ((BASE, plan.base), (EVAL, plan.evaluation)):
        with atomic_text(folder.file(name)) as stream:
            stream.write(_recipe(name, layer))
    if plan.expansion.folded or plan.expansion.left_out:
        console.log(
            f"{plan.expansion.folded} combinations of the grid are the same as another for their algorithm and run "
            f"once; {plan.expansion.left_out} are left out by rules"
        )
    if removed := _restore(plan):
        console.log(f"no longer in the grid, and left as they are: {', '.join(removed)}")
    for cell in plan.cells:
        for step in cell.steps:
            if step.billed:
                work.record_run_id(cell, step)


def _recipe(name: str, layer: Layer) -> str:
    files = dict.fromkeys(place.rpartition(":")[0] for place in layer.places.values())
    return f"# {name}: what the sweep began with, from {', '.join(files)}\n{as_yaml(layer.values)}"


def _restore(plan: Plan) -> list[str]:
    """Restore the state of the cells from ``sweep.json``; returns the names in it that the grid no longer has."""
    path = plan.output / SWEEP
    stored = {point["name"]: point for point in read_json(path)["points"]} if path.is_file() else {}
    for cell in plan.cells:
        point = stored.pop(cell.name, {})
        cell.runs.update(point.get("runs", []))
        cell.seconds, cell.began, cell.ended = point.get("seconds", 0.0), point.get("began"), point.get("ended")
        if cell.is_done:
            cell.state = "done"
        elif point.get("state") in ("failed", "stopped", "interrupted"):
            cell.state, cell.message = point["state"], point["said"]
    return list(stored)


def _run_points(
    folder: RunDir, config: SweepConfig, plan: Plan, result: SweepResult, orphans: Mapping[Path, Any]
) -> None:
    """Run the points that are not done; ``sweep.json`` is written at every change."""
    cells = plan.cells
    billed = [step.folder for cell in cells for step in cell.steps if step.billed]
    shared_budget = SharedBudget(config.budget_usd, partial(charged_usd, folders=billed))
    for cell in cells:
        shared_budget.settle(cell.name, cell.runs)
    reporter = _Reporter(cells, config.jobs)

    def save() -> None:
        result.spent_usd = round(shared_budget.spent(), 9)
        state = {
            "schema_version": SCHEMA_VERSION,
            "process": this_process(),
            "budget_usd": config.budget_usd,
            "spent_usd": result.spent_usd,
            "combinations_folded": plan.expansion.folded,
            "combinations_left_out": plan.expansion.left_out,
            "points": [work.as_json(cell) for cell in cells],
        }
        write_json(folder.path / SWEEP, state)

    def changed(cell: Cell) -> None:
        save()
        reporter.changed(cell)

    save()
    with console.interruptible("interrupting the runs at work, which save first") as stop:
        _wait_for(orphans, stop)
        for cell in cells:
            cell.state = "done" if cell.is_done else "waiting"
        reporter.skipped()
        with console.progress("sweep", reporter.total) as bar:
            bar.update(reporter.seen)
            reporter.bar = bar
            work.run_cells(
                cells, jobs=config.jobs, shared_budget=shared_budget, stop=stop, changed=changed, tick=reporter.tick
            )
        save()
        if stop.is_set():
            counts = work.summary(cells)
            raise Interrupted(
                f"{counts.get('done', 0)} of {len(cells)} points are done; the runs at work have saved",
                hint="--resume goes on from there",
            )


def _wait_for(orphans: Mapping[Path, Any], stop: Stop) -> None:
    """Wait for the end of the runs of a killed sweep, so that no folder has two writers."""
    for folder, process in orphans.items():
        console.log(f"process {process.pid} still writes to {folder}; waiting for it")
    while not stop.is_set() and any(folder in work.foreign_processes(orphans) for folder in orphans):
        time.sleep(_POLL_S / 2)


class _Reporter:
    """The progress of a sweep: a bar over all iterations, and a line where a point begins or ends."""

    def __init__(self, cells: Sequence[Cell], jobs: int) -> None:
        self.cells, self.jobs = cells, jobs
        self.bar: console.Progress | None = None
        self.done = {cell.name: cell.iterations_done() for cell in cells}
        self.total = sum(step.iterations for cell in cells for step in cell.steps)
        self.seen = self._at_start = sum(self.done.values())
        self._began, self._looked = time.monotonic(), 0.0

    def skipped(self) -> None:
        if done := sum(cell.state == "done" for cell in self.cells):
            console.log(f"{done} of {len(self.cells)} points are done already")

    def tick(self, running: Sequence[Cell]) -> None:
        if time.monotonic() < self._looked + _POLL_S or self.bar is None:
            return
        self._looked = time.monotonic()
        for cell in running:
            self.done[cell.name] = max(self.done[cell.name], cell.iterations_done())
        now = sum(self.done.values())
        at_work = "; ".join(
            f"{cell.title}: {(step.words[0] if (step := cell.next_step()) else 'done')}" for cell in running
        )
        self.bar.update(now - self.seen, at_work)
        self.seen = now

    def changed(self, cell: Cell) -> None:
        self.done[cell.name] = max(self.done[cell.name], cell.iterations_done())
        counts = work.summary(self.cells)
        over = sum(n for state, n in counts.items() if state not in ("waiting", "running"))
        where = f"[{over}/{len(self.cells)}] {cell.title}"
        if cell.state == "running" and (step := cell.next_step()) is not None:
            console.log(f"{where}: {step.words[0]}")
        elif cell.state == "done":
            console.log(f"{where}: done in {cell.seconds:.0f} s{self._time_left()}")
        elif cell.state != "waiting":
            console.log(f"{where}: {cell.state}: {cell.message} (log: {cell.log})")

    def _time_left(self) -> str:
        """An estimate from the iterations of this session; empty where there are none yet."""
        done = sum(self.done.values())
        if done <= self._at_start or done >= self.total:
            return ""
        seconds = (time.monotonic() - self._began) / (done - self._at_start) * (self.total - done)
        return f"; about {seconds / 60:.0f} min left" if seconds >= 60 else f"; about {seconds:.0f} s left"


def _problem(plan: Plan) -> RlgfError | None:
    """The error of the whole sweep: its failed points, else those that were stopped early."""
    for state, kind, hint in (
        ("failed", RlgfError, f"their output is in {plan.output / 'logs'}; --resume tries them again"),
        ("stopped", StoppedEarly, "raise budget_usd, or repair what stopped them, and use --resume"),
    ):
        cells = [cell for cell in plan.cells if cell.state == state]
        if cells:
            messages = "; ".join(f"{cell.title}: {cell.message}" for cell in cells)
            return kind(f"{len(cells)} of {len(plan.cells)} points {state}: {messages}", hint=hint)
    return None


def _try_table(config: SweepConfig, plan: Plan) -> tuple[str | None, RlgfError | None]:
    """The table, or the error that prevents it: the runs are complete without it."""
    try:
        return write_table(config, plan, log=console.log), None
    except UserError as error:
        return None, RlgfError(f"no table: {error}", hint=error.hint)
