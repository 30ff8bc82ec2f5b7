"""The same task on CommonGen's concept sets, with recorded texts of GPT-4 as the guide's.

``python recipes/sentences/commongen.py SOURCE FOLDER`` reads CommonGen's test and validation splits in SOURCE, and the
texts that GPT-4 wrote for 400 sets of the test split. 300 of these sets, by a hash of their words, are for training:
``data/train.jsonl`` without references and ``guide.jsonl``. The other 100 are held out: ``data/test.jsonl`` with the
references that people wrote, and ``guide_test.jsonl``. ``data/valid.jsonl``, for sweeps, is of the validation split.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from data import PROMPT, write

GUIDE = "guide_gpt-4-0613.test400.jsonl.gz"
TRAIN, VALID = 300, 100


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a gzipped JSONL file."""
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def request(row: dict[str, Any], *, references: bool) -> dict[str, Any]:
    """A concept set as a request; its references are left out for training."""
    concepts = row["meta"]["concepts"]
    return {
        "id": row["id"],
        "prompt": PROMPT.format(words=", ".join(concepts)),
        "references": row["references"] if references else [],
        "meta": {"concepts": concepts},
    }


def order(row: dict[str, Any]) -> bytes:
    """A hash of the concepts: the order of the files does not matter."""
    return hashlib.sha256(" ".join(sorted(row["meta"]["concepts"])).encode()).digest()


def main(source: Path, folder: Path) -> None:
    """Write the five files."""
    texts = {row["id"]: row for row in read(source / GUIDE)}
    sets = sorted((row for row in read(source / "test.jsonl.gz") if row["id"] in texts), key=order)
    valid = sorted(read(source / "validation.jsonl.gz"), key=order)[:VALID]
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name, guide, rows in (("train", "guide", sets[:TRAIN]), ("test", "guide_test", sets[TRAIN:])):
        requests = [request(row, references=name == "test") for row in rows]
        write(folder / "data" / f"{name}.jsonl", requests)
        write(folder / f"{guide}.jsonl", [{**texts[row["id"]], "prompt": row["prompt"]} for row in requests])
    write(folder / "data" / "valid.jsonl", [request(row, references=True) for row in valid])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
