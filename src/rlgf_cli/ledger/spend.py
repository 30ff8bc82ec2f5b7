"""The spend of a run: its guides and judges charge one account, and the run's manifest records the charges.

A stage calls :func:`charge_guides` once its manifest has a run id, :func:`record_spend` however it ends, and
:func:`spend_of` for what was spent so far. :func:`charged_usd` reads what runs were charged, from the account itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rlgf_cli.artifacts.jsonl import read_json
from rlgf_cli.artifacts.rundir import Manifest
from rlgf_cli.config.guide import BudgetConfig
from rlgf_cli.ledger.account_file import AccountFile, Totals, account_path
from rlgf_cli.ledger.meter import Meter, totals_of, usd
from rlgf_cli.ledger.store import Store
from rlgf_cli.protocols import Guide


def charge_guides(
    guides: Sequence[Guide],
    run: str,
    budget: BudgetConfig,
    spend: Mapping[str, Any] | None = None,
    *,
    manifest: Path | None = None,
    shared: bool = False,
) -> None:
    """Let all guides charge the account of ``run`` from now on, so that the caps hold over all of them.

    ``spend``: what the run's manifest says was charged in earlier sessions. The account is in the cache's file, of
    guides that share it also where they are local ones, and beside the ``manifest`` where one is given; ``shared``:
    guides of other processes charge it as well.
    """
    for guide in guides:
        guide.charge_to(run, budget, spend, shared=shared or len(guides) > 1)
        if manifest is not None:
            guide.keep_account(account_path(manifest))


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
    save_spend(
        manifest,
        spend,
        **{
            name: writer.provenance() if isinstance(writer, Guide) else [guide.provenance() for guide in writer]
            for name, writer in given.items()
        },
    )
    return spend


def save_spend(manifest: Manifest, spend: Mapping[str, Any], **facts: Any) -> None:
    """Save a session's spend and ``facts`` in the manifest, in the place of the account's file beside it."""
    file, wrote = account_path(manifest.path), manifest.data["wrote"]
    manifest.save(spend=spend, wrote=[name for name in wrote if name != file.name], **facts)
    file.unlink(missing_ok=True)


def charged_usd(runs: Collection[str], folders: Iterable[Path] = ()) -> float:
    """The sum that runs were charged, in US dollars; runs that were killed are included. Of a run that one of the
    ``folders`` holds, the larger amount of the account there and that in the cache counts."""
    if not runs:
        return 0.0
    recorded = dict(filter(None, map(_recorded, folders)))
    with closing(Store.default(make=False)) as store:
        return usd(sum(max(Meter(store, run).totals().nano_usd, recorded.get(run, 0)) for run in runs))


def _recorded(folder: Path) -> tuple[str, int] | None:
    """A run's id and what its folder says that it was charged, in billionths of a US dollar; None without a run."""
    if not (run_json := folder / "run.json").is_file():
        return None
    data = read_json(run_json)
    now = AccountFile(account_path(run_json), data["run_id"]).read() or Totals()
    return data["run_id"], max(totals_of(data.get("spend", {})).nano_usd, now.nano_usd)
