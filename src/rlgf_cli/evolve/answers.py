"""Asking the guide to answer the instructions that were kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rlgf_cli.evolve.environment import KEPT, UNANSWERED, ask
from rlgf_cli.evolve.operations import PLACEHOLDER
from rlgf_cli.evolve.rules import Limits, broken_by_answer
from rlgf_cli.protocols import Completion, Example, Failure, Guide, GuideRequest


@dataclass(frozen=True)
class Answered:
    """An answer, and ``kept`` or the rule that it broke (``unanswered``: there is none)."""

    outcome: str
    text: str
    cost_usd: float | None


def answer_requests(instructions: Iterable[Example], template: str | None) -> Iterator[Example]:
    """What the guide is asked for an answer to each instruction; without a ``template``, the instruction."""
    for instruction in instructions:
        prompt = instruction.prompt if template is None else template.replace(PLACEHOLDER, instruction.prompt)
        yield Example(instruction.id, prompt)


def answer(
    guide: Guide, instructions: Sequence[Example], *, template: str | None, max_new_tokens: int, limits: Limits
) -> list[Answered]:
    """The guide's answer to each instruction, in order. Raises RlgfError where the guide failed."""
    asked = answer_requests(instructions, template)
    outcomes = ask(guide, [GuideRequest(example, max_new_tokens=max_new_tokens) for example in asked])
    return [_held(i.prompt, outcome, limits) for i, outcome in zip(instructions, outcomes, strict=True)]


def _held(instruction: str, outcome: Completion | Failure, limits: Limits) -> Answered:
    if isinstance(outcome, Failure):
        return Answered("refusal" if outcome.refused else UNANSWERED, "", None)
    text = outcome.text.strip()
    rule = broken_by_answer(text, outcome.finish_reason, instruction=instruction, limits=limits)
    return Answered(rule or KEPT, text, outcome.cost_usd)
