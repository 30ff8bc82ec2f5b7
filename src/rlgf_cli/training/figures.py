"""The figures of a step's row: of its episodes, of the guide, and of the tensors that the losses used.

Shapes as in EpisodeBatch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import Any

from rlgf_cli.algorithms.spec import Regime
from rlgf_cli.functional.kl import k3
from rlgf_cli.functional.stats import explained_variance
from rlgf_cli.training.advantages import Advantages, RolloutStats
from rlgf_cli.training.episodes import Episode, EpisodeBatch, by_group, without_variance
from rlgf_cli.training.guide_tokens import GuideTokens

Row = dict[str, Any]


def of_episodes(regime: Regime, episodes: Sequence[Episode]) -> Row:
    """Scores, lengths and roll-ins."""
    row: Row = {
        "regime": regime.roll_out if regime.roll_in == "none" else f"{regime.roll_in}>{regime.roll_out}",
        "episodes": len(episodes),
        "length/mean": fmean(e.length for e in episodes),
        "length/truncated": fmean(not e.finished for e in episodes),
    }
    scored = [e for e in episodes if e.score is not None]
    if scored:
        values = [e.value for e in scored]
        row |= {"score/mean": fmean(values), "score/std": pstdev(values)}
        if regime.group_size > 1:
            row["score/groups_without_variance"] = fmean(map(without_variance, by_group(scored).values()))
        parts = [e.score.parts for e in scored if e.score]
        for name in sorted({name for of_text in parts for name in of_text}):  # a reward may log a part for some only
            row[f"score/part/{name}"] = fmean(of_text[name] for of_text in parts if name in of_text)
    begun = [e for e in episodes if e.cut > 0]
    if regime.roll_in != "none" or regime.on_failure is not None:
        row["rollin/share"] = len(begun) / len(episodes)
        row |= {"rollin/tokens": fmean(e.cut for e in begun)} if begun else {}
    if regime.needs_live_guide:
        row |= {"rollin/self_ended": fmean(e.policy_alone and e.finished for e in begun)} if begun else {}
    if regime.estimator == "guide_mc":
        returns = [e.mc_returns for e in scored if e.mc_returns is not None]
        row |= {"mc/before": fmean(b for b, _ in returns), "mc/after": fmean(a for _, a in returns)} if returns else {}
    return row


def of_guide_texts(regime: Regime, episodes: Sequence[Episode], guide: GuideTokens | None) -> Row:
    """The guide-token term: its coefficient, and the guide's whole texts of the step."""
    if guide is None:
        return {}
    row: Row = {"guide/coef": guide.coefficient}
    if regime.adds_texts:
        texts = [e for e in episodes if e.role != "own"]
        groups = len(by_group(e for e in episodes if e.role == "own"))
        row |= {"guide/texts": len(texts), "guide/gate": len(texts) / groups}
        scores = [e.value for e in texts if e.score is not None]
        row |= {"guide/score": fmean(scores)} if scores else {}
    return row


def of_guide(regime: Regime, counts: Counter[str]) -> Row:
    """Counts of the texts that were requested from the guide, and of their uses."""
    row: Row = {f"guide/{name}": counts[name] for name in ("cuts_moved", "unguided")}
    row |= {"guide/requests": counts["guide_requests"], "guide/capped": counts["guide_capped"]}
    row |= {"guide/failed": counts["guide_failed"]} if counts["guide_failed"] else {}
    row |= {"guide/empty": counts["guide_empty"]} if counts["guide_empty"] else {}
    row |= {"guide/endings": counts["guide_endings"]} if counts["guide_endings"] else {}
    row |= {"guide/gated": counts["gated"]} if regime.gate else {}
    if regime.on_failure is not None and regime.on_failure.known_from == "step":
        row |= {"guide/failed_groups": counts["failed_groups"], "rollout/rewritten": counts["rewritten"]}
    row |= {"mc/one_sided": counts["one_sided"]} if regime.estimator == "guide_mc" else {}
    return row


def of_tensors(batch: EpisodeBatch, stats: RolloutStats | None, advantages: Advantages | None) -> Row:
    """KL, entropy, advantages, and each critic's values compared with the returns that they predict."""
    row: Row = {"tokens/policy": float(batch.policy.sum() / batch.real[batch.own].sum())}
    if stats is None or advantages is None:
        return row
    if bool(batch.policy.any()):
        row["policy/entropy"] = -float(stats.old[batch.policy].mean())
    row["reward/sum"] = float(advantages.rewards[batch.own].sum(-1).mean())
    if (ratio := stats.log_ratio(batch)) is not None:
        policy_tokens = batch.policy.sum().clamp_min(1)
        row["kl/mean"] = float(ratio.sum() / policy_tokens)
        row["kl/k3"] = float(k3(ratio).sum() / policy_tokens)
        row["kl/episode"] = float(ratio.sum(-1).mean())
    if int(batch.learned.sum()) > 1:
        row["advantage/std"] = float(advantages.per_token[batch.learned].std())
    for name, returns in advantages.returns.items():
        mask, values = batch.fit[name], stats.values[name]
        row[f"value/return_{name}"] = float(returns[mask].mean())
        row[f"value/bias_{name}"] = float((values - returns)[mask].mean())
        explained = explained_variance(values, returns, mask)
        row |= {} if explained is None else {f"value/explained_{name}": explained}
    return row
