"""A guide that rewrites and answers by rule: a fake endpoint's answers to the requests of ``rlgf evolve``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from conftest import write_rows
from fake_openai import Plan, Reply, Request, fraction
from rlgf_cli.evolve.operations import PLACEHOLDER, Operation, read_operations

WORDS = [
    *("river", "stone", "lamp", "garden", "winter", "clock", "bridge", "paper", "sailor", "window", "market", "engine"),
    *("forest", "violin", "harbour", "ladder", "copper", "thunder", "basket", "mirror", "valley", "candle", "orchard"),
    *("pencil", "tunnel", "feather", "anchor", "meadow", "kettle", "compass"),
]
Rewrite = Callable[[Operation, str, Request], "Reply | str"]
Answer = Callable[[str, Request], "Reply | str"]
Verdict = Callable[[str, Request], "Reply | str"]


@cache
def _operations() -> Sequence[Operation]:
    return read_operations(None)


def asked(prompt: str) -> tuple[Operation, str] | None:
    """The operation and the instruction of a request for a rewrite; None for another prompt."""
    for operation in _operations():
        before, _, after = operation.prompt.partition(PLACEHOLDER)
        if prompt.startswith(before) and prompt.endswith(after):
            return operation, prompt[len(before) : len(prompt) - len(after)]
    return None


def new_task(*key: object) -> str:
    """An instruction that is fixed by the key and has few words in common with others."""
    picked = [WORDS[int(fraction(*key, i) * len(WORDS))] for i in range(12)]
    return f"Explain how a {' '.join(picked)} can work, case {int(fraction(*key) * 1e9)}."


def rewritten(operation: Operation, instruction: str, request: Request) -> str:
    return new_task(operation.name, instruction, request.body.get("seed"))


def answered(instruction: str, request: Request) -> str:
    return f"It works by {new_task('answer', instruction)[14:]}"


def different(question: str, request: Request) -> str:
    return "They differ.\nVerdict: different"


def guide(rewrite: Rewrite = rewritten, answer: Answer = answered, verdict: Verdict = different) -> Plan:
    """The plan of a server for rewrites, answers and verdicts."""

    def plan(n: int, request: Request) -> Reply:
        found = asked(request.prompt)
        if found is not None:
            said = rewrite(*found, request)
        elif "Do they ask for the same?" in request.prompt:
            said = verdict(request.prompt, request)
        else:
            said = answer(request.prompt, request)
        return said if isinstance(said, Reply) else Reply(text=said)

    return plan


def seeds_file(folder: Path, count: int) -> Path:
    return write_rows(folder / "seeds.jsonl", [{"id": f"s{i}", "prompt": new_task("seed", i)} for i in range(count)])


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
