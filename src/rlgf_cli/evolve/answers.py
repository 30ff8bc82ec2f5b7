"""The guide's answers to the instructions that were kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rlgf_cli.evolve.environment import KEPT, UNANSWERED, complete_all
from rlgf_cli.evolve.operations import PLACEHOLDER
from rlgf_cli.evolve.rules import Limits, broken_by_answer
from rlgf_cli.ledger.meter import usd
from rlgf_cli.protocols import Completion, Example, Failure, Guide, GuideRequest


@dataclass(frozen=True)
class InstructionAnswer:
    """An answer's text. ``outcome`` is ``kept``, the rule that it broke, or ``unanswered`` without a text."""

    outcome: str
    text: str
    cost_usd: float | None


def answer_requests(instructions: Iterable[Example], template: str | None) -> Iterator[Example]:
    """The prompts for answers: the instructions, put into the ``template`` where there is one."""
    for instruction in instructions:
        prompt = instruction.prompt if template is None else template.replace(PLACEHOLDER, instruction.prompt)
        yield Example(instruction.id, prompt)


def answer(
    guide: Guide, instructions: Sequence[Example], *, template: str | None, max_new_tokens: int, limits: Limits
) -> list[InstructionAnswer]:
    """The guide's answer to each instruction, in order. Raises RlgfError where the guide failed."""
    requests = [GuideRequest(e, max_new_tokens=max_new_tokens) for e in answer_requests(instructions, template)]
    answers = zip(instructions, complete_all(guide, requests), strict=True)
    return [_checked(instruction.prompt, completion, limits) for instruction, completion in answers]


def _checked(instruction: str, completion: Completion | Failure, limits: Limits) -> InstructionAnswer:
    if isinstance(completion, Failure):
        return InstructionAnswer("refusal" if completion.refused else UNANSWERED, "", None)
    text = completion.text.strip()
    rule = broken_by_answer(text, completion.finish_reason, instruction=instruction, limits=limits)
    return InstructionAnswer(rule or KEPT, text, usd(completion.nano_usd))
