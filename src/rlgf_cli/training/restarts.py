"""Where a guide's text is cut, so that the policy goes on from there: restart curricula.

k of L tokens are kept, k on 1..L-1. Every way takes the same one draw in [0, 1) per group of episodes, and looks at
nothing that the policy writes behind the cut: what changes is which states are practised, not the gradient in them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlgf_cli.algorithms.spec import Regime
from rlgf_cli.models.actor_critic import ActorCritic
from rlgf_cli.models.forward import TokenBatch
from rlgf_cli.training.episodes import Episode
from rlgf_cli.training.gate import Gate

FLOOR = 0.2
"""Share of the uncertain cuts that are uniform all the same, so that no cut is ever out of reach."""


def uniform_from(lowest: int, length: int, draw: float) -> int:
    """k uniform on lowest..length-1, by inversion of ``draw``."""
    return lowest + int(draw * (length - lowest))


def lowest_backward(length: int, age: int, steps: int) -> int:
    """The earliest cut of the backward curriculum: length - 1 at age 0, 1 from age ``steps`` on.

    The window lowest..length-1 holds ceil(age / steps x (length - 1)) cuts, and one at least: it starts at the text's
    end and widens towards its beginning (Salimans and Chen 2018; Florensa et al. 2017).
    """
    width = -(-min(age, steps) * (length - 1) // steps)
    return length - max(1, width)


def uncertain_probabilities(values: np.ndarray) -> np.ndarray:
    """Probability of each cut 1..L-1, shape [L-1], from V(s_0)..V(s_L-1) along the guide's text, shape [L].

    The cut k is drawn in proportion to |V(s_k+1) - V(s_k)|, the temporal difference of the state that the policy goes
    on from: how far the critic changes its mind over the token that the guide wrote there. No value follows the last
    token, so k = L-1 has only its part of the uniform ``FLOOR``. Where the critic says the same everywhere (it starts
    at 0), all cuts are alike.
    """
    count = len(values) - 1
    surprise = np.append(np.abs(np.diff(values.astype(np.float64)))[1:], 0.0)
    total = surprise.sum()
    uniform = np.full(count, 1 / count)
    return FLOOR * uniform + (1 - FLOOR) * surprise / total if total > 0 else uniform


def draw_cut(probabilities: np.ndarray, draw: float) -> int:
    """k on 1..len(probabilities), by inversion of ``draw``."""
    return 1 + min(int(np.searchsorted(np.cumsum(probabilities), draw, side="right")), len(probabilities) - 1)


@torch.no_grad()
def values_along(model: ActorCritic, episodes: Sequence[Episode], rows_at_once: int) -> list[np.ndarray]:
    """What the policy's critic says before each token of each text, shape [L] each."""
    found: dict[int, np.ndarray] = {}
    loaded = model.loaded
    order = sorted(range(len(episodes)), key=lambda i: episodes[i].length)  # texts of like length: less padding
    for at in range(0, len(order), rows_at_once):
        rows = order[at : at + rows_at_once]
        tokens = TokenBatch.build(
            [episodes[i].prompt_ids for i in rows],
            [episodes[i].ids for i in rows],
            pad_id=loaded.pad_id,
            encoder_decoder=loaded.encoder_decoder,
            device=loaded.device,
        )
        nothing = torch.zeros(tokens.response_ids.shape, dtype=torch.bool, device=loaded.device)
        scored = model.forward_logprobs(tokens, nothing, temperature=1.0, min_new_tokens=0, values=["policy"])
        for i, row in zip(rows, scored.values["policy"].float().cpu().numpy(), strict=True):
            found[i] = row[: episodes[i].length]
    return [found[i] for i in range(len(episodes))]


@dataclass(frozen=True)
class Restarts:
    """What one step's cuts depend on beside the texts.

    ``age``: iterations since the schedule came to this regime; ``values``: :func:`values_along`, where the cut follows
    the critic (without it such cuts are uniform); ``gate``: where there is one.
    """

    age: int = 0
    values: Callable[[Sequence[Episode]], list[np.ndarray]] | None = None
    gate: Gate | None = None

    def cuts(self, regime: Regime, whole: Sequence[Episode], draws: Sequence[float]) -> dict[int, int]:
        """Processes -> tokens to keep of the text that the guide wrote for it; 0 where the policy writes alone.

        ``whole``: one episode per group, as if the guide had written all of it, at least two tokens.
        """
        shut = self.gate.shuts(whole) if self.gate is not None else [False] * len(whole)
        kept = {e.group: 0 for e in whole}
        used = [(e, draw) for e, draw, out in zip(whole, draws, shut, strict=True) if not out]
        if regime.restart == "uncertain" and self.values is not None:
            along = self.values([e for e, _ in used])
            chosen = [draw_cut(uncertain_probabilities(v), d) for v, (_, d) in zip(along, used, strict=True)]
        else:
            chosen = [uniform_from(self._lowest(regime, e.length), e.length, draw) for e, draw in used]
        return kept | {e.group: k for (e, _), k in zip(used, chosen, strict=True)}

    def _lowest(self, regime: Regime, length: int) -> int:
        if regime.restart != "backward":
            return 1
        assert regime.restart_steps is not None
        return lowest_backward(length, self.age, regime.restart_steps)
