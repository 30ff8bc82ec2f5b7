"""From config to metrics, and from metrics to a table of per-example figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rlgf_cli import registry
from rlgf_cli.config.common import PartConfig, Parts
from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.metrics.reward import FunctionMetric, RewardMetric
from rlgf_cli.protocols import Example, Metric
from rlgf_cli.rewards.make import unique_names


@dataclass(frozen=True)
class Figure:
    """One number per example (None: skipped) and the signature of the metric it comes from."""

    values: Sequence[float | None]
    signature: str


def make_metrics(parts: Parts, *, device: str = "auto") -> list[Metric]:
    """The metrics that a config's list names.

    All ``reward:SPEC`` entries form one weighted sum, as the ``reward`` section of ``rlgf train`` does; their
    weights count. A metric named twice gets ``#2``. Raises UserError for unknown names and parameters, and
    for a weight on anything but a reward.
    """
    if not parts:
        raise UserError("no metric was given", hint="for example --metrics rouge; `rlgf ls metrics` lists them")
    rewards = [_reward_part(part) for part in parts if _is_reward(part)]
    metrics: list[Metric] = []
    for part in parts:
        if _is_reward(part):
            if not any(isinstance(metric, RewardMetric) for metric in metrics):
                metrics.append(RewardMetric(rewards, device=device))
            continue
        if part.weight != 1:
            raise UserError(f"the metric {part.name!r} takes no weight", hint="only reward:SPEC entries are summed")
        if registry.is_python_target(part.name):
            metrics.append(FunctionMetric(part.name, part.params))
        else:
            metrics.append(registry.build("metrics", part.name, part.params, device=device))
    for metric, name in zip(metrics, unique_names(m.name for m in metrics), strict=True):
        if metric.name != name:
            metric.name = name
    return metrics


def _is_reward(part: PartConfig) -> bool:
    return part.name.partition(":")[0] == "reward"


def _reward_part(part: PartConfig) -> PartConfig:
    """``reward:SPEC`` as the reward that it names."""
    spec = part.name.partition(":")[2]
    if not spec:
        raise UserError("the metric 'reward' needs a reward's name", hint="write reward:NAME, as in reward:rouge")
    return part.model_copy(update={"name": spec})


def figure_name(metric: str, key: str) -> str:
    """``metric.key``; the metric's name alone for the key ``score``."""
    return metric if key == "score" else f"{metric}.{key}"


def compute_figures(
    metric: Metric, examples: Sequence[Example], texts: Sequence[str]
) -> tuple[dict[str, Figure], dict[str, int]]:
    """Run one metric; returns its figures by full name and what it counted.

    Raises RlgfError where the metric breaks its promise: a wrong number of values, or one that is not
    finite. Raises UserError where a figure has no value at all.
    """
    result = metric.compute(examples, texts)
    figures = {}
    for key, values in result.values.items():
        name = figure_name(metric.name, key)
        if len(values) != len(texts):
            raise RlgfError(f"the metric {metric.name!r} gave {len(values)} values of {name} for {len(texts)} texts")
        for example, value in zip(examples, values, strict=True):
            if value is not None and not math.isfinite(value):
                raise RlgfError(f"the metric {metric.name!r} gave {value} as {name} of example {example.id!r}")
        if all(value is None for value in values):
            raise UserError(f"no example could be scored with {name}", hint="leave this metric out, or add its input")
        figures[name] = Figure(list(values), result.signature)
    return figures, {figure_name(metric.name, key): n for key, n in result.counts.items()}
