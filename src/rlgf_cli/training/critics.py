"""When a critic's values are used, and in which units they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlgf_cli.algorithms.spec import Regime
from rlgf_cli.functional.stats import running_moments, spread_of
from rlgf_cli.models.actor_critic import ActorCritic
from rlgf_cli.training.checkpoint import TrainerState
from rlgf_cli.training.episodes import Episode

TRUST_MEMORY = 0.8
"""Weight of the past in the running share of the returns' variance that a critic explains; single steps are noisy."""


@dataclass(frozen=True)
class CriticSettings:
    """Conditions under which a critic's values are used. The policy waits for at most ``warmup_steps`` fits of it, or
    until it explains ``warmup_explained`` of the returns' variance; below ``min_explained`` the mean score takes its
    place.
    """

    warmup_steps: int = 0
    warmup_explained: float | None = None
    min_explained: float = 0.05

    def trusts(self, state: TrainerState, critic: str) -> bool:
        """Whether a critic explained enough, lately, for its values to be the baseline."""
        return state.explained.get(critic, 0.0) >= self.min_explained

    def warming_up(self, state: TrainerState, critic: str) -> bool:
        """Whether the policy still waits for a critic."""
        wanted = self.warmup_explained
        warm = wanted is not None and state.explained.get(critic, 0.0) >= wanted
        return state.critic_steps.get(critic, 0) < self.warmup_steps and not warm


def calibrate_critics(
    model: ActorCritic, state: TrainerState, critics: Iterable[str], regime: Regime, episodes: Sequence[Episode]
) -> None:
    """Add the step's scores to the running moments, and set the units of the critics' values by them."""
    for name in critics:
        if values := [e.value for e in episodes if e.score is not None and e.fits == name]:
            moments = state.moments[name] = running_moments(state.moments.get(name), values)
            fitted = state.critic_steps.get(name, 0) > 0
            model.head(name).calibrate(moments[1], spread_of(moments), keep=fitted)
    if regime.estimator != "likelihood" and (values := [e.value for e in episodes if e.score is not None]):
        state.moments["scores"] = running_moments(state.moments.get("scores"), values)


def note_fits(state: TrainerState, fitted: Iterable[str], row: Mapping[str, Any]) -> None:
    """Count a step's fits, and follow the share of the variance (``value/explained_*``) that each critic explained;
    a share below -1 counts for -1."""
    for name in fitted:
        state.critic_steps[name] = state.critic_steps.get(name, 0) + 1
        if (explained := row.get(f"value/explained_{name}")) is not None:
            before = state.explained.get(name, 0.0)
            state.explained[name] = TRUST_MEMORY * before + (1 - TRUST_MEMORY) * max(explained, -1.0)
