"""The model card (README.md) of a checkpoint: command, data, results, guide and licences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rlgf_cli import __version__
from rlgf_cli.artifacts.jsonl import atomic_text

_LICENCE = (
    "The terms of the base model and of the training data hold for these weights too. "
    "Check both before you share or sell them."
)
_GUIDE_LICENCE = (
    "The guide's texts shaped these weights: its provider's terms may restrict what a model trained on them "
    "is used for."
)


def write_card(
    folder: str | Path,
    *,
    title: str,
    command: str,
    base_model: str,
    data: Sequence[str],
    metrics: Mapping[str, Any],
    guide: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``README.md``. ``metrics`` and ``guide`` are tables in their order, without entries that are None.

    A base model on this machine is shown by its folder's name: its path means nothing elsewhere.
    """
    local = Path(base_model).exists()
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["rlgf", command]}
    if not local:
        front["base_model"] = base_model
    shown = Path(base_model).name if local else base_model
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False).strip() + "\n---",
        f"# {title}",
        f"Made by `rlgf {command}` (rlgf {__version__}) from `{shown}`. Every setting is in "
        "`config.resolved.json`, versions and inputs in `run.json`, the course of it in `metrics.jsonl`.",
    ]
    if data:
        parts.append("## Data\n\n" + "\n".join(f"- `{Path(name).name}`" for name in data))
    parts.append("## Results\n\n" + table(metrics))
    if guide is not None:
        parts.append("## Guide\n\n" + table(guide) + "\n\n" + _GUIDE_LICENCE)
    parts.append("## Licence\n\n" + _LICENCE)
    path = Path(folder) / "README.md"
    with atomic_text(path) as stream:
        stream.write("\n\n".join(parts) + "\n")
    return path


def table(values: Mapping[str, Any]) -> str:
    """Names and values as a Markdown table, in their order, without values that are None."""
    rows = [f"| {name.replace('_', ' ')} | {_show(value)} |" for name, value in values.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *rows])


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
