"""Texts of models for the page: side by side, and with the author of every part, made safe to show."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rlgf_cli.artifacts.conversations import is_messages, read_prompt
from rlgf_cli.artifacts.predictions import read_predictions
from rlgf_cli.artifacts.records import EvaluatedRecord
from rlgf_cli.protocols.messages import prompt_key, transcript
from rlgf_cli.report.draw import Look
from rlgf_cli.report.read import Evaluation, Run, read_episodes, step_of

SHOWN = 800
"""Characters of a text that are shown; the page says how many were left out."""
EPISODES = 3
"""Episodes that are shown of a saved step."""


@dataclass(frozen=True)
class Excerpt:
    """The beginning of a text; ``more`` characters were left out."""

    text: str
    more: int = 0


@dataclass(frozen=True)
class SystemText:
    """One system's text for a prompt. ``score`` is None where it has none."""

    label: str
    look: Look | None
    text: Excerpt
    score: float | None = None


@dataclass(frozen=True)
class Prompt:
    """A prompt, its references, and the systems' texts."""

    id: str
    prompt: Excerpt
    references: Sequence[Excerpt]
    answers: Sequence[SystemText]


@dataclass(frozen=True)
class Sample:
    """A training episode. ``parts`` are (author, text); one part without an author if the file does not name it."""

    prompt: Excerpt
    parts: Sequence[tuple[str, Excerpt]]
    score: float | None
    finished: bool
    tokens: Mapping[str, int]


class TextRow(NamedTuple):
    """The evaluation whose texts are shown for a system."""

    label: str
    look: Look | None
    evaluation: Evaluation


def visible(text: str) -> str:
    """The text with control characters, direction overrides and half surrogate pairs made visible."""
    return "".join(_visible(c) for c in text)


def excerpt(text: str, most: int = SHOWN) -> Excerpt:
    """The first ``most`` characters of a text."""
    return Excerpt(visible(text[:most]), max(0, len(text) - most))


def side_by_side(
    rows: Sequence[TextRow],
    guide: Mapping[str, str],
    *,
    figure: str | None,
    count: int,
    seed: int,
) -> tuple[list[Prompt], int]:
    """``count`` prompts that all evaluations have, drawn with ``seed``, and the number that they were drawn from.

    ``guide``: texts of a guide file by id. An id counts if all evaluations have the same prompt under it.
    """
    with_texts = [row for row in rows if row.evaluation.texts]
    if not with_texts:
        return [], 0
    first = with_texts[0].evaluation.records
    common = sorted(
        name
        for name, record in first.items()
        if all(name in e.texts and e.records[name].prompt == record.prompt for _, _, e in with_texts)
    )
    prompts = []
    for name in random.Random(seed).sample(common, min(count, len(common))):
        answers = [
            SystemText(label, look, excerpt(e.texts[name]), e.records[name].scores.get(figure) if figure else None)
            for label, look, e in with_texts
        ]
        if name in guide:
            answers.insert(0, SystemText("guide file", None, excerpt(guide[name])))
        references = [excerpt(reference) for reference in first[name].references]
        prompts.append(Prompt(visible(name), excerpt(transcript(first[name].prompt)), references, answers))
    return prompts, len(common)


def guide_texts(path: Path, records: Mapping[str, EvaluatedRecord]) -> dict[str, str]:
    """The first text of a guide file (or predictions.jsonl) for each of the records, by id.

    A guide's record is joined by its id if the prompt is the same, else by its prompt.
    """
    by_prompt: dict[str, list[str]] = {}
    for name, record in records.items():
        by_prompt.setdefault(prompt_key(record.prompt), []).append(name)
    texts: dict[str, str] = {}
    for _, answer in read_predictions(path)[0]:
        same = answer.id in records and answer.prompt in ("", records[answer.id].prompt)
        for name in [answer.id] if same else by_prompt.get(prompt_key(answer.prompt), []):
            texts.setdefault(name, answer.prediction)
    return texts


def samples(run: Run) -> list[tuple[int, list[Sample]]]:
    """The first episodes of the first, the middle and the last saved step."""
    files = run.rollouts
    chosen = sorted({0, len(files) // 2, len(files) - 1}) if files else []
    return [(step_of(files[i]), [_sample(row) for row in read_episodes(files[i])[:EPISODES]]) for i in chosen]


def guided(steps: Sequence[tuple[int, Sequence[Sample]]]) -> bool:
    """Whether a guide wrote in any of these episodes."""
    return any("guide" in sample.tokens for _, episodes in steps for sample in episodes)


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
        parts = [(str(segment["author"]), excerpt(segment["text"])) for segment in segments]
    else:  # an earlier version wrote the ids alone
        parts = [("", excerpt(str(row.get("text", ""))))]
    return Sample(excerpt(_prompt(row)), parts, row.get("score"), bool(row.get("finished")), tokens)


def _prompt(row: Mapping[str, Any]) -> str:
    """The prompt of a saved episode, to read."""
    given = row.get("prompt", "")
    return transcript(read_prompt(given, "prompt")) if is_messages(given) else str(given)


def _visible(c: str) -> str:
    code, turns = ord(c), "\u202a" <= c <= "\u202e" or "\u2066" <= c <= "\u2069"  # the direction of the text
    if c in "\n\t" or (code >= 0xA0 and not turns and not 0xD800 <= code < 0xE000) or 0x20 <= code < 0x7F:
        return c
    if code < 0x20:
        return chr(0x2400 + code)
    return "\ufffd" if 0xD800 <= code < 0xE000 else f"⟨U+{code:04X}⟩"
