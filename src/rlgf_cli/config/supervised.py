"""The keys that the configs of ``rlgf sft`` and ``rlgf train-reward`` share."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rlgf_cli.config.common import Limit, ModelConfig, OptimConfig, ReportTo, StageConfig
from rlgf_cli.section import Flag


class SupervisedConfig(StageConfig):
    """Training by transformers' Trainer. ``max_steps`` wins over ``epochs``.

    ``eval_steps`` null: the held-out data is scored once, at the end. ``save_steps`` null: no checkpoints on
    the way (Ctrl-C still saves one). ``push_to_hub`` is a repository's name, ``user/model``.
    """

    model: Annotated[
        ModelConfig,
        Flag(
            "Folder, hub name, or a .yaml that describes a small model from scratch.", "--model", "--model-name-or-path"
        ),
    ]
    data: Annotated[str, Flag("JSONL with prompt and references.")]
    eval_data: Annotated[str | None, Flag("Held-out JSONL, scored at the end.")] = None
    limit: Limit = None
    optim: OptimConfig = Field(default_factory=OptimConfig)
    epochs: Annotated[float, Flag("Passes over the data.", "--epochs", "--num-train-epochs")] = Field(1.0, gt=0)
    max_steps: Annotated[int | None, Flag("Optimizer steps; wins over epochs.")] = Field(None, ge=1)
    batch_size: Annotated[int, Flag("Examples at once.", "--batch-size", "--per-device-train-batch-size")] = Field(
        16, ge=1
    )
    gradient_accumulation_steps: Annotated[int, Flag("Batches per step.")] = Field(1, ge=1)
    gradient_checkpointing: Annotated[
        bool, Flag("Less memory, more time.", "--gradient-checkpointing/--no-gradient-checkpointing")
    ] = False
    logging_steps: Annotated[int, Flag("Steps per row of metrics.jsonl.")] = Field(10, ge=1)
    eval_steps: Annotated[int | None, Flag("Score the held-out data this often.")] = Field(None, ge=1)
    save_steps: Annotated[int | None, Flag("Steps between checkpoints.")] = Field(500, ge=1)
    save_total_limit: int = Field(2, ge=1)
    report_to: ReportTo = "none"
    push_to_hub: Annotated[str | None, Flag("Upload the result to this repository.")] = None

    @property
    def trains_adapter(self) -> bool:
        """Whether the model's own weights stay as they are."""
        return False
