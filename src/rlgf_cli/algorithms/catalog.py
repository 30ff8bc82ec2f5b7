"""The named algorithms. Each is a class: its fields are the parameters, its ``spec`` is the algorithm as data.

PPO: Schulman et al. 2017. PPO++, AggreVaTeD, LOLS, D2LOLS: Chang et al. 2023 (arXiv 2306.11816), after Sun et al. 2017
and Chang et al. 2015. GRPO: Shao et al. 2024. RLOO: Ahmadian et al. 2024. DAgger: Ross et al. 2011. LUFFY: arXiv
2504.14945. CHORD: arXiv 2508.11408. HPT: arXiv 2509.04419. UFT: arXiv 2505.16984. Prefix-RFT: arXiv 2507.01679.
Restarts on failure: BREAD, arXiv 2506.17211; POPE, arXiv 2601.18779.
"""

from __future__ import annotations

from typing import Literal

from rlgf_cli.algorithms.base import Algorithm
from rlgf_cli.algorithms.guide_term import Coefficient, GuideTerm
from rlgf_cli.algorithms.parameters import (
    CoefSchedule,
    Cut,
    CutHorizon,
    FailedAt,
    Grouped,
    GroupSize,
    GuideCoef,
    HintSteps,
    Likelihood,
    Mix,
    MonteCarlo,
    OnFailure,
    Restart,
    RollIn,
    Shaped,
    Switch,
)
from rlgf_cli.algorithms.spec import AlgorithmSpec, Failure, Regime, Schedule


class PPO(Algorithm):
    """the policy writes all of it; GAE on its own critic"""

    name: Literal["ppo"] = "ppo"

    def spec(self) -> AlgorithmSpec:
        return self.always(Regime(roll_out="policy"))


class PPOPlusPlus(Restart, RollIn, Algorithm):
    """the policy goes on from the guide's text (a recorded guide will do)"""

    name: Literal["ppo++"] = "ppo++"

    def spec(self) -> AlgorithmSpec:
        return self.always(Regime(roll_in="guide", roll_out="policy", **self.of(RollIn, Restart)))


class AggreVaTeD(MonteCarlo, Cut, RollIn, Algorithm):
    """the guide finishes what the policy began (needs a live guide)

    With ``advantage: guide_mc``, the defaults of ``rollin_prob`` and ``credit`` are 1 and ``cut``.
    """

    name: Literal["aggrevated"] = "aggrevated"

    def spec(self) -> AlgorithmSpec:
        own = self.of(RollIn, Cut)
        if self.advantage == "guide_mc":
            defaults = {"rollin_prob": 1.0, "credit": "cut"}
            own |= {key: value for key, value in defaults.items() if key not in self.model_fields_set}
        more = {"estimator": self.advantage, "mc_samples": self.mc_samples}
        return self.always(Regime(roll_in="policy", roll_out="guide", **own, **more))


class LOLS(Restart, Cut, Mix, RollIn, Algorithm):
    """each iteration PPO++ with probability p_ppo_pp, else AggreVaTeD (live guide)"""

    name: Literal["lols"] = "lols"

    def spec(self) -> AlgorithmSpec:
        from_guide = Regime(roll_in="guide", roll_out="policy", **self.of(RollIn, Restart))
        aggrevated = Regime(roll_in="policy", roll_out="guide", **self.of(RollIn, Cut))
        schedule = Schedule(kind="mixture", weights=(self.p_ppo_pp, 1 - self.p_ppo_pp))
        return AlgorithmSpec(name=self.name, regimes=(from_guide, aggrevated), schedule=schedule)


class D2LOLS(Restart, Cut, Switch, RollIn, Algorithm):
    """AggreVaTeD until switch_step, then PPO++ (live guide)"""

    name: Literal["d2lols"] = "d2lols"

    def spec(self) -> AlgorithmSpec:
        aggrevated = Regime(roll_in="policy", roll_out="guide", **self.of(RollIn, Cut))
        from_guide = Regime(roll_in="guide", roll_out="policy", **self.of(RollIn, Restart))
        schedule = Schedule(kind="switch", switch_step=self.switch_step)
        return AlgorithmSpec(name=self.name, regimes=(aggrevated, from_guide), schedule=schedule)


class GRPO(Grouped, Algorithm):
    """no critic; the baseline is the mean of a group that shares the prompt"""

    name: Literal["grpo"] = "grpo"

    def spec(self) -> AlgorithmSpec:
        return self.always(Regime(estimator="group_mean", **self.of(Grouped)))


class RLOO(Grouped, Algorithm):
    """no critic; the baseline is the mean of the group's others"""

    name: Literal["rloo"] = "rloo"
    group_size: GroupSize = 4

    def spec(self) -> AlgorithmSpec:
        return self.always(Regime(estimator="leave_one_out", **self.of(Grouped)))


class GRPOPlusPlus(Restart, Grouped, RollIn, Algorithm):
    """GRPO from the guide's text; a group shares prompt and prefix"""

    name: Literal["grpo++"] = "grpo++"

    def spec(self) -> AlgorithmSpec:
        own = self.of(Grouped, RollIn, Restart)
        return self.always(Regime(roll_in="guide", roll_out="policy", estimator="group_mean", **own))


class RLOOPlusPlus(Restart, Grouped, RollIn, Algorithm):
    """RLOO from the guide's text; a group shares prompt and prefix"""

    name: Literal["rloo++"] = "rloo++"
    group_size: GroupSize = 4

    def spec(self) -> AlgorithmSpec:
        own = self.of(Grouped, RollIn, Restart)
        return self.always(Regime(roll_in="guide", roll_out="policy", estimator="leave_one_out", **own))


class BCGuide(Algorithm):
    """behaviour cloning: likelihood of the guide's text (a recorded guide will do)"""

    name: Literal["bc-guide"] = "bc-guide"

    def spec(self) -> AlgorithmSpec:
        return self.always(Regime(roll_out="guide", estimator="likelihood"))


class DAgger(CutHorizon, RollIn, Algorithm):
    """likelihood of the guide's continuations of the policy's own prefixes (live guide)"""

    name: Literal["dagger"] = "dagger"

    def spec(self) -> AlgorithmSpec:
        own = self.of(RollIn, CutHorizon)
        return self.always(Regime(roll_in="policy", roll_out="guide", estimator="likelihood", **own))


def _grpo_with(algorithm: Algorithm, term: GuideTerm) -> AlgorithmSpec:
    """GRPO with a guide-token term."""
    return algorithm.always(Regime(estimator="group_mean", guide_term=term, **algorithm.of(Grouped)))


class Luffy(Shaped, Grouped, Algorithm):
    """GRPO with a guide's text in each group, its tokens weighted by gamma p / (p + gamma)^2"""

    name: Literal["luffy"] = "luffy"

    def spec(self) -> AlgorithmSpec:
        return _grpo_with(self, GuideTerm(tokens="member", weight="shaped", credit="advantage", **self.of(Shaped)))


class MixGuide(Likelihood, Grouped, Algorithm):
    """GRPO plus guide_coef times the likelihood of the guide's texts"""

    name: Literal["mix"] = "mix"

    def spec(self) -> AlgorithmSpec:
        return _grpo_with(self, GuideTerm(tokens="beside", coefficient=Coefficient(peak=self.guide_coef)))


class Chord(CoefSchedule, Likelihood, Grouped, Algorithm):
    """(1 - mu) GRPO + mu likelihood of the guide's texts; mu falls from guide_coef to guide_coef_last"""

    name: Literal["chord"] = "chord"
    guide_coef: GuideCoef = 0.9

    def spec(self) -> AlgorithmSpec:
        return _grpo_with(self, GuideTerm(tokens="beside", coefficient=_scheduled(self), complement=True))


class ChordPhi(CoefSchedule, Likelihood, Grouped, Algorithm):
    """CHORD with guide tokens weighted by p (1 - p): less where the policy is sure, or never writes them"""

    name: Literal["chord-phi"] = "chord-phi"
    guide_coef: GuideCoef = 0.9

    def spec(self) -> AlgorithmSpec:
        term = GuideTerm(tokens="beside", weight="phi", coefficient=_scheduled(self), complement=True)
        return _grpo_with(self, term)


def _scheduled(algorithm: Chord | ChordPhi) -> Coefficient:
    return Coefficient(
        peak=algorithm.guide_coef,
        valley=algorithm.guide_coef_last,
        warmup_steps=algorithm.guide_coef_warmup,
        decay_steps=algorithm.guide_coef_decay,
    )


class HPT(FailedAt, Likelihood, Grouped, Algorithm):
    """GRPO where a text of the group succeeded, else the likelihood of the guide's text alone"""

    name: Literal["hpt"] = "hpt"
    guide_coef: GuideCoef = 1.0

    def spec(self) -> AlgorithmSpec:
        coefficient = Coefficient(peak=self.guide_coef)
        term = GuideTerm(tokens="beside", gate="failed", alone=True, coefficient=coefficient, **self.of(FailedAt))
        return _grpo_with(self, term)


class UFT(HintSteps, Likelihood, Grouped, Algorithm):
    """GRPO behind the first slices of the guide's text, fewer and fewer, plus guide_coef times their likelihood"""

    name: Literal["uft"] = "uft"
    guide_coef: GuideCoef = 0.001

    def spec(self) -> AlgorithmSpec:
        return _from_prefix(self, "slices", GuideTerm(tokens="prefix", coefficient=Coefficient(peak=self.guide_coef)))


class PrefixRFT(HintSteps, Likelihood, Grouped, Algorithm):
    """UFT with a length that falls by a cosine, and the likelihood of a prefix's most uncertain tokens alone"""

    name: Literal["prefix-rft"] = "prefix-rft"

    def spec(self) -> AlgorithmSpec:
        coefficient = Coefficient(peak=self.guide_coef)
        return _from_prefix(self, "annealed", GuideTerm(tokens="prefix", entropy_share=0.2, coefficient=coefficient))


def _from_prefix(algorithm: UFT | PrefixRFT, restart: Literal["slices", "annealed"], term: GuideTerm) -> AlgorithmSpec:
    """GRPO behind the guide's text in every group, whose tokens learn by the term."""
    own = {"restart": restart, "restart_steps": algorithm.hint_steps, "rollin_prob": 1.0, **algorithm.of(Grouped)}
    return algorithm.always(Regime(roll_in="guide", estimator="group_mean", guide_term=term, **own))


class RestartOnFailure(OnFailure, Grouped, Algorithm):
    """GRPO; where a whole group failed, some of its episodes begin again behind a part of the guide's text"""

    name: Literal["on-failure"] = "on-failure"

    def spec(self) -> AlgorithmSpec:
        rule = Failure(**self.of(OnFailure))
        return self.always(Regime(estimator="group_mean", on_failure=rule, **self.of(Grouped)))


class POPE(OnFailure, Grouped, Algorithm):
    """GRPO; of prompts that failed so far, some episodes begin behind a part of the guide's text"""

    name: Literal["pope"] = "pope"

    def spec(self) -> AlgorithmSpec:
        rule = Failure(known_from="record", **self.of(OnFailure))
        return self.always(Regime(estimator="group_mean", on_failure=rule, **self.of(Grouped)))
