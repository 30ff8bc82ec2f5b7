"""Evaluations that ``rlgf eval`` wrote, as systems of one or several seeds: figures, and their rows per prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, FiniteFloat, ValidationError

from rlgf_cli.artifacts import jsonl
from rlgf_cli.artifacts.records import EvaluatedRecord, Record
from rlgf_cli.errors import RlgfError, UserError

Row = Sequence[float]
"""Statistics of one text: ``[value, 1]`` for a figure that is a mean."""


class FigureEntry(Record):
    """A figure in scores.json. ``aggregate`` makes it of summed rows; null: a figure of the set as one.

    ``method`` says how the interval of the latter was made, where it has one.
    """

    value: FiniteFloat
    signature: str
    aggregate: str | None = "mean"  # earlier versions had means only, and no such key
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    n: int | None = None
    method: str | None = None


class Scores(Record):
    """The part of scores.json that is read."""

    metrics: dict[str, FigureEntry]
    interval: dict[str, Any] = Field(default_factory=dict)
    decoding: dict[str, Any] | None = None
    dataset: dict[str, Any] | None = None
    model: dict[str, Any] | None = None


@dataclass(frozen=True)
class Evaluation:
    """One evaluated set of texts: its predictions by id, and its scores.json."""

    folder: Path
    records: Mapping[str, EvaluatedRecord]
    scores: Scores

    @property
    def figures(self) -> dict[str, FigureEntry]:
        return self.scores.metrics

    def rows(self, figure: str, ids: Sequence[str]) -> list[Row | None]:
        """The rows of a figure for these prompts (None: skipped). Raises UserError where one lacks or does not fit."""
        rows = [self._row(figure, name) for name in ids]
        widths = {len(row) for row in rows if row is not None}
        if len(widths) > 1:
            expected = len(next(row for row in rows if row is not None))
            other = next(i for i, row in enumerate(rows) if row is not None and len(row) != expected)
            raise UserError(
                f"the rows of {figure} have different lengths: {expected}, and {len(rows[other] or ())} for the "
                f"prediction {ids[other]!r}",
                where=str(self.folder),
                hint="run rlgf eval again",
            )
        return rows

    def _row(self, figure: str, name: str) -> Row | None:
        record = self.records[name]
        if figure in record.scores:
            value = record.scores[figure]
            return None if value is None else (value, 1.0)
        if figure in record.statistics:
            return record.statistics[figure]
        raise UserError(
            f"the prediction {name!r} has no score {figure}",
            where=str(self.folder),
            hint="run rlgf eval again; --resume scores the texts that are there",
        )


@dataclass(frozen=True)
class System:
    """The evaluations that are compared under one name, one per seed."""

    label: str
    evaluations: tuple[Evaluation, ...]


def every(systems: Sequence[System]) -> Iterator[tuple[str, Evaluation]]:
    """All evaluations in order, each with a name for messages: its system's, and the folder where that has several."""
    for system in systems:
        for evaluation in system.evaluations:
            several = len(system.evaluations) > 1
            yield f"{system.label} ({evaluation.folder})" if several else system.label, evaluation


def read_systems(given: Sequence[str]) -> list[System]:
    """``FOLDER``, ``NAME=FOLDER`` or ``NAME=FOLDER,FOLDER``; a name that comes again adds seeds to its system.

    Raises UserError for folders without a whole evaluation, and for one that a system has twice.
    """
    named = [_split(text) for text in given]
    labels = [label or folder_label(folders[0]) for label, folders in named]
    twice = {label for label in labels if labels.count(label) > 1}
    for i, (label, folders) in enumerate(named):
        if label is None and labels[i] in twice:
            labels[i] = str(folders[0])
    grouped: dict[str, list[Evaluation]] = {}
    for label, (_, folders) in zip(labels, named, strict=True):
        grouped.setdefault(label, []).extend(map(read_evaluation, folders))
    for label, evaluations in grouped.items():
        folders = [evaluation.folder.resolve() for evaluation in evaluations]
        for folder in folders:
            if folders.count(folder) > 1:
                hint = "name each seed's folder once, or give the systems different names"
                raise UserError(f"{label!r} has this evaluation twice", where=str(folder), hint=hint)
    return [System(label, tuple(evaluations)) for label, evaluations in grouped.items()]


def split_label(text: str) -> tuple[str | None, str]:
    """``name=rest``; a folder whose own name has a = in it is taken as it is."""
    label, equals, rest = text.partition("=")
    return (label, rest) if equals and label and not Path(text).exists() else (None, text)


def _split(text: str) -> tuple[str | None, list[Path]]:
    """A folder whose own name has a comma in it is taken as it is."""
    label, folders = split_label(text)
    if label is None or (folders and Path(folders).exists()):
        return label, [Path(folders)]
    if not all(folder.strip() for folder in folders.split(",")):
        raise UserError(f"a folder is missing in {text!r}", hint="NAME=FOLDER, or NAME=FOLDER,FOLDER for seeds")
    return label, [Path(folder.strip()) for folder in folders.split(",")]


def folder_label(folder: Path) -> str:
    """A folder's name; for ``run/eval`` the run's."""
    resolved = folder.resolve()
    return resolved.parent.name if resolved.name == "eval" else resolved.name


def read_evaluation(folder: Path) -> Evaluation:
    """The evaluation in ``folder`` or in its eval/. Raises UserError where it is none, or not whole."""
    if folder.is_file():
        hint = "score its texts first: rlgf eval --predictions FILE --data DATA -o FOLDER"
        raise UserError("this is a file; the folder of an evaluation is needed", where=str(folder), hint=hint)
    place = next((f for f in (folder, folder / "eval") if (f / "predictions.jsonl").is_file()), None)
    if place is None:
        raise UserError(
            "there is no evaluation in it" if folder.is_dir() else "no such folder",
            where=str(folder),
            hint="run `rlgf eval` first; its output folder (or the run folder with eval/ in it) is meant",
        )
    if not (place / "scores.json").is_file():
        raise UserError("this evaluation did not finish: it has no scores.json", where=str(place))
    path = place / "predictions.jsonl"
    records: dict[str, EvaluatedRecord] = {}
    for record in jsonl.read_records(path, EvaluatedRecord):
        if not record.id or record.id in records:
            raise UserError(f"the id {record.id!r} is empty or here twice", where=str(path))
        records[record.id] = record
    if not records:
        raise UserError("the file holds no predictions", where=str(path), hint="run rlgf eval again")
    return Evaluation(place, records, read_scores(place / "scores.json"))


def read_scores(path: Path) -> Scores:
    """The scores.json of an evaluation. Raises UserError where it is none of ``rlgf eval``."""
    hint = "run rlgf eval again; --resume scores the texts that are there"
    try:
        return Scores.model_validate(jsonl.read_json(path))
    except RlgfError as error:
        raise UserError(error.message, where=error.where, hint=hint) from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        message = f"these are no scores of rlgf eval: {place}: {first['msg'].lower()}"
        raise UserError(message, where=str(path), hint=hint) from None
