"""The difference between the sampler's log-probabilities and the training model's, and its correction.

Shapes: B episodes, T response positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlgf_cli.functional.importance import importance_ratios, truncated_weights
from rlgf_cli.training.episodes import Episode


def sampler_gap(episodes: Sequence[Episode], logprobs: torch.Tensor) -> torch.Tensor | None:
    """[N]: the sampler's log-probabilities of the tokens that it reported them for, less those computed here
    (``logprobs`` [B, T]); nats. None where it reported none: the own loop samples from the training model.
    """
    sampled = [(row, at, value) for row, e in enumerate(episodes) for at, value in e.sampler_logprobs.items()]
    if not sampled:
        return None
    rows, places, values = zip(*sampled, strict=True)
    own = logprobs[list(rows), list(places)]
    return torch.tensor(values, dtype=own.dtype, device=own.device) - own


def correction_weights(episodes: Sequence[Episode], logprobs: torch.Tensor, cap: float) -> torch.Tensor:
    """Truncated importance weights [B, T] of a step's tokens: 1 where no sampler reported a log-probability (the
    guide's tokens, padding). ``logprobs`` [B, T]: the training model's, before the update.
    """
    sampler, mask = torch.zeros_like(logprobs), torch.zeros_like(logprobs, dtype=torch.bool)
    for row, e in enumerate(episodes):
        if e.sampler_logprobs:
            places = list(e.sampler_logprobs)
            sampler[row, places] = torch.tensor(list(e.sampler_logprobs.values()), device=sampler.device)
            mask[row, places] = True
    return truncated_weights(importance_ratios(logprobs, sampler, mask), cap)


def gap_figures(episodes: Sequence[Episode], logprobs: torch.Tensor, cap: float | None) -> dict[str, float]:
    """The figures of a step's row; ``cap``: of the correction, None where there is none. Empty without a sampler that
    reports log-probabilities.
    """
    gap = sampler_gap(episodes, logprobs)
    if gap is None:
        return {}
    row = {"sampler/gap": float(gap.abs().mean()), "sampler/gap_max": float(gap.abs().max())}
    if cap is not None:
        ratios = (-gap).exp()
        row["sampler/weight"] = float(truncated_weights(ratios, cap).mean())
        row["sampler/truncated"] = float((ratios > cap).float().mean())
    return row
