"""The command ``rlgf doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlgf_cli import console
from rlgf_cli.cli.invocation import Invocation
from rlgf_cli.errors import RlgfError

if TYPE_CHECKING:
    from rlgf_cli.protocols import Check
    from rlgf_cli.stages.doctor import Diagnosis

_LONGEST = 160


def doctor(invocation: Invocation) -> None:
    """Check what you would train with: model, data, reward and guide.

    Flags and recipes are those of `rlgf train`. The policy writes a text per prompt, on which the invariants of step 0
    are checked; a live guide is asked for a text per prompt and, where it can, for a continuation of half of it. Exit
    code 1 where an invariant is broken that training relies on.

    ```
    rlgf doctor --model runs/sft --data train.jsonl --reward rouge
    rlgf doctor -c recipes/synthetic/train.yaml --alg ppo++ --model runs/sft --guide guide.jsonl --data train.jsonl
    rlgf doctor --guide gpt-3.5 --model runs/sft --data train.jsonl -L 5 --max-new-tokens 48 --json
    ```
    """
    resolved = invocation.resolve()
    from rlgf_cli.stages import doctor as stage

    diagnosis = stage.run(resolved)
    if invocation.as_json:
        console.result_json(diagnosis.to_json())
    else:
        _show(diagnosis)
    if diagnosis.broken:
        remedies = [check.remedy for check in diagnosis.checks if check.status == "fail" and check.remedy]
        raise RlgfError(
            f"{len(diagnosis.broken)} of {len(diagnosis.checks)} checks failed: {', '.join(diagnosis.broken)}",
            hint="; ".join(dict.fromkeys(remedies)) or None,
        )


def _show(diagnosis: Diagnosis) -> None:
    who = f"{diagnosis.guide} and {diagnosis.model}" if diagnosis.guide else diagnosis.model
    console.result(f"{who} on {diagnosis.prompts} prompts of {diagnosis.data}")
    for check in diagnosis.checks:
        console.result()
        for line in _lines(check):
            console.result(line)


def _lines(check: Check) -> list[str]:
    lines = [f"{check.status:<4}  {check.name}: {check.finding}", f"      {check.explanation}"]
    if check.remedy:
        lines.append(f"      remedy: {check.remedy}")
    for sample in check.samples:
        lines.append(f"      lost {sample['lost']}:" if "lost" in sample else "      sample:")
        lines += [f"        {name}: {_short(text)}" for name, text in sample.items() if name != "lost"]
    return lines


def _short(text: str) -> str:
    """A text on one line, line breaks shown; the middle of a long one is left out."""
    shown = repr(text)
    half = _LONGEST // 2
    return shown if len(shown) <= _LONGEST else f"{shown[:half]} ... {shown[-half:]}"
