"""The invariants of step 0, measured on a model and its first episodes: a few more forward passes, no generation.

Shapes: B episodes, T response positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel

from rlgf_cli import noise
from rlgf_cli.checks import invariants
from rlgf_cli.checks.invariants import EXACT, Gap
from rlgf_cli.errors import RlgfError
from rlgf_cli.functional.logprobs import process_logits, warp_logits
from rlgf_cli.models.actor_critic import ActorCritic
from rlgf_cli.models.device import autocast
from rlgf_cli.models.forward import TokenBatch, response_states
from rlgf_cli.models.generate import decoder_start_id
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.protocols import Check
from rlgf_cli.training.advantages import Advantages, RolloutStats
from rlgf_cli.training.episodes import Episode, EpisodeBatch
from rlgf_cli.training.loop import PolicyProbe
from rlgf_cli.training.minibatches import StepData
from rlgf_cli.training.rollout import Sampling
from rlgf_cli.training.sampler_gap import sampler_gap

ROWS = 6
"""Episodes whose log-probabilities are computed again; checks without a forward pass take all episodes."""
_POSITIONS = 32
"""Positions whose whole distribution is in memory at a time, as float64."""


@torch.no_grad()
def probe(
    model: ActorCritic,
    episodes: Sequence[Episode],
    data: StepData,
    sampling: Sampling,
    *,
    kl_coef: float,
    seed: int,
    step: int,
) -> list[Check]:
    """All invariants of a step before its update. ``kl_coef``: the coefficient of the KL in the reward.

    A likelihood regime (no statistics and no advantages) has no ratio, no reference model and no reward.
    """
    batch, stats, advantages = data.batch, data.stats, data.advantages
    checks: list[Check | None] = []
    rows = _some(batch)
    if stats is not None and advantages is not None:
        checks += _scoring(model, episodes, batch, stats, sampling, rows)
        if isinstance(model.policy, PeftModel) and model.has_ref_model:
            checks.append(_adapters(model, batch, sampling, rows))
        if (ratio := stats.log_ratio(batch)) is not None:
            everything = Gap.of(ratio[batch.policy])
            checks.append(invariants.compared("policy.reference", everything, EXACT, "policy and reference"))
    if any(e.sampler_logprobs for e in episodes):
        checks.append(_engine(episodes, stats, sampling))
    else:
        checks.append(_sampler(model, [episodes[i] for i in rows.tolist()], sampling, seed, step))
    checks.append(invariants.masks(episodes, batch, data.regime, model.loaded.eos_ids))
    if advantages is not None:
        checks.append(_placement(episodes, batch, stats, advantages, kl_coef))
    return [check for check in checks if check is not None]


def _placement(
    episodes: Sequence[Episode],
    batch: EpisodeBatch,
    stats: RolloutStats | None,
    advantages: Advantages,
    kl_coef: float,
) -> Check:
    known = stats.log_ratio(batch) if stats is not None else None
    ratio = torch.zeros_like(advantages.rewards) if known is None else known
    return invariants.placement(episodes, batch.scores, advantages.rewards, ratio, kl_coef)


def broken_invariant(check: Check) -> RlgfError:
    """The error that stops training for a broken invariant."""
    hint = f"{check.remedy}; rlgf doctor shows all checks, and --set step0=warn trains all the same"
    return RlgfError(f"{check.name} does not hold at step 0: {check.finding}\n  {check.explanation}", hint=hint)


def _some(batch: EpisodeBatch) -> torch.Tensor:
    """Rows to score again: spread over the lengths, those with policy tokens first."""
    with_policy = batch.policy.any(-1).nonzero()[:, 0]
    if not len(with_policy):
        return with_policy
    order = with_policy[batch.tokens.lengths[with_policy].argsort(stable=True)]
    at = torch.linspace(0, len(order) - 1, min(ROWS, len(order)), device=order.device).round().long()
    return order[at]


def _tolerance(loaded: Loaded, of: Any = invariants.rounding) -> invariants.Tolerance:
    return of(loaded.dtype, quantized=bool(getattr(loaded.model, "is_quantized", False)))


def _scoring(
    model: ActorCritic,
    episodes: Sequence[Episode],
    batch: EpisodeBatch,
    stats: RolloutStats,
    sampling: Sampling,
    rows: torch.Tensor,
) -> list[Check | None]:
    """Log-probabilities of the same tokens again: in the same batch, in other batches, and one text at a time."""
    if not len(rows):
        return []
    tokens, chosen = _of_rows(batch, rows)
    first = model.forward_logprobs(tokens, chosen, **sampling.scored).logprobs
    again = model.forward_logprobs(tokens, chosen, **sampling.scored).logprobs
    tolerance = _tolerance(model.loaded)
    checks = [invariants.compared("policy.deterministic", Gap.between(first, again, chosen), EXACT, "scored twice")]
    others, plain = [], []
    like = rows[batch.tokens.prompt_mask[rows].sum(-1).argsort(stable=True)]
    for part in like.split(max(1, len(rows) // 2)):  # short prompts together, so that padding is cut off
        tokens, chosen = _of_rows(batch, part)
        scored = model.forward_logprobs(tokens, chosen, **sampling.scored).logprobs
        others.append((scored - stats.old[part][:, : chosen.shape[1]])[chosen])
    for row in rows:
        episode = episodes[int(row)]
        mask = batch.policy[row, : episode.length]
        alone = plain_logprobs(model, episode.prompt_ids, episode.ids, sampling)
        plain.append((alone - stats.old[row, : len(mask)])[mask])
    ratio = Gap.of(torch.cat(others))
    checks.append(invariants.compared("policy.ratio", ratio, tolerance, "in other batches"))
    checks.append(invariants.compared("policy.plain", Gap.of(torch.cat(plain)), tolerance, "one text at a time"))
    return checks


def _of_rows(batch: EpisodeBatch, rows: torch.Tensor) -> tuple[TokenBatch, torch.Tensor]:
    """Some rows' tokens and policy mask, padding that none of them needs cut off."""
    tokens = batch.tokens.rows(rows)
    return tokens, batch.policy[rows][:, : tokens.response_ids.shape[1]]


def plain_logprobs(
    model: ActorCritic, prompt_ids: Sequence[int], response_ids: Sequence[int], sampling: Sampling
) -> torch.Tensor:
    """Log-probabilities [T] of one text by a plain call of the model: no batch, no mask, no position ids, no hook."""
    policy, device = model.policy, model.loaded.device
    prompt, response = torch.tensor([prompt_ids], device=device), torch.tensor([response_ids], device=device)
    with autocast(device, model.loaded.dtype):
        if model.loaded.encoder_decoder:
            inputs = torch.cat([torch.full_like(response[:, :1], decoder_start_id(policy)), response[:, :-1]], dim=1)
            logits = policy(input_ids=prompt, decoder_input_ids=inputs, use_cache=False).logits[0]
        else:
            logits = policy(input_ids=torch.cat([prompt, response[:, :-1]], dim=1), use_cache=False).logits[0]
            logits = logits[len(prompt_ids) - 1 :]
    early = torch.arange(len(response_ids), device=device) < sampling.min_new_tokens
    banned = model.control if sampling.ban_control else None
    logits = process_logits(logits.float(), sampling.temperature, early, model.eos, banned)
    return logits.log_softmax(-1).gather(-1, response.T)[:, 0]


def _adapters(model: ActorCritic, batch: EpisodeBatch, sampling: Sampling, rows: torch.Tensor) -> Check | None:
    if not len(rows):
        return None
    tokens, chosen = _of_rows(batch, rows)
    on = model.forward_logprobs(tokens, chosen, **sampling.scored).logprobs
    reference = model.ref_logprobs(tokens, chosen, **sampling.scored)
    with model.policy.disable_adapter():
        off = model.forward_logprobs(tokens, chosen, **sampling.scored).logprobs
    fresh = not model.ref_model_is_frozen_adapter
    return invariants.adapters(Gap.between(on, off, chosen), Gap.between(on, reference, chosen), fresh=fresh)


def _sampler(model: ActorCritic, episodes: Sequence[Episode], sampling: Sampling, seed: int, step: int) -> Check | None:
    """Compare every token that the policy sampled with the uniform draw that it was sampled by."""
    loaded = model.loaded
    draws: list[torch.Tensor] = []
    below: list[torch.Tensor] = []
    upto: list[torch.Tensor] = []
    for e in episodes:
        own = torch.tensor([author == invariants.AUTHOR_CODE["policy"] for author in e.authors], device=loaded.device)
        tokens = TokenBatch.build(
            [e.prompt_ids], [e.ids], pad_id=loaded.pad_id, encoder_decoder=loaded.encoder_decoder, device=loaded.device
        )
        with autocast(loaded.device, loaded.dtype):
            hidden = response_states(model.policy, tokens, share_prompts=False).at(own[None])
        uniforms = noise.uniforms(sampling.max_new_tokens, seed, "tokens", *e.drawn)
        at = own.nonzero()[:, 0]
        for part in torch.arange(len(at), device=at.device).split(_POSITIONS):
            places = at[part]
            ids = tokens.response_ids[0, places]
            early, banned = places < sampling.min_new_tokens, model.control if sampling.ban_control else None
            scaled = process_logits(model.logits(hidden[part]), sampling.temperature, early, model.eos, banned)
            shares = torch.softmax(warp_logits(scaled, sampling.top_k, sampling.top_p), -1).cpu().double()
            cumulative = shares.cumsum(-1) / shares.sum(-1, keepdim=True)
            reached = cumulative.gather(-1, ids.cpu()[:, None])[:, 0]
            upto.append(reached)
            below.append(reached - shares.gather(-1, ids.cpu()[:, None])[:, 0])
            draws.append(torch.from_numpy(uniforms)[places.cpu()])
    if not draws:
        return None
    tolerance = _tolerance(loaded, invariants.quantile_rounding)
    return invariants.sampled(torch.cat(draws), torch.cat(below), torch.cat(upto), tolerance)


def _engine(episodes: Sequence[Episode], stats: RolloutStats | None, sampling: Sampling) -> Check | None:
    """Compare vLLM's log-probabilities of the tokens that it sampled with those computed here; it computes in bfloat16
    most often. None where its distribution is cut (top_k, top_p) and the one here is not."""
    if stats is None or sampling.top_k or sampling.top_p < 1:
        return None
    gap = sampler_gap(episodes, stats.old)
    assert gap is not None
    return invariants.compared("policy.sampler", Gap.of(gap), invariants.rounding(torch.bfloat16), "vLLM and policy")


def make_probe(model: ActorCritic, sampling: Sampling, *, seed: int, warn: Callable[[str], None] | None) -> PolicyProbe:
    """Checks the invariants on the first episodes of a run: the first broken one is raised as an error, or, with
    ``warn``, every broken one is passed to it."""

    def run(episodes: Sequence[Episode], data: StepData, kl_coef: float) -> None:
        for check in probe(model, episodes, data, sampling, kl_coef=kl_coef, seed=seed, step=0):
            if check.status == "fail":
                if warn is None:
                    raise broken_invariant(check)
                warn(str(broken_invariant(check)))

    return run
