"""The config of ``rlgf evolve train``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rlgf_cli.config.common import COMMON, GUIDE, MODEL, PRICE, RUN, SPEND
from rlgf_cli.config.evolve import FREE_WHILE_EVOLVING, EvolveConfig
from rlgf_cli.section import Flag, Strict


class EvolveRewardConfig(Strict):
    """The reward of a kept rewrite is ``novelty`` times its novelty, plus ``different`` where the reviewer calls it
    different; that of a rejected one is -``penalty``.
    """

    novelty: float = Field(1.0, ge=0)
    different: float = Field(0.0, ge=0)
    penalty: float = Field(0.5, ge=0)


class EvolvePPOConfig(Strict):
    """PPO over chains of steps. ``minibatch_size`` is in chains; ``hidden`` is the width of both layers of the policy.
    Advantages are whitened. Adam, its learning rate constant.
    """

    learning_rate: Annotated[float, Flag("Adam's.", "--learning-rate", "--lr")] = Field(1e-2, gt=0)
    epochs: int = Field(4, ge=1)
    minibatch_size: int = Field(16, ge=1)
    clip_range: float = Field(0.2, gt=0)
    gamma: float = Field(1.0, gt=0, le=1)
    gae_lambda: float = Field(0.95, ge=0, le=1)
    entropy_coef: Annotated[float, Flag("Weight of the entropy.")] = Field(0.03, ge=0)
    value_coef: float = Field(0.5, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    hidden: int = Field(64, ge=1)


class EvolveTrainConfig(EvolveConfig):
    """``policy``: ``learned``, or a baseline, which acts in the same environment and learns nothing. Each of the
    ``iterations`` takes ``steps`` steps with ``batch_size`` chains and then updates the policy with them. Novelty is
    measured against the last ``memory`` rewrites that were kept: about as many as the set that the policy is meant for
    will hold. ``save_every``: iterations between checkpoints, of which the newest ``save_total_limit`` stay (null:
    all).
    """

    panels: ClassVar[Mapping[str, str]] = {
        COMMON: "data guide policy output limit --config --set seed",
        "Evolving options": "operations reviewer novelty.encoder steps batch_size max_new_tokens memory",
        "Learning options": "iterations ppo.learning_rate ppo.entropy_coef",
        RUN: "save_every --dry-run --resume --overwrite --print-config --json",
        MODEL: "device",
        GUIDE: "guide.base_url guide.api_key_env guide.api",
        SPEND: f"budget.max_cost_usd budget.max_calls {PRICE} guide.mode",
    }
    policy: Annotated[
        Literal["learned", "random", "round-robin", "paper"], Flag("learned, random, round-robin or paper.")
    ] = "learned"
    iterations: Annotated[int, Flag("Iterations: chains and an update each. Default: {default}.")] = Field(50, ge=1)
    memory: Annotated[int, Flag("Kept rewrites that novelty is measured against.")] = Field(500, ge=1)
    reward: EvolveRewardConfig = Field(default_factory=EvolveRewardConfig)
    ppo: EvolvePPOConfig = Field(default_factory=EvolvePPOConfig)
    save_every: Annotated[int, Flag("Iterations between checkpoints.")] = Field(5, ge=1)
    save_total_limit: int | None = Field(2, ge=1)


FREE_ON_RESUME = FREE_WHILE_EVOLVING | {"save_every", "device"}
"""Keys that may differ when a run is resumed: they do not change the policy."""
