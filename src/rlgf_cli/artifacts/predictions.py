"""Predicted texts of a file, joined to the examples that they answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlgf_cli.artifacts.jsonl import id_twice, parse_record, read_objects
from rlgf_cli.artifacts.records import PredictionRecord
from rlgf_cli.errors import UserError
from rlgf_cli.protocols import Example, FinishReason, Prompt

TEXT_KEYS = ("prediction", "completion", "text")
OnMissing = Literal["error", "skip"]


@dataclass(frozen=True)
class Answer:
    """A text for one example. ``finish_reason`` None: not known. ``written`` False: no text was generated.

    ``token_ids`` are those that the evaluated model generated, EOS included; None for a text made elsewhere.
    """

    example: Example
    text: str
    finish_reason: FinishReason | None = None
    written: bool = True
    token_ids: Sequence[int] | None = None


def read_predictions(path: str | Path) -> tuple[list[tuple[int, PredictionRecord]], dict[str, int]]:
    """``(line number, record)`` of a predictions.jsonl, a guide.jsonl, or any JSONL with a text per line.

    The text is ``prediction``, ``completion`` or ``text``, the first of them that a line has; it may be
    empty. Of a guide file with several samples per prompt the first is taken; the count ``other_samples``
    says how many were left out.
    """
    records = []
    counts = {"other_samples": 0}
    for number, value in read_objects(path):
        where = f"{path}:{number}"
        key = next((key for key in TEXT_KEYS if key in value), None)
        if key is None:
            raise UserError(
                f"no field {', '.join(map(repr, TEXT_KEYS[:-1]))} or {TEXT_KEYS[-1]!r}",
                where=where,
                hint=f"this line has: {', '.join(sorted(value)) or 'nothing'}",
            )
        if not isinstance(value[key], str | list | Mapping):
            unwritten = "no metric of that evaluation read texts, and none were written; evaluate with one that does"
            raise UserError(
                f"the field {key!r} is {value[key]!r}, not a text",
                where=where,
                hint=unwritten if value[key] is None and "scores" in value else 'a text may be empty: ""',
            )
        if value.get("prefix"):
            raise UserError(
                "this text continues a prefix; only whole texts can be scored",
                where=where,
                hint="a guide file for evaluation is collected without prefixes",
            )
        if value.get("sample_index"):
            counts["other_samples"] += 1
            continue
        records.append((number, parse_record(PredictionRecord, {**value, "prediction": value[key]}, where)))
    if not records:
        raise UserError(
            "the file holds no predictions", where=str(path), hint='one per line: {"id": "...", "text": "..."}'
        )
    return records, counts


def answers_alone(path: str | Path) -> tuple[list[Answer], dict[str, int]]:
    """The predictions of a file with their own prompts and references; missing ids become ``line-N``."""
    records, counts = read_predictions(path)
    answers: list[Answer] = []
    lines: dict[str, int] = {}
    for number, record in records:
        name = record.id or f"line-{number}"
        if name in lines:
            raise id_twice(name, lines[name], f"{path}:{number}")
        lines[name] = number
        example = Example.of(name, record.prompt, record.references)
        answers.append(Answer(example, record.prediction, record.finish_reason))
    return answers, counts


def answers_to(
    examples: Sequence[Example], path: str | Path, *, on_missing: OnMissing = "error", limit: int | None = None
) -> tuple[list[Answer], dict[str, int]]:
    """The predictions of a file joined to the first ``limit`` of ``examples``, in their order.

    A record joins by its id; one without an id by its prompt. Raises UserError that counts predictions for
    unknown examples, examples with two predictions, predictions whose prompt is another one, and (unless
    ``on_missing`` is ``skip``: then they are counted) examples without a prediction; and where none of the examples
    has one.
    """
    records, counts = read_predictions(path)
    by_id = {example.id: example for example in examples}
    by_prompt: dict[Prompt, list[str]] = {}
    for example in examples:
        by_prompt.setdefault(example.given, []).append(example.id)
    matched: dict[str, PredictionRecord] = {}
    unknown, twice, other = [], [], []
    for number, record in records:
        same_prompt = by_prompt.get(record.prompt, [])
        name = record.id or (same_prompt[0] if len(same_prompt) == 1 else "")
        if name not in by_id:
            unknown.append(f"{record.id or 'no id'!r} on line {number}")
        elif name in matched:
            twice.append(f"{name!r} on line {number}")
        elif record.prompt and record.prompt != by_id[name].given:
            other.append(f"{name!r} on line {number}")
        else:
            matched[name] = record
    _refuse(unknown, len(records), "predictions belong to no example of the data", path, "is it the right --data?")
    _refuse(
        twice,
        len(records),
        "predictions are for an example that has one already",
        path,
        "keep one for each id",
    )
    _refuse(
        other, len(records), "predictions have the id of an example but another prompt", path,
        "is it the right --data? Leave the prompts out of the predictions where they only differ in format",
    )  # fmt: skip
    wanted = examples[:limit]
    missing = [repr(example.id) for example in wanted if example.id not in matched]
    if on_missing == "error":
        hint = "--on-missing skip scores the examples that have one, and counts the others"
        _refuse(missing, len(wanted), "examples have no prediction", path, hint)
    if len(missing) == len(wanted):
        raise UserError(
            f"none of the first {len(wanted)} examples has a prediction",
            where=str(path),
            hint=f"--limit takes the first examples of the data; the predictions are for others of its {len(examples)}",
        )
    counts["missing"] = len(missing)
    answers = [
        Answer(example, matched[example.id].prediction, matched[example.id].finish_reason)
        for example in wanted
        if example.id in matched
    ]
    return answers, counts


def _refuse(names: Sequence[str], total: int, what: str, path: str | Path, hint: str) -> None:
    if names:
        more = ", ..." if len(names) > 3 else ""
        raise UserError(f"{len(names)} of {total} {what}: {', '.join(names[:3])}{more}", where=str(path), hint=hint)
