"""The invariants that must hold before the first update, each with what its failure means.

Pure functions of tensors and numbers that return a ``Check``. ``policy_probe`` measures the figures on a model;
``rlgf doctor`` shows all checks, ``rlgf train`` stops at step 0 where one of them fails.

Shapes: B episodes, T response positions.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlgf_cli.algorithms.spec import Regime
from rlgf_cli.protocols import Check
from rlgf_cli.training.episodes import AUTHOR_CODE, Episode, EpisodeBatch


@dataclass(frozen=True)
class Invariant:
    """``looks_at``: what is compared; ``broken``: what it means where it does not hold; ``remedy``: what to do."""

    looks_at: str
    broken: str
    remedy: str


INVARIANTS: dict[str, Invariant] = {
    "policy.deterministic": Invariant(
        "log-probabilities of the same tokens, computed twice",
        "log-probabilities are random, so old and new ones differ before anything was learned: dropout or another "
        "noise is left on in the model",
        "turn the noise off in the model's config (dropout rates, layer drop, router jitter); a hub model's own code "
        "may hold it under a name that rlgf does not know",
    ),
    "policy.ratio": Invariant(
        "log-probabilities computed again in other batches, in another order, with other padding: the update's ratio",
        "the ratio of new to old probability must be 1 before the first update; here padding or the batch changes a "
        "text's probabilities, so that PPO clips and learns noise",
        "see that the model takes attention_mask and position_ids; a mixture of experts that drops tokens by batch, or "
        "quantised weights, need another model or dtype float32",
    ),
    "policy.plain": Invariant(
        "log-probabilities in batches against plain calls of the model: one text at a time, nothing padded",
        "log-probabilities depend on the padding or on its side: position ids, or the attention mask, are not what the "
        "model expects, and every gradient is that of another model",
        "see that the model takes attention_mask and position_ids (an encoder: its mask), and that the tokenizer's pad "
        "token is one that the model has",
    ),
    "lora.reference": Invariant(
        "policy, policy without its adapter, and reference model",
        "with a fresh adapter, off must mean the same as on; where training goes on from an adapter, the reference "
        "model must be that adapter, frozen",
        "a fresh adapter starts with lora_B = 0 (no init_lora_weights that differs), and training goes on from the "
        "folder that holds adapter_config.json",
    ),
    "policy.reference": Invariant(
        "log pi - log pi_ref on the policy's tokens",
        "KL(policy, reference model) must be 0 before the first update; here the policy is charged for a KL that it "
        "did not cause, or the reference model is not the model that training starts from",
        "start from a checkpoint that is whole; under LoRA see what lora.reference says",
    ),
    "policy.sampler": Invariant(
        "the quantile of every sampled token under the distribution of the log-probabilities (temperature, "
        "min_new_tokens, top_k, top_p)",
        "tokens are sampled from another distribution than that of the log-probabilities: the policy gradient is then "
        "biased from the first step on",
        "a model whose key-value cache or position ids are wrong while it generates (a hub model's own code); see that "
        "one call of it and a call token by token give the same logits",
    ),
    "episodes.masks": Invariant(
        "tokens, authors, the end of every text, and EOS inside the mask",
        "a mask off by one learns padding, or never learns to end: EOS must be inside, padding outside, and each "
        "author's tokens its own",
        "this is a defect of rlgf or of an extension of it: report it with the command and the model's name",
    ),
    "reward.place": Invariant(
        "the per-token reward, less the KL charge",
        "the score must land once, on the last real token; anywhere else the wrong token gets the credit",
        "this is a defect of rlgf or of an extension of it: report it with the command and the model's name",
    ),
}
"""The invariants that ``rlgf train`` checks too, in the order of the checks: causes before effects."""


@dataclass(frozen=True)
class Tolerance:
    """The largest effect of rounding: ``mean`` and ``worst`` absolute difference, nats per token (or of a
    probability).
    """

    mean: float
    worst: float


EXACT = Tolerance(1e-5, 1e-3)
"""The same weights, the same tokens, the same shapes: hardly anything may differ, whatever the dtype."""


def rounding(dtype: torch.dtype, *, quantized: bool = False) -> Tolerance:
    """Other shapes, other kernels: rounding only. Mistakes of padding or position cost 0.1 to 2 nats a token."""
    if dtype == torch.float32 and not quantized:
        return Tolerance(1e-3, 5e-2)
    return Tolerance(0.1, 3.0)  # logits near 100 have steps of a half in bfloat16


def quantile_rounding(dtype: torch.dtype, *, quantized: bool = False) -> Tolerance:
    """The same for probabilities: how far a draw may lie outside the interval of its token.

    Below it lies half of the vocabulary, in which errors cancel: a temperature that is 5 % off moves the draws of a
    sharp distribution by 1e-3, one that is 20 % off those of a flat one by 2e-4. bfloat16's own noise is of that size.
    """
    return Tolerance(1e-4, 1e-2) if dtype == torch.float32 and not quantized else Tolerance(0.01, 0.3)


@dataclass(frozen=True)
class Gap:
    """The distance of two [B, T] tensors on a mask: mean and worst absolute difference over ``tokens``."""

    mean: float
    worst: float
    tokens: int

    @classmethod
    def between(cls, a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> Gap:
        """NaN or infinity on either side is a gap without bound."""
        return cls.of((a - b)[mask])

    @classmethod
    def of(cls, differences: torch.Tensor) -> Gap:
        if not differences.numel():
            return cls(0.0, 0.0, 0)
        size = torch.nan_to_num(differences.double().abs(), nan=float("inf"))
        return cls(float(size.mean()), float(size.max()), differences.numel())

    def within(self, tolerance: Tolerance) -> bool:
        return self.mean <= tolerance.mean and self.worst <= tolerance.worst

    def __str__(self) -> str:
        return f"{self.mean:.2g} nats a token apart, {self.worst:.2g} at most, on {self.tokens} tokens"

    def numbers(self) -> dict[str, float | int | None]:
        """For a report; what has no bound is None."""
        finite = {name: value if value != float("inf") else None for name, value in vars(self).items()}
        return dict(finite)


def check_of(name: str, ok: bool, finding: str, numbers: dict[str, Any] | None = None) -> Check:
    """One of INVARIANTS as a check."""
    invariant = INVARIANTS[name]
    return Check(name, "ok" if ok else "fail", finding, invariant.broken, "" if ok else invariant.remedy, numbers or {})


def compared(name: str, gap: Gap, tolerance: Tolerance, what: str) -> Check | None:
    """An invariant about two computations of the same numbers; None where no token could be compared."""
    return check_of(name, gap.within(tolerance), f"{what}: {gap}", gap.numbers()) if gap.tokens else None


def sampled(draws: torch.Tensor, below: torch.Tensor, upto: torch.Tensor, tolerance: Tolerance) -> Check | None:
    """Checks inverse-transform sampling: the draw of a token lies between the cumulative masses on
    both sides of it, ``below <= draw < upto``, all [N] float64. None where the policy wrote nothing."""
    outside = torch.maximum((below - draws).clamp_min(0), (draws - upto).clamp_min(0))
    gap = Gap.of(outside)
    if not gap.tokens:
        return None
    strays = int((outside > tolerance.worst).sum())
    finding = (
        f"{gap.tokens} sampled tokens: {gap.tokens - strays} at their quantile; draws lie outside by {gap.mean:.2g} of "
        f"the probability on average, {gap.worst:.2g} at most"
    )
    return check_of("policy.sampler", gap.within(tolerance), finding, {**gap.numbers(), "strays": strays})


def adapters(on_off: Gap, on_reference: Gap, *, fresh: bool) -> Check | None:
    """``fresh``: the reference is the policy with its adapter off; else it is a frozen copy of the adapter."""
    if not on_reference.tokens:
        return None
    numbers = {"adapter_off": on_off.numbers(), "reference": on_reference.numbers(), "fresh": fresh}
    if not fresh:
        finding = f"the reference is a frozen copy of the adapter that training goes on from: {on_reference}"
        return check_of("lora.reference", on_reference.within(EXACT), finding, numbers)
    finding = f"the reference is the policy with its adapter off: {on_off}"
    return check_of("lora.reference", on_off.within(EXACT) and on_reference.within(EXACT), finding, numbers)


def masks(episodes: Sequence[Episode], batch: EpisodeBatch, regime: Regime, eos_ids: Collection[int]) -> Check:
    """The batch against its episodes, token by token, without the functions that made it."""
    faults: list[str] = []
    ends = learned_ends = 0
    learner = AUTHOR_CODE[regime.learn_author]
    width = batch.real.shape[1]
    tokens = batch.tokens
    prompts = [row[mask.bool()].tolist() for row, mask in zip(tokens.prompt_ids, tokens.prompt_mask, strict=True)]
    rows = zip(
        episodes, prompts,
        tokens.response_ids.tolist(), batch.real.tolist(), batch.policy.tolist(), batch.learned.tolist(),
        batch.last.tolist(), strict=True,
    )  # fmt: skip
    for episode, prompt, ids, real, policy, learned, last in rows:
        n, authors = episode.length, episode.authors
        behind = [False] * (width - n)
        own = [author == AUTHOR_CODE["policy"] for author in authors] + behind
        may = [author == learner and episode.learns for author in authors] + behind
        if regime.credit == "cut":
            action = range(episode.action_start, episode.cut) if episode.reached_cut else range(0)
            may = [m and t in action for t, m in enumerate(may)]
        if prompt != episode.prompt_ids:
            faults.append("padding in the prompt, or a part of it left out")
        if ids[:n] != episode.ids:
            faults.append("other tokens than the episode's")
        if real != [True] * n + behind:
            faults.append("real tokens left out or padding counted as real")
        if policy != own:
            faults.append("tokens given to another author")
        if learned != may:
            faults.append("learned tokens are not the author's own")
        if last != [t == n - 1 for t in range(width)]:
            faults.append("the last token is another one")
        if any(token in eos_ids and mine for token, mine in zip(ids[: n - 1], own, strict=False)):
            faults.append("tokens behind the policy's EOS")
        if episode.finished and may[n - 1]:
            ends += 1
            learned_ends += learned[n - 1]
    if faults:
        named = ", ".join(f"{words} ({faults.count(words)} texts)" for words in dict.fromkeys(faults))
        finding = f"of {len(episodes)} texts: {named}; EOS learns in {learned_ends} of {ends} places where it should"
    else:
        finding = f"{len(episodes)} texts agree with their masks; EOS learns in {learned_ends} of {ends} places"
    return check_of(
        "episodes.masks", not faults, finding, {"faults": len(faults), "ends": ends, "learned": learned_ends}
    )


def placement(
    episodes: Sequence[Episode], scores: torch.Tensor, rewards: torch.Tensor, log_ratio: torch.Tensor, kl_coef: float
) -> Check:
    """``rewards`` [B, T] without the KL charge must be ``scores`` [B] at each text's last token, and 0 elsewhere."""
    left = rewards + kl_coef * log_ratio
    expected = torch.zeros_like(left)
    for i, episode in enumerate(episodes):
        if episode.length:
            expected[i, episode.length - 1] = scores[i]
    wrong = ~torch.isclose(left, expected, rtol=1e-4, atol=1e-5)
    rows = int(wrong.any(-1).sum())
    finding = f"{len(episodes) - rows} of {len(episodes)} scores are on the last real token, and nothing elsewhere"
    return check_of("reward.place", rows == 0, finding, {"texts": len(episodes), "misplaced": rows})
