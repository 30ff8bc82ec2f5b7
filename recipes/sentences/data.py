"""The data of the demonstration, and the figures that it is judged by.

``python recipes/sentences/data.py FOLDER`` writes ``train.jsonl``, ``valid.jsonl`` (for sweeps) and ``test.jsonl``:
requests for one sentence with three given words, one of each paragraph of words.txt. The words of a paragraph are split
among the files, so that no word of a held-out request was ever trained on.

``python recipes/sentences/data.py DATA GUIDE OUT`` writes DATA with the completions of the guide file GUIDE as
references; requests without a completion have none.
"""

from __future__ import annotations

import json
import random
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlgf_cli.scorers.coverage import base_forms, coverage, words

WORDS = Path(__file__).with_name("words.txt")
"""Paragraphs of words: who, what they do (verbs with regular forms), and with what."""
PROMPT = "Write one sentence that uses the words: {words}."
SHARES = {"train": 0.6, "valid": 0.2, "test": 0.2}
"""The share of each list's words that a file gets."""
ROWS = {"train": 100, "valid": 100, "test": 200}


def listed(text: str, meta: Mapping[str, Any]) -> float:
    """1 where the text lists given words: three of them next to each other, in the form in which they were given.

    Commas and "and" between them do not count. "A dog carries bread" has an inflected verb, and is no list: 0.
    """
    run: list[str] = []
    for word in words(text):
        if word in meta["concepts"]:
            run = [*run[run.index(word) + 1 if word in run else 0 :], word]
        elif word != "and":
            run = []
        if len(run) == 3:
            return 1.0
    return 0.0


def repeated(text: str, meta: Mapping[str, Any]) -> float:
    """1 where the text uses a given word, in any of its forms, more than once; else 0."""
    forms = [base_forms(word) for word in words(text)]
    return float(any(sum(word in of_word for of_word in forms) > 1 for word in meta["concepts"]))


def plain(text: str, meta: Mapping[str, Any]) -> float:
    """1 where the text neither lists nor repeats the given words: the figure to watch during training."""
    return 1.0 - max(listed(text, meta), repeated(text, meta))


def natural(text: str, meta: Mapping[str, Any]) -> float:
    """1 where the text uses every given word once, and does not list them; else 0."""
    return float(coverage(meta["concepts"], text) == 1.0) * plain(text, meta)


def split(kind: list[str], seed: int) -> dict[str, list[str]]:
    """The words of one paragraph, dealt to the files."""
    dealt = random.Random(f"{kind[0]}-{seed}").sample(kind, len(kind))
    parts, first = {}, 0
    for name, share in SHARES.items():
        last = first + round(share * len(kind))
        parts[name] = dealt[first:last]
        first = last
    return parts


def records(name: str, seed: int) -> list[dict[str, Any]]:
    """The requests of a file, each set of words once."""
    rng = random.Random(f"{name}-{seed}")
    paragraphs = WORDS.read_text(encoding="utf-8").split("\n\n")
    kinds = [split(words.split(), seed)[name] for words in paragraphs]
    rows: dict[frozenset[str], dict[str, Any]] = {}
    while len(rows) < ROWS[name]:
        concepts = [rng.choice(kind) for kind in kinds]
        rng.shuffle(concepts)
        prompt = PROMPT.format(words=", ".join(concepts))
        row = {"id": f"{name}-{len(rows)}", "prompt": prompt, "meta": {"concepts": concepts}}
        rows.setdefault(frozenset(concepts), row)
    return list(rows.values())


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def with_references(data: Path, guide: Path, out: Path) -> None:
    """``data`` with the guide's completions as references."""
    texts = defaultdict(list)
    for row in read(guide):
        texts[row["prompt"]].append(row["completion"])
    write(out, [{**row, "references": texts[row["prompt"]]} for row in read(data)])


def main(folder: Path, seed: int = 0) -> None:
    """Write the three files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ROWS:
        write(folder / f"{name}.jsonl", records(name, seed))


if __name__ == "__main__":
    if len(sys.argv) == 4:
        with_references(*map(Path, sys.argv[1:]))
    else:
        main(Path(sys.argv[1]))
