"""The guide-token term of an update: which tokens, their credit, and the loss of a part of a minibatch.

Shapes: B episodes, T response positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rlgf_cli.algorithms.guide_term import GuideTerm
from rlgf_cli.algorithms.spec import Regime
from rlgf_cli.functional import losses
from rlgf_cli.training.advantages import Advantages
from rlgf_cli.training.episodes import EpisodeBatch

PLAIN: dict[str, Any] = {"temperature": 1.0, "min_new_tokens": 0}
"""The distribution of the term's probabilities: the guide's tokens were not drawn from the policy's sampling
distribution, in which an early EOS is impossible."""


@dataclass(frozen=True)
class GuideTokens:
    """A step's guide tokens. ``mask`` [B, T] bool; ``credit`` [B, T]: c of the term; ``coefficient``: of this step."""

    term: GuideTerm
    coefficient: float
    mask: torch.Tensor
    credit: torch.Tensor

    @classmethod
    def of(cls, regime: Regime, batch: EpisodeBatch, advantages: Advantages | None, age: int) -> GuideTokens | None:
        """The term's tokens at the regime's iteration ``age``; None for a regime without the term."""
        term = regime.guide_term
        if term is None:
            return None
        credit = torch.ones_like(batch.real, dtype=torch.float32)
        if term.credit == "advantage":
            assert advantages is not None
            credit = advantages.per_token
        return cls(term, term.coefficient.at(age), batch.guide, credit)

    @property
    def policy_coefficient(self) -> float:
        """The coefficient of the policy's own term."""
        return 1 - self.coefficient if self.term.complement else 1.0

    @property
    def shares_average(self) -> bool:
        """Whether one average is taken over the policy's and the guide's tokens, as over the members of a group."""
        return self.term.tokens == "member"

    @property
    def needs_entropy(self) -> bool:
        """Whether the entropies of the guide's tokens decide which of them learn."""
        return self.term.entropy_share < 1

    def count(self, rows: torch.Tensor) -> torch.Tensor:
        """The number of tokens that learn in these rows. rows [n] -> scalar"""
        return losses.uncertain_counts(self.mask[rows], self.term.entropy_share).sum()

    def loss(
        self,
        logprobs: torch.Tensor,
        entropies: torch.Tensor | None,
        rows: torch.Tensor,
        mask: torch.Tensor,
        count: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """The term of some rows, times its coefficient; the tokens that it was taken on; and sums over these.

        ``logprobs``, ``entropies`` [n, T]: at the tokens of ``mask`` [n, T]; ``count``: what sums are divided by.
        """
        term, width = self.term, mask.shape[1]
        if self.needs_entropy:
            assert entropies is not None
            mask = losses.most_uncertain(entropies, mask, term.entropy_share)
        credit = self.credit[rows][:, :width]
        loss = losses.guide_loss(logprobs, credit, mask, term.weight, term.shaping_gamma, count)
        with torch.no_grad():
            p = logprobs.exp()[mask]
            weights = losses.guide_weights(logprobs[mask], term.weight, term.shaping_gamma)
            sums = {
                "guide/probability": p.sum(),
                "guide/weight": weights.sum(),
                "loss/guide_nll": -logprobs[mask].sum(),
            }
        return self.coefficient * loss, mask, sums
