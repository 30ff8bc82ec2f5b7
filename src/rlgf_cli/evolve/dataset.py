"""The set on disk: chains in blocks, their rows, their sums, and what a killed run left of them.

A block is ``batch_size`` chains with all their steps. It is finished when all its steps are in the one file and all its
instructions in the other.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rlgf_cli.artifacts.jsonl import Appender, parse_object, parse_record
from rlgf_cli.artifacts.records import AnsweredStepRecord, EvolvedRecord
from rlgf_cli.errors import UserError
from rlgf_cli.evolve.answers import InstructionAnswer
from rlgf_cli.evolve.environment import KEPT, Chain
from rlgf_cli.evolve.operations import Operation
from rlgf_cli.ledger.meter import nano_usd, usd
from rlgf_cli.protocols import Example

INSTRUCTIONS, STEPS = "instructions.jsonl", "steps.jsonl"


class StepIndex(NamedTuple):
    """A step of a block: the chain's number and the step's, from 0."""

    chain: int
    step: int


Answers = Mapping[StepIndex, InstructionAnswer]


def blocks(seeds: Sequence[Example], passes: int, size: int) -> Iterator[list[Chain]]:
    """New chains, ``size`` at a time: all seeds once, then all of them again."""
    chains = (Chain(seed, visit) for visit in range(passes) for seed in seeds)
    while block := list(itertools.islice(chains, size)):
        yield block


def kept_instructions(block: Sequence[Chain]) -> dict[StepIndex, Example]:
    """The instructions that a block kept, each under its id in the set."""
    return {
        StepIndex(c, s): Example(id_of(chain, s), step.text)
        for c, chain in enumerate(block)
        for s, step in enumerate(chain.steps)
        if step.outcome == KEPT
    }


def id_of(chain: Chain, step: int) -> str:
    """``SEED/VISIT.STEP``, the step counted from 1."""
    return f"{chain.seed.id}/{chain.visit}.{step + 1}"


def step_records(block: Sequence[Chain], answers: Answers) -> Iterator[AnsweredStepRecord]:
    """The rows of ``steps.jsonl``: every step, chain by chain."""
    for c, chain in enumerate(block):
        for s, row in enumerate(chain.rows()):
            if (answer := answers.get(StepIndex(c, s))) is not None:
                row |= {"answer": answer.outcome, "answer_cost_usd": answer.cost_usd, "queries": row["queries"] + 1}
                row["answer_text"] = None if answer.outcome == KEPT else answer.text
            yield AnsweredStepRecord(**row)


def instruction_records(block: Sequence[Chain], answers: Answers) -> Iterator[EvolvedRecord]:
    """The rows of ``instructions.jsonl``: rewrites that were kept and, with answers, whose answer was kept."""
    for c, chain in enumerate(block):
        texts, ids, operations, queries = [chain.seed.prompt], [chain.seed.id], [], 0
        for s, step in enumerate(chain.steps):
            answer = answers.get(StepIndex(c, s))
            queries += step.queries + (answer is not None)
            if step.outcome != KEPT:
                continue
            operations.append(step.operation)
            if answer is None or answer.outcome == KEPT:
                cost = known_sum([step.cost_usd, answer.cost_usd if answer else None])
                yield EvolvedRecord(
                    id=id_of(chain, s),
                    prompt=step.text,
                    references=[] if answer is None else [answer.text],
                    meta={"chain": list(texts)},
                    seed_id=chain.seed.id,
                    visit=chain.visit,
                    step=s + 1,
                    operation=step.operation,
                    operations=list(operations),
                    parent=ids[-1],
                    novelty=step.novelty,
                    different=step.different,
                    queries=queries,
                    cost_usd=None if cost is None else round(cost, 9),
                )
            texts.append(step.text)
            ids.append(id_of(chain, s))


def known_sum(amounts: Iterable[float | None]) -> float | None:
    """The sum of the amounts that are known; None where none is."""
    known = [amount for amount in amounts if amount is not None]
    return sum(known) if known else None


@dataclass
class Tally:
    """Sums of the rows of ``steps.jsonl``. ``requested``, ``kept``: rewrites by operation; ``rejected``: by outcome."""

    requested: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    verdicts: int = 0
    nano_usd: int = 0
    priced: int = 0
    in_set: int = 0

    def add(self, rows: Sequence[AnsweredStepRecord]) -> None:
        for row in rows:
            self.requested[row.operation] += 1
            if row.outcome == KEPT:
                self.kept[row.operation] += 1
            else:
                self.rejected[row.outcome] += 1
            if row.answer is not None:
                self.answers[row.answer] += 1
            self.in_set += is_in_set(row)
            self.verdicts += row.queries - 1 - (row.answer is not None)
            for amount in (row.cost_usd, row.answer_cost_usd):
                self.nano_usd += nano_usd(amount or 0)
                self.priced += amount is not None

    def summary(self, operations: Sequence[Operation]) -> dict[str, Any]:
        """The figures for the manifest. ``cost_usd``: the price of all texts when they were bought; None: unknown."""
        rewrites, answers = self.requested.total(), self.answers.total()
        queries = rewrites + self.verdicts + answers
        return {
            "instructions": self.in_set,
            "rewrites": rewrites,
            "kept": self.kept.total(),
            "rejected": dict(self.rejected.most_common()),
            "answers": answers,
            "answers_rejected": {name: n for name, n in self.answers.most_common() if name != KEPT},
            "verdicts": self.verdicts,
            "queries": queries,
            "queries_per_instruction": round(queries / self.in_set, 4) if self.in_set else None,
            "cost_usd": round(usd(self.nano_usd), 9) if self.priced else None,
            "operations": {o.name: {"asked": self.requested[o.name], "kept": self.kept[o.name]} for o in operations},
        }


class Rows:
    """Both files of a run, block by block. Blocks that an earlier session finished are read; an unfinished one behind
    them is cut off, and then new blocks are appended.
    """

    def __init__(self, instructions: Path, steps: Path) -> None:
        self._paths = (instructions, steps)
        self._lines: tuple[Iterator[bytes], Iterator[bytes]] | None = (_whole_lines(instructions), _whole_lines(steps))
        self._ends = [0, 0]
        self._row = 0

    def finished(self, block: Sequence[Chain], steps: int) -> list[AnsweredStepRecord] | None:
        """The rows of the next block's steps, chain by chain, if an earlier session finished it; else None, also for
        all later blocks. Raises UserError for rows of another run.
        """
        if self._lines is None:
            return None
        instructions, lines = self._lines
        step_lines = list(itertools.islice(lines, len(block) * steps))
        rows = [self._read(line) for line in step_lines]
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
        for n, block_lines in enumerate((in_set, step_lines)):
            self._ends[n] += sum(map(len, block_lines))
        return rows

    def _read(self, line: bytes) -> AnsweredStepRecord:
        self._row += 1
        where = f"{self._paths[1]}:{self._row}"
        return parse_record(AnsweredStepRecord, parse_object(line, where), where)

    def append(self, block: Sequence[Chain], answers: Answers) -> list[AnsweredStepRecord]:
        """Write a block. Returns the rows of its steps."""
        steps = list(step_records(block, answers))
        for path, rows in zip(self._paths, (instruction_records(block, answers), steps), strict=True):
            with Appender(path) as out:
                for row in rows:
                    out.write(row)
        return steps


def _whole_lines(path: Path) -> Iterator[bytes]:
    """The lines that end with a line break; none of a file that does not exist."""
    if path.exists():
        with path.open("rb") as stream:
            yield from itertools.takewhile(lambda line: line.endswith(b"\n"), stream)


def is_in_set(row: AnsweredStepRecord) -> bool:
    """Whether the rewrite of a step is in the set: it was kept, and its answer too where one was requested."""
    return row.outcome == KEPT and row.answer in (None, KEPT)
