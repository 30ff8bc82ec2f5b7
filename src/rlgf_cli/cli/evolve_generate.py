"""The command ``rlgf evolve generate``."""

from __future__ import annotations

from typing import Any

from rlgf_cli import console
from rlgf_cli.cli.invocation import Invocation


def evolve_generate(invocation: Invocation) -> None:
    """Evolve seed instructions into a new set, with the guide's answers.

    A policy chooses how the guide rewrites each seed, step by step. A rewrite that breaks a rule, or is not new, is
    left out and counted. The set is prompts and references, as rlgf sft takes them.

    ```
    rlgf evolve generate --guide gpt-3.5 --data seeds.jsonl -o runs/evolved --dry-run
    rlgf evolve generate --guide gpt-3.5 --policy runs/policy --data seeds.jsonl \\
      -o runs/evolved --max-cost-usd 5
    rlgf sft --model gpt2 --data runs/evolved/instructions.jsonl -o runs/sft
    ```
    """
    resolved, existing = invocation.resolve(), invocation.existing
    from rlgf_cli.stages import evolve_generate as stage

    invocation.estimate(stage.dry_run, resolved)
    done = stage.run(resolved, existing=existing)
    if not invocation.as_json:
        _log_summary(done.summary, resolved.config.answers)
    invocation.print({"path": str(done.folder), **done.summary, "spend": done.spend}, done.folder)


def _log_summary(summary: dict[str, Any], answers: bool) -> None:
    """Log how many rewrites were kept, and the reasons for which other rewrites, and answers, were rejected."""
    rows = [[name, str(n["asked"]), str(n["kept"])] for name, n in summary["operations"].items()]
    console.log(console.table(["operation", "asked", "kept"], rows))
    for what in ("rejected", "answers_rejected"):
        if summary[what]:
            counts = ", ".join(f"{name}: {count}" for name, count in summary[what].items())
            console.log(f"{what.replace('_', ' ')}: {counts}")
    console.log(
        f"{summary['instructions']} instructions of {summary['queries']} queries "
        f"({summary['queries_per_instruction']:g} each)"
    )
    if not answers:
        console.log("without answers: rlgf sft needs references, which rlgf collect-guide can ask for")
