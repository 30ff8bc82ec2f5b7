"""Texts that models wrote, as they may stand on a page: side by side, and with the author of every part."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlgf_cli.artifacts.predictions import read_predictions
from rlgf_cli.artifacts.records import EvaluatedRecord
from rlgf_cli.report.draw import Look
from rlgf_cli.report.read import Evaluation, Run, read_episodes, step_of

SHOWN = 800
"""Characters of a text that are shown; the page says how many more there are."""
EPISODES = 3
"""Episodes that are shown of a saved step."""
_OBEYED = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}
"""Characters that turn the direction of what comes after them."""


@dataclass(frozen=True)
class Shown:
    """A text on the page: ``more`` characters were left out."""

    text: str
    more: int = 0


@dataclass(frozen=True)
class Answered:
    """One system's text for a prompt. ``score`` is None where it has none."""

    label: str
    look: Look | None
    text: Shown
    score: float | None = None


@dataclass(frozen=True)
class Prompt:
    """A prompt, its references, and the systems' texts."""

    id: str
    prompt: Shown
    references: Sequence[Shown]
    answers: Sequence[Answered]


@dataclass(frozen=True)
class Sample:
    """A training episode. ``parts`` are (author, text); one part without an author where the file does not say who."""

    prompt: Shown
    parts: Sequence[tuple[str, Shown]]
    score: float | None
    finished: bool
    tokens: Mapping[str, int]


def visible(text: str) -> str:
    """The text with everything that a browser would obey or hide made visible: controls, overrides, half characters."""
    return "".join(_visible(c) for c in text)


def shown(text: str, most: int = SHOWN) -> Shown:
    """The beginning of a text."""
    return Shown(visible(text[:most]), max(0, len(text) - most))


def side_by_side(
    rows: Sequence[tuple[str, Look | None, Evaluation]],
    guide: Mapping[str, str],
    *,
    figure: str | None,
    count: int,
    seed: int,
) -> tuple[list[Prompt], int]:
    """``count`` prompts that all evaluations have, drawn with ``seed``, and how many there were to draw from.

    ``guide``: texts of a guide file by id. An id counts where all evaluations have the same prompt under it.
    """
    written = [(label, look, evaluation) for label, look, evaluation in rows if evaluation.texts]
    if not written:
        return [], 0
    first = written[0][2].records
    common = sorted(
        name
        for name, record in first.items()
        if all(name in other.texts and other.records[name].prompt == record.prompt for _, _, other in written)
    )
    prompts = []
    for name in random.Random(seed).sample(common, min(count, len(common))):
        answers = [
            Answered(label, look, shown(e.texts[name]), e.records[name].scores.get(figure) if figure else None)
            for label, look, e in written
        ]
        if name in guide:
            answers.insert(0, Answered("guide file", None, shown(guide[name])))
        references = [shown(reference) for reference in first[name].references]
        prompts.append(Prompt(visible(name), shown(first[name].prompt), references, answers))
    return prompts, len(common)


def guide_texts(path: Path, records: Mapping[str, EvaluatedRecord]) -> dict[str, str]:
    """The first text of a guide file (or predictions.jsonl) for each of the records that it has one for, by id.

    A guide's record joins by its id where the prompt is the same, else by its prompt.
    """
    by_prompt: dict[str, list[str]] = {}
    for name, record in records.items():
        by_prompt.setdefault(record.prompt, []).append(name)
    found: dict[str, str] = {}
    for _, answer in read_predictions(path)[0]:
        same = answer.id in records and answer.prompt in ("", records[answer.id].prompt)
        for name in [answer.id] if same else by_prompt.get(answer.prompt, []):
            found.setdefault(name, answer.prediction)
    return found


def samples(run: Run) -> list[tuple[int, list[Sample]]]:
    """Episodes of the first, the middle and the last saved step: of each the first ones of the file."""
    files = run.rollouts
    chosen = sorted({0, len(files) // 2, len(files) - 1}) if files else []
    return [(step_of(files[i]), [_sample(row) for row in read_episodes(files[i])[:EPISODES]]) for i in chosen]


def guided(steps: Sequence[tuple[int, Sequence[Sample]]]) -> bool:
    """Whether a guide wrote in any of these episodes."""
    return any("guide" in sample.tokens for _, found in steps for sample in found)


def rollout_scores(run: Run) -> list[float]:
    """Scores of the episodes of the last saved step."""
    rows = read_episodes(run.rollouts[-1]) if run.rollouts else []
    return [float(row["score"]) for row in rows if row.get("score") is not None]


def _sample(row: Mapping[str, Any]) -> Sample:
    segments = row.get("segments") or []
    tokens: dict[str, int] = {}
    for segment in segments:
        author = str(segment["author"])
        tokens[author] = tokens.get(author, 0) + len(segment.get("ids") or ())
    if segments and all(isinstance(segment.get("text"), str) for segment in segments):
        parts = [(str(segment["author"]), shown(segment["text"])) for segment in segments]
    else:  # written by a version that kept the ids alone
        parts = [("", shown(str(row.get("text", ""))))]
    return Sample(shown(str(row.get("prompt", ""))), parts, row.get("score"), bool(row.get("finished")), tokens)


def _visible(c: str) -> str:
    code = ord(c)
    if c in "\n\t" or (code >= 0xA0 and code not in _OBEYED and not 0xD800 <= code < 0xE000) or 0x20 <= code < 0x7F:
        return c
    if code < 0x20:
        return chr(0x2400 + code)
    if unicodedata.category(c) == "Cs":
        return "\ufffd"
    return f"⟨U+{code:04X}⟩"
