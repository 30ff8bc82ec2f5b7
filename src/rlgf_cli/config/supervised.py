"""What the configs of supervised stages (``sft``, ``train-reward``) share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlgf_cli.config.common import ModelConfig, OptimConfig, StageConfig


class SupervisedConfig(StageConfig):
    """Training by transformers' Trainer. ``max_steps`` wins over ``epochs``.

    ``eval_steps`` null: the held-out data is scored once, at the end. ``save_steps`` null: no checkpoints on
    the way (Ctrl-C still saves one). ``push_to_hub`` is a repository's name, ``user/model``.
    """

    model: ModelConfig
    data: str
    eval_data: str | None = None
    limit: int | None = Field(None, ge=1)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    epochs: float = Field(1.0, gt=0)
    max_steps: int | None = Field(None, ge=1)
    batch_size: int = Field(16, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    gradient_checkpointing: bool = False
    logging_steps: int = Field(10, ge=1)
    eval_steps: int | None = Field(None, ge=1)
    save_steps: int | None = Field(500, ge=1)
    save_total_limit: int = Field(2, ge=1)
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    push_to_hub: str | None = None

    @property
    def trains_adapter(self) -> bool:
        """Whether the model's own weights stay as they are."""
        return False
