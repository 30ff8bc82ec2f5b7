"""The small CommonGen recipe's data: concept sets of frequent words.

``python recipes/commongen/small/data.py SOURCE FOLDER`` reads ``train.jsonl.gz`` in SOURCE and keeps the concept sets
whose concepts are among the 500 most frequent, with their sentences of at most 14 words that use the 2,000 commonest
words and the concepts; all lower case, punctuation apart. The training split alone is used: the concepts of the others
hardly occur in it, and a model with a closed vocabulary has no way to write a word that it never saw. A tenth of the
concept sets, by a hash of their words, is held out. It writes ``train.jsonl`` and ``test.jsonl``.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

CONCEPTS, WORDS, LONGEST = 500, 2000, 14
_WORD = re.compile(r"\w+(?:-\w+)*|'\w+|[^\w\s]")

Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """The records of a gzipped JSONL file."""
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def split(text: str) -> list[str]:
    """Lower-cased words and punctuation marks."""
    return _WORD.findall(text.lower())


def frequent(rows: list[Record]) -> list[Record]:
    """The rows that the frequent words suffice for, with the sentences that they suffice for."""
    concepts = Counter(word for row in rows for word in row["meta"]["concepts"])
    known = {word for word, _ in concepts.most_common(CONCEPTS)}
    words = Counter(word for row in rows for text in row["references"] for word in split(text))
    writable = known | {word for word, _ in words.most_common(WORDS)}
    kept = []
    for row in rows:
        if not known.issuperset(row["meta"]["concepts"]):
            continue
        sentences = [split(text) for text in row["references"]]
        references = [" ".join(s) for s in sentences if len(s) <= LONGEST and writable.issuperset(s)]
        if references:
            meta = {"concepts": row["meta"]["concepts"]}
            kept.append({"id": row["id"], "prompt": row["prompt"], "references": references, "meta": meta})
    return kept


def held_out(row: Record) -> bool:
    """A tenth of the concept sets: a function of the words, not of the order of rows."""
    return hashlib.sha256(" ".join(sorted(row["meta"]["concepts"])).encode()).digest()[0] < 26


def main(source: Path, folder: Path) -> None:
    """Write both files."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = frequent(read(source / "train.jsonl.gz"))
    for name in ("train", "test"):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as stream:
            for row in rows:
                if held_out(row) == (name == "test"):
                    stream.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
