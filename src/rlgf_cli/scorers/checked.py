"""The check that every score passes: a broken reward stops the run and is never turned into a number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlgf_cli.errors import RlgfError
from rlgf_cli.protocols import Example, Reward, Score
from rlgf_cli.scorers.base import shorten


def score_checked(reward: Reward, examples: Sequence[Example], texts: Sequence[str]) -> list[Score]:
    """As :func:`score_or_skip`, where every text must have a score: raises RlgfError for one that was skipped."""
    scores = []
    for example, text, score in zip(examples, texts, score_or_skip(reward, examples, texts), strict=True):
        if score is None:
            raise refusal(reward.name, "gave no score", [example], [text])
        scores.append(score)
    return scores


def score_or_skip(reward: Reward, examples: Sequence[Example], texts: Sequence[str]) -> list[Score | None]:
    """``reward.score``, checked to return one finite number per text, or None where it skips one.

    Raises RlgfError (exit code 1) that names the reward, the reason and the offending example where the
    reward raises, returns another number of scores than it got texts, or a value that is no finite number.
    """
    if len(examples) != len(texts):
        raise ValueError(f"{len(examples)} examples, {len(texts)} texts")
    if not texts:
        return []
    try:
        scores = reward.score(examples, texts)
    except RlgfError:
        raise
    except Exception as error:  # a reward may be a user's code and raise any exception
        raise refusal(reward.name, f"raised {describe(error)}", examples, texts) from error
    if not isinstance(scores, Sequence) or isinstance(scores, str):
        reason = f"returned {type(scores).__name__} instead of a list of scores"
        raise refusal(reward.name, reason, examples, texts)
    if len(scores) != len(texts):
        raise refusal(reward.name, f"returned {len(scores)} scores for {len(texts)} texts", examples, texts)
    checked: list[Score | None] = []
    for example, text, score in zip(examples, texts, scores, strict=True):
        if score is None:
            checked.append(None)
            continue
        if not isinstance(score, Score):
            reason = f"returned {shorten(repr(score), 60)} where a Score is needed"
            raise refusal(reward.name, reason, [example], [text])
        try:
            checked.append(_finite(score))
        except ValueError as error:
            raise refusal(reward.name, f"returned {error}", [example], [text]) from None
    return checked


def to_number(value: Any) -> float:
    """A float from any real number (numpy and torch scalars too). Raises ValueError for all else."""
    if not isinstance(value, str | bytes) and hasattr(value, "__float__"):
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):  # an array of several numbers
            pass
    raise ValueError(f"{shorten(repr(value), 60)}, which is not a number")


def to_score(value: Any) -> Score:
    """A Score from a number, a Score, or a mapping with ``score`` and further parts. Raises ValueError."""
    if isinstance(value, Score):
        return value
    if isinstance(value, Mapping):
        if "score" not in value:
            raise ValueError(f"a dict without the key 'score' (it has: {', '.join(map(str, value)) or 'nothing'})")
        parts = {str(key): to_number(part) for key, part in value.items() if key != "score"}
        return Score(to_number(value["score"]), parts)
    return Score(to_number(value))


def refusal(
    name: str, reason: str, examples: Sequence[Example], texts: Sequence[str], *, where: str | None = None
) -> RlgfError:
    """The error for a reward that failed: it names the example where that is known, else the first of the batch."""
    example, text = examples[0], texts[0]
    at = f"example {example.id!r}"
    if len(examples) > 1:
        at = f"a batch of {len(examples)} texts, the first of {at}"
    shown = shorten(text) if text else "(empty)"
    return RlgfError(
        f"the reward {name!r} {reason}, on {at}\n  prompt: {shorten(example.prompt)}\n  text: {shown}",
        where=where,
        hint="a reward gives one finite number per text, an empty text included; --debug shows the traceback",
    )


def describe(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {shorten(error)}" if str(error) else type(error).__name__


def _finite(score: Score) -> Score:
    value = to_number(score.value)
    parts = {key: to_number(part) for key, part in score.parts.items()}
    for label, number in [("", value), *((f" in its part {key!r}", part) for key, part in parts.items())]:
        if not math.isfinite(number):
            raise ValueError(f"{number}{label}, which is not finite")
    return Score(value, parts)
