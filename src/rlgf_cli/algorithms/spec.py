"""The data types of an algorithm (Regime, Schedule, AlgorithmSpec), and which combinations are refused and why.

A regime defines who writes an episode and which of its tokens learn. A schedule defines which regime an iteration uses.
No code below this depends on an algorithm's name.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlgf_cli.algorithms.guide_term import GuideTerm
from rlgf_cli.algorithms.parameters import Cut, Grouped, GroupSize, OnFailure, Restart, RollIn

Author = Literal["policy", "guide"]
Estimator = Literal["gae", "group_mean", "leave_one_out", "likelihood", "guide_mc"]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Failure(OnFailure, _Data):
    """Restarts of failed groups alone: ``restarted`` of a group's episodes begin behind a cut of the guide's text.

    The cut is uniform up to ``longest_prefix`` of the text.

    ``known_from``: a group has failed where none of its texts of this step scored above ``failed_at`` (its episodes
    are then written again), or where the running score of the policy's texts on the prompt is not above it. ``joined``:
    these episodes stay in their group; else they are a group of their own, which shares prompt and prefix.
    """

    known_from: Literal["step", "record"] = "step"
    joined: bool = False


class Regime(RollIn, Cut, Restart, Grouped, _Data):
    """One way to write an episode and to learn from it.

    ``roll_in`` writes a prefix with probability ``rollin_prob``; ``roll_out`` finishes the text. Policy-gradient
    estimators learn on the policy's tokens, ``likelihood`` on the guide's. The fields of ``Cut`` matter where the
    policy rolls in, those of ``Restart`` where the guide does, ``group_size`` for the group estimators.
    ``mc_samples``: texts that ``guide_mc`` requests from the guide on either side of the action at the cut.
    ``on_failure``: roll-ins of the guide for failed groups alone, with ``roll_in: none`` (None: none).
    ``guide_term``: a weighted likelihood on guide tokens beside the policy gradient (None: none).
    """

    roll_in: Literal["none", "policy", "guide"] = "none"
    roll_out: Author = "policy"
    estimator: Estimator = "gae"
    group_size: GroupSize = 1
    mc_samples: int = Field(1, ge=1)
    on_failure: Failure | None = None
    guide_term: GuideTerm | None = None

    @property
    def learn_author(self) -> Author:
        """The author whose tokens carry the loss."""
        return "guide" if self.estimator == "likelihood" else "policy"

    @property
    def critic(self) -> Author | None:
        """The author whose roll-outs the critic values; None where the estimator needs no critic."""
        return self.roll_out if self.estimator == "gae" else None

    @property
    def needs_guide(self) -> bool:
        return "guide" in (self.roll_in, self.roll_out) or self.adds_texts or self.on_failure is not None

    @property
    def adds_texts(self) -> bool:
        """Whether a step has whole texts of the guide besides the policy's own."""
        return self.guide_term is not None and self.guide_term.adds_texts

    @property
    def own_size(self) -> int:
        """The policy's own episodes of a group: one less where a text of the guide is always one of its members."""
        term = self.guide_term
        always_member = term is not None and (term.tokens, term.gate) == ("member", "always")
        return self.group_size - always_member

    @property
    def guide_calls(self) -> int:
        """The most texts that an episode requests from the guide."""
        return 2 * self.mc_samples if self.estimator == "guide_mc" else int(self.needs_guide)

    @property
    def needs_live_guide(self) -> bool:
        """Whether the guide must go on from text that it did not write."""
        return self.roll_in == "policy" and self.roll_out == "guide"

    @model_validator(mode="after")
    def _refuse(self) -> Regime:
        if self.roll_in == self.roll_out:
            raise ValueError(
                f"roll_in and roll_out are both {self.roll_in!r}: one author writes all; use roll_in: none"
            )
        if self.estimator == "likelihood" and self.roll_out != "guide":
            raise ValueError(
                "estimator likelihood learns on the guide's tokens, and here the policy rolls out; "
                "use roll_out: guide (bc-guide, dagger), or gae, group_mean, leave_one_out"
            )
        if self.roll_in == "none" and self.roll_out == "guide" and self.estimator != "likelihood":
            raise ValueError(
                "the guide writes the whole text and the policy none of it, so a policy gradient has no token to "
                "learn on; use roll_in: policy (aggrevated), or estimator: likelihood (bc-guide)"
            )
        grouped = self.estimator in ("group_mean", "leave_one_out")
        if grouped and self.roll_out == "guide":
            raise ValueError(
                f"a guide's roll-out has no baseline under estimator {self.estimator!r}: the group shares no prefix; "
                "use gae, whose critic values the guide, or guide_mc"
            )
        if self.estimator == "guide_mc" and not (
            self.needs_live_guide and self.rollin_prob == 1 and (self.credit, self.cut) == ("cut", "first")
        ):
            raise ValueError(
                "guide_mc learns on the action at the cut and on nothing else: it takes roll_in: policy, "
                "roll_out: guide, rollin_prob: 1, credit: cut and cut: first"
            )
        if self.estimator != "guide_mc" and self.mc_samples != 1:
            raise ValueError(f"mc_samples is for the estimator guide_mc, not for {self.estimator!r}")
        if grouped and self.group_size < 2:
            raise ValueError(f"estimator {self.estimator!r} needs group_size of at least 2")
        if not grouped and self.group_size > 1:
            raise ValueError(f"group_size above 1 is for group_mean and leave_one_out, not for {self.estimator!r}")
        if not self.needs_live_guide and (self.credit, self.cut, self.cut_horizon) != (
            "prefix",
            "first",
            None,
        ):
            raise ValueError("credit, cut and cut_horizon are for regimes in which the policy rolls in")
        if self.estimator == "likelihood" and self.credit == "cut":
            raise ValueError(
                "credit: cut trains the policy's token at the cut, estimator likelihood the guide's tokens"
            )
        if self.cut == "inner" and (self.cut_horizon is not None or self.credit == "cut"):
            raise ValueError("cut: inner draws within the finished roll-in: no cut_horizon, and credit: prefix only")
        self._refuse_restarts()
        self._refuse_on_failure()
        self._refuse_guide_term()
        return self

    def _refuse_on_failure(self) -> None:
        rule = self.on_failure
        if rule is None:
            return
        if self.estimator not in ("group_mean", "leave_one_out") or self.roll_in != "none":
            raise ValueError("on_failure is for groups: estimator group_mean or leave_one_out, with roll_in: none")
        left = self.group_size - rule.restarted
        if rule.restarted > self.group_size or (not rule.joined and (rule.restarted < 2 or left == 1)):
            raise ValueError(
                f"on_failure with restarted: {rule.restarted} divides a group of {self.group_size}: both parts need "
                "two episodes or none, or joined: true"
            )
        if self.adds_texts:
            raise ValueError("on_failure and a guide_term with the guide's whole texts exclude each other")

    def _refuse_guide_term(self) -> None:
        term = self.guide_term
        if term is None:
            return
        if self.estimator in ("likelihood", "guide_mc") or self.roll_out == "guide":
            raise ValueError(
                "guide_term stands beside the gradient on the policy's own texts: it takes roll_out: policy and "
                f"estimator gae, group_mean or leave_one_out, not {self.estimator!r} with roll_out {self.roll_out!r}"
            )
        if (term.tokens == "prefix") != (self.roll_in == "guide"):
            raise ValueError(
                "guide_term with tokens: prefix is taken on the guide's roll-in, so it goes with roll_in: guide; "
                "member and beside bring the guide's whole text, and go with roll_in: none"
            )
        grouped = self.estimator in ("group_mean", "leave_one_out")
        if not grouped and (term.tokens == "member" or term.gate != "always"):
            raise ValueError(
                "guide_term with tokens: member, or with a gate, compares texts of one prompt: it takes estimator "
                "group_mean or leave_one_out"
            )
        if term.baseline_of == "own" and self.estimator != "group_mean":
            raise ValueError("guide_term with baseline_of: own takes estimator: group_mean")
        if self.own_size < 2 and grouped:
            raise ValueError("guide_term with tokens: member needs a group_size of at least 3: two texts of the policy")

    def _refuse_restarts(self) -> None:
        if self.roll_in != "guide" and (self.restart, self.restart_steps, self.gate) != ("uniform", None, False):
            raise ValueError(
                "restart, restart_steps and gate are for regimes in which the guide rolls in (ppo++, grpo++, rloo++)"
            )
        if (self.restart in ("backward", "slices", "annealed")) != (self.restart_steps is not None):
            raise ValueError(
                "restart: backward, slices or annealed and restart_steps go together: the iterations after which cuts "
                "fall anywhere in the guide's text, or hardly any of it is left, e.g. half of max_steps"
            )
        if (self.target_success, self.failed_at) != (0.5, 0.0) and self.restart != "steered":
            raise ValueError("target_success and failed_at of a roll-in are for restart: steered")
        if self.restart == "uncertain" and self.estimator != "gae":
            raise ValueError(
                f"restart: uncertain asks the policy's critic, and estimator {self.estimator!r} has none; "
                "use restart: uniform or backward, or estimator: gae (ppo++)"
            )
        if self.gate and self.rollin_prob == 1:
            raise ValueError(
                "gate compares the guide's text with what the policy writes alone, and with rollin_prob 1 it writes "
                "nothing alone; use a rollin_prob below 1"
            )


class Schedule(_Data):
    """The choice of each iteration's regime.

    ``always``: the only one. ``mixture``: regime i with probability ``weights[i]``, drawn anew each iteration.
    ``switch``: the first until ``switch_step`` iterations are done, then the second.
    """

    kind: Literal["always", "mixture", "switch"] = "always"
    weights: tuple[float, ...] = ()
    switch_step: int | None = Field(None, ge=0)


class AlgorithmSpec(_Data):
    """A named algorithm: its regimes and the schedule over them."""

    name: str
    regimes: tuple[Regime, ...]
    schedule: Schedule = Schedule()

    @model_validator(mode="after")
    def _refuse(self) -> AlgorithmSpec:
        count, schedule = len(self.regimes), self.schedule
        if schedule.kind == "always" and count != 1:
            raise ValueError(f"schedule always takes one regime, here are {count}")
        if schedule.kind == "switch" and (count != 2 or schedule.switch_step is None):
            raise ValueError("schedule switch takes two regimes and a switch_step")
        if schedule.kind == "mixture":
            if count < 2 or len(schedule.weights) != count:
                raise ValueError(
                    f"schedule mixture takes one weight per regime: {count} regimes, {len(schedule.weights)} weights"
                )
            if min(schedule.weights) < 0 or abs(sum(schedule.weights) - 1) > 1e-6:
                raise ValueError(f"mixture weights must be at least 0 and sum to 1, not {schedule.weights}")
        if schedule.kind != "mixture" and schedule.weights:
            raise ValueError("weights are for schedule mixture")
        if schedule.kind != "switch" and schedule.switch_step is not None:
            raise ValueError("switch_step is for schedule switch")
        if len({r.group_size for r in self.regimes}) > 1:
            raise ValueError("all regimes of one algorithm need the same group_size")
        return self

    def regime_at(self, step: int, draw: float) -> Regime:
        """The regime of iteration ``step`` (counted from 0); ``draw`` in [0, 1) decides a mixture."""
        if self.schedule.kind == "switch":
            assert self.schedule.switch_step is not None
            return self.regimes[0 if step < self.schedule.switch_step else 1]
        total = 0.0
        for regime, weight in zip(self.regimes, self.schedule.weights, strict=False):
            total += weight
            if draw < total:
                return regime
        return self.regimes[-1]

    def age(self, step: int) -> int:
        """Iterations that the schedule's present phase has had before iteration ``step``, counted from 0."""
        switch = self.schedule.switch_step if self.schedule.kind == "switch" else None
        return step - switch if switch is not None and step >= switch else step

    @property
    def critics(self) -> tuple[Author, ...]:
        """The roll-out authors that need a critic, each once."""
        return tuple(dict.fromkeys(r.critic for r in self.regimes if r.critic is not None))

    @property
    def group_size(self) -> int:
        return self.regimes[0].group_size

    @property
    def needs_guide(self) -> bool:
        return any(r.needs_guide for r in self.regimes)

    @property
    def needs_live_guide(self) -> bool:
        return any(r.needs_live_guide for r in self.regimes)

    @property
    def has_policy_gradient(self) -> bool:
        """Whether any regime has policy-gradient tokens, which need a reward and may be charged a KL."""
        return any(r.estimator != "likelihood" for r in self.regimes)
