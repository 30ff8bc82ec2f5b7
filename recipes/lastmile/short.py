"""The small last-mile recipes' data: the short examples of a task.

``python recipes/lastmile/short.py SOURCE FOLDER PROMPT_WORDS REFERENCE_WORDS`` reads ``train``, ``validation`` and
``test.jsonl.gz`` in SOURCE and keeps prompts of at most PROMPT_WORDS words; in ``train`` and ``validation`` only those
whose references have at most REFERENCE_WORDS. It writes the three as ``.jsonl`` and says how many it kept.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any


def is_short(row: dict[str, Any], prompt_words: int, reference_words: int | None) -> bool:
    """Whether a row is short enough for a small model."""
    if len(row["prompt"].split()) > prompt_words:
        return False
    return reference_words is None or max(len(text.split()) for text in row["references"]) <= reference_words


def main(source: Path, folder: Path, prompt_words: int, reference_words: int) -> None:
    """Write the three files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "validation", "test"):
        with gzip.open(source / f"{name}.jsonl.gz", "rt", encoding="utf-8") as stream:
            rows = [json.loads(line) for line in stream]
        kept = [row for row in rows if is_short(row, prompt_words, None if name == "test" else reference_words)]
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        print(f"{name}: {len(kept)} of {len(rows)}", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
