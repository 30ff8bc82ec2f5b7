"""What the metrics share: signatures, and what may be asked of a metric beyond ``protocols.Metric``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlgf_cli.errors import UserError
from rlgf_cli.protocols import Example, Metric


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


def require_some_references(metric: str, examples: Sequence[Example]) -> None:
    """A metric skips (and counts) examples without references; there must be some with."""
    if not any(example.references for example in examples):
        raise UserError(
            f"the metric {metric!r} needs references, and no example has any",
            hint='give "references": [...] in the data',
        )
