"""The features of a chain for a learned policy: numbers of order one, in the order of their names."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from rlgf_cli.evolve.environment import KEPT, Step
from rlgf_cli.evolve.operations import Operation

TEXT_FEATURES = ("words", "sentences", "numbers", "list_marks", "question", "type_token")
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")
_NUMBER = re.compile(r"\d+")
_LIST_MARK = re.compile(r"^\s*(?:[-*\u2022]|\d+[.)])\s|\|", re.MULTILINE)


def feature_names(operations: Sequence[Operation]) -> list[str]:
    """The names of :func:`features`' numbers, in their order.

    ``previous/*``: the operation of the last step, one-hot (``none`` at the start). ``asked/*``: the number of steps
    with each operation, divided by ``steps_per_chain``. ``held/*``: the number of kept rewrites by each operation since
    the last kept breadth, divided by 3. ``step``: divided by ``steps_per_chain``, at most 1. ``rejected``: 1 where the
    last rewrite was not kept. Of the current instruction: ``words``, ``sentences``, ``numbers`` and ``list_marks`` as
    ln(1 + count) / 4; ``question``: 1 with a question mark; ``type_token``: distinct words divided by words;
    ``novelty`` when it was kept, 0 for a seed.
    """
    names = [operation.name for operation in operations]
    return [
        *(f"previous/{name}" for name in ["none", *names]),
        *(f"asked/{name}" for name in names),
        *(f"held/{name}" for name in names),
        "step",
        "rejected",
        *TEXT_FEATURES,
        "novelty",
    ]


def features(
    seed_prompt: str, steps: Sequence[Step], operations: Sequence[Operation], steps_per_chain: int
) -> np.ndarray:
    """The state before the step after ``steps``, in the order of :func:`feature_names`. float32 [features]"""
    names = [operation.name for operation in operations]
    breadth = {operation.name for operation in operations if operation.breadth}
    last = steps[-1] if steps else None
    chosen = Counter(step.operation for step in steps)
    kept = [step for step in steps if step.outcome == KEPT]
    begins = max((i for i, step in enumerate(kept) if step.operation in breadth), default=0)
    since_breadth = Counter(step.operation for step in kept[begins:])
    current = kept[-1] if kept else None
    values = [
        float(last is None),
        *(float(last is not None and last.operation == name) for name in names),
        *(chosen[name] / steps_per_chain for name in names),
        *(since_breadth[name] / 3 for name in names),
        min(1.0, len(steps) / steps_per_chain),
        float(last is not None and last.outcome != KEPT),
        *text_features(current.text if current else seed_prompt),
        (current.novelty or 0.0) if current else 0.0,
    ]
    return np.array(values, dtype=np.float32)


def text_features(text: str) -> list[float]:
    """The numbers of :data:`TEXT_FEATURES`, in their order."""
    words = re.findall(r"\w+", text.casefold())
    counts = (len(words), *(len(mark.findall(text)) for mark in (_SENTENCE_END, _NUMBER, _LIST_MARK)))
    return [
        *(math.log1p(count) / 4 for count in counts),
        float("?" in text),
        len(set(words)) / len(words) if words else 0.0,
    ]
