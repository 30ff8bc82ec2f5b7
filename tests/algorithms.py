"""A named algorithm as data, from its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlgf_cli.algorithms.catalog import Algorithm
from rlgf_cli.algorithms.spec import AlgorithmSpec

NAMES = list(Algorithm.named)


def spec_of(name: str, parameters: Mapping[str, Any] | None = None) -> AlgorithmSpec:
    """The spec of ``algorithm: {name: NAME, ...}`` in a recipe."""
    return Algorithm.model_validate({"name": name, **(parameters or {})}).spec()
