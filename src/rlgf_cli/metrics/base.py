"""What the metrics share: signatures, and what may be asked of a metric beyond ``protocols.Metric``.

A metric may have ``check(examples)``, ``on_rows`` (see ``rewards.base.listen``), and, where it is a metric of the
evaluated model, ``take_model(loaded, lengths)``. ``reads_texts = False`` says that it needs no texts: where no metric
does, none are generated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rlgf_cli.errors import UserError
from rlgf_cli.protocols import Example, Metric
from rlgf_cli.rewards.base import written

if TYPE_CHECKING:
    from rlgf_cli.config.common import LengthConfig
    from rlgf_cli.models.load import Loaded


def signature(metric: str, settings: str, examples: Sequence[Example]) -> str:
    """``metric|settings|n=N``: two values may be compared where their signatures are equal."""
    return "|".join(part for part in (metric, settings, f"n={len(examples)}") if part)


def scored_only(values: Mapping[str, Sequence[float | None]]) -> Mapping[str, Sequence[float | None]]:
    """The figures that some example has a value of; all of them where none has, so that the refusal names one."""
    return {key: column for key, column in values.items() if any(v is not None for v in column)} or values


def check_examples(metric: Metric, examples: Sequence[Example]) -> None:
    """Raise UserError where the metric could score no example. Cheap: call it before a run starts."""
    check = getattr(metric, "check", None)
    if check is not None:
        check(examples)


def give_model(metric: Metric, loaded: Loaded, lengths: LengthConfig) -> None:
    """Hand the evaluated model to a metric that tests it. Raises UserError where the metric can do nothing with it."""
    take = getattr(metric, "take_model", None)
    if take is not None:
        take(loaded, lengths)


def reads_texts(metric: Metric) -> bool:
    """Whether the metric needs the texts that the model writes."""
    return bool(getattr(metric, "reads_texts", True))


def require_some_references(metric: str, examples: Sequence[Example]) -> None:
    """A metric skips (and counts) examples without references; there must be some with."""
    if not any(written(example.references) for example in examples):
        raise UserError(
            f"the metric {metric!r} needs references, and no example has any",
            hint='give "references": [...] in the data',
        )


def written_references(examples: Sequence[Example]) -> tuple[list[list[str]], dict[str, int]]:
    """Each example's references that are not blank, and the count of those that are (empty where none is)."""
    groups = [written(example.references) for example in examples]
    blank = sum(len(example.references) - len(group) for example, group in zip(examples, groups, strict=True))
    return groups, {"blank_references": blank} if blank else {}
