"""TextFilter: a reward scores texts as they are received, and says which of them are kept."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlgf_cli.artifacts.guide_files import GuideFiles
from rlgf_cli.config.common import Parts
from rlgf_cli.errors import UserError
from rlgf_cli.protocols import Example
from rlgf_cli.scorers.checked import score_checked
from rlgf_cli.scorers.weighted_sum import SumReward, make_reward

_AT_ONCE = 500
"""Examples that are checked at once, so that memory does not grow with their number."""
SETTINGS = ("reward", "keep_above")
"""The keys of :attr:`TextFilter.settings`."""


@dataclass(frozen=True)
class TextFilter:
    """``keep_above`` is the lowest score of a text that is kept; None: all texts are kept, with their scores."""

    reward: SumReward
    keep_above: float | None

    @classmethod
    def make(cls, parts: Parts, keep_above: float | None, *, device: str) -> TextFilter | None:
        """The filter that a config describes; None without a reward. Raises UserError for a judge."""
        if not parts:
            return None
        reward = make_reward(parts, device=device)
        if reward.guides:
            raise UserError(
                f"the reward {reward.name!r} asks a judge, whose cost would not be charged to the collection",
                hint="another reward; rlgf eval --metrics judge:GUIDE --predictions FILE judges collected texts",
            )
        return cls(reward, keep_above)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides scores and choice: the texts of one file were chosen under equal settings."""
        return dict(zip(SETTINGS, (self.reward.signature, self.keep_above), strict=True))

    def check(self, examples: Iterable[Example]) -> None:
        """Raise UserError where an example lacks what the reward needs."""
        source = iter(examples)
        while window := list(itertools.islice(source, _AT_ONCE)):
            self.reward.check(window)

    def scores(self, examples: Sequence[Example], texts: Sequence[str]) -> list[float]:
        """One finite score per text. Raises RlgfError where the reward fails."""
        return [score.value for score in score_checked(self.reward, examples, texts)]

    def keeps(self, text: str, score: float) -> bool:
        """Whether a text is kept: it scores enough and is not empty."""
        return self.keep_above is None or (score >= self.keep_above and bool(text.strip()))

    def lines(self, summary: Mapping[str, Any], files: GuideFiles) -> list[str]:
        """What was kept, the scores and the reward's counts, for the user. ``summary`` is that of the collection."""
        means = (
            f"mean score {summary['mean_score']:.4g}, of the best text of each prompt {summary['mean_best_score']:.4g}"
        )
        if self.keep_above is not None:
            means = (
                f"{summary['kept']} of {summary['records']} texts score {self.keep_above:g} or more and are kept; "
                f"{summary['dropped']} are in {files.dropped}; prompts without a kept text: "
                f"{summary['prompts_without_text']}; {means}"
            )
        return [means, *(f"the reward counts {name}: {count}" for name, count in self.reward.counts.items() if count)]

    def warning(self, summary: Mapping[str, Any], files: GuideFiles) -> str | None:
        """The warning of a complete collection that leaves prompts without a text; None where it leaves none."""
        without = summary["prompts_without_text"]
        if self.keep_above is None or not without:
            return None
        if not summary["kept"]:
            return f"no text scores {self.keep_above:g} or more, and {files.path} is empty: lower --keep-above"
        more = "--resume with a larger -k requests more texts for every prompt"
        return f"{without} prompts have no text in {files.path}; {more}"
