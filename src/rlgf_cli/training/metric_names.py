"""Every figure in ``metrics.jsonl``, with its meaning. The table in docs/metrics.md is made from this."""

from __future__ import annotations

METRICS: dict[str, str] = {
    "step": "iteration, counted from 1",
    "regime": "who rolled in and who rolled out, e.g. guide>policy",
    "episodes": "episodes of this step",
    "score/mean": "mean score of the episodes (what the reward returned, less missing_eos_penalty)",
    "score/std": "standard deviation of the scores",
    "score/part/*": "mean of each part of the reward, before its weight, over the episodes that have it",
    "reward/sum": "mean over episodes of the summed per-token rewards: the tensor that the advantages were made of",
    "length/mean": "response tokens per episode, EOS included",
    "length/truncated": "share of episodes that ended at the limit, without EOS",
    "length/horizon": "typical length from which a policy's cut is drawn",
    "rollin/share": "share of episodes with a roll-in",
    "rollin/tokens": "mean length of the roll-ins that took place, in tokens",
    "rollin/self_ended": "share of the policy's roll-ins that ended by themselves",
    "tokens/policy": "share of response tokens that the policy wrote",
    "tokens/learned": "tokens that carried the policy's loss",
    "kl/mean": "mean per policy token of log pi - log pi_ref (nats); estimates KL(pi || ref), may be negative",
    "kl/k3": "the non-negative k3 estimate of the same",
    "kl/episode": "mean per episode of the summed log-ratio (nats)",
    "kl/coef": "the coefficient that was charged",
    "policy/entropy": "mean of -log pi over the tokens that the policy drew (nats): an estimate of its entropy",
    "sampler/gap": "mean absolute difference (nats per token) between a vLLM server's log-probabilities of the tokens "
    "that it drew and the scorer's",
    "loss/policy": "PPO's clipped loss, mean over learned tokens",
    "loss/likelihood": "negative log-likelihood per learned token (nats)",
    "loss/value_policy": "value loss of the policy's critic",
    "loss/value_guide": "value loss of the guide's critic",
    "loss/reference_nll": "auxiliary likelihood of a reference (nats per token)",
    "ppo/ratio": "mean probability ratio over learned tokens",
    "ppo/clip_fraction": "share of learned tokens whose ratio was clipped",
    "ppo/approx_kl": "k3 estimate of KL(old policy || policy) over learned tokens (nats)",
    "ppo/entropy": "mean entropy over learned tokens (nats), where it has a coefficient",
    "value/explained_*": "1 - Var(return - value) / Var(return) of each critic on the tokens that it is fitted on",
    "advantage/std": "standard deviation of the advantages on learned tokens",
    "update/grad_norm": "gradient norm before clipping",
    "update/skipped": "share of minibatches without anything to learn",
    "update/policy_frozen": "1 while only the critics learn (critic_warmup_steps)",
    "lr": "learning rate",
    "guide/requests": "texts asked of the guide in this step",
    "guide/reuse": "mean number of uses of each distinct guide text so far",
    "guide/capped": "guide texts cut at max_new_tokens (in the policy's tokens, of the whole response)",
    "guide/cuts_moved": "cuts that moved to the next boundary of the text",
    "guide/unguided": "episodes that ran unguided because the guide had no text",
    "guide/failed": "texts of this step that the guide refused; their episodes ran unguided",
    "guide/calls": "calls charged so far (answered or of unknown outcome), for a guide elsewhere",
    "guide/cached": "texts that came from the cache since the run was started or resumed",
    "guide/mended": "repairs of the guide's answers since then (a repeated prefix, quotes, chatter, a missing space)",
    "guide/usd": "US dollars charged so far",
    "eval/score": "mean score of the policy alone on held-out prompts, sampled",
    "eval/length": "mean words of those texts",
    "time/rollout": "seconds spent on writing episodes, without the guide",
    "time/guide": "seconds spent on waiting for the guide",
    "time/sync": "seconds spent on sending the weights to a vLLM server",
    "time/reward": "seconds spent on scoring",
    "time/annotate": "seconds spent on log-probabilities and values",
    "time/check": "seconds spent on the truths of step 0 (docs/doctor.md); in the first step only",
    "time/update": "seconds spent on the update",
    "time/eval": "seconds spent on held-out prompts",
}
"""Name -> meaning; ``*`` stands for one part of a name."""


def known(name: str) -> bool:
    """Whether a figure's name is in the table."""
    return name in METRICS or any(k.endswith("*") and name.startswith(k[:-1]) for k in METRICS)
