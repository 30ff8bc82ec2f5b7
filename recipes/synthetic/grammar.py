"""The synthetic task: six concept words to a sentence of a small grammar that uses all of them.

``python recipes/synthetic/grammar.py FOLDER`` writes its data; ``grammar.py:score`` is its reward, and shows how a
task of one's own is written: JSONL and a Python function.

A training sentence is spoilt with probability q per concept: the concept is replaced, mostly by a favourite word of
its kind. A model trained on badly spoilt sentences (q = 0.65, the starting policy) knows the grammar and its habits,
and seldom says what it was asked, sampled or greedy; one trained on lightly spoilt ones (q = 0.1, the guide) mostly
does.
"""

# ruff: noqa: SIM905 - word lists read better as text

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NOUNS = (
    "dog cat bird horse child farmer teacher sailor doctor painter king queen robot ghost pirate singer "
    "baker hunter monk nurse judge thief clown giant wizard"
).split()
VERBS = (
    "finds loses buys sells paints hides breaks carries cleans draws drops fixes guards holds keeps likes "
    "makes moves pulls pushes sees steals takes throws wants"
).split()
ADJECTIVES = (
    "old young happy sad tall small brave quiet loud clever lazy hungry tired angry gentle proud shy rich "
    "poor blind pale strong weak famous lonely"
).split()
COLOURS = (
    "red green blue yellow white black brown pink purple orange grey golden silver scarlet violet crimson "
    "amber ivory olive copper bronze beige cream coral teal"
).split()
THINGS = (
    "ball book chair table lamp clock box cup plate spoon knife rope hat coat shoe drum flute letter ring "
    "key mirror basket bottle candle ladder"
).split()
PLACES = (
    "garden forest kitchen market harbor castle school church tower village valley island desert library "
    "station bridge cave field temple palace prison meadow attic cellar square"
).split()
KINDS = (NOUNS, VERBS, ADJECTIVES, COLOURS, THINGS, PLACES)
ARTICLES = ("the", "a")

Concepts = tuple[str, ...]
"""A noun, a verb, an adjective, a colour, a thing and a place, in this order."""


def sentence(concepts: Concepts, rng: random.Random) -> str:
    """A sentence of the grammar with the given concepts: ten words and a full stop."""
    noun, verb, adjective, colour, thing, place = concepts
    clause = f"{rng.choice(ARTICLES)} {adjective} {noun} {verb} {rng.choice(ARTICLES)} {colour} {thing}"
    return f"{clause} in the {place} ." if rng.random() < 0.5 else f"in the {place} {clause} ."


def parse(text: str) -> set[str] | None:
    """The six concept words of a grammatical sentence; None where the text is not one."""
    words = text.split()
    if len(words) != 11 or words[-1] != ".":
        return None
    where, clause = (words[:3], words[3:10]) if words[0] == "in" else (words[7:10], words[:7])
    article, adjective, noun, verb, other_article, colour, thing = clause
    concepts = (noun, verb, adjective, colour, thing, where[2])
    good = (
        where[:2] == ["in", "the"]
        and {article, other_article} <= set(ARTICLES)
        and all(word in kind for word, kind in zip(concepts, KINDS, strict=True))
    )
    return set(concepts) if good else None


def score(text: str, meta: Mapping[str, Any]) -> float:
    """1 where the text is grammatical and holds all six concepts, else 0."""
    return float(parse(text) == set(meta["concepts"]))


def spoil(concepts: Concepts, q: float, rng: random.Random) -> Concepts:
    """Each concept replaced with probability q: mostly by the favourite (first) word of its kind, else by any."""
    return tuple(_habit(kind, rng) if rng.random() < q else word for word, kind in zip(concepts, KINDS, strict=True))


def _habit(kind: list[str], rng: random.Random) -> str:
    return kind[0] if rng.random() < 0.65 else rng.choice(kind)


def records(name: str, count: int, q: float, seed: int) -> list[dict[str, Any]]:
    """``count`` examples with a reference spoilt with probability q; prompts of ``test`` occur nowhere else."""
    rng = random.Random(f"{name}-{seed}")
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        concepts = tuple(rng.choice(kind) for kind in KINDS)
        held_out = random.Random(" ".join(concepts)).random() < 0.1
        if held_out != (name == "test"):
            continue
        prompt = list(concepts)
        rng.shuffle(prompt)
        reference = sentence(spoil(concepts, q, rng), rng)
        rows.append(
            {
                "id": f"{name}-{len(rows)}",
                "prompt": " ".join(prompt),
                "references": [reference],
                "meta": {"concepts": list(concepts)},
            }
        )
    return rows


def main(folder: Path, seed: int = 0) -> None:
    """Write the four files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, q in (("start", 20000, 0.65), ("guide", 20000, 0.1), ("train", 8000, 0.0), ("test", 400, 0.0)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as stream:
            for row in records(name, count, q, seed):
                stream.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
