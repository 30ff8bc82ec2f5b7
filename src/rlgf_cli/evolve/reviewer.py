"""A guide as reviewer: it judges whether a rewrite asks for something else than its instruction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlgf_cli.protocols import Example
from rlgf_cli.scorers.judge_guide import Judge, fill
from rlgf_cli.scorers.judge_verdicts import read_choice

TEMPLATE = """Here are two tasks for an assistant. Do they ask for the same?

### First task
{first}

### Second task
{second}

They are equal if they set the same constraints, ask for the same depth and cover the same breadth; other words for the
same thing do not matter. Say in one sentence what differs, if anything does. Then give your verdict."""
ENDING = """End with a line of its own that holds nothing but the verdict: `Verdict: equal` or `Verdict: different`."""
MAX_NEW_TOKENS = 200


class GuideReviewer:
    """Asks a guide, greedily and through the cache."""

    def __init__(self, guide: dict[str, Any], *, device: str = "auto") -> None:
        self.judge = Judge("the reviewer", None, guide, ending=ENDING, max_new_tokens=MAX_NEW_TOKENS, device=device)

    def different(self, pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
        """Whether each rewrite differs from its instruction; None where no answer had a verdict, or the guide refused
        or gave no text. Raises RlgfError for other failures of the guide.
        """
        questions = [
            (Example(f"review {i}", first), fill(TEMPLATE, {"first": first, "second": second}))
            for i, (first, second) in enumerate(pairs)
        ]
        return [verdict.value for verdict in self.judge.verdicts(questions, read_verdict, lambda n: None)]


def read_verdict(answer: str) -> bool | None:
    """True or False for a last line ``Verdict: different`` or ``Verdict: equal``; None for any other last line."""
    choice = read_choice(answer, "equal|different")
    return None if choice is None else choice.lower() == "different"
