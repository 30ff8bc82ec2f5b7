"""What an update works on: its settings, a step's data, which tokens carry which loss, and the minibatches.

Shapes: B episodes, T response positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rlgf_cli import noise
from rlgf_cli.algorithms.spec import Regime
from rlgf_cli.config.common import OptimConfig
from rlgf_cli.config.train import AuxConfig, KLConfig, PPOConfig
from rlgf_cli.functional import losses
from rlgf_cli.functional.kl import KLEstimator
from rlgf_cli.models.forward import TokenBatch
from rlgf_cli.training.advantages import Advantages, RolloutStats
from rlgf_cli.training.episodes import EpisodeBatch
from rlgf_cli.training.guide_tokens import GuideTokens


@dataclass(frozen=True)
class UpdateSettings:
    """Sizes and coefficients of the update. ``accumulation``: parts of a minibatch, which are split further where they
    have more than ``max_tokens`` tokens; ``kl_coef``: of the KL as a loss (0: it is charged elsewhere or not at all);
    ``policy_frozen``: the critics learn alone (critic warm-up)."""

    epochs: int
    minibatch_size: int
    accumulation: int
    max_tokens: int | None
    clip_range: float
    value_clip_range: float
    value_coef: float
    entropy_coef: float
    reference_nll: float
    max_grad_norm: float
    clip_range_high: float | None = None
    loss_average: losses.LossAverage = "tokens"
    mask_truncated: bool = False
    kl_estimator: KLEstimator = "k3"
    kl_coef: float = 0.0
    policy_frozen: bool = False

    @classmethod
    def of(cls, ppo: PPOConfig, kl: KLConfig, aux: AuxConfig, optim: OptimConfig) -> UpdateSettings:
        return cls(
            epochs=ppo.epochs,
            minibatch_size=ppo.minibatch_size,
            accumulation=ppo.gradient_accumulation_steps,
            max_tokens=ppo.max_tokens_per_batch,
            clip_range=ppo.clip_range,
            value_clip_range=ppo.value_clip_range if ppo.value_clip_range is not None else float("inf"),
            value_coef=ppo.value_coef,
            entropy_coef=ppo.entropy_coef,
            reference_nll=aux.reference_nll,
            max_grad_norm=optim.max_grad_norm,
            clip_range_high=ppo.clip_range_high,
            loss_average=ppo.loss_average,
            mask_truncated=ppo.mask_truncated,
            kl_estimator=kl.estimator,
        )


@dataclass(frozen=True)
class StepData:
    """One step's episodes, with the models' figures of them and their advantages.

    ``stats`` and ``advantages`` are None for the likelihood estimator. ``references``: one reference text per episode,
    for the auxiliary likelihood. ``weights`` [B, T]: importance weights of the policy loss (None: 1 everywhere).
    ``guide``: the tokens of the guide-token term (None: the regime has none).
    :func:`update` fills in ``stats.old_logprobs`` where they are None.
    """

    regime: Regime
    batch: EpisodeBatch
    stats: RolloutStats | None
    advantages: Advantages | None
    references: TokenBatch | None
    weights: torch.Tensor | None = None
    guide: GuideTokens | None = None


def carries_loss(batch: EpisodeBatch, settings: UpdateSettings) -> torch.Tensor:
    """The tokens that the policy's loss is taken on. With ``mask_truncated`` a text that was cut at the limit has none
    (DAPO's overlong filtering, arXiv 2503.14476, section 3.4). [B, T] bool"""
    return batch.learned & batch.finished.unsqueeze(-1) if settings.mask_truncated else batch.learned


@dataclass(frozen=True)
class LossTokens:
    """The tokens of a step that carry the policy's loss (or the likelihood), and those of the guide-token term.

    Both [B, T] bool, all false where the policy is frozen.
    """

    learned: torch.Tensor
    guide: torch.Tensor

    @classmethod
    def of(cls, data: StepData, settings: UpdateSettings) -> LossTokens:
        learns = not settings.policy_frozen
        guide = data.guide.mask if data.guide is not None else torch.zeros_like(data.batch.real)
        return cls(carries_loss(data.batch, settings) & learns, guide & learns)


@dataclass(frozen=True)
class Counts:
    """Denominators of one minibatch. ``average``: what each episode's loss is divided by [B], at its row; ``guide``:
    the tokens of the guide-token term, where its average is its own."""

    learned: torch.Tensor
    guide: torch.Tensor
    fitted: torch.Tensor
    reference: torch.Tensor
    average: torch.Tensor

    @property
    def empty(self) -> bool:
        return not bool(self.learned + self.guide + self.fitted + self.reference)

    @classmethod
    def of(
        cls, data: StepData, rows: torch.Tensor, tokens: LossTokens, settings: UpdateSettings, longest: int
    ) -> Counts:
        learned, guide = tokens.learned[rows], tokens.guide[rows]
        zero = torch.zeros((), dtype=torch.long, device=learned.device)
        fitted = [data.batch.fit[name][rows].sum() for name in (data.advantages.returns if data.advantages else {})]
        wanted = data.references is not None and not settings.policy_frozen
        reference = data.references.lengths[rows].sum() if wanted and data.references is not None else zero
        averaged = learned | guide if data.guide is not None and data.guide.shares_average else learned
        average = torch.zeros(len(data.batch.scores), dtype=torch.long, device=learned.device)
        average[rows] = losses.loss_counts(averaged, settings.loss_average, longest).squeeze(-1)
        taught = data.guide.count(rows) if data.guide is not None and not settings.policy_frozen else zero
        return cls(learned.sum(), taught, sum(fitted, zero), reference, average)


def minibatches(compared: torch.Tensor, settings: UpdateSettings, seed: int, step: int) -> Iterator[torch.Tensor]:
    """Row numbers, shuffled anew each epoch; the order is a function of (seed, step, epoch).

    The size is that of the episodes; the guide's texts beside them (not ``compared`` [B]) are spread evenly.
    """
    episodes, beside = (torch.nonzero(mask.cpu())[:, 0] for mask in (compared, ~compared))
    for epoch in range(settings.epochs):
        draws = noise.generator(seed, "minibatches", step, epoch)
        parts = episodes[torch.from_numpy(draws.permutation(len(episodes)))].split(settings.minibatch_size)
        more = beside[torch.from_numpy(draws.permutation(len(beside)))].tensor_split(len(parts))
        for part, its_more in zip(parts, more, strict=True):
            yield torch.cat([part, its_more])
