"""What rewards may have beyond ``protocols.Reward``, and how it is asked for.

A reward needs ``name`` and ``score``. It may also have ``signature`` (a text that fixes how its numbers come
about), ``check(examples)`` (raises UserError where an example lacks what it needs) and ``counts`` (things
that happened and should be seen, such as truncated texts). One that takes long may have ``on_rows``, a function that
it tells of every n texts that are done. Rewards from other packages can leave them out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlgf_cli.errors import UserError
from rlgf_cli.protocols import Example, Metric, Reward

if TYPE_CHECKING:
    from rlgf_cli.config.common import LengthConfig
    from rlgf_cli.models.loaded import Loaded


def signature_of(reward: Reward) -> str:
    """The reward's signature; its name where it has none."""
    return str(getattr(reward, "signature", reward.name))


def check_examples(scorer: Reward | Metric, examples: Sequence[Example]) -> None:
    """Raise UserError where the examples lack what the scorer needs. Cheap: call it before a run starts."""
    check = getattr(scorer, "check", None)
    if check is not None:
        check(examples)


def counts_of(reward: Reward) -> Mapping[str, int]:
    """What the reward counted so far."""
    return dict(getattr(reward, "counts", {}))


def listen(scorer: Any, on_rows: Callable[[int], None]) -> bool:
    """Have a reward or metric tell ``on_rows`` of its progress. Returns whether it does."""
    tells = hasattr(scorer, "on_rows")
    if tells:
        scorer.on_rows = on_rows
    return tells


def refuse_target(name: str, target: str | None) -> None:
    """For scorers that take no ``name:TARGET``."""
    if target is not None:
        raise UserError(f"{name!r} takes nothing behind a colon (given: {target!r})", hint=f"write {name}")


def written(references: Sequence[str]) -> list[str]:
    """The references that are not blank: a blank one says nothing of a text."""
    return [reference for reference in references if reference.strip()]


def require_references(name: str, examples: Sequence[Example]) -> None:
    """Every example must have a reference that is not blank: a reward cannot skip one."""
    without = [e.id for e in examples if not written(e.references)]
    if without:
        raise UserError(
            f"the reward {name!r} needs references; {len(without)} of {len(examples)} examples have none "
            f"(first: {without[0]!r})",
            hint="add references to the data, or choose a reward that needs none",
        )


def shorten(text: Any, limit: int = 200) -> str:
    """A text on one line, cut in the middle where it is long."""
    line = " ".join(str(text).split())
    if len(line) <= limit:
        return line
    half = (limit - 5) // 2
    return f"{line[:half]} ... {line[-half:]}"


def signature(metric: str, settings: str, examples: Sequence[Example]) -> str:
    """``metric|settings|n=N``: two values may be compared where their signatures are equal."""
    return "|".join(part for part in (metric, settings, f"n={len(examples)}") if part)


def scored_only(values: Mapping[str, Sequence[float | None]]) -> Mapping[str, Sequence[float | None]]:
    """The figures that some example has a value of; all of them where none has, so that the refusal names one."""
    return {key: column for key, column in values.items() if any(v is not None for v in column)} or values


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
