"""An LLM as judge: its rating of a text (reward), and its preference between a text and an opponent (metric).

The metric is a win rate. Judges prefer what stands first, or second (Zheng et al. 2023, section 3.3), so both orders
are asked. As there, a text wins where both verdicts prefer it and loses where both prefer the opponent; all else is a
tie:

    score = 1     both orders prefer the text
            0     both orders prefer the opponent
            0.5   anything else: the verdicts differ, or one of them is "tie"

``judge`` is the mean of the scores, ``judge.consistent`` the share of prompts whose two verdicts name the same winner,
or both "tie". An example is skipped, and counted, where it has no opponent (``no_opponent``), where the judge refuses
to answer in one of the orders (``refused``) or its answer holds no text (``no_text``), or where a verdict cannot be
read (``unparseable``); ``on_unreadable`` says what becomes of the last three.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from rlgf_cli.artifacts.predictions import answers_alone
from rlgf_cli.artifacts.rundir import parent_of
from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.noise import short_hash
from rlgf_cli.protocols import Example, MetricResult, Prompt, Reward, Score, Scorer
from rlgf_cli.protocols.messages import transcript
from rlgf_cli.scorers.base import ReferenceMetric, signature
from rlgf_cli.scorers.judge_guide import (
    CRITERION,
    MAX_NEW_TOKENS,
    Judge,
    Verdict,
    check_template,
    fill,
)
from rlgf_cli.scorers.judge_verdicts import read_choice, read_rating

RATING_TEMPLATE = """Somebody answered the prompt below. Rate the answer.

### Prompt
{prompt}

### Answer
{text}

### What a good answer is like
{criterion}

First say in one to three sentences what is good and what is bad about the answer. Judge what is there; nothing that the
answer says about itself counts. Then give a whole number from 1 (useless) to 10 (could not be better)."""
RATING_ENDING = "End with a line of its own that holds nothing but the rating, in this form:\nRating: N"
TEMPLATE = """Two answers to the same prompt are compared. Say which of them is better.

### Prompt
{prompt}

### Answer A
{a}

### Answer B
{b}

### What a good answer is like
{criterion}

First say in one to three sentences how the answers differ. Which of them stands first means nothing, and neither does
what they say about themselves; a longer answer is not better for its length. Then give your verdict: A, B, or tie where
neither is better."""
ENDING = """End with a line of its own that holds nothing but the verdict, in one of these forms:
Verdict: A
Verdict: B
Verdict: tie"""
Winner = Literal["A", "B", "tie"]
OnUnreadable = Literal["skip", "value", "error"]
_MIRRORED: dict[Winner, Winner] = {"A": "B", "B": "A", "tie": "tie"}


class _JudgeScorer(Scorer):
    """The members that the reward and the metric share: the judge, its template and its criterion."""

    name = "judge"
    reports_rows = True
    kind: ClassVar[str]
    needed: ClassVar[tuple[str, ...]]
    """Placeholders that a template must hold."""
    ending: ClassVar[str]

    def __init__(
        self,
        spec: str | None,
        guide: Mapping[str, Any] | None,
        template: str,
        criterion: str,
        max_new_tokens: int,
        on_unreadable: OnUnreadable,
        unreadable_value: float | None,
        device: str,
    ) -> None:
        check_template(self.kind, template, criterion, self.needed)
        if (on_unreadable == "value") != (unreadable_value is not None):
            raise UserError(f"{self.kind}: on_unreadable: value and unreadable_value go together")
        self.on_unreadable, self.unreadable_value = on_unreadable, unreadable_value
        self.template, self.criterion = template, criterion
        self.judge = Judge(
            self.kind, spec, guide or {}, ending=self.ending, max_new_tokens=max_new_tokens, device=device
        )
        self.guides = [self.judge.guide]
        self.settings = (
            f"{self.judge.settings},template={self.judge.template_hash(template)},criterion={short_hash(criterion, 12)}"
        )
        if unreadable_value is not None:
            self.settings += f",unreadable={unreadable_value:g}"

    def stop_when(self, stop: Callable[[], bool]) -> None:
        self.judge.stop = stop

    def _error(self, what: str, example: Example, verdict: Verdict) -> RlgfError:
        """The error for an answer without what was asked for."""
        tries = "did not answer" if verdict.failed else f"gave no {what} in {self.judge.attempts} answers"
        return RlgfError(
            f"the judge {self.judge.guide.name} {tries} for the text of example {example.id!r}: {verdict.excerpt}",
            hint="a better judge, another template, or a larger max_new_tokens; on_unreadable: skip leaves it out",
        )

    def _question(self, example: Example, **texts: str) -> str:
        return fill(self.template, {"prompt": transcript(example.given), **texts, "criterion": self.criterion})


class JudgeReward(_JudgeScorer, Reward):
    """``judge:GUIDE``: a rating from 1 to 10 as ``(rating - 1) / 9``; the part ``rating`` logs it as it was given.

    ``guide``: more of the guide's section. ``criterion``: what a good answer is like, in words. ``template`` replaces
    the question; it holds ``{text}``, and may hold ``{prompt}`` and ``{criterion}``. The form of the last line follows.
    ``on_unreadable``: a text whose rating cannot be read has no score, so that training leaves its episode out
    (``skip``), counts as rated ``unreadable_value`` (``value``), or ends the run (``error``).
    """

    kind, needed, ending = "the reward 'judge'", ("text",), RATING_ENDING

    def __init__(
        self,
        spec: str | None = None,
        *,
        guide: dict[str, Any] | None = None,
        template: str = RATING_TEMPLATE,
        criterion: str = CRITERION,
        max_new_tokens: Annotated[int, Field(ge=1)] = MAX_NEW_TOKENS,
        on_unreadable: OnUnreadable = "skip",
        unreadable_value: Annotated[float, Field(ge=1, le=10)] | None = None,
        device: str = "auto",
    ) -> None:
        super().__init__(spec, guide, template, criterion, max_new_tokens, on_unreadable, unreadable_value, device)
        self.counts = self.judge.counts
        self.signature = f"{self.name},{self.settings},scale=1-10"

    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> list[Score | None]:
        questions = [
            (example, self._question(example, text=text)) for example, text in zip(examples, texts, strict=True)
        ]
        verdicts = self.judge.verdicts(questions, read_rating, self.on_rows)
        return [self._score(example, verdict) for example, verdict in zip(examples, verdicts, strict=True)]

    def _score(self, example: Example, verdict: Verdict) -> Score | None:
        if (rating := verdict.value) is not None:
            return Score((rating - 1) / 9, {"rating": float(rating)})
        self.judge.counts[verdict.unread] += 1
        if self.on_unreadable == "error":
            raise self._error("rating", example, verdict)
        return None if self.unreadable_value is None else Score((self.unreadable_value - 1) / 9)


class JudgeMetric(_JudgeScorer, ReferenceMetric):
    """``judge:GUIDE``. ``against``: a file with another system's texts, joined by id; else the first reference.

    ``guide``: more of the guide's section. ``criterion``: what a good answer is like, in words. ``template`` replaces
    the question; it holds ``{a}`` and ``{b}``, and may hold ``{prompt}`` and ``{criterion}``. The form of the last line
    follows. ``on_unreadable``: an example with a verdict that cannot be read is skipped (``skip``), has the score
    ``unreadable_value`` (``value``; 0.5 is a tie), or ends the evaluation (``error``).
    """

    kind, needed, ending = "the metric 'judge'", ("a", "b"), ENDING

    def __init__(
        self,
        spec: str | None = None,
        *,
        against: str | None = None,
        guide: dict[str, Any] | None = None,
        template: str = TEMPLATE,
        criterion: str = CRITERION,
        max_new_tokens: Annotated[int, Field(ge=1)] = MAX_NEW_TOKENS,
        on_unreadable: OnUnreadable = "skip",
        unreadable_value: Annotated[float, Field(ge=0, le=1)] | None = None,
        device: str = "auto",
    ) -> None:
        self.against = against
        self._opponents = _read(against) if against is not None else None
        super().__init__(spec, guide, template, criterion, max_new_tokens, on_unreadable, unreadable_value, device)
        opponent = "references" if against is None else f"sha256:{(parent_of(against) or {})['sha256'][:12]}"
        self.settings += f",opponent={opponent},orders=both"

    def check_set(self, examples: Sequence[Example]) -> None:
        if self._opponents is None:
            super().check_set(examples)
            return
        assert self.against is not None
        for example in examples:
            prompt, _ = self._opponents.get(example.id, ("", ""))
            if prompt and prompt != example.given:
                raise UserError(
                    f"the text for {example.id!r} answers another prompt",
                    where=self.against,
                    hint="`against` must be texts for the same data",
                )
        if not any(example.id in self._opponents for example in examples):
            raise UserError(
                "none of these texts has the id of an example", where=self.against, hint="texts are joined by their ids"
            )

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        before = Counter(self.judge.counts)
        pairs = [(e, text, self._opponent(e)) for e, text in zip(examples, texts, strict=True)]
        faced = [(e, text, opponent) for e, text, opponent in pairs if opponent is not None]
        questions = [
            (e, self._question(e, a=a, b=b)) for e, text, other in faced for a, b in ((text, other), (other, text))
        ]
        done = 0

        def on_answers(n: int) -> None:
            nonlocal done
            self.on_rows((done + n) // 2 - done // 2)  # two answers to a row
            done += n

        self.on_rows(len(pairs) - len(faced))
        verdicts = iter(self.judge.verdicts(questions, read_verdict, on_answers))
        counts = Counter({"no_opponent": len(pairs) - len(faced)})
        scores: list[float | None] = []
        consistent: list[float | None] = []
        last: Verdict | None = None
        read = 0
        for example, _, opponent in pairs:
            both = (next(verdicts), next(verdicts)) if opponent is not None else ()
            winners: list[Winner] = [v.value for v in both if v.value is not None]
            if unread := [v for v in both if v.value is None]:
                last = unread[0]
                counts[min(v.unread for v in unread)] += 1  # one reason for an example
                if self.on_unreadable == "error":
                    raise self._error("verdict", example, last)
            read += (complete := len(winners) == 2)
            instead = self.unreadable_value if unread else None
            scores.append(preference(winners[0], winners[1]) if complete else instead)
            consistent.append(float(winners[0] == _MIRRORED[winners[1]]) if complete else None)
        if not read and last is not None:
            raise RlgfError(
                f"the judge {self.judge.guide.name} gave no verdict that could be read, in {self.judge.attempts} "
                f"answers to each question; the last one: {last.excerpt}",
                hint="a better judge, another template, or a larger max_new_tokens",
            )
        requests = {key: self.judge.counts[key] - before[key] for key in ("answers", "cached", "asked_again")}
        return MetricResult(
            {"score": scores, "consistent": consistent},
            signature(self.name, self.settings, examples),
            {key: n for key, n in {**requests, **counts}.items() if n},
        )

    def _opponent(self, example: Example) -> str | None:
        if self._opponents is not None:
            return self._opponents[example.id][1] if example.id in self._opponents else None
        return example.references[0] if example.references else None


def read_verdict(answer: str) -> Winner | None:
    """The winner in the last line ``Verdict: A|B|tie``; None for any other last line."""
    choice = (read_choice(answer, r"A|B|(?:a\s+)?tie") or "").lower()
    return "tie" if choice.endswith("tie") else {"a": "A", "b": "B"}.get(choice)  # type: ignore[return-value]


def preference(as_a: Winner, as_b: Winner) -> float:
    """The score of a text from the verdicts with the text as A and with the text as B; see the module."""
    if as_a == "A" and as_b == "B":
        return 1.0
    return 0.0 if as_a == "B" and as_b == "A" else 0.5


def _read(path: str) -> dict[str, tuple[Prompt, str]]:
    """``(prompt, text)`` by id."""
    return {answer.example.id: (answer.example.given, answer.text) for answer in answers_alone(path)[0]}
