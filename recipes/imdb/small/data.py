"""The small IMDB recipe's data: short windows of film reviews.

``python recipes/imdb/small/data.py SOURCE FOLDER [MOST]`` reads ``train``, ``validation`` and ``test.jsonl.gz`` (whole
reviews: prompt and first reference; ``meta.label`` 1 is positive) and the recorded guide's file in SOURCE, at most MOST
records of each, and writes

- ``windows.jsonl``: every training review cut into windows, each a prompt of 20 words and the next 24, with the label
  of its review: for the starting policy and the classifiers;
- ``positive.jsonl``: the windows of positive reviews, for the guide;
- ``validation.jsonl``: two windows of each validation review, to see what a classifier has learned;
- ``train.jsonl``, ``test.jsonl``: one window of each review, its first: the prompts of training and of evaluation;
- ``api.jsonl``: the recorded guide's own prompts, positive ones, as a training set of their own.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

PROMPT_WORDS, RESPONSE_WORDS = 20, 24
GUIDE = "guide_gpt-3.5-turbo-0613.continue.jsonl.gz"

Record = dict[str, Any]


def read(path: Path, most: int | None) -> list[Record]:
    """The first records of a gzipped JSONL file."""
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in islice(stream, most)]


def windows(review: Record, most: int | None = None) -> list[Record]:
    """A review in pieces of a prompt and the words that follow it; HTML line breaks become spaces."""
    words = (review["prompt"] + review["references"][0]).replace("<br />", " ").split()
    size = PROMPT_WORDS + RESPONSE_WORDS
    found = []
    for n, start in enumerate(range(0, len(words) - size + 1, size)):
        if n == most:
            break
        middle = start + PROMPT_WORDS
        found.append(
            {
                "id": f"{review['id']}-{n}",
                "prompt": " ".join(words[start:middle]),
                "references": [" ".join(words[middle : start + size])],
                "meta": {"label": review["meta"]["label"]},
            }
        )
    return found


def write(path: Path, records: Iterable[Record]) -> None:
    """One JSON record a line."""
    with path.open("w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def main(source: Path, folder: Path, most: int | None = None) -> None:
    """Write all files."""
    folder.mkdir(parents=True, exist_ok=True)
    reviews = {name: read(source / f"{name}.jsonl.gz", most) for name in ("train", "validation", "test")}
    pieces = [piece for review in reviews["train"] for piece in windows(review)]
    write(folder / "windows.jsonl", pieces)
    write(folder / "positive.jsonl", (piece for piece in pieces if piece["meta"]["label"] == 1))
    write(folder / "validation.jsonl", (piece for review in reviews["validation"] for piece in windows(review, 2)))
    for name in ("train", "test"):
        write(folder / f"{name}.jsonl", (piece for review in reviews[name] for piece in windows(review, 1)))
    write(
        folder / "api.jsonl",
        (
            {"id": row["id"], "prompt": row["prompt"], "references": [], "meta": {"sentiment": row["sentiment"]}}
            for row in read(source / GUIDE, most)
            if row["sentiment"] == "positive" and row["completion"].strip()
        ),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
