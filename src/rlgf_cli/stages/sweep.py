"""``rlgf sweep``: the runs of a grid as processes of their own, and the table of what came out."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from rlgf_cli import console
from rlgf_cli.artifacts.jsonl import atomic_text, read_json, write_json
from rlgf_cli.artifacts.records import SCHEMA_VERSION
from rlgf_cli.artifacts.resume import refuse_used
from rlgf_cli.artifacts.rundir import Existing, RunDir
from rlgf_cli.config.loader import Layer, Resolved, as_yaml
from rlgf_cli.config.sweep import SweepConfig
from rlgf_cli.errors import Interrupted, RlgfError, StoppedEarly, UserError
from rlgf_cli.ledger.leases import is_dead, this_process
from rlgf_cli.ledger.shared_budget import SharedBudget
from rlgf_cli.ledger.spend import charged_usd
from rlgf_cli.stages.session import StageSession
from rlgf_cli.sweep import table as tables
from rlgf_cli.sweep import work
from rlgf_cli.sweep.grid import safe_name
from rlgf_cli.sweep.plan import BASE, EVAL, Plan, make_plan, refuse_changed_points
from rlgf_cli.sweep.work import Cell

SWEEP = "sweep.json"
_LOOK_S = 1.0
"""How often the runs at work are looked at for the progress bar."""


@dataclass
class SweepResult:
    """The folder, the table in Markdown (None where nothing can be compared yet), and what went wrong, if anything."""

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
    """Train and evaluate every point that is not there yet, then write the table.

    All configs and inputs are checked before the first run starts. A run that fails leaves the others alone: the
    result's ``problem`` names it. Raises Interrupted after Ctrl-C, when the runs at work have saved.
    """
    plan = make_plan(resolved)
    output = plan.output
    session = StageSession("sweep", resolved, existing, output=output)
    refuse_used(str(output), session.command, existing)
    _refuse_another_sweep(output)
    if existing == "resume":
        refuse_changed_points(plan)
    left = work.foreign_processes(step.folder for cell in plan.cells for step in cell.steps)
    if left and existing != "resume":
        where, process = next(iter(left.items()))
        raise UserError(f"process {process.pid} still writes to this folder", where=str(where), hint="end it first")
    folder = session.claim()
    result = SweepResult(output, plan.cells)
    try:
        with folder.manifest.running():
            _begin(folder, resolved, plan)
            _work_through(folder, resolved.config, plan, result, left)
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
    """Write the table of what is there so far; nothing is started, and a sweep at work is left alone."""
    plan = make_plan(resolved)
    if not (plan.output / SWEEP).is_file():
        raise UserError("there is no sweep in it", where=str(plan.output), hint="rlgf sweep starts one")
    _remember(plan)
    return SweepResult(plan.output, plan.cells, _write_table(resolved.config, plan))


def dry_run(resolved: Resolved[SweepConfig]) -> dict[str, Any]:
    """What would be run, and how often guides would be asked and what that costs; nothing is written."""
    plan = make_plan(resolved)
    calls, usd, known = 0, [0.0, 0.0, 0.0], True
    for training in plan.trainings.values():
        if not training.config.algorithm.spec().needs_guide:
            continue
        from rlgf_cli.runs.guide_costs import training_estimate

        found = training_estimate(training.config)
        calls += found["guide_calls"]
        if found["guide_calls"] and "usd" in found:
            known = known and found["usd"] is not None
            usd = [a + b for a, b in zip(usd, found["usd"] or usd, strict=True)]
    return {
        "runs": len(plan.trainings),
        "systems": len(plan.systems),
        "combinations_left_out": plan.expansion.left_out,
        "combinations_folded": plan.expansion.folded,
        "guide_calls_at_most": calls,
        "guide_usd": usd if known else None,
        "points": [{"name": c.name, "title": c.title, "commands": [s.command() for s in c.steps]} for c in plan.cells],
    }


def _refuse_another_sweep(output: Path) -> None:
    if (output / SWEEP).is_file():
        process = read_json(output / SWEEP)["process"]
        if work.status_of(output) == "running" and process != this_process() and not is_dead(process):
            raise UserError(f"another rlgf sweep is at work here (process {process})", where=str(output))


def _begin(folder: RunDir, resolved: Resolved[SweepConfig], plan: Plan) -> None:
    """Write down what is to be run, and take over what an earlier session knew."""
    tops = dict.fromkeys(Path(cell.name).parts[0] for cell in plan.cells)
    comparisons = [_comparison(base) for base in plan.systems]
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
    gone = _remember(plan)
    if gone:
        console.log(f"no longer in the grid, and left as they are: {', '.join(gone)}")
    for cell in plan.cells:
        for step in cell.steps:
            if step.billed:
                work.record_run_id(cell, step)


def _recipe(name: str, layer: Layer) -> str:
    files = dict.fromkeys(place.rpartition(":")[0] for place in layer.places.values())
    return f"# {name}: what the sweep began with, from {', '.join(files)}\n{as_yaml(layer.values)}"


def _remember(plan: Plan) -> list[str]:
    """Take over what ``sweep.json`` says of the cells; the names of those that are no longer there."""
    path = plan.output / SWEEP
    before = {told["name"]: told for told in read_json(path)["points"]} if path.is_file() else {}
    for cell in plan.cells:
        told = before.pop(cell.name, {})
        cell.runs.update(told.get("runs", []))
        cell.seconds, cell.began, cell.ended = told.get("seconds", 0.0), told.get("began"), told.get("ended")
        if cell.is_done:
            cell.state = "done"
        elif told.get("state") in ("failed", "stopped", "interrupted"):
            cell.state, cell.message = told["state"], told["said"]
    return list(before)


def _work_through(
    folder: RunDir, config: SweepConfig, plan: Plan, result: SweepResult, left: Mapping[Path, Any]
) -> None:
    """Run what is not done; ``sweep.json`` is true at every moment."""
    cells = plan.cells
    shared_budget = SharedBudget(config.budget_usd, charged_usd)
    for cell in cells:
        shared_budget.settle(cell.name, cell.runs)
    reporter = _Reporter(cells, config.jobs)

    def save() -> None:
        result.spent_usd = round(shared_budget.spent(), 9)
        told = {
            "schema_version": SCHEMA_VERSION,
            "process": this_process(),
            "budget_usd": config.budget_usd,
            "spent_usd": result.spent_usd,
            "combinations_folded": plan.expansion.folded,
            "combinations_left_out": plan.expansion.left_out,
            "points": [work.as_json(cell) for cell in cells],
        }
        write_json(folder.path / SWEEP, told)

    def changed(cell: Cell) -> None:
        save()
        reporter.changed(cell)

    save()
    with console.interruptible("interrupting the runs at work, which save first") as stop:
        _wait_for(left, stop)
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


def _wait_for(left: Mapping[Path, Any], stop: Event) -> None:
    """Let runs that a killed sweep left behind come to their end, rather than write to their folders as well."""
    for folder, process in left.items():
        console.log(f"process {process.pid} still writes to {folder}; waiting for it")
    while not stop.is_set() and any(folder in work.foreign_processes(left) for folder in left):
        time.sleep(_LOOK_S / 2)


class _Reporter:
    """Tells the person who watches: a bar over all iterations, and a line where a point begins or ends."""

    def __init__(self, cells: Sequence[Cell], jobs: int) -> None:
        self.cells, self.jobs = cells, jobs
        self.bar: console.Progress | None = None
        self.done = {cell.name: cell.iterations_done() for cell in cells}
        self.total = sum(step.iterations for cell in cells for step in cell.steps)
        self.seen = self._at_start = sum(self.done.values())
        self._began, self._looked = time.monotonic(), 0.0

    def skipped(self) -> None:
        if there := sum(cell.state == "done" for cell in self.cells):
            console.log(f"{there} of {len(self.cells)} points are done already")

    def tick(self, running: Sequence[Cell]) -> None:
        if time.monotonic() < self._looked + _LOOK_S or self.bar is None:
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
        """From the iterations of this session, which is what takes the time; nothing where there is none yet."""
        done = sum(self.done.values())
        if done <= self._at_start or done >= self.total:
            return ""
        seconds = (time.monotonic() - self._began) / (done - self._at_start) * (self.total - done)
        return f"; about {seconds / 60:.0f} min left" if seconds >= 60 else f"; about {seconds:.0f} s left"


def _problem(plan: Plan) -> RlgfError | None:
    """What the whole sweep failed of, or was stopped by."""
    for state, kind, hint in (
        ("failed", RlgfError, f"what they said is in {plan.output / 'logs'}; --resume tries them again"),
        ("stopped", StoppedEarly, "raise budget_usd, or mend what stopped them, and use --resume"),
    ):
        found = [cell for cell in plan.cells if cell.state == state]
        if found:
            told = "; ".join(f"{cell.title}: {cell.message}" for cell in found)
            return kind(f"{len(found)} of {len(plan.cells)} points {state}: {told}", hint=hint)
    return None


# --- the table -----------------------------------------------------------------------------------------------------


def _try_table(config: SweepConfig, plan: Plan) -> tuple[str | None, RlgfError | None]:
    """The table, or why there is none: the runs are there all the same."""
    try:
        return _write_table(config, plan), None
    except UserError as error:
        return None, RlgfError(f"no table: {error}", hint=error.hint)


def _write_table(config: SweepConfig, plan: Plan) -> str:
    """Compare what is evaluated and write table.md, .csv and .html; the Markdown."""
    folders: dict[str, list[Path]] = {}
    for cell in plan.cells:
        if cell.is_done:
            folders.setdefault(cell.system, []).append(cell.folder)
    if len(folders) < 2:
        raise UserError(
            f"{len(folders)} of {len(plan.systems)} systems are evaluated so far, and a table compares",
            where=str(plan.output),
            hint="--resume goes on with the sweep",
        )
    bases = [base for base in plan.baselines if base in folders] or [next(iter(folders))]
    comparisons: dict[str, Any] = {}
    for base in bases:
        comparisons[base] = _compare(config, folders, base)
        write_json(plan.output / _comparison(base), comparisons[base])
    systems = {
        label: (
            sum(cell.system == label for cell in plan.cells),
            [_why(cell) for cell in plan.cells if cell.system == label and not cell.is_done],
        )
        for label in plan.systems
    }
    built = tables.build(comparisons, systems, baselines=plan.baselines, level=config.interval.level)
    markdown = tables.to_markdown(built)
    for name, text in (
        ("table.md", markdown),
        ("table.csv", tables.to_csv(built)),
        ("table.html", tables.to_html(built, plan.output.name)),
    ):
        with atomic_text(plan.output / name) as stream:
            stream.write(text)
    return markdown


def _why(cell: Cell) -> str:
    what = "its run" if cell.seed is None else f"seed {cell.seed}"
    return f"{what} {cell.state}{': ' + cell.message if cell.message else ''}"


def _comparison(base: str) -> str:
    return f"comparison_{safe_name(base)}.json"


def _compare(config: SweepConfig, folders: Mapping[str, Sequence[Path]], base: str) -> dict[str, Any]:
    """What ``rlgf compare`` says of all systems against one of them."""
    labels = [base, *(label for label in folders if label != base)]
    words = [f"{label}={folder}" for label in labels for folder in folders[label]]
    if config.figures is not None:
        words += ["--metrics", ",".join(config.figures)]
    words += ["--level", str(config.interval.level), "--resamples", str(config.interval.resamples)]
    command = [*work.RLGF, "compare", *words, "--seed", str(config.seed), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    said = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode:
        first = next((line for line in said if line.startswith("error: ")), said[-1] if said else "it said nothing")
        raise UserError(f"rlgf compare, against {base}: {first.removeprefix('error: ')}")
    for line in said:
        console.log(line)
    return dict(json.loads(done.stdout))
