"""Length of texts: a penalty for leaving a range of words, and figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from statistics import fmean
from typing import Annotated, Literal

from pydantic import Field

from rlgf_cli.errors import UserError
from rlgf_cli.failures.sentences import words
from rlgf_cli.protocols import Example, Metric, MetricResult, Reward, Score
from rlgf_cli.scorers.base import refuse_target, require_references, scored_only, signature
from rlgf_cli.scorers.schedule import LinearSchedule, linear_schedule

Count = Annotated[int, Field(ge=0)]

FORMS: dict[str, Callable[[int, int], float]] = {
    "linear": lambda count, bound: float(abs(count - bound)),
    "quadratic": lambda count, bound: ((max(count, 1) - max(bound, 1)) / max(bound, 1)) ** 2,
    "log_ratio": lambda count, bound: abs(math.log(max(count, 1) / max(bound, 1))),
}
"""The cost of ``count`` words where the limit is ``bound``: the words between them; their square, as a share of the
bound; |log| of the ratio, the same for half of it as for twice. The last two take no words for one word.
"""


class Length(Reward, Metric):
    """As a reward: minus what a text costs whose number of words (split at whitespace) is outside a range; see FORMS.

    The range is ``min_words`` to ``max_words``; or the whole numbers around a target and ``tolerance``, a share of
    it, on either side. The target is ``target`` words, or ``ratio`` times the words of what ``to`` names: the prompt,
    or the reference (the mean over an example's references). In training it moves there from ``start`` over the first
    ``steps`` iterations. ``cap`` is the most that a text costs. The unit of ``linear`` is words: choose the part's
    weight accordingly. A target that differs between texts or iterations is logged, in words, as ``length.target``.

    As a metric: ``length.words`` (split at white space), ``length.characters`` (without the white space around the
    text) and ``length.ratio``, words by the mean words of the example's references, which must have some. An empty text
    has 0.
    """

    name = "length"
    reward_only = frozenset(
        {"min_words", "max_words", "target", "ratio", "to", "tolerance", "start", "steps", "form", "cap"}
    )

    def __init__(
        self,
        argument: str | None = None,
        *,
        min_words: Count | None = None,
        max_words: Count | None = None,
        target: Annotated[float, Field(ge=0)] | None = None,
        ratio: Annotated[float, Field(gt=0)] | None = None,
        to: Literal["prompt", "reference"] | None = None,
        tolerance: Annotated[float, Field(ge=0, lt=1)] | None = None,
        start: Annotated[float, Field(ge=0)] | None = None,
        steps: Annotated[int, Field(ge=1)] | None = None,
        form: Literal["linear", "quadratic", "log_ratio"] = "linear",
        cap: Annotated[float, Field(gt=0)] | None = None,
    ) -> None:
        refuse_target(self.name, argument)
        ranged, aimed = min_words is not None or max_words is not None, target is not None or ratio is not None
        if (target is not None) + (ratio is not None) + ranged > 1:
            raise UserError("the reward 'length' takes target, ratio, or min_words and max_words, not both")
        if to is not None and ratio is None:
            raise UserError("the reward 'length': to says what a ratio is of", hint="give ratio, or leave to out")
        if not aimed and (tolerance, start, steps) != (None, None, None):
            raise UserError("the reward 'length': tolerance, start and steps are for target and ratio")
        if (start is None) != (steps is None):
            raise UserError("the reward 'length': start and steps go together")
        self.bounded = ranged or aimed
        self.low, self.high = min_words or 0, max_words
        if self.high is not None and self.low > self.high:
            raise UserError(f"the reward 'length': min_words {self.low} is larger than max_words {self.high}")
        aim = target if target is not None else ratio
        self.aim = linear_schedule(aim, start, steps) if aim is not None else None
        self.to = (to or "prompt") if ratio is not None else None
        self.tolerance, self.form, self.cap = tolerance or 0.0, form, cap
        self.moves = self.aim is not None and self.aim.moves
        self._logs_target = self.to is not None or self.moves
        self.signature = self._signature()

    def _signature(self) -> str:
        aim = f"ratio_to_{self.to}" if self.to else "target"
        settings = [self.name, "rule=1", f"{aim}={self.aim}", f"tolerance={self.tolerance:g}"]
        if self.aim is None:
            settings[2:] = [f"min_words={self.low}", f"max_words={self.high}"]
        settings += [f"form={self.form}"] if self.form != "linear" else []
        settings += [f"cap={self.cap:g}"] if self.cap is not None else []
        return ",".join(settings)

    def at(self, step: int) -> Length:
        if self.aim is None or not self.aim.moves:
            return self
        fixed = copy(self)
        fixed.aim, fixed.moves = LinearSchedule(self.aim.at(step)), False
        fixed.signature = fixed._signature()
        return fixed

    def check(self, examples: Sequence[Example]) -> None:
        if not self.bounded:
            raise UserError(
                "the reward 'length' needs a bound",
                hint="give params: {max_words: 20}, {min_words: 5}, {target: 12} or {ratio: 0.2}",
            )
        if self.to == "reference":
            require_references(self.name, examples)

    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> list[Score]:
        self.check(examples)
        return [self._score(example, len(words(text))) for example, text in zip(examples, texts, strict=True)]

    def _score(self, example: Example, count: int) -> Score:
        low, high, logged = self.low, self.high, {}
        if self.aim is not None:
            target = self.aim.end * self._unit(example)
            # 0.07 * 100 is a little more than 7
            low = math.floor(round(target * (1 - self.tolerance), 9))
            high = math.ceil(round(target * (1 + self.tolerance), 9))
            logged = {"target": target} if self._logs_target else {}
        if count >= low and (high is None or count <= high):
            return Score(0.0, logged)
        cost = FORMS[self.form](count, low if high is None or count < low else high)
        return Score(-(cost if self.cap is None else min(cost, self.cap)), logged)

    def _unit(self, example: Example) -> float:
        """The number of words that the target is a multiple of."""
        if self.to == "reference":
            return fmean(len(words(reference)) for reference in example.references)
        return len(words(example.prompt)) if self.to == "prompt" else 1.0

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        counts = [float(len(words(text))) for text in texts]
        means = [_mean_words(example.references) for example in examples]
        values: dict[str, list[float | None]] = {
            "words": list(counts),
            "characters": [float(len(text.strip())) for text in texts],
            "ratio": [count / mean if mean else None for count, mean in zip(counts, means, strict=True)],
        }
        return MetricResult(scored_only(values), signature(self.name, "words=whitespace,rule=1", examples))


def _mean_words(references: Sequence[str]) -> float:
    """0 where there is no reference, or only empty ones."""
    return sum(len(words(reference)) for reference in references) / len(references) if references else 0.0
