"""The config of ``rlgf doctor``."""

from __future__ import annotations

from pydantic import Field

from rlgf_cli.config.common import ModelConfig, Strict, TextConfig
from rlgf_cli.config.guide import BudgetConfig, GuideConfig


class DoctorConfig(Strict):
    """Hold ``guide``'s texts against the tokens of the policy ``model``, on the first ``limit`` prompts of ``data``.

    ``max_new_tokens`` is the limit that training will have. A live guide is asked for one text per prompt and, where
    it can continue, for one continuation; ``budget`` caps that. ``text`` null: the format that lies with the
    checkpoint.
    """

    model: ModelConfig
    guide: GuideConfig
    data: str
    limit: int = Field(20, ge=1)
    max_new_tokens: int = Field(64, ge=2)
    seed: int = Field(0, ge=0)
    text: TextConfig | None = None
    budget: BudgetConfig = BudgetConfig()
