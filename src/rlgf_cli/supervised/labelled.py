"""The trainer of a text classifier: transformers' Trainer on ids from this package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from transformers import Trainer, TrainingArguments

from rlgf_cli.config.train_reward import TrainRewardConfig
from rlgf_cli.models.device import DTYPES
from rlgf_cli.models.generate import pad_rows
from rlgf_cli.supervised import trainer as supervised


class LabelledIds(NamedTuple):
    """The ids of a text, and the id of its label."""

    ids: list[int]
    label: int


def make_trainer(
    config: TrainRewardConfig,
    model: Any,
    pad_id: int,
    folder: Path,
    rows: Sequence[LabelledIds],
    eval_rows: Sequence[LabelledIds],
    device: torch.device,
) -> Trainer:
    """The trainer for labelled ids; checkpoints go below ``folder``."""
    arguments = supervised.training_arguments(
        TrainingArguments, config, folder, device=device, dtype=DTYPES[config.model.dtype],
        remove_unused_columns=False, label_names=["labels"],
    )  # fmt: skip
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=_dataset(rows),
        eval_dataset=_dataset(eval_rows),
        data_collator=_Collator(pad_id),
        compute_loss_func=supervised.cross_entropy,
        compute_metrics=_accuracy,
    )


def _dataset(rows: Sequence[LabelledIds]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"input_ids": [row.ids for row in rows], "labels": [row.label for row in rows]})


@dataclass(frozen=True)
class _Collator:
    pad_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids, mask = pad_rows([row["input_ids"] for row in rows], self.pad_id, left=False)
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["labels"] for row in rows])}


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}
