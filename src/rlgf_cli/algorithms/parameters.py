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


class FailedAt(Strict):
    """The score up to which a text counts as failed."""

    failed_at: Annotated[float, Flag("hpt, on-failure, steered: texts up to this score failed.")] = 0.0


class Restart(FailedAt):
    """The cut of the guide's roll-in, and the choice of the guide's texts."""

    restart: Annotated[
        Literal["uniform", "backward", "uncertain", "slices", "annealed", "steered"],
        Flag("ppo++: cuts uniform, backward, uncertain, slices, annealed or steered."),
    ] = "uniform"
    restart_steps: Annotated[int | None, Flag("backward, slices, annealed: iterations that they take.")] = Field(
        None, ge=1
    )
    target_success: Annotated[float, Flag("steered: share of texts that should succeed.")] = Field(0.5, gt=0, lt=1)
    gate: Annotated[bool, Flag("ppo++: only texts above the policy's own.", "--gate/--no-gate")] = False


GuideCoef = Annotated[
    float, Field(ge=0), Flag("mix, chord, hpt: coefficient of the likelihood of guide tokens.", "--guide-coef")
]


class Likelihood(Strict):
    """The coefficient of the likelihood of guide tokens beside the policy gradient."""

    guide_coef: GuideCoef = 0.1


class CoefSchedule(Strict):
    """The change of the coefficient over the run: a linear rise, then a half cosine down to its last value."""

    guide_coef_last: Annotated[float | None, Flag("chord: the coefficient after its decay.")] = Field(0.05, ge=0)
    guide_coef_warmup: Annotated[int, Flag("chord: iterations until guide_coef.")] = Field(0, ge=0)
    guide_coef_decay: Annotated[int, Flag("chord: iterations from guide_coef to its last value.")] = Field(200, ge=0)


class Shaped(Strict):
    """LUFFY's shaping of the guide tokens' probability, and the baseline of a group with a guide's text."""

    shaping_gamma: Annotated[float, Flag("luffy: gamma of p / (p + gamma).")] = Field(0.1, gt=0)
    baseline_of: Annotated[Literal["group", "own"], Flag("luffy: the texts that the baseline counts.")] = "group"


class OnFailure(FailedAt):
    """The episodes of a failed group that begin again behind a part of the guide's text."""

    restarted: Annotated[int, Flag("on-failure: episodes of a failed group that begin again.")] = Field(4, ge=1)
    longest_prefix: Annotated[float, Flag("on-failure: largest share of the guide's text.")] = Field(0.5, gt=0, le=1)


class HintSteps(Strict):
    """The iterations in which the guide's part of a text becomes shorter."""

    hint_steps: Annotated[int, Flag("uft, prefix-rft: iterations until (almost) no prefix is left.")] = Field(300, ge=1)


class MonteCarlo(Strict):
    """AggreVaTeD's estimate of the advantage of the action at the cut."""

    advantage: Annotated[Literal["gae", "guide_mc"], Flag("aggrevated: gae, or guide_mc (no critic).")] = "gae"
    mc_samples: Annotated[int, Flag("guide_mc: texts on each side of an action.")] = Field(1, ge=1)


ALL: tuple[type[Strict], ...] = (
    RollIn, Mix, Switch, Grouped, Cut, Restart, MonteCarlo, Likelihood, CoefSchedule, Shaped, OnFailure, HintSteps,
)  # fmt: skip
