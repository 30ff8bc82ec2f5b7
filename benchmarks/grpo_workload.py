"""The workload that both sides of the GRPO benchmark run (W2): model, chat prompts, reward.

GRPO on SmolLM2-135M-Instruct with its chat template: one sentence with the words of a CommonGen training prompt, 16
episodes in groups of 8, 24 new tokens each, one optimizer step an iteration. All prompts of a case have equally many
tokens, so that both sides, which draw them in orders of their own, do equal work.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EPISODES, GROUP, PROMPTS = 16, 8, 32
LEARNING_RATE, KL, TEMPERATURE = 1e-5, 0.02, 1.0
LORA_R, LORA_ALPHA = 16, 32
REQUEST = "Write one sentence that uses the words: {words}."


@dataclass(frozen=True)
class GrpoCase:
    """``lora``: LoRA on all linear layers in bfloat16, else all weights in float32. ``prompt``: the most tokens of a
    rendered prompt, which example sentences fill up to within 8; 0: no examples. ``eos``: whether a text may end before
    ``response`` tokens. ``checkpointing``: with gradient checkpointing, TRL's default. ``iterations``: those that are
    measured, after one that is not."""

    lora: bool = False
    prompt: int = 0
    response: int = 24
    eos: bool = False
    checkpointing: bool = False
    iterations: int = 4

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def write_prompts(case: GrpoCase, tokenizer: Any, data: Path, output: Path) -> int:
    """Write the case's prompts as ``{"id", "prompt", "meta": {"concepts"}}``; returns their length in tokens."""

    def length(text: str) -> int:
        message = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return len(tokenizer(rendered, add_special_tokens=False)["input_ids"])

    by_length: dict[int, list[dict[str, Any]]] = {}
    rows = _rows(data)
    for row in rows:
        text = REQUEST.format(words=", ".join(row["meta"]["concepts"]))
        while (count := length(text)) < case.prompt - 8:  # one more example, until there is hardly room for one
            text = f"{next(rows)['references'][0]}\n{text}"
        if case.prompt and count > case.prompt:
            continue
        found = by_length.setdefault(count, [])
        found.append({"id": row["id"], "prompt": text, "meta": {"concepts": row["meta"]["concepts"]}})
        if len(found) == PROMPTS:
            output.write_text("".join(json.dumps(line) + "\n" for line in found), encoding="utf-8")
            return count
    sys.exit(f"{data} has not {PROMPTS} prompts of one length")


def _rows(data: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(data, "rt", encoding="utf-8") if data.suffix == ".gz" else data.open(encoding="utf-8") as stream:
        yield from map(json.loads, stream)


def concepts_covered(concepts: list[str], text: str) -> float:
    """The reward of both sides: the share of the words that are in the text."""
    written = text.lower()
    return sum(word in written for word in concepts) / len(concepts)


def read_grpo_case() -> tuple[GrpoCase, str, Path]:
    """The arguments of a side's program: the case as JSON, the model, and the folder with ``train.jsonl``."""
    return GrpoCase(**json.loads(sys.argv[1])), sys.argv[2], Path(sys.argv[3])
