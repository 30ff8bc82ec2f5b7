"""The command ``rlgf ls``."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from rlgf_cli import console
from rlgf_cli.cli.options import AsJson

if TYPE_CHECKING:
    from rlgf_cli.guides.openai.presets import Provider


class Kind(str, Enum):
    """The kinds of names that can be listed."""

    algorithms = "algorithms"
    rewards = "rewards"
    metrics = "metrics"
    tasks = "tasks"
    guides = "guides"
    providers = "providers"


def ls(
    kind: Annotated[Kind, typer.Argument(help="What to list.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """List what rlgf knows by name.

    ```
    rlgf ls algorithms
    rlgf ls rewards
    rlgf ls guides --json
    rlgf ls providers
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
    if kind is Kind.providers:
        from rlgf_cli.guides.openai.presets import providers

        return {name: _rules(provider) for name, provider in providers().items()}
    from rlgf_cli import registry

    summaries = {name: entry.summary for name, entry in registry.entries(kind.value).items()}
    if kind is Kind.guides:
        from rlgf_cli.guides.openai import presets

        for name, alias in presets.known().items():
            prices = (alias.usd_per_million_input, alias.usd_per_million_output)
            price = f", ${prices[0]:g} in and ${prices[1]:g} out per million tokens" if None not in prices else ""
            noted = f" (noted {alias.noted})" if alias.noted and price else ""
            summaries[name] = f"{alias.provider or 'openai'}:{alias.model}{price}{noted}"
    return summaries


def _rules(provider: Provider) -> str:
    """A provider's base URL, the variable of its key, and what differs from OpenAI's API."""
    rules = [provider.base_url or "guide.base_url has to be given", provider.api_key_env or "no key"]
    if provider.prefill:
        rules.append(f"prefill: {provider.prefill}")
    if provider.seed != "seed":
        rules.append(f"seed: {provider.seed}" if provider.seed else "no seed")
    if provider.refuses:
        rules.append(f"no {', '.join(provider.refuses)}")
    return ", ".join(rules) + (f" (noted {provider.noted})" if provider.noted else "")
