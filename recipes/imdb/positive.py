"""``python recipes/imdb/positive.py IN.jsonl OUT.jsonl``: the positive reviews of a file by ``rlgf prepare``."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(source: Path, target: Path) -> None:
    """Copy the lines whose ``meta.label`` is 1."""
    with source.open(encoding="utf-8") as lines, target.open("w", encoding="utf-8") as out:
        out.writelines(line for line in lines if json.loads(line)["meta"]["label"] == 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
