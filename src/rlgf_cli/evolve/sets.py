"""Sets of instructions on disk: what ``rlgf evolve generate`` made, or any file of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlgf_cli.artifacts.jsonl import id_twice, parse_record, read_objects, read_records
from rlgf_cli.artifacts.records import AnsweredStepRecord, EvolvedRecord, ExampleRecord
from rlgf_cli.errors import UserError
from rlgf_cli.evolve.dataset import INSTRUCTIONS, STEPS
from rlgf_cli.evolve.diversity import by_hash
from rlgf_cli.scorers.coverage import words


@dataclass(frozen=True)
class TextSet:
    """Instructions that have a word, in an order of their own (:func:`by_hash`).

    ``seeds[i]``: the seed that text i was made from; its own id where the file says nothing of chains, and ``steps`` is
    None then. ``rows``: every rewrite that was asked for, in order of time; None without ``steps.jsonl``.
    ``wordless`` texts were left out. ``notes`` say what cannot be told of this set.
    """

    path: str
    files: Sequence[Path]
    texts: Sequence[str]
    seeds: Sequence[str]
    steps: Sequence[int] | None
    rows: Sequence[AnsweredStepRecord] | None
    wordless: int
    notes: Sequence[str]


def read_set(path: str) -> TextSet:
    """A folder of ``rlgf evolve generate``, its instructions.jsonl, or a JSONL file of prompts.

    Raises UserError where there are not at least two texts.
    """
    file = Path(path)
    if file.is_dir():
        file /= INSTRUCTIONS
        if not file.is_file():
            hint = "name the folder of rlgf evolve generate, or a JSONL file of prompts"
            raise UserError(f"this folder holds no {INSTRUCTIONS}", where=path, hint=hint)
    records = _records(file)
    chained = [record for record in records if isinstance(record, EvolvedRecord)]
    kept = [record for record in records if words(record.prompt)]
    if len(kept) < 2:
        found = f"{len(kept)} text{'' if len(kept) == 1 else 's'} with a word in it"
        raise UserError(f"diversity is a matter of several texts; there is {found}", where=str(file))
    kept = [kept[i] for i in by_hash([record.prompt for record in kept])]
    steps = file.with_name(STEPS)
    rows = None
    notes = []
    if not chained:
        notes.append("no chains (seed_id, step): nothing is told by step, and every text counts as a seed of its own")
    elif not steps.is_file():
        notes.append(f"no {STEPS} beside it: operations, outcomes, novelty, queries and cost are left out")
    else:
        rows = list(read_records(steps, AnsweredStepRecord, torn_tail=True))
    return TextSet(
        path,
        [file] if rows is None else [file, steps],
        [record.prompt for record in kept],
        [record.seed_id if isinstance(record, EvolvedRecord) else record.id for record in kept],
        [record.step for record in kept if isinstance(record, EvolvedRecord)] if chained else None,
        rows,
        len(records) - len(kept),
        notes,
    )


def _records(file: Path) -> list[ExampleRecord]:
    """All of one kind: a first record with a chain means that all have one. An id twice is refused."""
    found: list[ExampleRecord] = []
    lines: dict[str, int] = {}
    kind: type[ExampleRecord] = ExampleRecord
    for number, value in read_objects(file, torn_tail=file.name == INSTRUCTIONS):
        if not found and "seed_id" in value:
            kind = EvolvedRecord
        value.pop("references", None)  # an answer that is no text does not concern the instructions
        record = parse_record(kind, value, f"{file}:{number}")
        record.id = record.id or f"line-{number}"
        if record.id in lines:
            raise id_twice(record.id, lines[record.id], f"{file}:{number}")
        lines[record.id] = number
        found.append(record)
    if not found:
        raise UserError("the file holds no records", where=str(file), hint='one per line: {"prompt": "..."}')
    return found
