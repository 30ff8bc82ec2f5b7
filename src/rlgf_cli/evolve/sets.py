"""Sets of instructions on disk: those of ``rlgf evolve generate``, or any file of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlgf_cli.artifacts.conversations import plain
from rlgf_cli.artifacts.jsonl import id_twice, parse_record, read_objects, read_records
from rlgf_cli.artifacts.records import AnsweredStepRecord, EvolvedRecord, ExampleRecord
from rlgf_cli.errors import UserError
from rlgf_cli.evolve.dataset import INSTRUCTIONS, STEPS
from rlgf_cli.evolve.diversity import by_hash
from rlgf_cli.protocols.messages import last_words
from rlgf_cli.scorers.coverage import words


@dataclass(frozen=True)
class TextSet:
    """Instructions with at least one word, in the order of their hashes (:func:`by_hash`).

    ``seeds[i]``: the seed that text i was made from; its own id in a file without chains, where ``steps`` is None.
    ``rows``: every rewrite that was requested, in order of time; None without ``steps.jsonl``. ``wordless`` texts were
    left out. ``notes`` name the figures that are unknown for this set.
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
    evolved = isinstance(records[0], EvolvedRecord)
    usable = [record for record in records if words(last_words(record.prompt))]
    if len(usable) < 2:
        number = f"{len(usable)} text{'' if len(usable) == 1 else 's'} with a word in it"
        raise UserError(f"diversity needs several texts; there is {number}", where=str(file))
    usable = [usable[i] for i in by_hash([last_words(record.prompt) for record in usable])]
    steps = file.with_name(STEPS)
    rows = None
    notes = []
    if not evolved:
        notes.append(
            "no chains (seed_id, step): there are no figures by step, and every text counts as a seed of its own"
        )
    elif not steps.is_file():
        notes.append(f"no {STEPS} beside it: operations, outcomes, novelty, queries and cost are left out")
    else:
        rows = list(read_records(steps, AnsweredStepRecord, torn_tail=True))
    return TextSet(
        path,
        files=[file] if rows is None else [file, steps],
        texts=[last_words(record.prompt) for record in usable],
        seeds=[record.seed_id if isinstance(record, EvolvedRecord) else record.id for record in usable],
        steps=[record.step for record in usable if isinstance(record, EvolvedRecord)] if evolved else None,
        rows=rows,
        wordless=len(records) - len(usable),
        notes=notes,
    )


def _records(file: Path) -> list[ExampleRecord]:
    """The records of a file, all with chains or all without, as the first one. Refuses an id that is there twice."""
    records: list[ExampleRecord] = []
    lines: dict[str, int] = {}
    kind: type[ExampleRecord] = ExampleRecord
    for number, value in read_objects(file, torn_tail=file.name == INSTRUCTIONS):
        if not records and "seed_id" in value:
            kind = EvolvedRecord
        value.pop("references", None)  # the instructions can be measured whatever their answers are
        record = parse_record(kind, value, f"{file}:{number}")
        plain(record.prompt, f"{file}:{number}")
        record.id = record.id or f"line-{number}"
        if record.id in lines:
            raise id_twice(record.id, lines[record.id], f"{file}:{number}")
        lines[record.id] = number
        records.append(record)
    if not records:
        raise UserError("the file holds no records", where=str(file), hint='one per line: {"prompt": "..."}')
    return records
