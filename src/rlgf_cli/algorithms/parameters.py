"""The parameters of the algorithms. Each is declared once; ``rlgf train --help`` and the docs keep this order."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlgf_cli.section import Flag, Strict


class RollIn(Strict):
    """The share of episodes that begin with a roll-in."""

    rollin_prob: Annotated[float, Flag("Share of episodes with a roll-in.")] = Field(0.8, ge=0, le=1)


class Mix(Strict):
    """The share of iterations of PPO++."""

    p_ppo_pp: Annotated[float, Flag("lols: share of PPO++ iterations.")] = Field(0.8, ge=0, le=1)


class Switch(Strict):
    """The number of iterations of the first regime."""

    switch_step: Annotated[int, Flag("d2lols: iterations of AggreVaTeD.")] = Field(20, ge=0)


GroupSize = Annotated[int, Field(ge=1), Flag("grpo, rloo: episodes per prompt.", "--group-size", "--num-generations")]


class Grouped(Strict):
    """The number of episodes that share a prompt."""

    group_size: GroupSize = 8


class CutHorizon(Strict):
    """The largest length of the policy's roll-in."""

    cut_horizon: int | None = Field(None, ge=1)
    """The latest place of the cut, in tokens; null: the typical length so far."""


class Cut(CutHorizon):
    """The end of the policy's roll-in, and the choice of its tokens that learn."""

    cut: Annotated[Literal["first", "inner"], Flag("aggrevated: first or inner.")] = "first"
    credit: Annotated[Literal["prefix", "cut"], Flag("aggrevated: prefix or cut.")] = "prefix"
    """Which tokens learn: all of the policy's up to the cut, or the one at the cut."""


class Restart(Strict):
    """The cut of the guide's roll-in, and the choice of the guide's texts."""

    restart: Annotated[
        Literal["uniform", "backward", "uncertain"], Flag("ppo++: cuts uniform, backward or uncertain.")
    ] = "uniform"
    restart_steps: Annotated[int | None, Flag("backward: iterations until uniform.")] = Field(None, ge=1)
    gate: Annotated[bool, Flag("ppo++: only texts above the policy's own.", "--gate/--no-gate")] = False


class MonteCarlo(Strict):
    """AggreVaTeD's estimate of the advantage of the action at the cut."""

    advantage: Annotated[Literal["gae", "guide_mc"], Flag("aggrevated: gae, or guide_mc (no critic).")] = "gae"
    mc_samples: Annotated[int, Flag("guide_mc: texts on each side of an action.")] = Field(1, ge=1)


ALL: tuple[type[Strict], ...] = (RollIn, Mix, Switch, Grouped, Cut, Restart, MonteCarlo)
