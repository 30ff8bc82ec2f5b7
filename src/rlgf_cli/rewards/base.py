"""What rewards may have beyond ``protocols.Reward``, and how it is asked for.

A reward needs ``name`` and ``score``. It may also have ``signature`` (a text that fixes how its numbers come
about), ``check(examples)`` (raises UserError where an example lacks what it needs) and ``counts`` (things
that happened and should be seen, such as truncated texts). One that takes long may have ``on_rows``, a function that
it tells of every n texts that are done. Rewards from other packages can leave them out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlgf_cli.errors import UserError
from rlgf_cli.protocols import Example, Reward


def signature_of(reward: Reward) -> str:
    """The reward's signature; its name where it has none."""
    return str(getattr(reward, "signature", reward.name))


def check_examples(reward: Reward, examples: Sequence[Example]) -> None:
    """Raise UserError where the examples lack what the reward needs. Cheap: call it before a run starts."""
    check = getattr(reward, "check", None)
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
