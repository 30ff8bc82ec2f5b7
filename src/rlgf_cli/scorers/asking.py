"""An LLM as judge, asked through the guide layer, and its rating of one text as a reward.

The judge is asked as any guide is: what the cache holds is not bought again, ``replay`` asks nobody, and the run's
budget is a hard cap. What it must end with is one line that is read strictly. An answer that cannot be read, or that
was cut at its limit, is never turned into a number: the judge is asked again, and told once more how to end.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from rlgf_cli.config.guide import GuideConfig
from rlgf_cli.errors import Interrupted, RlgfError, UserError, did_you_mean
from rlgf_cli.guides.make import make_live_guide
from rlgf_cli.noise import short_hash
from rlgf_cli.protocols import Completion, Example, Failure, Guide, GuideRequest
from rlgf_cli.scorers.base import shorten

ATTEMPTS = 3
"""How often a judge is asked for one answer that can be read."""
MAX_NEW_TOKENS = 512
CRITERION = "It does what the prompt asks for. It is correct, fluent and complete, and adds nothing that is not wanted."
_REMINDER = "Mind the last line: an answer that does not end as asked is of no use."
_OWN_WORDS = ("prompt_template", "clean", "continuation", "continue_template")
"""Keys of a guide that put its question, or mend its answer, in ways that a judge's is not."""


class Judge:
    """A guide that judges. ``spec`` is its name, or stands in the ``guide`` section.

    The section is that of ``rlgf collect-guide``, with temperature 0 and no seeds unless it says otherwise.
    ``ending`` is the last thing that the judge is told: how to end its answer. ``on_rows(n)`` hears of n more answers
    that could be read or are given up; where ``stop()`` is true nothing more is asked. Failures of the kinds
    ``given_up`` are taken as refusals are; other ones that pass are raised.
    """

    def __init__(
        self, kind: str, spec: str | None, guide: Mapping[str, Any], *, ending: str, max_new_tokens: int, device: str
    ) -> None:
        self.kind, self.ending, self.max_new_tokens = kind, ending, max_new_tokens
        self.config = _config(kind, spec, guide, device)
        self.guide: Guide = make_live_guide(self.config, seed=0)
        self.counts: Counter[str] = Counter()
        self.stop: Callable[[], bool] = lambda: False
        self.given_up: Collection[str] = ()

    @property
    def settings(self) -> str:
        """Which model judges, and how it answers, for a signature."""
        known, sampling = self.guide.settings, self.config.sampling
        weights = known.get("weights_sha256")
        local = self.config.name.rpartition("/")[2]
        name = f"{local},sha256={weights[:12]}" if weights else known.get("model", self.config.name)
        drawn = sampling.model_dump(exclude={"temperature", "send_seed"}, exclude_defaults=True)
        return f"model={name},temperature={sampling.temperature:g},max_tokens={self.max_new_tokens}" + (
            f",sampling={short_hash(repr(drawn), 12)}" if drawn else ""
        )

    def wording(self, template: str) -> str:
        """A hash of all that the judge is told besides the texts."""
        return short_hash("\n".join([self.config.system or "", template, self.ending, _REMINDER]), 12)

    def ask(
        self,
        questions: Sequence[tuple[Example, str]],
        read: Callable[[str], Any],
        on_rows: Callable[[int], None],
    ) -> list[Verdict]:
        """What the judge says to each question, in order; equal questions are asked once.

        ``questions``: the example that each is about, and its text. ``read`` makes a value of an answer, or None where
        it cannot. Raises RlgfError where the guide failed, so that no figure depends on a server's state, Interrupted
        where ``stop`` came true, and what the guide raises (a spent budget, a replay of what was never recorded). All
        answers that came are in the cache.
        """
        verdicts: dict[str, Verdict] = {}
        about = {question: example for example, question in questions}
        times = Counter(question for _, question in questions)
        left = list(times)
        self.guide.check((self._asked(about[q], q) for q in left), self.max_new_tokens)
        for attempt in range(ATTEMPTS):
            for question, outcome in self._answers(left, about, attempt):
                value = None if isinstance(outcome, Failure) or outcome.finish_reason != "stop" else read(outcome.text)
                verdicts[question] = Verdict(value, outcome)
                if value is not None or isinstance(outcome, Failure) or attempt == ATTEMPTS - 1:
                    on_rows(times[question])
            left = [q for q in left if verdicts[q].value is None and not verdicts[q].refused]
            self.counts["asked_again"] += len(left) if attempt < ATTEMPTS - 1 else 0
        return [verdicts[question] for _, question in questions]

    def _asked(self, about: Example, question: str, *, again: bool = False) -> Example:
        """The question as the guide gets it. Greedy answers to equal questions are equal: the second time says more."""
        reminder = f"\n\n{_REMINDER} {self.ending}" if again else ""
        return Example(about.id, f"{question}\n\n{self.ending}{reminder}")

    def _answers(
        self, questions: Sequence[str], about: Mapping[str, Example], attempt: int
    ) -> Iterator[tuple[str, Completion | Failure]]:
        """Answers as they come. The guide's failures are raised when all others are there, refusals are not."""

        def requests() -> Iterator[GuideRequest]:
            for question in questions:
                if self.stop():
                    return
                asked = self._asked(about[question], question, again=attempt > 0)
                yield GuideRequest(asked, sample_index=attempt, max_new_tokens=self.max_new_tokens)

        failures: list[Failure] = []
        with closing(self.guide.stream(requests())) as answers:
            for answer in answers:
                outcome, question = answer.outcome, questions[answer.index]
                if isinstance(outcome, Failure) and not outcome.final and outcome.kind not in self.given_up:
                    failures.append(outcome)
                    continue
                self.counts["answers"] += not isinstance(outcome, Failure)
                self.counts["cached"] += not isinstance(outcome, Failure) and outcome.cached
                yield question, outcome
        if self.stop():
            raise Interrupted(
                "interrupted; what the judge has said is in the cache", hint="--resume goes on from there"
            )
        if failures:
            kinds = ", ".join(f"{kind}: {n}" for kind, n in Counter(f.kind for f in failures).most_common())
            raise RlgfError(
                f"the judge {self.guide.name} did not answer {len(failures)} of {len(questions)} questions ({kinds}); "
                f"the first: {failures[0].message}",
                hint="what it said is in the cache: the same command with --resume asks for the rest",
            )


@dataclass(frozen=True)
class Verdict:
    """What came of a question: the value that was read, None where nothing could be read, and the last answer."""

    value: Any
    answer: Completion | Failure

    @property
    def refused(self) -> bool:
        """Whether the judge would not answer."""
        return isinstance(self.answer, Failure)

    @property
    def said(self) -> str:
        """The end of the last answer, or why there is none, for a letter."""
        if isinstance(self.answer, Failure):
            return self.answer.message
        cut = "cut at its limit; " if self.answer.finish_reason == "length" else ""
        return f"{cut}its end: {shorten(self.answer.text[-120:])!r}"


def last_line(answer: str) -> str:
    lines = answer.strip().splitlines()
    return lines[-1].strip() if lines else ""


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with all placeholders filled in at once: braces in the texts are left alone."""
    return re.sub(r"\{(" + "|".join(values) + r")\}", lambda match: values[match[1]], template)


def check_template(what: str, template: str, criterion: str, needed: Sequence[str]) -> None:
    """Refuse a template without its texts, and a criterion that it has no place for. Raises UserError."""
    for name in needed:
        if f"{{{name}}}" not in template:
            raise UserError(f"{what}: the template must hold {{{name}}}", hint="it is what the judge is asked about")
    if criterion != CRITERION and "{criterion}" not in template:
        raise UserError(f"{what}: this template has no place for the criterion", hint="put {criterion} into it")


def _config(what: str, spec: str | None, section: Mapping[str, Any], device: str) -> GuideConfig:
    """The judge as a guide: greedy, and its words as they come."""
    given = dict(section)
    if spec is not None and given.setdefault("name", spec) != spec:
        raise UserError(f"{what} is named twice: {spec!r} and {given['name']!r}", hint="leave guide.name out")
    if "name" not in given:
        raise UserError(f"{what} needs a guide", hint="write judge:GUIDE, as in judge:gpt-4o-mini or judge:hf:PATH")
    if wrong := [key for key in _OWN_WORDS if key in given]:
        raise UserError(f"{what}: guide.{wrong[0]} is not for a judge", hint="`template` says how it is asked")
    sampling = given.get("sampling")
    if sampling is None or isinstance(sampling, Mapping):
        given["sampling"] = {"temperature": 0.0, "send_seed": False, **(sampling or {})}
    given.setdefault("device", device)
    # the words are the judge's own, not those of the checkpoint's task, and nothing in the answer is mended
    given |= {"clean": "none", "prompt_template": None if given.get("api") == "chat" else "{prompt}"}
    try:
        return GuideConfig.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        hint = did_you_mean(key, GuideConfig.model_fields) if first["type"] == "extra_forbidden" else None
        raise UserError(f"{what}: guide{'.' + key if key else ''}: {first['msg'].lower()}", hint=hint) from None
