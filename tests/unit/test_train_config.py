"""Where the KL is charged, what advantages may be divided by, and what does not go together."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from configured import config_of
from rlgf_cli.config.train import KLConfig
from rlgf_cli.runs.build import HEAD_RATE, critic_rate, needs_ref_model
from rlgf_cli.training.advantages import scale_of

ESTIMATORS = ["gae", "group_mean", "leave_one_out", "likelihood", "guide_mc"]
ALGORITHMS: dict[str, Any] = {
    "gae": "ppo",
    "group_mean": {"name": "grpo", "group_size": 4},
    "leave_one_out": {"name": "rloo", "group_size": 4},
    "likelihood": "bc-guide",
    "guide_mc": {"name": "aggrevated", "advantage": "guide_mc", "mc_samples": 2},
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_advantages_are_divided_by(estimator: Any) -> None:
    own = {"group_mean": "group", "leave_one_out": "none"}.get(estimator, "running")
    assert scale_of("auto", estimator) == own
    assert [scale_of(scale, estimator) for scale in ("none", "running", "batch", "group")] == [
        "none", "running", "batch", "group"
    ]  # fmt: skip


@pytest.mark.parametrize("scale", ["auto", "none", "running", "batch", "group"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_divisor_that_the_estimator_has_no_use_for_is_refused(estimator: str, scale: str) -> None:
    taken = {
        "gae": {"auto", "none", "running", "batch"},
        "guide_mc": {"auto", "none", "running", "batch"},
        "group_mean": {"auto", "none", "group"},
        "leave_one_out": {"auto", "none"},
        "likelihood": {"auto", "none", "running", "batch", "group"},  # it has no advantages
    }[estimator]
    ppo = {"minibatch_size": 8, "advantage_scale": scale}
    if scale in taken:
        assert config_of(ALGORITHMS[estimator], ppo=ppo).ppo.advantage_scale == scale
        return
    with pytest.raises(ValidationError) as refused:
        config_of(ALGORITHMS[estimator], ppo=ppo)
    assert f"ppo.advantage_scale: {scale} does not go with" in str(refused.value)


@pytest.mark.parametrize("scale", ["auto", "group", "none"])
@pytest.mark.parametrize("coef", [0.0, 0.1])
@pytest.mark.parametrize("where", ["reward", "loss", "log"])
def test_a_kl_in_scores_that_are_divided_by_their_groups_deviation_is_refused(
    where: str, coef: float, scale: str
) -> None:
    sections: dict[str, Any] = {"ppo": {"minibatch_size": 8, "advantage_scale": scale}}
    sections["kl"] = {"coef": coef, "where": where}
    if where == "reward" and coef and scale != "none":
        with pytest.raises(ValidationError, match=r"kl\.where: reward puts the KL into scores that are divided"):
            config_of(ALGORITHMS["group_mean"], **sections)
    else:
        config_of(ALGORITHMS["group_mean"], **sections)


def test_a_kl_in_rloos_returns_is_allowed() -> None:
    assert config_of(ALGORITHMS["leave_one_out"], kl={"coef": 0.1, "where": "reward"}).kl.where == "reward"


@pytest.mark.parametrize(("kl", "allowed"), [
    ({"coef": 0.1, "adaptive": True}, True),
    ({"coef": 0.0, "adaptive": True}, False),
    ({"coef": 0.1, "adaptive": True, "where": "log"}, False),
    ({"coef": 0.0, "where": "log"}, True),
])  # fmt: skip
def test_a_coefficient_that_nothing_is_charged_with_does_not_move(kl: dict[str, Any], allowed: bool) -> None:
    if allowed:
        assert KLConfig(**kl).adaptive == kl.get("adaptive", False)
    else:
        with pytest.raises(ValidationError, match="needs one to start from that is charged"):
            KLConfig(**kl)


def test_who_has_no_groups_cannot_replace_them() -> None:
    with pytest.raises(ValidationError, match="replaces groups, and 'ppo' has none"):
        config_of(rollout={"episodes": 8, "resample_groups": 1})
    assert config_of(ALGORITHMS["group_mean"], rollout={"episodes": 8, "resample_groups": 1}).rollout.resample_groups


def test_an_end_of_a_warmup_that_there_is_none_of_is_refused() -> None:
    ppo = {"minibatch_size": 8, "critic_warmup_explained": 0.3}
    with pytest.raises(ValidationError, match="there is no warm-up"):
        config_of(ppo=ppo)
    assert config_of(ppo={**ppo, "critic_warmup_steps": 1}).ppo.critic_warmup_explained == 0.3


def test_the_algorithm_of_each_estimator_is_checked_in_a_mixture() -> None:
    regimes = [{}, {"roll_out": "guide", "estimator": "likelihood"}]
    mixed = {"name": "mine", "regimes": regimes, "schedule": {"kind": "mixture", "weights": [0.5, 0.5]}}
    with pytest.raises(ValidationError, match=r"group does not go with 'mine' \(gae\)"):
        config_of(mixed, ppo={"minibatch_size": 8, "advantage_scale": "group"})
    assert config_of(mixed).algorithm.spec().name == "mine"


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("kl", "wanted"), [
    ({"coef": 0.0}, False),
    ({"coef": 0.01}, True),
    ({"coef": 0.0, "where": "log"}, True),
    ({"coef": 0.0, "where": "loss"}, False),
])  # fmt: skip
def test_a_reference_is_needed_where_a_kl_is_charged_or_measured(
    estimator: str, kl: dict[str, Any], wanted: bool
) -> None:
    config = config_of(ALGORITHMS[estimator], kl=kl)
    assert needs_ref_model(config) == (wanted and estimator != "likelihood")


@pytest.mark.parametrize(("critic", "given", "expected"), [
    ("separate", None, 5e-6),  # a model like the policy
    ("head", None, HEAD_RATE),
    ("shared", None, HEAD_RATE),
    ("separate", 0.3, 0.3),
    ("head", 0.3, 0.3),
])  # fmt: skip
def test_the_critics_learning_rate(critic: str, given: float | None, expected: float) -> None:
    ppo = {"minibatch_size": 8, "critic": critic, "critic_learning_rate": given}
    assert critic_rate(config_of(ppo=ppo, optim={"learning_rate": 5e-6})) == expected
    assert HEAD_RATE == 1e-3
