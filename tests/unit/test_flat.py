"""Where no text is better than another, the policy stays where it is: its texts keep their length."""

from __future__ import annotations

import pytest

import flat
from rl import both, caught_if
from rlgf_cli.models.actor_critic import ValueHead

FORMER = ["ppo.advantage_scale=batch", "ppo.critic_lambda=0.95", "ppo.critic_min_explained=-1000000"]
"""Of PPO before: whitened, a critic that steers from the first step on; with a head that starts at 0."""


@both
@pytest.mark.parametrize("mean", [1.0, -1.0, 10.0])
def test_lengths_stay_whatever_the_level_of_the_reward(
    mean: float, injected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """30 iterations on scores of mean +- 0.1 that do not look at the text."""
    if injected:
        monkeypatch.setattr(ValueHead, "calibrate", lambda *args, **kwargs: None)
    start = flat.start(words=7)
    with caught_if(injected):
        sets = ["optim.learning_rate=1e-4", "ppo.minibatch_size=16", *(FORMER if injected else [])]
        drift = flat.drift(start, mean, 1, steps=8 if injected else 30, episodes=16, sets=sets)
        assert drift == pytest.approx(1.0, abs=0.1)
