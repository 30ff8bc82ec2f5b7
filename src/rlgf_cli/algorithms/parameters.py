"""Parameters that several algorithms share, each declared once. Every one is also a field of a Regime."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlgf_cli.section import Flag, Strict

GroupSize = Annotated[int, Field(ge=1), Flag("grpo, rloo: episodes per prompt.", "--group-size", "--num-generations")]


class RollIn(Strict):
    """How often an episode begins with a roll-in."""

    rollin_prob: Annotated[float, Flag("Share of episodes with a roll-in.")] = Field(0.8, ge=0, le=1)


class Cut(Strict):
    """Where the policy's roll-in ends, and which of its tokens learn: see docs/algorithms.md."""

    credit: Annotated[Literal["prefix", "cut"], Flag("aggrevated: prefix or cut.")] = "prefix"
    """Which tokens learn: all of the policy's up to the cut, or the one at the cut."""
    cut: Annotated[Literal["first", "inner"], Flag("aggrevated: first or inner.")] = "first"
    cut_horizon: int | None = Field(None, ge=1)
    """Limit of the cut's place, in tokens; null: the typical length so far."""


class Restart(Strict):
    """Where the guide's roll-in is cut, and from which of its texts the policy goes on: see docs/algorithms.md."""

    restart: Annotated[
        Literal["uniform", "backward", "uncertain"], Flag("ppo++: cuts uniform, backward or uncertain.")
    ] = "uniform"
    restart_steps: Annotated[int | None, Flag("backward: iterations until uniform.")] = Field(None, ge=1)
    gate: Annotated[bool, Flag("ppo++: only texts above the policy's own.", "--gate/--no-gate")] = False


class Group(Strict):
    """How many episodes share a prompt."""

    group_size: GroupSize = 8
