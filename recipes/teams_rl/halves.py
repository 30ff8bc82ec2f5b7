"""A set of instructions in two halves without a common seed: one to train on, one to hold out.

``python recipes/teams_rl/halves.py SET.jsonl FOLDER`` writes FOLDER/a.jsonl and FOLDER/b.jsonl. All that came of one
seed goes to one side, by the hash of the seed's id: rewrites of one seed share their words.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path


def side(seed_id: str) -> str:
    """``a`` or ``b``, equally likely."""
    return "ab"[hashlib.sha256(seed_id.encode()).digest()[0] % 2]


def main(source: Path, folder: Path) -> None:
    """Write both halves."""
    rows: dict[str, list[str]] = {"a": [], "b": []}
    for line in source.read_text(encoding="utf-8").splitlines():
        rows[side(json.loads(line)["seed_id"])].append(line)
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        print(f"{name}: {len(lines)} instructions", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
