"""One number per text from a reward, or from one figure of a metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlgf_cli import registry
from rlgf_cli.config.common import PartConfig
from rlgf_cli.errors import RlgfError, UserError, did_you_mean
from rlgf_cli.protocols import Example, Scorer
from rlgf_cli.scorers.checked import score_checked
from rlgf_cli.scorers.figures import compute_figures, make_metrics
from rlgf_cli.scorers.weighted_sum import make_reward

PerText = Callable[[Sequence[Example], Sequence[str]], Sequence[float | None]]
"""``texts[i]`` answers ``examples[i]``; None where an example was skipped."""
_TRIED = 2


def per_text(
    name: str,
    examples: Sequence[Example],
    *,
    figure: str | None = None,
    params: Mapping[str, Any] | None = None,
    device: str = "auto",
) -> PerText:
    """A function that scores texts by ``name``: a reward of that name, else the metric, by its only figure with a
    number per text. With ``figure`` it is that figure of the metric.

    Raises UserError where there is no such reward or metric, where it asks a judge (whose cost no run would be
    charged), or where it cannot score ``examples``; a metric is tried on two of them. The function raises RlgfError for
    texts that are all skipped.
    """
    part = PartConfig(name=name, params=dict(params or {}))
    is_reward = registry.is_python_target(name) or name.partition(":")[0] in registry.entries("rewards")
    if figure is None and is_reward:
        reward = make_reward([part], device=device)
        _refuse_judges(name, reward)
        reward.check(examples)
        return lambda examples, texts: [score.value for score in score_checked(reward, examples, texts)]
    (metric,) = make_metrics([part], device=device)
    _refuse_judges(name, metric)
    metric.check_set(examples)
    some = sorted(examples, key=lambda e: not e.references)[:_TRIED]
    figures, _ = compute_figures(metric, some, [e.references[0] if e.references else e.prompt for e in some])
    fitting = [key for key, value in figures.items() if value.values is not None]
    if figure is None and len(fitting) != 1:
        raise UserError(
            f"the metric {name!r} has {len(fitting)} figures with a number per text",
            hint=f"choose one of them: {', '.join(fitting)}" if fitting else "choose another metric or a reward",
        )
    if figure is not None and figure not in fitting:
        raise UserError(
            f"the metric {name!r} has no figure {figure!r} with a number per text", hint=did_you_mean(figure, fitting)
        )
    chosen = figure or fitting[0]

    def values(examples: Sequence[Example], texts: Sequence[str]) -> Sequence[float | None]:
        made = compute_figures(metric, examples, texts)[0].get(chosen)
        if made is None or made.values is None:  # a metric leaves out a figure that no text is long enough for
            raise RlgfError(
                f"none of the {len(texts)} texts has a value of {chosen}",
                hint="read the texts in rollouts/: they may be empty, or too short for this figure",
            )
        return made.values

    return values


def _refuse_judges(name: str, scorer: Scorer) -> None:
    if scorer.guides:
        raise UserError(
            f"{name!r}: a judge cannot be watched: its cost would not be charged to the run",
            hint="watch another figure; rlgf eval --metrics judge:GUIDE judges the policies that were kept",
        )
