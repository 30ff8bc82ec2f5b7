"""The update: epochs of minibatches over one step's episodes.

A loss's denominator is counted over the whole minibatch before its parts are run, so that accumulating over parts gives
the minibatch's own gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.distributed.tensor import DTensor

from rlgf_cli.algorithms.spec import Regime
from rlgf_cli.errors import RlgfError
from rlgf_cli.functional import losses
from rlgf_cli.models.actor_critic import ActorCritic, TokenOutputs
from rlgf_cli.models.forward import TokenBatch
from rlgf_cli.training.episodes import EpisodeBatch
from rlgf_cli.training.guide_tokens import PLAIN, GuideTokens
from rlgf_cli.training.microbatches import split_by_tokens
from rlgf_cli.training.minibatches import Counts, LossTokens, StepData, UpdateSettings, carries_loss, minibatches
from rlgf_cli.training.optimizer import by_role
from rlgf_cli.training.parallel.processes import SINGLE, Processes, raised_by_all
from rlgf_cli.training.rollout import Sampling


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
    tokens = LossTokens.of(data, settings)
    for minibatch in minibatches(data.batch.compared, settings, seed, step):
        counts = Counts.of(data, minibatch, tokens, settings, sampling.max_new_tokens)
        if counts.empty:
            sums.add("update/skipped", 1, 1)
            continue
        sums.add("update/skipped", 0, 1)
        optimizer.zero_grad(set_to_none=True)
        for part in _passes(data, minibatch, settings, processes, packing_hidden=model.packing_hidden):
            rows, its_sums = (minibatch[part], sums) if len(part) else (minibatch[:1], Sums())
            loss, logprobs = _loss(model, data, sampling, settings, rows, tokens, counts, its_sums, processes.lockstep)
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
        and int(batch.compared.sum()) <= settings.minibatch_size
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


def _clip(parameters: Sequence[torch.Tensor], limit: float) -> torch.Tensor:
    """Scale the gradients down to a norm of at most ``limit``; returns the norm before, a scalar."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def _loss(
    model: ActorCritic,
    data: StepData,
    sampling: Sampling,
    settings: UpdateSettings,
    rows: torch.Tensor,
    selected: LossTokens,
    counts: Counts,
    sums: Sums,
    lockstep: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of one part of a minibatch: policy (or likelihood), guide tokens, critics, entropy, auxiliary; and the
    log-probabilities of its learned tokens, without their gradient.

    ``lockstep``: where other parts have tokens to learn, this one runs the policy too.
    """
    batch, stats, advantages, references = data.batch, data.stats, data.advantages, data.references
    tokens = batch.tokens.rows(rows)
    width = tokens.response_ids.shape[1]
    learned, guide = (mask[rows][:, :width] for mask in (selected.learned, selected.guide))
    one_pass = data.guide is not None and sampling.plain  # one distribution for both authors' tokens
    carried = learned | guide if one_pass else learned
    fitted = list(advantages.returns) if advantages is not None else []
    likelihood = data.regime.estimator == "likelihood"
    idle = lockstep and bool(counts.learned + one_pass * counts.guide) and not bool(carried.any())
    scored = model.forward_logprobs(
        tokens,
        _first_token(carried) if idle else carried,
        **(PLAIN if likelihood else sampling.scored),
        values=fitted,
        entropy=settings.entropy_coef > 0 or (one_pass and data.guide is not None and data.guide.needs_entropy),
        policy_frozen=settings.policy_frozen,
    )
    total = 0 * scored.logprobs.clamp_min(-1e4).sum() if idle else scored.logprobs.new_zeros(())
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
        weight = data.guide.policy_coefficient if data.guide is not None else 1.0
        total = total + weight * loss
        if settings.kl_coef and stats.ref_logprobs is not None:
            ref = stats.ref_logprobs[rows][:, :width]
            charge = losses.kl_loss(scored.logprobs, old, ref, learned, settings.kl_estimator, average)
            sums.add("loss/kl", charge.detach() * counts.learned, size)
            total = total + weight * settings.kl_coef * charge
    if data.guide is not None and bool(counts.guide):
        theirs = scored if one_pass else _guide_pass(model, tokens, guide, data.guide, lockstep)
        divisor = average if data.guide.shares_average else counts.guide
        loss, guide, its_sums = data.guide.loss(theirs.logprobs, theirs.entropies, rows, guide, divisor)
        for name, value in its_sums.items():
            sums.add(name, value, guide.sum())
        total = total + loss + (0 * theirs.logprobs.clamp_min(-1e4).sum() if lockstep else 0)
    if settings.entropy_coef > 0 and scored.entropies is not None:
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


def _guide_pass(
    model: ActorCritic, tokens: TokenBatch, mask: torch.Tensor, guide: GuideTokens, lockstep: bool
) -> TokenOutputs:
    """The guide's tokens under the plain distribution, where the policy's are sampled from another one. In lockstep
    every process makes this pass."""
    idle = lockstep and not bool(mask.any())
    wanted = _first_token(mask) if idle else mask
    return model.forward_logprobs(tokens, wanted, **PLAIN, entropy=guide.needs_entropy)


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
