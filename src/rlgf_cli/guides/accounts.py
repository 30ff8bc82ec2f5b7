"""Several guides that one run pays for: one account and one cap for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from rlgf_cli.config.guide import BudgetConfig
from rlgf_cli.protocols import Guide


def charge_together(
    guides: Sequence[Guide],
    run: str,
    budget: BudgetConfig,
    spend: Mapping[str, Any] | None = None,
    *,
    shared: bool = False,
) -> None:
    """As ``Guide.charge_to`` for each: all charge the account of ``run``, so that the cap holds over all of them.

    Guides that share an account keep its books in the cache's file, local ones too. ``shared``: guides of other
    processes charge it too.
    """
    for guide in guides:
        guide.charge_to(run, budget, spend, shared=shared or len(guides) > 1)


def spend_together(guides: Sequence[Guide]) -> dict[str, Any]:
    """The spend of guides that :func:`charge_together` joined, for the manifest: the account is one, what came from
    the cache is each guide's own."""
    return {**guides[0].spend(), "cached": sum(guide.spend()["cached"] for guide in guides)}


@contextmanager
def closing_all(guides: Sequence[Guide | None]) -> Iterator[None]:
    """Let guides give back their connections at the end, however that comes."""
    with ExitStack() as stack:
        for guide in guides:
            if guide is not None:
                stack.callback(guide.close)
        yield
