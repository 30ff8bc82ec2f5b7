"""The command ``rlgf make-negatives``."""

from __future__ import annotations

from typing import Any

from rlgf_cli import console
from rlgf_cli.cli.invocation import Invocation


def make_negatives(invocation: Invocation) -> None:
    """Make bad texts of many kinds from good ones, to train a reward model on.

    ```
    rlgf make-negatives --data train.jsonl -o negatives.jsonl
    rlgf make-negatives --data train.jsonl --kinds cut_off,repetition -o neg.jsonl
    rlgf make-negatives --data train.jsonl --samples sft_texts.jsonl -o neg.jsonl
    ```
    """
    resolved, existing = invocation.resolve(), invocation.existing
    from rlgf_cli.stages import make_negatives as stage

    done = stage.run(resolved, existing=existing)
    if not invocation.as_json:
        _log_summary(done.summary)
    invocation.print({"path": str(done.path), **done.summary}, done.path)


def _log_summary(summary: dict[str, Any]) -> None:
    """Log how many texts of each kind were made, and what was left out."""
    names = dict.fromkeys([*summary["made"], *summary["not_applicable"], *summary["equal_to_reference"]])
    rows = [
        [name, *(str(summary[what].get(name, 0)) for what in ("made", "not_applicable", "equal_to_reference"))]
        for name in names
    ]
    console.log(console.table(["kind", "made", "does not apply", "equal to a reference"], rows))
    console.log(f"good texts: {summary['good']}, rows: {summary['rows']}")
    if own := summary.get("on_policy"):
        console.log(
            f"on_policy: {own['made']} made, {own['no_rule_broken']} broke no rule, {own['empty']} empty, "
            f"{own['left_over']} left over"
        )
    if summary["without_references"]:
        console.log(f"examples without a reference: {summary['without_references']}")
