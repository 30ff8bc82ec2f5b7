"""The command ``rlgf ls``."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from rlgf_cli import console
from rlgf_cli.cli.options import AsJson


class Kind(str, Enum):
    """The kinds of names that can be listed."""

    algorithms = "algorithms"
    rewards = "rewards"
    metrics = "metrics"
    tasks = "tasks"
    guides = "guides"


def ls(
    kind: Annotated[Kind, typer.Argument(help="What to list.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """List what rlgf knows by name.

    ```
    rlgf ls algorithms
    rlgf ls rewards
    rlgf ls guides --json
    ```
    """
    summaries = _summaries(kind)
    if as_json:
        console.result_json(summaries)
        return
    width = max(map(len, summaries), default=0)
    for name, summary in summaries.items():
        console.result(f"{name:<{width}}  {summary}".rstrip())


def _summaries(kind: Kind) -> dict[str, str]:
    """Name -> one line."""
    if kind is Kind.algorithms:
        from rlgf_cli.algorithms.catalog import Algorithm

        return {name: algorithm.summary() for name, algorithm in Algorithm.named.items()}
    from rlgf_cli import registry

    summaries = {name: entry.summary for name, entry in registry.entries(kind.value).items()}
    if kind is Kind.guides:
        from rlgf_cli.guides.openai import presets as aliases

        for name, alias in aliases.known().items():
            prices = (alias.usd_per_million_input, alias.usd_per_million_output)
            price = f", ${prices[0]:g} in and ${prices[1]:g} out per million tokens" if None not in prices else ""
            noted = f" (noted {alias.noted})" if alias.noted and price else ""
            summaries[name] = f"openai:{alias.model}{price}{noted}"
    return summaries
