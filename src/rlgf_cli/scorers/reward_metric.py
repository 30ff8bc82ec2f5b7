"""Rewards and Python functions used as metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlgf_cli.config.common import Parts
from rlgf_cli.errors import RlgfError
from rlgf_cli.protocols import Example, Metric, MetricResult, Score
from rlgf_cli.scorers.base import counted_since, signature
from rlgf_cli.scorers.checked import score_checked, score_or_skip
from rlgf_cli.scorers.python import PythonReward
from rlgf_cli.scorers.weighted_sum import make_reward


class RewardMetric(Metric):
    """The training reward. Figures: ``reward.total`` (the weighted sum) and ``reward.PART`` for
    each part's raw score.
    """

    name = "reward"
    reports_rows = True

    def __init__(self, parts: Parts, *, device: str = "auto") -> None:
        self.reward = make_reward(parts, device=device)
        self.guides = self.reward.guides

    def stop_when(self, stop: Callable[[], bool]) -> None:
        self.reward.stop_when(stop)

    def check_set(self, examples: Sequence[Example]) -> None:
        self.reward.check(examples)

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        before = self.reward.counts
        self._report_rows()
        scores = score_or_skip(self.reward, examples, texts)
        counts = counted_since(before, self.reward.counts)
        if scores and all(score is None for score in scores):
            why = ", ".join(f"{name}: {n}" for name, n in counts.items() if n)
            raise RlgfError(f"the reward {self.reward.name!r} gave none of {len(scores)} texts a score ({why})")
        return MetricResult(_columns("total", scores), signature(self.name, self.reward.signature, examples), counts)

    def _report_rows(self) -> None:
        """A text is done when all parts that report have scored it; where none does, nothing is reported."""
        reporting = [part.reward for _, part in self.reward.parts if part.reward.reports_rows]
        done = 0

        def on_scores(count: int) -> None:
            nonlocal done
            before, done = done, done + count
            self.on_rows(done // len(reporting) - before // len(reporting))

        for reward in reporting:
            reward.on_rows = on_scores


class FunctionMetric(Metric):
    """``file.py:function``: the same functions that ``scorers.python`` takes. A dict's ``score`` is the
    figure ``function``, its other keys are ``function.key``.
    """

    def __init__(self, target: str, params: Mapping[str, Any]) -> None:
        self.function = PythonReward(target, params)
        self.name = self.function.name

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        scores = score_checked(self.function, examples, texts)
        return MetricResult(_columns("score", scores), signature(self.name, self.function.signature, examples))


def _columns(total: str, scores: Sequence[Score | None]) -> dict[str, list[float | None]]:
    """Scores to figures; a text without a score, and a part that a score lacks, is None there (skipped)."""
    keys = dict.fromkeys(key for score in scores if score for key in score.parts if key != total)
    parts: dict[str, list[float | None]] = {key: [s.parts.get(key) if s else None for s in scores] for key in keys}
    return {total: [s.value if s else None for s in scores], **parts}
