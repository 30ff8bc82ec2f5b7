"""The command ``rlgf cache``."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from rlgf_cli import console
from rlgf_cli.cli.options import AsJson
from rlgf_cli.errors import UserError


class Verb(str, Enum):
    """The actions on the cache."""

    stats = "stats"
    export = "export"
    import_ = "import"
    prune = "prune"


_FOR_GUIDE = (Verb.export, Verb.prune)


def cache(
    verb: Annotated[Verb, typer.Argument(help="What to do.", show_default=False)],
    file: Annotated[str | None, typer.Argument(help="The JSONL file (export, import).", show_default=False)] = None,
    guide: Annotated[str | None, typer.Option("--guide", help="Only this guide's texts (export, prune).")] = None,
    older_than: Annotated[float | None, typer.Option("--older-than", help="Days (prune).")] = None,
    as_json: AsJson = False,
) -> None:
    """Show, export, import or prune the cache of guide texts.

    It lies in RLGF_CACHE_DIR (default ~/.cache/rlgf) and is shared by all commands and runs.

    ```
    rlgf cache stats
    rlgf cache export texts.jsonl --guide gpt-3.5
    rlgf cache import texts.jsonl
    rlgf cache prune --older-than 90
    ```
    """
    if (verb in (Verb.export, Verb.import_)) != (file is not None):
        raise UserError(f"rlgf cache {verb.value} takes {'a file' if file is None else 'no file'}")
    for flag, value, verbs in (("--guide", guide, _FOR_GUIDE), ("--older-than", older_than, (Verb.prune,))):
        if value is not None and verb not in verbs:
            raise UserError(f"rlgf cache {verb.value} takes no {flag}")
    from rlgf_cli.stages import cache as stage

    if verb is Verb.stats:
        _stats(stage.stats(), as_json)
        return
    if verb is Verb.export:
        done = {"exported": stage.export(str(file), guide=guide)}
    elif verb is Verb.import_:
        texts, new = stage.import_(str(file))
        done = {"texts": texts, "new": new}
    else:
        done = {"deleted": stage.prune(older_than_days=older_than, guide=guide)}
    if as_json:
        console.result_json(done)
    else:
        console.result(", ".join(f"{name}: {count}" for name, count in done.items()))


def _stats(stats: dict, as_json: bool) -> None:
    if as_json:
        console.result_json(stats)
        return
    console.result(f"{stats['path']} ({stats['bytes'] / 1e6:.1f} MB)")
    header = ["guide", "texts", "tokens in", "tokens out", "USD", "first", "last"]
    keys = ["guide", "texts", "prompt_tokens", "completion_tokens", "cost_usd", "first", "last"]
    rows = [["-" if row[key] is None else str(row[key]) for key in keys] for row in stats["guides"]]
    if rows:
        console.result(console.table(header, rows))
