"""Several guides that one run pays for: one account and one cap for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from rlgf_cli.config.guide import BudgetConfig
from rlgf_cli.guides.base import LiveGuide


def charge_together(
    guides: Sequence[LiveGuide], run: str, budget: BudgetConfig, spend: dict[str, Any] | None = None
) -> None:
    """As ``LiveGuide.charge_to`` for each: all charge the account of ``run``, so that the cap holds over all of them.

    Guides that share an account keep its books in the cache's file, local ones too.
    """
    for guide in guides:
        guide.several = guide.several or len(guides) > 1
        guide.charge_to(run, budget, spend)


def spend_together(guides: Sequence[LiveGuide]) -> dict[str, Any]:
    """The spend of guides that :func:`charge_together` joined, for the manifest: the account is one, what came from
    the cache is each guide's own."""
    return {**guides[0].meter.to_json(), "cached": sum(guide.meter.cached for guide in guides)}


@contextmanager
def closing_all(guides: Sequence[Any]) -> Iterator[None]:
    """Let guides give back their connections at the end, however that comes; what cannot be closed need not be."""
    with ExitStack() as stack:
        for guide in guides:
            if (close := getattr(guide, "close", None)) is not None:
                stack.callback(close)
        yield
