"""A task for reward models: short reviews, good and bad ones, and small models that can tell them apart."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

GOOD, BAD, REST = ["good", "great", "fine"], ["bad", "awful", "poor"], ["film", "plot", "scene", "the", "a"]

FAST = ("--max-steps", 40, "--batch-size", 16, "--learning-rate", "1e-2", "--device", "cpu")


def review(rng: random.Random, label: int) -> str:
    words = rng.choices(REST, k=rng.randrange(3, 7))
    words.insert(rng.randrange(len(words)), rng.choice(GOOD if label else BAD))
    return " ".join(words)


def reviews(count: int, seed: int = 0, names: tuple[Any, Any] = (0, 1)) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [{"text": review(rng, i % 2), "label": names[i % 2]} for i in range(count)]


def pairs(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """A good and a bad review of the same words but one, about the same prompt; two kinds of them."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        chosen = review(rng, 1)
        bad = rng.choice(BAD)
        rejected = " ".join(bad if word in GOOD else word for word in chosen.split())
        rows.append(
            {"prompt": f"film {i // 2}", "chosen": chosen, "rejected": rejected, "kind": ("rude", "cold")[i % 2]}
        )
    return rows


def negatives(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The same as rows of ``rlgf make-negatives``: every prompt's good text once, and its bad ones."""
    rows = []
    for i, pair in enumerate(pairs(count, seed)):
        common = {"schema_version": 1, "prompt": f"film {i}", "reference": pair["chosen"]}
        rows.append({**common, "id": f"{i}/reference/0", "text": pair["chosen"], "label": "good", "kind": "reference"})
        rows.append({**common, "id": f"{i}/rude/0", "text": pair["rejected"], "label": "bad", "kind": "rude"})
        cut = " ".join(pair["rejected"].split()[::-1])
        rows.append({**common, "id": f"{i}/turned/0", "text": cut, "label": "bad", "kind": "turned"})
    return rows


def describe(tmp_path: Path, architecture: str = "gpt2", **keys: Any) -> str:
    """A YAML file for a small model from scratch."""
    path = tmp_path / "small.yaml"
    lines = {"architecture": architecture, "hidden": 32, "layers": 1, "tokenizer": "word", "max_positions": 32, **keys}
    path.write_text("".join(f"{k}: {v}\n" for k, v in lines.items()))
    return str(path)


def train_json(run_cli: Any, out: Path, *arguments: object) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """``rlgf train-reward --json``: the command's outcome, what it printed, and the file evaluation.json."""
    shown = run_cli("train-reward", *arguments, "-o", out, "--json")
    assert shown.exit_code == 0, shown.stderr
    return shown, json.loads(shown.stdout), json.loads((out / "evaluation.json").read_text())


def large_classifier(folder: Path, architecture: str, texts: list[str], labels: list[str]) -> tuple[Any, Any]:
    """A model whose random weights are larger than usual, so that a mistake changes its loss, and its tokenizer."""
    import torch

    from rlgf_cli.config.scratch import read_scratch
    from rlgf_cli.models import scratch

    described = read_scratch(describe(folder, architecture))
    model, tokenizer = scratch.build_classifier(described, name="x", texts=texts, labels=labels, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() > 1 else 1)
    return model.eval(), tokenizer
