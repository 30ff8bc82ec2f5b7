"""The trainer of a reward model on pairs: TRL's RewardTrainer on ids from this package.

Loss per pair: -log sigmoid(r(chosen) - r(rejected)), the Bradley-Terry likelihood (Ouyang et al. 2022, eq. 1).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reads it when it is imported

import datasets
import torch
from trl import RewardConfig, RewardTrainer

from rlgf_cli.config.train_reward import TrainRewardConfig
from rlgf_cli.models.device import DTYPES
from rlgf_cli.supervised import trainer as supervised


class _RewardTrainer(supervised.WithoutModelCard, RewardTrainer):
    pass


def make_trainer(
    config: TrainRewardConfig,
    model: Any,
    tokenizer: Any,
    folder: Path,
    rows: Sequence[Sequence[list[int]]],
    eval_rows: Sequence[Sequence[list[int]]],
    device: torch.device,
) -> RewardTrainer:
    """The trainer for rows of (chosen ids, rejected ids); checkpoints go below ``folder``.

    By default TRL appends an EOS, which not every tokenizer has and the reward does not read, drops long pairs and
    turns dropout off. Here the ids are those that the reward reads, and dropout is the model's own.
    """
    for name in ("bos_token_id", "eos_token_id"):  # as the trainer does, with a warning
        if (token := getattr(tokenizer, name)) is not None:
            setattr(model.config.get_text_config(), name, token)
    arguments = supervised.training_arguments(
        RewardConfig, config, folder, device=device, dtype=DTYPES[config.model.dtype],
        max_length=None, disable_dropout=False, pad_to_multiple_of=None,
        center_rewards_coefficient=config.center_rewards_coefficient or None,
    )  # fmt: skip
    return _RewardTrainer(
        model=model,
        args=arguments,
        train_dataset=_dataset(rows),
        eval_dataset=_dataset(eval_rows),
        processing_class=tokenizer,
    )


def _dataset(rows: Sequence[Sequence[list[int]]]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {"chosen_ids": [chosen for chosen, _ in rows], "rejected_ids": [rejected for _, rejected in rows]}
    )
