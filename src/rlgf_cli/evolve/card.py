"""The data card (README.md) of a generated set: its inputs, settings, counts, cost, and licence terms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlgf_cli import __version__
from rlgf_cli.artifacts.jsonl import atomic_text
from rlgf_cli.config.evolve_generate import EvolveGenerateConfig
from rlgf_cli.models.card import table

_TERMS = (
    "The texts are the guide's: its provider's terms hold for them and may restrict what a model trained on them is "
    "used for. The seeds' licence holds for what was made from them. Check both before you share or sell the set."
)


def write_data_card(path: Path, config: EvolveGenerateConfig, run: Mapping[str, Any]) -> None:
    """Write the card. ``run``: the manifest with its summary (``result``). Inputs are shown by name, without the paths
    of this machine.
    """
    summary, spend = run["result"], run["spend"]
    answers = " and the guide's answers to them" if config.answers else ", without answers"
    sft = f"rlgf sft --model MODEL --data {path.parent.name}/instructions.jsonl -o sft"
    parts = [
        "---\ntags: [rlgf, instructions, synthetic]\n---",
        f"# {path.parent.name}",
        f"{summary['instructions']} instructions{answers}, made by `rlgf evolve generate` (rlgf {__version__}) from "
        f"{summary['seeds']} seeds: a policy chose how the guide rewrote each (TeaMs-RL, Gu, Knoll and Jin, arXiv "
        "2403.08694). `instructions.jsonl` is the set, `steps.jsonl` every requested rewrite with its "
        "outcome, `config.resolved.json` every setting, `run.json` versions and inputs.",
    ]
    if config.answers:
        parts.append(f"```\n{sft}\n```")
    space = "words and pairs of words" if config.novelty.encoder is None else Path(config.novelty.encoder).name
    novelty = f"novelty below {config.novelty.least:g} ({space})"
    duplicate = f"Jaccard {config.minhash.threshold:g} of three words, or {novelty}"
    settings = {
        "seeds": f"{summary['seeds']} of {Path(config.data).name}",
        "policy": Path(config.policy).name,
        "operations": Path(config.operations).name if config.operations else "built in",
        "steps of a chain": config.steps,
        "chains of a seed": config.passes,
        "a duplicate": duplicate,
        "rewrites requested": summary["rewrites"],
        "kept": summary["kept"],
        "in the set": summary["instructions"],
        "verdicts of the reviewer": summary["verdicts"] if config.reviewer else None,
        "answers requested": summary["answers"] or None,
        "queries in all": summary["queries"],
        "queries per instruction": summary["queries_per_instruction"],
        "US dollars, when the texts were bought": summary["cost_usd"],
        "US dollars charged to this run": spend.get("charged_usd"),
        "calls charged to this run": spend.get("calls"),
    }
    parts.append("## How it was made\n\n" + table(settings))
    shares = {name: f"{n['asked']} asked, {n['kept']} kept" for name, n in summary["operations"].items()}
    parts.append("## Operations\n\n" + table(shares))
    rejected = {**summary["rejected"], **{f"answer: {name}": n for name, n in summary["answers_rejected"].items()}}
    if rejected:
        parts.append("## What was rejected\n\n" + table(rejected))
    for role in ("guide", "reviewer"):
        if (provenance := run.get(role)) is not None:
            rows = {
                "name": provenance["guide"].rpartition("/")[2],
                "models as reported": ", ".join(sorted(provenance["models"])) or None,
                "terms": provenance["licence"],
            }
            parts.append(f"## {role.capitalize()}\n\n" + table(rows))
    parts.append("## Licence and terms\n\n" + _TERMS)
    with atomic_text(path) as stream:
        stream.write("\n\n".join(parts) + "\n")
