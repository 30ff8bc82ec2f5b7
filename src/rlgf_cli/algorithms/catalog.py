"""The named algorithms. Each is a class: its fields are the parameters, its ``spec`` is the algorithm as data.

PPO: Schulman et al. 2017. PPO++, AggreVaTeD, LOLS, D2LOLS: Chang et al. 2023 (arXiv 2306.11816), after Sun et al. 2017
and Chang et al. 2015. GRPO: Shao et al. 2024. RLOO: Ahmadian et al. 2024. DAgger: Ross et al. 2011.
"""

from __future__ import annotations

from typing import Literal

from rlgf_cli.algorithms.base import Algorithm
from rlgf_cli.algorithms.parameters import Cut, CutHorizon, Grouped, GroupSize, Mix, MonteCarlo, Restart, RollIn, Switch
from rlgf_cli.algorithms.spec import AlgorithmSpec, Regime, Schedule


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
