"""The set on disk: chains in blocks, their rows, what they sum up to, and what a killed run left of them.

A block is ``batch_size`` chains with all their steps. It counts as done where all its steps are in the one file and all
its instructions in the other, whichever of them is ahead.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlgf_cli.artifacts.jsonl import Appender, parse_object, parse_record
from rlgf_cli.artifacts.records import AnsweredStepRecord, EvolvedRecord
from rlgf_cli.errors import UserError
from rlgf_cli.evolve.answers import Answered
from rlgf_cli.evolve.environment import KEPT, Chain
from rlgf_cli.evolve.operations import Operation
from rlgf_cli.protocols import Example

INSTRUCTIONS, STEPS = "instructions.jsonl", "steps.jsonl"
StepIndex = tuple[int, int]
"""A step of a block: the chain's number and the step's, from 0."""


def blocks(seeds: Sequence[Example], passes: int, size: int) -> Iterator[list[Chain]]:
    """New chains, ``size`` at a time: all seeds once, then all of them again."""
    chains = (Chain(seed, visit) for visit in range(passes) for seed in seeds)
    while block := list(itertools.islice(chains, size)):
        yield block


def kept_instructions(block: Sequence[Chain]) -> dict[StepIndex, Example]:
    """The instructions that a block kept, each under its name in the set."""
    return {
        (c, s): Example(name_of(chain, s), step.text)
        for c, chain in enumerate(block)
        for s, step in enumerate(chain.steps)
        if step.outcome == KEPT
    }


def name_of(chain: Chain, step: int) -> str:
    """``SEED/VISIT.STEP``, the step counted from 1."""
    return f"{chain.seed.id}/{chain.visit}.{step + 1}"


def step_records(block: Sequence[Chain], answers: Mapping[StepIndex, Answered]) -> Iterator[AnsweredStepRecord]:
    """The rows of ``steps.jsonl``: every step, chain by chain."""
    for c, chain in enumerate(block):
        for s, step in enumerate(chain.steps):
            row = {"seed_id": chain.seed.id, "visit": chain.visit, "step": s + 1, **asdict(step)}
            if (found := answers.get((c, s))) is not None:
                row |= {"answer": found.outcome, "answer_cost_usd": found.cost_usd, "queries": step.queries + 1}
                row["answer_text"] = None if found.outcome == KEPT else found.text
            yield AnsweredStepRecord(**row)


def instruction_records(block: Sequence[Chain], answers: Mapping[StepIndex, Answered]) -> Iterator[EvolvedRecord]:
    """The rows of ``instructions.jsonl``: what was kept and, where there are answers, has a sound one."""
    for c, chain in enumerate(block):
        texts, names, operations, queries = [chain.seed.prompt], [chain.seed.id], [], 0
        for s, step in enumerate(chain.steps):
            found = answers.get((c, s))
            queries += step.queries + (found is not None)
            if step.outcome != KEPT:
                continue
            operations.append(step.operation)
            if found is None or found.outcome == KEPT:
                yield EvolvedRecord(
                    id=name_of(chain, s),
                    prompt=step.text,
                    references=[] if found is None else [found.text],
                    meta={"chain": list(texts)},
                    seed_id=chain.seed.id,
                    visit=chain.visit,
                    step=s + 1,
                    operation=step.operation,
                    operations=list(operations),
                    parent=names[-1],
                    novelty=step.novelty,
                    different=step.different,
                    queries=queries,
                    cost_usd=_sum([step.cost_usd, found.cost_usd if found else None]),
                )
            texts.append(step.text)
            names.append(name_of(chain, s))


def _sum(amounts: Sequence[float | None]) -> float | None:
    known = [amount for amount in amounts if amount is not None]
    return round(sum(known), 9) if known else None


@dataclass
class Tally:
    """What the rows sum up to."""

    asked: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    verdicts: int = 0
    nano_usd: int = 0
    priced: int = 0
    in_set: int = 0

    def add(self, rows: Sequence[AnsweredStepRecord]) -> None:
        for row in rows:
            self.asked[row.operation] += 1
            if row.outcome == KEPT:
                self.kept[row.operation] += 1
            else:
                self.rejected[row.outcome] += 1
            if row.answer is not None:
                self.answers[row.answer] += 1
            self.in_set += is_in_set(row)
            self.verdicts += row.queries - 1 - (row.answer is not None)
            for amount in (row.cost_usd, row.answer_cost_usd):
                self.nano_usd += round((amount or 0) * 1e9)
                self.priced += amount is not None

    def summary(self, operations: Sequence[Operation]) -> dict[str, Any]:
        """The figures for the manifest. ``cost_usd``: what all texts cost when they were bought; None: not known."""
        rewrites, answers = self.asked.total(), self.answers.total()
        queries = rewrites + self.verdicts + answers
        wrong = {name: n for name, n in self.answers.most_common() if name != KEPT}
        return {
            "instructions": self.in_set,
            "rewrites": rewrites,
            "kept": self.kept.total(),
            "rejected": dict(self.rejected.most_common()),
            "answers": answers,
            "answers_rejected": wrong,
            "verdicts": self.verdicts,
            "queries": queries,
            "queries_per_instruction": round(queries / self.in_set, 4) if self.in_set else None,
            "cost_usd": round(self.nano_usd / 1e9, 9) if self.priced else None,
            "operations": {o.name: {"asked": self.asked[o.name], "kept": self.kept[o.name]} for o in operations},
        }


class Rows:
    """Both files of a run, block by block. Blocks that an earlier session finished are read; then what it left of
    another is cut off, and blocks are appended.
    """

    def __init__(self, instructions: Path, steps: Path) -> None:
        self._paths = (instructions, steps)
        self._lines: tuple[Iterator[bytes], Iterator[bytes]] | None = (_whole_lines(instructions), _whole_lines(steps))
        self._ends = [0, 0]
        self._row = 0

    def finished(self, block: Sequence[Chain], steps: int) -> list[AnsweredStepRecord] | None:
        """The rows of the next block's steps, chain by chain, where an earlier session finished it; else None, for all
        blocks from then on. Raises UserError where the rows are those of another run.
        """
        if self._lines is None:
            return None
        instructions, lines = self._lines
        mine = list(itertools.islice(lines, len(block) * steps))
        rows = [self._read(line) for line in mine]
        in_set = list(itertools.islice(instructions, sum(map(is_in_set, rows))))
        if len(rows) < len(block) * steps or len(in_set) < sum(map(is_in_set, rows)):
            self._lines = None
            for path, end in zip(self._paths, self._ends, strict=True):
                if path.exists():
                    os.truncate(path, end)
            return None
        places = [(chain.seed.id, chain.visit, s + 1) for chain in block for s in range(steps)]
        if places != [(row.seed_id, row.visit, row.step) for row in rows]:
            raise UserError(
                "these steps are not those of this run's seeds",
                where=str(self._paths[1]),
                hint="start anew: another -o",
            )
        for n, found in enumerate((in_set, mine)):
            self._ends[n] += sum(map(len, found))
        return rows

    def _read(self, line: bytes) -> AnsweredStepRecord:
        self._row += 1
        where = f"{self._paths[1]}:{self._row}"
        return parse_record(AnsweredStepRecord, parse_object(line, where), where)

    def append(self, block: Sequence[Chain], answers: Mapping[StepIndex, Answered]) -> list[AnsweredStepRecord]:
        """Write a block. Returns the rows of its steps."""
        steps = list(step_records(block, answers))
        for path, rows in zip(self._paths, (instruction_records(block, answers), steps), strict=True):
            with Appender(path) as out:
                for row in rows:
                    out.write(row)
        return steps


def _whole_lines(path: Path) -> Iterator[bytes]:
    """The lines that have their end; a file that is not there has none."""
    if path.exists():
        with path.open("rb") as stream:
            yield from itertools.takewhile(lambda line: line.endswith(b"\n"), stream)


def is_in_set(row: AnsweredStepRecord) -> bool:
    """Whether the rewrite of a step is part of the set: kept, and its answer too where one was asked for."""
    return row.outcome == KEPT and row.answer in (None, KEPT)
