"""The config of ``rlgf collect-guide``."""

from __future__ import annotations

from pydantic import Field

from rlgf_cli.config.common import StageConfig
from rlgf_cli.config.guide import BudgetConfig, GuideConfig


class CollectGuideConfig(StageConfig):
    """Ask ``guide`` for ``samples`` texts of at most ``max_new_tokens`` tokens for every prompt in ``data``.

    ``output`` is a JSONL file; ``limit`` takes the first prompts only. ``budget`` caps what the file may cost over
    all its resumptions. ``batch`` asks through the endpoint's batch API, at its lower price: answers come within
    hours.
    """

    data: str
    guide: GuideConfig
    samples: int = Field(1, ge=1)
    max_new_tokens: int = Field(64, ge=1)
    limit: int | None = Field(None, ge=1)
    budget: BudgetConfig = BudgetConfig()
    batch: bool = False
