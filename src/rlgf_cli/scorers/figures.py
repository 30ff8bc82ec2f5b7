"""Makes metrics from config, and runs a metric to its figures, one row of values per example."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rlgf_cli import registry
from rlgf_cli.config.common import PartConfig, Parts
from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.protocols import BoundedFigure, CorpusFigure, Example, Metric
from rlgf_cli.scorers.reward_metric import FunctionMetric, RewardMetric
from rlgf_cli.scorers.weighted_sum import normalisation, unique_names


@dataclass(frozen=True)
class Figure:
    """A figure of a set of texts and the signature of the metric it comes from.

    One of three: the mean of ``values``, one per example (None: skipped); ``corpus``, which follows from summed
    rows; or ``whole``, of the set as one.
    """

    signature: str
    values: Sequence[float | None] | None = None
    corpus: CorpusFigure | None = None
    whole: float | BoundedFigure | None = None

    @property
    def aggregate(self) -> str | None:
        """The registry's name of what makes the figure from :attr:`rows`; None where it has no rows."""
        return "mean" if self.values is not None else self.corpus.aggregate if self.corpus else None

    @property
    def rows(self) -> list[Sequence[float] | None]:
        """One row of statistics per example (None: skipped), whose sum ``aggregate`` makes the figure of."""
        if self.values is not None:
            return [None if value is None else (value, 1.0) for value in self.values]
        return list(self.corpus.rows) if self.corpus else []


def make_metrics(parts: Parts, *, device: str = "auto") -> list[Metric]:
    """The metrics that a config's list names.

    All ``reward:SPEC`` entries form one weighted sum, as the ``reward`` section of ``rlgf train`` does; their
    weights count. A metric named twice gets ``#2``. Raises UserError for unknown names and parameters, and
    for a weight, shift, scale or clip on anything but a reward.
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
        if part.weight != 1 or part.weight_steps is not None:
            raise UserError(f"the metric {part.name!r} takes no weight", hint="only reward:SPEC entries are summed")
        if normalisation(part) is not None:
            raise UserError(
                f"the metric {part.name!r} takes no shift, scale or clip",
                hint="only reward:SPEC entries are normalised",
            )
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

    Raises RlgfError where the metric returns a wrong number of values, or one that is not finite. Raises UserError
    where a figure has no value at all, or a package is missing.
    """
    try:
        result = metric.compute(examples, texts)
    except ImportError as error:  # a metric's own imports
        raise registry.missing_package(error, f"the metric {metric.name!r}") from error
    made = [
        *((key, Figure(result.signature, values=list(values))) for key, values in result.values.items()),
        *((key, Figure(result.signature, corpus=corpus)) for key, corpus in result.corpus.items()),
        *((key, Figure(result.signature, whole=whole)) for key, whole in result.whole.items()),
    ]
    figures: dict[str, Figure] = {}
    for key, figure in made:
        name = figure_name(metric.name, key)
        if name in figures:
            raise RlgfError(f"the metric {metric.name!r} gave the figure {name} twice")
        _check(figure, f"the metric {metric.name!r} gave", name, examples)
        figures[name] = figure
    return figures, {figure_name(metric.name, key): n for key, n in result.counts.items()}


def _check(figure: Figure, prefix: str, name: str, examples: Sequence[Example]) -> None:
    if figure.whole is not None:
        value = figure.whole.value if isinstance(figure.whole, BoundedFigure) else figure.whole
        if not math.isfinite(value):
            raise RlgfError(f"{prefix} {value} as {name}")
        return
    rows = figure.rows
    if len(rows) != len(examples):
        raise RlgfError(f"{prefix} {len(rows)} values of {name} for {len(examples)} texts")
    for example, row in zip(examples, rows, strict=True):
        if row is not None and not all(map(math.isfinite, row)):
            bad = next(value for value in row if not math.isfinite(value))
            raise RlgfError(f"{prefix} {bad} as {name} of example {example.id!r}")
    if all(row is None for row in rows):
        raise UserError(f"no example could be scored with {name}", hint="leave this metric out, or add its input")
    if len({len(row) for row in rows if row is not None}) > 1:
        raise RlgfError(f"{prefix} rows of different lengths for {name}")
