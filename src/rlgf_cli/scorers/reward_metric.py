"""Rewards and Python functions as metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlgf_cli.config.common import Parts
from rlgf_cli.protocols import Example, MetricResult, Score
from rlgf_cli.scorers.asking import Judge
from rlgf_cli.scorers.base import check_examples, counts_of, listen, signature
from rlgf_cli.scorers.checked import score_checked
from rlgf_cli.scorers.python import PythonReward
from rlgf_cli.scorers.weighted_sum import make_reward


class RewardMetric:
    """What the training reward says. Figures: ``reward.total`` (the weighted sum) and ``reward.PART`` for
    each part's raw score.
    """

    name = "reward"

    def __init__(self, parts: Parts, *, device: str = "auto") -> None:
        self.reward = make_reward(parts, device=device)
        self.on_rows = lambda n: None

    @property
    def judges(self) -> list[Judge]:
        return self.reward.judges

    @property
    def on_rows(self) -> Callable[[int], None]:
        return self._on_rows

    @on_rows.setter
    def on_rows(self, told: Callable[[int], None]) -> None:
        """A text is done when all parts that tell have scored it; where none does, all texts are at the end."""
        self._on_rows, self._done = told, 0
        self._telling = sum(listen(part.reward, self._hear) for _, part in self.reward.parts)

    def _hear(self, scores: int) -> None:
        before, self._done = self._done, self._done + scores
        self._on_rows(self._done // self._telling - before // self._telling)

    def check(self, examples: Sequence[Example]) -> None:
        check_examples(self.reward, examples)

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        before = counts_of(self.reward)
        scores = score_checked(self.reward, examples, texts)
        counts = {key: n - before.get(key, 0) for key, n in counts_of(self.reward).items()}
        return MetricResult(
            _columns("total", scores),
            signature(self.name, self.reward.signature, examples),
            {key: n for key, n in counts.items() if n},
        )


class FunctionMetric:
    """``file.py:function``: the same functions that ``scorers.python`` takes. A dict's ``score`` is the
    figure ``function``, its other keys are ``function.key``.
    """

    def __init__(self, target: str, params: Mapping[str, Any]) -> None:
        self.function = PythonReward(target, params)
        self.name = self.function.name

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        scores = score_checked(self.function, examples, texts)
        return MetricResult(_columns("score", scores), signature(self.name, self.function.signature, examples))


def _columns(total: str, scores: Sequence[Score]) -> dict[str, list[float | None]]:
    """Scores to figures; a part that an example's score lacks is None there (skipped)."""
    keys = dict.fromkeys(key for score in scores for key in score.parts if key != total)
    return {total: [s.value for s in scores], **{key: [s.parts.get(key) for s in scores] for key in keys}}
