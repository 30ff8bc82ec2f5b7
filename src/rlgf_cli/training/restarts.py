"""Restart curricula: the cut of a guide's text, from which the policy continues, and the choice of the texts.

k of L tokens are kept, k on 1..L-1. Every curriculum takes the same one draw in [0, 1) per group of episodes, and does
not depend on what the policy writes behind the cut: it changes which states are practised, not the gradient in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
import torch

from rlgf_cli import noise
from rlgf_cli.algorithms.spec import Failure, Regime
from rlgf_cli.models.actor_critic import ActorCritic
from rlgf_cli.models.forward import TokenBatch
from rlgf_cli.training.episodes import Episode
from rlgf_cli.training.parallel.processes import Processes

SLICES = 5
"""Slices of a guide's text, of which UFT keeps the first few (arXiv 2505.16984)."""
STEER_RATE = 0.1
"""Change of the kept share per unit of the difference between the target success and the step's."""
FLOOR = 0.2
"""Weight of the uniform distribution in the uncertain cuts, so that every cut has a positive probability."""
MEMORY = 0.5
"""Weight of the past in the running score of the policy's own texts: it learns, and its first texts should fade."""


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


def cosine_share(age: int, steps: int) -> float:
    """The share of the guide's text that is kept on average, from .95 at age 0 to .05 at ``steps``, by a half cosine
    (UFT, arXiv 2505.16984, section 4; Prefix-RFT, arXiv 2507.01679). Later it stays at .05."""
    return 0.05 + 0.45 * (1 + math.cos(math.pi * min(1.0, age / steps)))


def drawn_slices(share: float, draw: float) -> int:
    """The number of the text's ``SLICES`` slices that are kept: binomial with mean SLICES x share, by inversion."""
    total = 0.0
    for count in range(SLICES):
        total += math.comb(SLICES, count) * share**count * (1 - share) ** (SLICES - count)
        if draw < total:
            return count
    return SLICES


def uncertain_probabilities(values: np.ndarray) -> np.ndarray:
    """Probability of each cut 1..L-1, shape [L-1], from V(s_0)..V(s_L-1) along the guide's text, shape [L].

    The cut k is drawn in proportion to |V(s_k+1) - V(s_k)|, the temporal difference of the state that the policy
    continues from: how much the guide's token there changes the critic's value. No value follows the last token, so
    k = L-1 has only its part of the uniform ``FLOOR``. Where all values are equal (the critic starts at 0), the cut is
    uniform.
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
    """V(s_0)..V(s_L-1) of the policy's critic along each text, shape [L] each."""
    values: dict[int, np.ndarray] = {}
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
            values[i] = row[: episodes[i].length]
    return [values[i] for i in range(len(episodes))]


@dataclass
class Gate:
    """Rejects a guide's text that scored no better than what the policy writes alone on that prompt.

    ``own``: prompt id -> running score of the texts that the policy wrote alone; ``known``: :func:`text_key` -> score
    of a guide's text, both from earlier steps (``TrainerState.own_scores``, ``guide_scores``). ``score`` scores
    episodes in place; ``new``: the scores of this step's guide texts that were not known.
    """

    own: Mapping[str, float]
    known: Mapping[str, float]
    score: Callable[[list[Episode]], None]
    new: dict[str, float] = field(default_factory=dict)

    def rejects(self, whole: Sequence[Episode]) -> list[bool]:
        """For each episode, as if the guide had written all of it: whether its text is rejected.

        Where the policy has no score of its own yet the guide's text is used, and not scored.
        """
        compared = {text_key(e): e for e in whole if e.example.id in self.own}
        unscored = {key: e for key, e in compared.items() if key not in self.known and key not in self.new}
        self.score(list(unscored.values()))
        self.new |= {key: e.value for key, e in unscored.items() if e.score is not None}
        return [self._rejected(e) for e in whole]

    def _rejected(self, episode: Episode) -> bool:
        key = text_key(episode)
        score = self.known.get(key, self.new.get(key))  # None: a judge gave none, and nothing speaks against the text
        own = self.own.get(episode.example.id)
        return own is not None and score is not None and score <= own

    def merge(self, processes: Processes) -> None:
        """Add the other processes' new scores. No text is in two of them: all episodes of a prompt are in one."""
        for new in processes.gather(self.new):
            self.new |= new


def text_key(episode: Episode) -> str:
    """A prompt and the tokens of a text on it; with EOS it is another text."""
    return f"{episode.example.id}\x1f{noise.short_hash(' '.join(map(str, episode.ids)))}"


def failing_prompts(rule: Failure | None, own_scores: Mapping[str, float]) -> frozenset[str]:
    """The ids of the prompts whose running score says that the policy fails on them."""
    return frozenset(name for name, score in own_scores.items() if rule is not None and score <= rule.failed_at)


def update_own_scores(before: Mapping[str, float], episodes: Sequence[Episode]) -> dict[str, float]:
    """The running scores after a step: (1 - MEMORY) times the mean score of the prompt's texts that the policy wrote
    alone, plus MEMORY times the score before; the first mean is taken as it is."""
    values: dict[str, list[float]] = {}
    for e in episodes:
        if e.policy_alone and e.score is not None:
            values.setdefault(e.example.id, []).append(e.value)
    after = dict(before)
    for name, scores in values.items():
        mean = fmean(scores)
        after[name] = MEMORY * before[name] + (1 - MEMORY) * mean if name in before else mean
    return after


@dataclass(frozen=True)
class Restarts:
    """Inputs of one step's cuts besides the texts.

    ``age``: iterations since the schedule came to this regime; ``values``: :func:`values_along`, for cuts in proportion
    to the critic's temporal difference (None: such cuts are uniform); ``gate``: None where all texts are used;
    ``share``: of the guide's text, where it follows the success so far; ``failing``: ids of prompts whose texts failed
    so far.
    """

    age: int = 0
    share: float = 0.5
    failing: frozenset[str] = frozenset()
    values: Callable[[Sequence[Episode]], list[np.ndarray]] | None = None
    gate: Gate | None = None

    def cuts(self, regime: Regime, whole: Sequence[Episode], draws: Sequence[float]) -> dict[int, int]:
        """Group -> tokens to keep of the text that the guide wrote for it; 0 where the policy writes alone.

        ``whole``: one episode per group, as if the guide had written all of it, at least two tokens.
        """
        rejected = self.gate.rejects(whole) if self.gate is not None else [False] * len(whole)
        used = [(e, draw) for e, draw, out in zip(whole, draws, rejected, strict=True) if not out]
        if regime.restart == "uncertain" and self.values is not None:
            values = self.values([e for e, _ in used])
            cuts = [draw_cut(uncertain_probabilities(v), draw) for v, (_, draw) in zip(values, used, strict=True)]
        else:
            cuts = [self._cut(regime, e.length, draw) for e, draw in used]
        return {e.group: 0 for e in whole} | {e.group: k for (e, _), k in zip(used, cuts, strict=True)}

    def ended(self, regime: Regime) -> bool:
        """Whether the regime's roll-ins are over."""
        return regime.restart == "slices" and self.age >= (regime.restart_steps or 0)

    def _cut(self, regime: Regime, length: int, draw: float) -> int:
        if regime.on_failure is not None:
            return uniform_from(1, 1 + max(1, int(regime.on_failure.longest_prefix * (length - 1))), draw)
        if regime.restart in ("uniform", "uncertain"):
            return uniform_from(1, length, draw)
        if regime.restart == "steered":
            return _part(self.share, length)
        assert regime.restart_steps is not None
        if regime.restart == "slices":
            slices = drawn_slices(cosine_share(self.age, regime.restart_steps), draw)
            return min(length - 1, length * slices // SLICES)
        if regime.restart == "annealed":
            return _part(cosine_share(self.age, regime.restart_steps), length)
        return uniform_from(lowest_backward(length, self.age, regime.restart_steps), length, draw)


def _part(share: float, length: int) -> int:
    """k of a share of the text, on 1..L-1."""
    return max(1, min(length - 1, round(share * length)))


def steered_share(share: float, episodes: Sequence[Episode], target: float, failed_at: float) -> float:
    """The share of the guide's text for the next step: more where fewer than ``target`` of the episodes behind it
    succeeded (scored above ``failed_at``), less where more did; from 0 to .95."""
    begun = [e for e in episodes if e.cut > 0 and e.score is not None]
    if not begun:
        return share
    success = fmean(e.value > failed_at for e in begun)
    return min(0.95, max(0.0, share + STEER_RATE * (target - success)))
