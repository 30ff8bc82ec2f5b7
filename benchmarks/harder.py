"""A harder task than the synthetic one: twelve concept words to a sentence of two clauses that uses all of them.

``python benchmarks/harder.py FOLDER`` writes its data; ``benchmarks/harder.py:score`` is its reward. A sentence has
twenty-two words and a full stop; the words of each clause and their order are those of recipes/synthetic/grammar.py.
Two words of every kind are in the prompt, so that the writer has to know which of them it has used: a small model from
scratch learns that from text and hardly from a reward. With the concepts of the start's sentences replaced with
probability 0.6 and those of the guide's with 0.12, the start never succeeds and the guide in one text of ten.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes" / "synthetic"))

import grammar

START, GUIDE = 0.6, 0.12
"""How often a concept is replaced in the sentences that the start and the guide are fitted to."""
MAX_POSITIONS = 48
"""A prompt has thirteen tokens with the recipe's template, a response at most twenty-four with its EOS."""
MAX_NEW_TOKENS = 28
SIZES = {"start": (20000, START), "guide": (20000, GUIDE), "train": (8000, 0.0), "test": (400, 0.0)}
"""Each file's number of examples, and how often a concept of their references is replaced."""


def sentence(first: grammar.Concepts, then: grammar.Concepts, rng: random.Random) -> str:
    """Two clauses of eleven words each and a full stop."""
    clauses = [grammar.sentence(concepts, rng).removesuffix(" .") for concepts in (first, then)]
    return f"first {clauses[0]} then {clauses[1]} ."


def parse(text: str) -> set[str] | None:
    """The concept words of a grammatical text; None where it is not one."""
    words = text.split()
    if len(words) != 23 or (words[0], words[11], words[22]) != ("first", "then", "."):
        return None
    found = [grammar.parse(" ".join([*clause, "."])) for clause in (words[1:11], words[12:22])]
    return None if found[0] is None or found[1] is None else found[0] | found[1]


def score(text: str, meta: Mapping[str, Any]) -> float:
    """1 where the text is grammatical and holds all twelve concepts, else 0."""
    return float(parse(text) == set(meta["concepts"]))


def records(name: str, count: int, q: float, seed: int = 0) -> list[dict[str, Any]]:
    """``count`` examples with a reference in which each concept is replaced with probability q; prompts of ``test``
    occur nowhere else."""
    rng = random.Random(f"harder-{name}-{seed}")
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        first, then = zip(*(rng.sample(kind, 2) for kind in grammar.KINDS), strict=True)
        concepts = [*first, *then]
        held_out = random.Random(" ".join(sorted(concepts))).random() < 0.1
        if held_out != (name == "test"):
            continue
        rng.shuffle(concepts)
        reference = sentence(grammar.spoil(first, q, rng), grammar.spoil(then, q, rng), rng)
        rows.append(
            {
                "id": f"{name}-{len(rows)}",
                "prompt": " ".join(concepts),
                "references": [reference],
                "meta": {"concepts": concepts},
            }
        )
    return rows


def main(folder: Path, seed: int = 0) -> None:
    """Write the four files of :data:`SIZES`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (count, q) in SIZES.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as stream:
            for row in records(name, count, q, seed):
                stream.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
