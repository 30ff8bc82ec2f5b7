"""The training loop as ``rlgf train`` makes it from a config, on a tiny model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rl import coverage_score, prompts_for
from rlgf_cli.config.train import TrainConfig
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.runs.build import make_trainer
from rlgf_cli.training.loop import Trainer
from rlgf_cli.training.parallel.processes import SINGLE

SMALL: dict[str, dict[str, Any]] = {
    "lengths": {"max_new_tokens": 8},
    "rollout": {"episodes": 8},
    "ppo": {"minibatch_size": 8, "epochs": 1},
    "kl": {"coef": 0.0},
    "optim": {"learning_rate": 1e-2, "schedule": "constant"},
}


def config_of(algorithm: Any = "ppo", **sections: Any) -> TrainConfig:
    """``sections`` are laid over small sizes, no KL and a constant learning rate."""
    given = {name: {**SMALL.get(name, {}), **s} if isinstance(s, Mapping) else s for name, s in sections.items()}
    named = {"name": algorithm} if isinstance(algorithm, str) else algorithm
    fixed = {"model": {"name": "m"}, "data": "d", "output": "o", "reward": "length", "algorithm": named}
    fixed["guide"] = {"name": "hf:g"}
    return TrainConfig.model_validate({**fixed, **SMALL, **given})


def trainer_of(
    loaded: Loaded,
    algorithm: Any = "ppo",
    *,
    scorer: Any = coverage_score,
    guide: Any = None,
    prompts: int = 12,
    examined: bool = False,
    **sections: Any,
) -> Trainer:
    """``examined``: with the check of step 0, which makes forward passes of its own."""
    trainer = make_trainer(
        config_of(algorithm, **sections),
        loaded,
        prompts_for(loaded, prompts),
        SINGLE,
        guide=guide,
        covered=None,
        scorer=scorer,
        scorer_at=None,
        prefetch=None,
        evaluate=None,
        warn=print,
    )
    if not examined:
        trainer.probe = None
    return trainer


def with_sgd(trainer: Trainer, rate: float = 0.1) -> Trainer:
    """Plain gradient steps: Adam divides a gradient by its size, and makes a step of one that is only rounding.

    The groups of the optimizer, with their roles, are kept; all have one learning rate.
    """
    groups = [{**g, "lr": rate, "weight_decay": 0.0} for g in trainer.optimizer.param_groups]
    keys = ("params", "lr", "role", "weight_decay")
    trainer.optimizer = torch.optim.SGD([{k: g[k] for k in keys if k in g} for g in groups], lr=rate)
    trainer.scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer, factor=1.0)
    return trainer
