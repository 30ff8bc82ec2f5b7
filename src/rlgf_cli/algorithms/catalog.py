"""The named algorithms. Each is a function from its parameters to an :class:`AlgorithmSpec`.

PPO: Schulman et al. 2017. PPO++, AggreVaTeD, LOLS, D2LOLS: Chang et al. 2023 (arXiv 2306.11816), after Sun et al. 2017
and Chang et al. 2015. GRPO: Shao et al. 2024. RLOO: Ahmadian et al. 2024. DAgger: Ross et al. 2011.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from rlgf_cli.algorithms.spec import AlgorithmSpec, Regime, Schedule
from rlgf_cli.errors import UserError, did_you_mean


def _always(name: str, **regime: Any) -> AlgorithmSpec:
    return AlgorithmSpec(name=name, regimes=(Regime(**regime),))


def _from_guide(**regime: Any) -> Regime:
    return Regime.model_validate({"roll_in": "guide", "roll_out": "policy", **regime})


def _aggrevated(rollin_prob: float, credit: str, cut: str, cut_horizon: int | None, **more: Any) -> Regime:
    return Regime.model_validate(
        {
            "roll_in": "policy",
            "roll_out": "guide",
            "rollin_prob": rollin_prob,
            "credit": credit,
            "cut": cut,
            "cut_horizon": cut_horizon,
            **more,
        }
    )


def ppo() -> AlgorithmSpec:
    """the policy writes all of it; GAE on its own critic"""
    return _always("ppo", roll_out="policy")


def ppo_pp(
    rollin_prob: float = 0.8, restart: str = "uniform", restart_steps: int | None = None, gate: bool = False
) -> AlgorithmSpec:
    """the policy goes on from the guide's text (a recorded guide will do)"""
    regime = _from_guide(rollin_prob=rollin_prob, restart=restart, restart_steps=restart_steps, gate=gate)
    return AlgorithmSpec(name="ppo++", regimes=(regime,))


def aggrevated(
    rollin_prob: float | None = None,
    credit: str | None = None,
    cut: str = "first",
    cut_horizon: int | None = None,
    advantage: str = "gae",
    mc_samples: int = 1,
) -> AlgorithmSpec:
    """the guide finishes what the policy began (needs a live guide)"""
    if advantage not in ("gae", "guide_mc"):
        raise ValueError(f"advantage: Input should be 'gae' or 'guide_mc', not {advantage!r}")
    defaults = (1.0, "cut") if advantage == "guide_mc" else (0.8, "prefix")
    prob = defaults[0] if rollin_prob is None else rollin_prob
    more = {"estimator": advantage, "mc_samples": mc_samples}
    return AlgorithmSpec(
        name="aggrevated", regimes=(_aggrevated(prob, credit or defaults[1], cut, cut_horizon, **more),)
    )


def lols(
    p_ppo_pp: float = 0.8,
    rollin_prob: float = 0.8,
    credit: str = "prefix",
    cut: str = "first",
    cut_horizon: int | None = None,
    restart: str = "uniform",
    restart_steps: int | None = None,
    gate: bool = False,
) -> AlgorithmSpec:
    """each iteration PPO++ with probability p_ppo_pp, else AggreVaTeD (live guide)"""
    from_guide = _from_guide(rollin_prob=rollin_prob, restart=restart, restart_steps=restart_steps, gate=gate)
    return AlgorithmSpec(
        name="lols",
        regimes=(from_guide, _aggrevated(rollin_prob, credit, cut, cut_horizon)),
        schedule=Schedule(kind="mixture", weights=(p_ppo_pp, 1 - p_ppo_pp)),
    )


def d2lols(
    switch_step: int = 20,
    rollin_prob: float = 0.8,
    credit: str = "prefix",
    cut: str = "first",
    cut_horizon: int | None = None,
    restart: str = "uniform",
    restart_steps: int | None = None,
    gate: bool = False,
) -> AlgorithmSpec:
    """AggreVaTeD until switch_step, then PPO++ (live guide)"""
    from_guide = _from_guide(rollin_prob=rollin_prob, restart=restart, restart_steps=restart_steps, gate=gate)
    return AlgorithmSpec(
        name="d2lols",
        regimes=(_aggrevated(rollin_prob, credit, cut, cut_horizon), from_guide),
        schedule=Schedule(kind="switch", switch_step=switch_step),
    )


def grpo(group_size: int = 8) -> AlgorithmSpec:
    """no critic; the baseline is the mean of a group that shares the prompt"""
    return _always("grpo", estimator="group_mean", group_size=group_size)


def rloo(group_size: int = 4) -> AlgorithmSpec:
    """no critic; the baseline is the mean of the group's others"""
    return _always("rloo", estimator="leave_one_out", group_size=group_size)


def _from_guide_in_groups(name: str, summary: str, estimator: str, size: int) -> Callable[..., AlgorithmSpec]:
    """A group shares prompt and prefix, and its texts are the baseline of each other."""

    def make(
        group_size: int = size,
        rollin_prob: float = 0.8,
        restart: str = "uniform",
        restart_steps: int | None = None,
        gate: bool = False,
    ) -> AlgorithmSpec:
        how = {"restart": restart, "restart_steps": restart_steps, "gate": gate}
        regime = _from_guide(estimator=estimator, group_size=group_size, rollin_prob=rollin_prob, **how)
        return AlgorithmSpec(name=name, regimes=(regime,))

    make.__doc__ = summary
    return make


grpo_pp = _from_guide_in_groups(
    "grpo++", "GRPO from the guide's text; a group shares prompt and prefix", "group_mean", 8
)
rloo_pp = _from_guide_in_groups(
    "rloo++", "RLOO from the guide's text; a group shares prompt and prefix", "leave_one_out", 4
)


def bc_guide() -> AlgorithmSpec:
    """behaviour cloning: likelihood of the guide's text (a recorded guide will do)"""
    return _always("bc-guide", roll_out="guide", estimator="likelihood")


def dagger(rollin_prob: float = 0.8, cut_horizon: int | None = None) -> AlgorithmSpec:
    """likelihood of how the guide goes on from the policy's own prefixes (live guide)"""
    return _always(
        "dagger",
        roll_in="policy",
        roll_out="guide",
        rollin_prob=rollin_prob,
        estimator="likelihood",
        cut_horizon=cut_horizon,
    )


CATALOG: dict[str, Callable[..., AlgorithmSpec]] = {
    "ppo": ppo,
    "ppo++": ppo_pp,
    "aggrevated": aggrevated,
    "lols": lols,
    "d2lols": d2lols,
    "grpo": grpo,
    "rloo": rloo,
    "grpo++": grpo_pp,
    "rloo++": rloo_pp,
    "bc-guide": bc_guide,
    "dagger": dagger,
}


def summaries() -> dict[str, str]:
    """Each name with the line that ``rlgf ls algorithms`` prints."""
    return {name: inspect.getdoc(make) or "" for name, make in CATALOG.items()}


def parameters_of(name: str) -> list[str]:
    """What the named algorithm takes."""
    if name not in CATALOG:
        raise UserError(f"unknown algorithm {name!r}", hint=did_you_mean(name, CATALOG))
    return list(inspect.signature(CATALOG[name]).parameters)


def build(name: str, parameters: Mapping[str, Any]) -> AlgorithmSpec:
    """The named algorithm with the given parameters; what it does not take is refused with what it does take."""
    taken = parameters_of(name)
    for key in parameters:
        if key not in taken:
            hint = f"{name} takes {', '.join(taken)}" if taken else f"{name} takes no parameters"
            raise UserError(f"the algorithm {name!r} has no parameter {key!r}", hint=hint)
    try:
        return CATALOG[name](**parameters)
    except ValueError as error:  # pydantic's ValidationError: a value out of range, a refused combination
        raise UserError(f"algorithm {name!r}: {first_reason(error)}") from None


def first_reason(error: ValueError) -> str:
    """The first message of a pydantic error, without its framing."""
    details = getattr(error, "errors", None)
    if details is None:
        return str(error)
    first = details()[0]
    place = ".".join(str(p) for p in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message
