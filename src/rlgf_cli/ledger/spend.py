"""The spend of a run: its guides and judges charge one account, and the run's manifest records the charges.

A stage calls :func:`charge_guides` once its manifest has a run id, :func:`record_spend` however it ends, and
:func:`spend_of` for what was spent so far. :func:`charged_usd` reads what runs were charged, from the account itself.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from typing import Any

from rlgf_cli.artifacts.rundir import Manifest
from rlgf_cli.config.guide import BudgetConfig
from rlgf_cli.ledger.meter import Meter, usd
from rlgf_cli.ledger.store import Store
from rlgf_cli.protocols import Guide


def charge_guides(
    guides: Sequence[Guide],
    run: str,
    budget: BudgetConfig,
    spend: Mapping[str, Any] | None = None,
    *,
    shared: bool = False,
) -> None:
    """Let all guides charge the account of ``run`` from now on, so that the caps hold over all of them.

    ``spend``: what the run's manifest says was charged in earlier sessions. Guides that share an account keep it in
    the cache's file, local ones too; ``shared``: guides of other processes charge it as well.
    """
    for guide in guides:
        guide.charge_to(run, budget, spend, shared=shared or len(guides) > 1)


def spend_of(guides: Sequence[Guide]) -> dict[str, Any]:
    """The spend of guides that charge one account: the account's, and the texts that each took from the cache.

    A guide without an account, which reports no calls, may be among them.
    """
    spends = [guide.spend() for guide in guides]
    return {**max(spends, key=lambda spend: spend["calls"]), "cached": sum(spend["cached"] for spend in spends)}


def record_spend(manifest: Manifest, **writers: Guide | Sequence[Guide] | None) -> dict[str, Any]:
    """Save what the run was charged, and under each name whose texts it used; returns the spend.

    ``record_spend(manifest, guide=guide, judges=[...])`` saves ``spend``, ``guide`` and ``judges``. What is None or
    empty is left out.
    """
    given = {name: writer for name, writer in writers.items() if writer}
    guides = [g for writer in given.values() for g in ([writer] if isinstance(writer, Guide) else writer)]
    spend = spend_of(guides)
    manifest.save(
        spend=spend,
        **{
            name: writer.provenance() if isinstance(writer, Guide) else [guide.provenance() for guide in writer]
            for name, writer in given.items()
        },
    )
    return spend


def charged_usd(runs: Collection[str]) -> float:
    """The sum that runs were charged, in US dollars; runs that were killed are included."""
    if not runs:
        return 0.0
    with closing(Store.default(make=False)) as store:
        return usd(sum(Meter(store, run).totals().nano_usd for run in runs))
