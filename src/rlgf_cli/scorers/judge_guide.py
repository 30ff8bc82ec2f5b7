"""A guide as judge: sends questions, and reads the verdict from the last line of each answer.

The judge goes through the guide layer: cached answers are not billed again, ``replay`` sends no request, and the run's
budget is a hard cap. An answer that cannot be read, or that was cut at its limit, is never turned into a number: the
request is repeated with a reminder of how to end.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from rlgf_cli.config.common import PartConfig
from rlgf_cli.config.guide import BudgetConfig, GuideConfig
from rlgf_cli.errors import Interrupted, UserError, did_you_mean
from rlgf_cli.guides.make import describe, make_live_guide, make_offline_guide, refuses_temperature
from rlgf_cli.guides.unanswered import unanswered
from rlgf_cli.noise import short_hash
from rlgf_cli.protocols import Completion, Example, Failure, Guide, GuideRequest
from rlgf_cli.scorers.base import shorten

MAX_NEW_TOKENS = 512
CRITERION = "It does what the prompt asks for. It is correct, fluent and complete, and adds nothing that is not wanted."
_REMINDER = "Mind the last line: an answer that does not end as asked is of no use."
_OWN_WORDS = ("prompt_template", "examples", "clean", "continuation", "continue_template")
"""Keys of a guide's section that change its prompt or its text; a judge takes none of them."""
_SENT = {"extra_body", "reasoning_effort", "reasoning_tokens"}
"""Keys that decide a verdict, for the signature; those of before they existed do not have them."""


class Judge:
    """A guide that judges texts. ``spec`` is its name, which the ``guide`` section may hold instead.

    The section is that of ``rlgf collect-guide``, with temperature 0 and without seeds by default. ``ending`` ends
    every question: it states the form of the last line. ``on_rows(n)`` is called when n more answers are read or given
    up. Where ``stop()`` is true no further request is sent.
    """

    def __init__(
        self, kind: str, spec: str | None, guide: Mapping[str, Any], *, ending: str, max_new_tokens: int, device: str
    ) -> None:
        self.kind, self.ending, self.max_new_tokens = kind, ending, max_new_tokens
        self.config = judge_config(kind, spec, guide, device)
        self.guide: Guide = make_live_guide(self.config, seed=0)
        self.counts: Counter[str] = Counter()
        self.stop: Callable[[], bool] = lambda: False

    @property
    def attempts(self) -> int:
        """Requests for one answer that can be read: the question, the question with a reminder and, where the judge
        samples, that once more. A greedy judge would give the same answer again."""
        return 2 if self.config.sampling.temperature == 0 else 3

    @property
    def settings(self) -> str:
        """The judging model and its sampling, for a signature."""
        known, sampling = self.guide.settings, self.config.sampling
        weights = known.get("weights_sha256")
        local = self.config.name.rpartition("/")[2]
        name = f"{local},sha256={weights[:12]}" if weights else known.get("model", self.config.name)
        chat = ",chat" if self.config.api == "chat" and _is_local(self.config.name) else ""
        temperature = "default" if sampling.temperature is None else f"{sampling.temperature:g}"
        hashed = {
            "sampling": sampling.model_dump(exclude={"temperature", "send_seed"}, exclude_defaults=True),
            "request": self.config.model_dump(include=_SENT, exclude_defaults=True),
        }
        return f"model={name},temperature={temperature},max_tokens={self.max_new_tokens}{chat}" + "".join(
            f",{what}={short_hash(repr(changed), 12)}" for what, changed in hashed.items() if changed
        )

    def template_hash(self, template: str) -> str:
        """A hash of all that a question holds besides the texts: system message, template, ending and reminder."""
        return short_hash("\n".join([self.config.system or "", template, self.ending, _REMINDER]), 12)

    def verdicts(
        self,
        questions: Sequence[tuple[Example, str]],
        read: Callable[[str], Any],
        on_rows: Callable[[int], None],
    ) -> list[Verdict]:
        """The judge's verdict on each question, in order; equal questions are sent once.

        ``questions``: pairs of an example and the text of the question. ``read`` makes a value of an answer, or None
        where it cannot. Raises RlgfError where the guide failed, so that no figure depends on a server's state;
        Interrupted where ``stop`` came true; and the guide's own errors (a spent budget, a replay without a recorded
        text). All answers that arrived are in the cache.
        """
        verdicts: dict[str, Verdict] = {}
        about = {question: example for example, question in questions}
        times = Counter(question for _, question in questions)
        left = list(times)
        self.guide.check((self._prompt(about[q], q) for q in left), self.max_new_tokens)
        for attempt in range(self.attempts):
            for question, outcome in self._answers(left, about, attempt):
                value = None if isinstance(outcome, Failure) or outcome.finish_reason != "stop" else read(outcome.text)
                verdicts[question] = Verdict(value, outcome)
                if value is not None or isinstance(outcome, Failure) or attempt == self.attempts - 1:
                    on_rows(times[question])
            left = [q for q in left if verdicts[q].value is None and not verdicts[q].failed]
            self.counts["asked_again"] += len(left) if attempt < self.attempts - 1 else 0
        return [verdicts[question] for _, question in questions]

    def _prompt(self, about: Example, question: str, *, again: bool = False) -> Example:
        """The prompt of a question; a repeated one has a reminder, for greedy answers to equal prompts are equal."""
        reminder = f"\n\n{_REMINDER} {self.ending}" if again else ""
        return Example(about.id, f"{question}\n\n{self.ending}{reminder}")

    def _answers(
        self, questions: Sequence[str], about: Mapping[str, Example], attempt: int
    ) -> Iterator[tuple[str, Completion | Failure]]:
        """Answers as they arrive, with or without a text; other failures are raised when all answers are there."""

        def requests() -> Iterator[GuideRequest]:
            for question in questions:
                if self.stop():
                    return
                prompt = self._prompt(about[question], question, again=attempt > 0)
                yield GuideRequest(prompt, sample_index=attempt, max_new_tokens=self.max_new_tokens)

        failures: list[Failure] = []
        with closing(self.guide.stream(requests())) as answers:
            for answer in answers:
                outcome, question = answer.outcome, questions[answer.index]
                if isinstance(outcome, Failure) and not outcome.settled:
                    failures.append(outcome)
                    continue
                self.counts["answers"] += not isinstance(outcome, Failure)
                self.counts["cached"] += not isinstance(outcome, Failure) and outcome.cached
                yield question, outcome
        if self.stop():
            raise Interrupted("the judge's answers so far are in the cache", hint="--resume goes on from there")
        if failures:
            raise unanswered(f"the judge {self.guide.name}", failures, f"{len(questions)} questions")


@dataclass(frozen=True)
class Verdict:
    """The value read from the answer to a question (None where none could be read), and the last answer."""

    value: Any
    answer: Completion | Failure

    @property
    def failed(self) -> bool:
        """Whether the judge gave no text: it is not asked again."""
        return isinstance(self.answer, Failure)

    @property
    def unread(self) -> str:
        """Why there is no value, as it is counted."""
        if isinstance(self.answer, Failure):
            return "refused" if self.answer.refused else "no_text"
        return "unparseable"

    @property
    def excerpt(self) -> str:
        """The end of the last answer, or why there is none, for error messages."""
        if isinstance(self.answer, Failure):
            return self.answer.message
        cut = "cut at its limit; " if self.answer.finish_reason == "length" else ""
        return f"{cut}its end: {shorten(self.answer.text[-120:])!r}"


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with all placeholders filled in at once: braces in the texts are left alone."""
    return re.sub(r"\{(" + "|".join(values) + r")\}", lambda match: values[match[1]], template)


def check_template(what: str, template: str, criterion: str, needed: Sequence[str]) -> None:
    """Refuse a template without the placeholders of the judged texts or of a given criterion. Raises UserError."""
    for name in needed:
        if f"{{{name}}}" not in template:
            raise UserError(
                f"{what}: the template must hold {{{name}}}",
                hint="the judge compares or rates that text",
            )
    if criterion != CRITERION and "{criterion}" not in template:
        raise UserError(f"{what}: this template has no place for the criterion", hint="put {criterion} into it")


def judge_config(what: str, spec: str | None, section: Mapping[str, Any], device: str) -> GuideConfig:
    """The judge as a guide: greedy, and without repairs of its answers; thinking before them is not read."""
    given = dict(section)
    if spec is not None and given.setdefault("name", spec) != spec:
        raise UserError(f"{what} is named twice: {spec!r} and {given['name']!r}", hint="leave guide.name out")
    if "name" not in given:
        raise UserError(f"{what} needs a guide", hint="write judge:GUIDE, as in judge:gpt-4o-mini or judge:hf:PATH")
    if wrong := [key for key in _OWN_WORDS if key in given]:
        raise UserError(f"{what}: guide.{wrong[0]} is not for a judge", hint="a judge's prompt is given by `template`")
    sampling = given.get("sampling")
    if sampling is None or isinstance(sampling, Mapping):
        greedy = {} if refuses_temperature(given) else {"temperature": 0.0}
        given["sampling"] = {"temperature": None, **greedy, "send_seed": False, **(sampling or {})}
    given.setdefault("device", device)
    if given.get("api") is None and _is_local(given["name"]) and _has_chat_template(given["name"]):
        given["api"] = "chat"
    # the prompt is the judge's own, not the template of the checkpoint's task, and the answer is not repaired
    given |= {"clean": "thinking", "prompt_template": None if given.get("api") == "chat" else "{prompt}"}
    try:
        return GuideConfig.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        hint = did_you_mean(key, GuideConfig.model_fields) if first["type"] == "extra_forbidden" else None
        raise UserError(f"{what}: guide{'.' + key if key else ''}: {first['msg'].lower()}", hint=hint) from None


def _is_local(name: Any) -> bool:
    return isinstance(name, str) and name.startswith(("hf:", "vllm:"))


def _has_chat_template(name: str) -> bool:
    """Whether the tokenizer of a local judge has a chat template: then the question is a message of the user."""
    from rlgf_cli.models.gguf import plain_checkpoint
    from rlgf_cli.models.load import check_checkpoint_name, load_tokenizer

    path, _ = plain_checkpoint(name.partition(":")[2])
    check_checkpoint_name(path)
    return bool(load_tokenizer(path).chat_template)


def refuse_judges_without_price(rewards: Sequence[PartConfig], budget: BudgetConfig) -> None:
    """Refuse a cap in US dollars for a judge among rewards that has no price; no request is sent. Raises UserError."""
    for part in rewards:
        kind, _, spec = part.name.partition(":")
        if kind == "judge":
            config = judge_config("the reward judge", spec or None, part.params.get("guide") or {}, "cpu")
            if describe(config).remote:
                with closing(make_offline_guide(config, seed=0)) as guide:
                    guide.check_budget(budget)
