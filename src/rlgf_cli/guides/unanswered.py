"""Requests without a usable text: what helps against each kind, and the errors that end a command for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rlgf_cli.errors import RlgfError, StoppedEarly
from rlgf_cli.protocols import Completion, Failure

REMEDIES: Mapping[str, str] = {
    "reasoning": "give the reasoning tokens of its own (guide.reasoning_tokens), or ask for less of it "
    "(guide.reasoning_effort) or none (--set 'guide.chat_template_kwargs={enable_thinking: false}' where the server "
    "renders a chat template)",
    "tool_call": "turn off the tools that the server gives the model",
    "stream": "the server, or a proxy before it, streams unasked: turn that off there",
    "html": "the address leads to a web page: check the base URL (it usually ends in /v1) and proxies",
    "empty": "check guide.api (chat or completion), the prompt and guide.sampling.stop",
    "refusal": "guide.system and guide.prompt_template change what the model is asked",
    "oversized": "the server does not keep to the limit of new tokens: check that the base URL is that of an "
    "OpenAI-compatible server",
    "malformed": "check that the base URL is that of an OpenAI-compatible server, and guide.api (chat or completion)",
}
"""What helps against a kind of failure."""
FIRST_ANSWERS = 10
"""Answers without one usable text after which no further one is bought."""


def no_text(kind: str, why: str) -> Failure:
    """The failure of an answer without a usable text, which another request would not change."""
    remedy = REMEDIES.get(kind)
    return Failure(kind, f"{why}; {remedy}" if remedy else why, final=True)


class FirstAnswers:
    """Stops a session whose first answers hold no usable text: what comes after them would cost as much for as little.

    An answer that a filter kept back does not count: it says something about its prompt alone. Neither does one that
    the server broke off.
    """

    def __init__(self) -> None:
        self.usable = False
        """Whether a usable text was received, in this session or, as far as is known, before."""
        self._failed: Counter[str] = Counter()

    def add(self, who: str, outcome: Completion | Failure) -> None:
        """Count an answer that has been paid for. Raises StoppedEarly."""
        if isinstance(outcome, Completion):
            self.usable = True
        elif not self.usable and outcome.kind not in ("content_filter", "server", "rate_limit"):
            self._failed[outcome.kind] += 1
            if self._failed.total() >= FIRST_ANSWERS:
                raise self._error(who, outcome)

    def _error(self, who: str, last: Failure) -> StoppedEarly:
        kind = self._failed.most_common(1)[0][0]
        why = last.message.partition("; ")[0]
        return StoppedEarly(
            f"the first {self._failed.total()} answers of {who} hold no usable text ({_counted(self._failed)}); "
            f"the last: {why}",
            hint="; ".join(filter(None, [REMEDIES.get(kind), "--resume goes on"])),
        )


def unanswered(who: str, failures: Sequence[Failure], requests: str) -> RlgfError:
    """``who`` did not answer some of the ``requests`` ("12 questions"): the failures by kind, and the first message."""
    kinds = _counted(Counter(f.kind for f in failures))
    return RlgfError(
        f"{who} did not answer {len(failures)} of {requests} ({kinds}); the first: {failures[0].message}",
        hint="the other answers are in the cache: the same command with --resume requests the rest",
    )


def _counted(kinds: Counter[str]) -> str:
    return ", ".join(f"{kind}: {n}" for kind, n in kinds.most_common())
