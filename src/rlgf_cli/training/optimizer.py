"""The optimizer and its learning rates: groups of parameters by role, and a schedule over the iterations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from rlgf_cli.config.common import OptimConfig


def make_optimizer(
    named: Sequence[tuple[str, Any]],
    learning_rate: float,
    weight_decay: float,
    critic_learning_rate: float | None = None,
) -> torch.optim.AdamW:
    """AdamW, one kernel for all parameters; LayerNorm weights, biases and other vectors are not decayed.

    Parameters named ``critics.*`` are groups of their own (``role``), with ``critic_learning_rate`` (None: the
    policy's).
    """
    groups = []
    for role, rate in (("policy", learning_rate), ("critic", critic_learning_rate or learning_rate)):
        own = [p for name, p in named if name.startswith("critics.") == (role == "critic")]
        for decay, params in ((weight_decay, [p for p in own if p.dim() >= 2]), (0.0, [p for p in own if p.dim() < 2])):
            groups.append({"params": params, "weight_decay": decay, "lr": rate, "role": role})
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, eps=1e-8, fused=True)


def make_scheduler(optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int) -> LambdaLR:
    """The learning rates over ``steps`` iterations: (step + 1) / warmup_steps of them in the warmup, so that no
    iteration is spent on a rate of 0, and then constant, or falling to 0 as a line or as half a cosine."""

    def share(step: int) -> float:
        if step + 1 < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        done = min(1.0, max(0, step - config.warmup_steps) / max(1, steps - config.warmup_steps))
        return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[config.schedule]

    return LambdaLR(optimizer, share)


def by_role(optimizer: torch.optim.Optimizer) -> dict[str, list[torch.Tensor]]:
    """The parameters of the policy and of the critics: each has a learning rate and a gradient norm of its own, so that
    the critic's error does not decide how far the policy moves."""
    parameters: dict[str, list[torch.Tensor]] = {}
    for params in optimizer.param_groups:
        parameters.setdefault(params.get("role", "policy"), []).extend(params["params"])
    return parameters
