"""Sets of evolved instructions, as ``rlgf evolve generate`` writes them, made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import write_rows
from rlgf_cli.artifacts.records import AnsweredStepRecord, EvolvedRecord

_WORDS = [
    *("amber", "basil", "cedar", "dune", "ember", "frost", "grove", "heath", "islet"),
    *("jetty", "knoll", "larch", "marsh", "nook", "oasis", "pond", "quarry", "reef"),
]


def instruction(seed: str, step: int, kind: str = "") -> str:
    """An instruction of 3 + 3 ``step`` words; each step adds words that depend on the seed and the kind."""
    words = ["Describe", "the", seed]
    for k in range(1, step + 1):
        start = sum(map(ord, f"{kind}{seed}")) * k
        words += [_WORDS[(start + 5 * j) % len(_WORDS)] for j in range(3)]
    return " ".join(words) + "."


def step(seed: str, number: int, **changes: Any) -> AnsweredStepRecord:
    """A row of steps.jsonl: kept, for one query and a tenth of a cent, unless it is changed."""
    row = {
        "seed_id": seed,
        "visit": 0,
        "step": number,
        "operation": "deepening",
        "instruction": instruction(seed, number - 1),
        "text": instruction(seed, number),
        "outcome": "kept",
        "novelty": 0.5,
        "different": None,
        "reward": 0.5,
        "queries": 1,
        "cost_usd": 0.001,
    }
    return AnsweredStepRecord(**{**row, **changes})


def write_set(folder: Path, *, seeds: int, steps: int, kind: str = "", queries: int = 1) -> Path:
    """A folder of ``seeds`` chains of ``steps`` kept steps and one that was refused."""
    folder.mkdir()
    kept, rows = [], []
    for name in [f"s{i}" for i in range(seeds)]:
        for k in range(1, steps + 1):
            text = instruction(name, k, kind)
            rows.append(step(name, k, text=text, operation="breadth" if k == 1 else "deepening", queries=queries))
            kept.append(
                EvolvedRecord(
                    id=f"{name}/0.{k}",
                    prompt=text,
                    references=["An answer."],
                    seed_id=name,
                    visit=0,
                    step=k,
                    operation=rows[-1].operation,
                    operations=["breadth", *["deepening"] * (k - 1)],
                    parent=f"{name}/0.{k - 1}" if k > 1 else name,
                    novelty=0.5,
                    different=None,
                    queries=queries * k,
                    cost_usd=0.001,
                )
            )
        rows.append(step(name, steps + 1, text="", outcome="refusal", novelty=None, cost_usd=None, queries=queries))
    write_rows(folder / "instructions.jsonl", [record.model_dump() for record in kept])
    write_rows(folder / "steps.jsonl", [row.model_dump() for row in rows])
    return folder
