"""The update: epochs of minibatches over one step's episodes.

A loss's denominator is counted over the whole minibatch before its parts are run, so that accumulating over parts gives
the minibatch's own gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.distributed.tensor import DTensor

from rlgf_cli import noise
from rlgf_cli.algorithms.spec import Regime
from rlgf_cli.config.common import OptimConfig
from rlgf_cli.config.train import AuxConfig, KLConfig, PPOConfig
from rlgf_cli.errors import RlgfError
from rlgf_cli.functional import losses
from rlgf_cli.functional.kl import KLEstimator
from rlgf_cli.models.actor_critic import ActorCritic
from rlgf_cli.models.forward import TokenBatch
from rlgf_cli.training.advantages import Advantages, RolloutStats
from rlgf_cli.training.episodes import EpisodeBatch
from rlgf_cli.training.microbatches import split_by_tokens
from rlgf_cli.training.optimizer import by_role
from rlgf_cli.training.parallel.processes import SINGLE, Processes, raised_by_all
from rlgf_cli.training.rollout import Sampling


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
    :func:`update` fills in ``stats.old_logprobs`` where they are None.
    """

    regime: Regime
    batch: EpisodeBatch
    stats: RolloutStats | None
    advantages: Advantages | None
    references: TokenBatch | None
    weights: torch.Tensor | None = None


class Sums:
    """Sums and counts over minibatches, so that an empty minibatch does not change a mean."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, name: str, total: torch.Tensor | float, count: torch.Tensor | float) -> None:
        before = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (before[0] + float(total), before[1] + float(count))

    def add_up(self, processes: Processes) -> None:
        """Add up the sums and counts of all processes."""
        everyone, self._sums = processes.gather(self._sums), {}
        for sums in everyone:
            for name, (total, count) in sums.items():
                self.add(name, total, count)

    def means(self) -> dict[str, float]:
        """The mean of each figure that was counted at least once."""
        return {name: total / count for name, (total, count) in self._sums.items() if count > 0}


def update(
    model: ActorCritic,
    optimizer: torch.optim.Optimizer,
    data: StepData,
    sampling: Sampling,
    settings: UpdateSettings,
    *,
    seed: int,
    step: int,
    processes: Processes = SINGLE,
) -> tuple[dict[str, float], StepData]:
    """Run the epochs; returns the means of the losses and of the diagnostics over what they were taken on, and the data
    with the log-probabilities before the update.

    A minibatch without anything to learn takes no optimizer step and is counted. Of each minibatch a process
    differentiates its share; the denominators are those of the whole.
    """
    sums = Sums()
    before = None
    if data.stats is not None and data.stats.old_logprobs is None:
        before = torch.zeros(data.batch.real.shape, device=data.batch.real.device)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    policy_learns = not settings.policy_frozen
    for minibatch in _minibatches(len(data.batch.scores), settings, seed, step):
        learned = carries_loss(data.batch, settings)[minibatch] & policy_learns
        counts = _Counts.of(data, minibatch, learned, settings, sampling.max_new_tokens)
        if counts.empty:
            sums.add("update/skipped", 1, 1)
            continue
        sums.add("update/skipped", 0, 1)
        optimizer.zero_grad(set_to_none=True)
        for part in _passes(data, minibatch, settings, processes, packing_hidden=model.packing_hidden):
            rows, its_sums = (minibatch[part], sums) if len(part) else (minibatch[:1], Sums())
            its_learned = learned[part] if len(part) else learned[:1]
            loss, logprobs = _loss(
                model, data, sampling, settings, rows, its_learned, counts, its_sums, processes.lockstep
            )
            if not len(part):
                loss = 0 * loss
            elif before is not None:
                before[rows, : logprobs.shape[1]] = logprobs
            if loss.requires_grad:
                (processes.loss_scale * loss).backward()
        processes.add_gradients(parameters)
        for role, owned in by_role(optimizer).items():
            norm = _clip(owned, settings.max_grad_norm)
            if not bool(norm.isfinite()):
                error = RlgfError(
                    f"the {role}'s gradient of step {step + 1} is not finite ({float(norm)}); the weights were not "
                    "changed by it",
                    hint="a smaller learning rate, more kl.coef, or dtype float32; --resume goes on from the "
                    "checkpoint",
                )
                raise raised_by_all(error)  # the sum of all processes' gradients is not finite on any of them
            sums.add("update/grad_norm" if role == "policy" else "update/critic_grad_norm", norm, 1)
        optimizer.step()
    sums.add_up(processes)
    if before is not None and data.stats is not None:
        processes.add_up([before])  # a row is 0 in all processes but the one that differentiated it
        data = replace(data, stats=replace(data.stats, old_logprobs=before))
    return sums.means(), data


def update_gives_old_logprobs(batch: EpisodeBatch, regime: Regime, settings: UpdateSettings) -> bool:
    """Whether the update's own passes give the log-probabilities before the update of all of the policy's tokens: one
    minibatch in one epoch, so that every ratio is 1, and a loss on all of these tokens. Only advantages of groups need
    no pass before the update; others need a critic's values."""
    return (
        regime.critic is None
        and regime.estimator in ("group_mean", "leave_one_out")
        and settings.epochs == 1
        and len(batch.scores) <= settings.minibatch_size
        and torch.equal(carries_loss(batch, settings), batch.policy)
    )


def _passes(
    data: StepData,
    minibatch: torch.Tensor,
    settings: UpdateSettings,
    processes: Processes,
    *,
    packing_hidden: int | None,
) -> list[torch.Tensor]:
    """The positions in a minibatch of each forward pass of this process, of responses as of references.

    In lockstep all processes make the same number of passes, and one with fewer of its own makes empty ones.
    """

    def of(rank: int) -> list[torch.Tensor]:
        mine = Processes(rank, processes.size).rows(torch.arange(len(minibatch), device=minibatch.device))
        count = settings.accumulation if processes.lockstep else min(settings.accumulation, len(mine))
        parts = list(mine.tensor_split(max(1, count)))
        for tokens in filter(None, (data.batch.tokens, data.references)):
            parts = [
                part[split]
                for part in parts
                for split in split_by_tokens(
                    tokens, minibatch[part], settings.max_tokens, packing_hidden=packing_hidden
                )
            ]
        return parts if processes.lockstep else [part for part in parts if len(part)]

    own = of(processes.rank)
    if not processes.lockstep:
        return own
    passes = max(len(of(rank)) for rank in range(processes.size))
    return own + [minibatch.new_zeros(0)] * (passes - len(own))


def carries_loss(batch: EpisodeBatch, settings: UpdateSettings) -> torch.Tensor:
    """The tokens that the policy's loss is taken on. With ``mask_truncated`` a text that was cut at the limit has none
    (DAPO's overlong filtering, arXiv 2503.14476, section 3.4). [B, T] bool"""
    return batch.learned & batch.finished.unsqueeze(-1) if settings.mask_truncated else batch.learned


def _clip(parameters: Sequence[torch.Tensor], limit: float) -> torch.Tensor:
    """Scale the gradients down to a norm of at most ``limit``; returns the norm before, a scalar."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


@dataclass(frozen=True)
class _Counts:
    """Denominators of one minibatch. ``average``: what each episode's loss is divided by [B], at its row."""

    learned: torch.Tensor
    fitted: torch.Tensor
    reference: torch.Tensor
    average: torch.Tensor

    @property
    def empty(self) -> bool:
        return not bool(self.learned + self.fitted + self.reference)

    @classmethod
    def of(
        cls, data: StepData, rows: torch.Tensor, learned: torch.Tensor, settings: UpdateSettings, longest: int
    ) -> _Counts:
        zero = torch.zeros((), dtype=torch.long, device=learned.device)
        fitted = [data.batch.fit[name][rows].sum() for name in (data.advantages.returns if data.advantages else {})]
        wanted = data.references is not None and not settings.policy_frozen
        tokens = data.references.lengths[rows].sum() if wanted and data.references is not None else zero
        average = torch.zeros(len(data.batch.scores), dtype=torch.long, device=learned.device)
        average[rows] = losses.loss_counts(learned, settings.loss_average, longest).squeeze(-1)
        return cls(learned.sum(), sum(fitted, zero), tokens, average)


def _minibatches(count: int, settings: UpdateSettings, seed: int, step: int) -> Iterator[torch.Tensor]:
    """Row numbers, shuffled anew each epoch; the order is a function of (seed, step, epoch)."""
    for epoch in range(settings.epochs):
        order = torch.from_numpy(noise.generator(seed, "minibatches", step, epoch).permutation(count))
        yield from order.split(settings.minibatch_size)


def _loss(
    model: ActorCritic,
    data: StepData,
    sampling: Sampling,
    settings: UpdateSettings,
    rows: torch.Tensor,
    learned: torch.Tensor,
    counts: _Counts,
    sums: Sums,
    lockstep: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of one part of a minibatch: policy (or likelihood), critics, entropy, auxiliary; and the
    log-probabilities of its learned tokens, without their gradient.

    ``lockstep``: where other parts have tokens to learn, this one runs the policy too.
    """
    batch, stats, advantages, references = data.batch, data.stats, data.advantages, data.references
    tokens = batch.tokens.rows(rows)
    width = tokens.response_ids.shape[1]
    learned = learned[:, :width]
    fitted = list(advantages.returns) if advantages is not None else []
    likelihood = data.regime.estimator == "likelihood"
    beside = lockstep and bool(counts.learned) and not bool(learned.any())
    scored = model.forward_logprobs(
        tokens,
        _first_token(learned) if beside else learned,
        # the guide's tokens were not drawn from the policy's sampling distribution, in which an early EOS is impossible
        **({"temperature": 1.0, "min_new_tokens": 0} if likelihood else sampling.scored),
        values=fitted,
        entropy=settings.entropy_coef > 0,
        policy_frozen=settings.policy_frozen,
    )
    total = 0 * scored.logprobs.clamp_min(-1e4).sum() if beside else scored.logprobs.new_zeros(())
    size = learned.sum()
    average = counts.average[rows].unsqueeze(-1)
    if likelihood:
        loss = losses.likelihood_loss(scored.logprobs, learned, counts.learned)
        sums.add("loss/likelihood", loss.detach() * counts.learned, size)
        total = total + loss
    elif bool(size):
        assert stats is not None and advantages is not None
        old = scored.logprobs.detach() if stats.old_logprobs is None else stats.old_logprobs[rows][:, :width]
        per_token = advantages.per_token[rows][:, :width]
        if data.weights is not None:  # positive, so that min and clip of the loss are not changed by the factor
            per_token = per_token * data.weights[rows][:, :width]
        loss, diagnostics = losses.policy_loss(
            scored.logprobs, old, per_token, learned, settings.clip_range, average,
            clip_range_high=settings.clip_range_high,
        )  # fmt: skip
        sums.add("loss/policy", loss.detach() * counts.learned, size)
        sums.add("ppo/ratio", diagnostics["ratio"], size)
        sums.add("ppo/clip_fraction", diagnostics["clipped"], size)
        sums.add("ppo/approx_kl", diagnostics["approx_kl"], size)
        total = total + loss
        if settings.kl_coef and stats.ref_logprobs is not None:
            ref = stats.ref_logprobs[rows][:, :width]
            charge = losses.kl_loss(scored.logprobs, old, ref, learned, settings.kl_estimator, average)
            sums.add("loss/kl", charge.detach() * counts.learned, size)
            total = total + settings.kl_coef * charge
    if scored.entropies is not None:
        bonus = losses.entropy_bonus(scored.entropies, learned, counts.learned)
        sums.add("ppo/entropy", bonus.detach() * counts.learned, size)
        total = total - settings.entropy_coef * bonus
    for name in fitted:
        assert stats is not None and advantages is not None
        mask = batch.fit[name][rows][:, :width]
        unit = model.value_unit(name)  # in units of the returns' spread: no reward scale is special
        loss = losses.value_loss(
            scored.values[name] / unit,
            stats.values[name][rows][:, :width] / unit,
            advantages.returns[name][rows][:, :width] / unit,
            mask,
            settings.value_clip_range,
            counts.fitted,
        )
        sums.add(f"loss/value_{name}", loss.detach() * counts.fitted, mask.sum())
        total = total + settings.value_coef * loss
    if references is not None and bool(counts.reference):
        total = total + settings.reference_nll * _reference_loss(model, references.rows(rows), counts.reference, sums)
    return total, scored.logprobs.detach().float()


def _first_token(mask: torch.Tensor) -> torch.Tensor:
    """A mask [B, T] of one token."""
    first = torch.zeros_like(mask)
    first[0, 0] = True
    return first


def _reference_loss(model: ActorCritic, tokens: TokenBatch, count: torch.Tensor, sums: Sums) -> torch.Tensor:
    """Likelihood of one reference per episode, under the plain distribution (temperature 1)."""
    mask = torch.arange(tokens.response_ids.shape[1], device=tokens.lengths.device) < tokens.lengths.unsqueeze(-1)
    scored = model.forward_logprobs(tokens, mask, temperature=1.0, min_new_tokens=0)
    loss = losses.likelihood_loss(scored.logprobs, mask, count)
    sums.add("loss/reference_nll", loss.detach() * count, mask.sum())
    return loss
