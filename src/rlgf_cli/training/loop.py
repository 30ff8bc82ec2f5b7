"""The training loop. One iteration reads top to bottom in :meth:`Trainer.step`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, pstdev
from typing import Any, Protocol

import torch

from rlgf_cli import noise
from rlgf_cli.algorithms.spec import AlgorithmSpec, Regime
from rlgf_cli.config.train import KLConfig
from rlgf_cli.functional.kl import KLCoefficients, adapt_kl_coef
from rlgf_cli.functional.stats import spread_of
from rlgf_cli.models.actor_critic import ActorCritic
from rlgf_cli.models.prompts import Encoded
from rlgf_cli.protocols import Example, Score
from rlgf_cli.training import figures
from rlgf_cli.training.advantages import (
    AdvantageInputs,
    Advantages,
    AdvantageSettings,
    compute_advantages,
    compute_stats,
)
from rlgf_cli.training.checkpoint import TrainerState
from rlgf_cli.training.critics import CriticSettings, calibrate_critics, note_fits
from rlgf_cli.training.divergence import HeldOutResult, compare_watched
from rlgf_cli.training.episodes import Episode, build_batch, by_group, draw_references, scored_texts, without_variance
from rlgf_cli.training.guide_texts import add_guide_texts, restart_failed
from rlgf_cli.training.guide_tokens import GuideTokens
from rlgf_cli.training.minibatches import StepData, UpdateSettings, carries_loss
from rlgf_cli.training.parallel.processes import SINGLE, Processes
from rlgf_cli.training.prompts import resampled_prompts, step_prompts
from rlgf_cli.training.restarts import Gate, Restarts, failing_prompts, steered_share, update_own_scores, values_along
from rlgf_cli.training.rollout import RolloutGenerator
from rlgf_cli.training.sampler_gap import correction_weights, gap_figures
from rlgf_cli.training.skipped import comparable, with_scores
from rlgf_cli.training.timing import Clock
from rlgf_cli.training.update import update, update_gives_old_logprobs

Scorer = Callable[[Sequence[Example], Sequence[str]], list[Score | None]]
ScorerAt = Callable[[int], tuple[Scorer, dict[str, float]]]
"""The scorer of an iteration (counted from 0), and the figures of its schedule, for the iteration's row."""
LENGTH_MEMORY = 0.9
"""Weight of the past in the running mean of response lengths."""


class PolicyProbe(Protocol):
    """Checks the first step's episodes before anything is learned from them; raises where the run must not go on."""

    def __call__(self, episodes: Sequence[Episode], data: StepData, kl_coef: float) -> None: ...


class HeldOutEvaluator(Protocol):
    """Samples the policy alone on held-out prompts and scores the texts."""

    def __call__(self) -> HeldOutResult: ...


@dataclass
class Trainer:
    """Everything that an iteration needs. ``prompts`` are visited epoch by epoch, each epoch in an order of its own.

    ``scorer_at``: for a reward with a schedule, the scorer of an iteration, used in place of ``scorer``. ``patience``:
    held-out results in a row that diverge before the run counts as diverged. ``correction_cap``: the largest weight of
    the correction for the sampler's gap (None: no correction).
    """

    spec: AlgorithmSpec
    model: ActorCritic
    optimizer: torch.optim.Optimizer
    scheduler: Any
    prompts: Sequence[Encoded]
    generator: RolloutGenerator
    scorer: Scorer | None
    advantage: AdvantageSettings
    update: UpdateSettings
    kl: KLConfig
    state: TrainerState
    seed: int
    episodes: int
    missing_eos_penalty: float
    critic: CriticSettings
    eval_every: int
    resample_groups: int = 0
    correction_cap: float | None = None
    scorer_at: ScorerAt | None = None
    evaluate: HeldOutEvaluator | None = None
    patience: int = 2
    probe: PolicyProbe | None = None
    processes: Processes = SINGLE
    clock: Clock = field(init=False)
    resampled: int = field(init=False, default=0)
    last_episodes: list[Episode] = field(init=False, default_factory=list)
    """Those of the step that has changed the state last."""

    def __post_init__(self) -> None:
        self.clock = Clock(lambda: self.generator.guide_writer.seconds)

    def step(self) -> tuple[dict[str, Any], list[Episode]]:
        """One iteration. Returns its row for metrics.jsonl and its episodes.

        Where the evaluation at its end is stopped, the state keeps the row, and the next call evaluates.
        """
        if self.state.unevaluated is not None:
            self.clock.begin()
            return self._evaluated_row(self.state.unevaluated), []
        step = self.state.step
        self.clock.begin()
        regime = self.spec.regime_at(step, noise.uniforms(1, self.seed, "regime", step)[0])
        schedule = self._set_scorer(step)
        self._send_weights()
        start = self._start_figures() if step == 0 else {}
        with self.processes.gathered(self.model):
            episodes = self._rollout(regime, step)
        self.generator.sampler.sleep()
        own = [e for e in episodes if e.role == "own"]
        # changes weights: on gathered ones the change would be lost
        calibrate_critics(self.model, self.state, self.spec.critics, regime, own)
        with self.processes.gathered(self.model):
            data = self._compute_advantages(regime, episodes)
            self._probe_first_step(episodes, data)
        settings = self._update_settings(regime)
        losses, data = self._update(episodes, data, settings)
        row: dict[str, Any] = {
            "step": step + 1,
            **figures.of_episodes(regime, own),
            **figures.of_guide_texts(regime, episodes, data.guide),
            **figures.of_tensors(data.batch, data.stats, data.advantages),
            **(gap_figures(episodes, data.stats.old, self.correction_cap) if data.stats else {}),
            **self._state_figures(data),
            **schedule,
            **losses,
            **start,
        }
        row["lr"] = self.scheduler.get_last_lr()[0]
        row["update/policy_frozen"] = float(settings.policy_frozen)
        self._advance(regime, own, data.advantages, row)
        self.last_episodes = episodes
        return self._evaluated_row(row), episodes

    # episodes

    def _set_scorer(self, step: int) -> dict[str, float]:
        """The scorer of this iteration, for a reward with a schedule; the figures of the schedule."""
        if self.scorer_at is None:
            return {}
        self.scorer, schedule = self.scorer_at(step)
        return schedule

    def _send_weights(self) -> None:
        """Give the policy's weights to an engine that samples with its own copy of them."""
        if (sampler := self.generator.sampler).separate:
            with self.clock.timed("sync"):
                self.processes.raise_together(sampler.send)

    def _rollout(self, regime: Regime, step: int) -> list[Episode]:
        """The step's episodes, with their scores."""
        self.generator.restarts = self._restarts(regime, step)
        groups = self.episodes // self.spec.group_size
        prompts = step_prompts(self.prompts, self.seed, step, groups=groups, group_size=regime.own_size)
        episodes = self._scored_episodes(regime, prompts, step)
        self.resampled = 0
        for number in range(self.resample_groups):
            episodes = self._resample(regime, episodes, f"{step}.{number}")
        return episodes

    def _scored_episodes(self, regime: Regime, prompts: Sequence[Encoded], key: int | str) -> list[Episode]:
        """All processes' episodes for these prompts, with their scores. The draws are a function of (seed, key)."""
        length, size = self.state.typical_length, regime.own_size
        with self.clock.timed("rollout"):
            episodes = self.processes.raise_together(
                lambda: self.generator.generate(regime, prompts, key, length, size, processes=self.processes)
            )
        with self.clock.timed("reward"):
            self.processes.raise_together(lambda: self._score(episodes))
        by_scores = self.scorer is not None and regime.estimator != "likelihood"  # which learns from texts
        if by_scores:
            episodes = with_scores(episodes, self.generator.counts)
        if regime.adds_texts or regime.on_failure is not None:
            with self.clock.timed("rollout"):
                episodes = self.processes.raise_together(
                    lambda: self._ask_the_guide(regime, episodes, key, len(prompts))
                )
        with self.clock.timed("reward"):
            episodes = self._gather_episodes(episodes)
        return comparable(episodes, size, self.generator.counts) if by_scores else episodes

    def _ask_the_guide(self, regime: Regime, own: list[Episode], key: int | str, count: int) -> list[Episode]:
        """This process's episodes with what the regime requests of the guide once they are scored."""
        episodes = restart_failed(self.generator, regime, own, f"{key}.again", count, self._score)
        return episodes + add_guide_texts(self.generator, regime, episodes, count, self._score)

    def _score(self, episodes: list[Episode]) -> None:
        texts = list(scored_texts(episodes))
        for _, part in texts:
            part.penalty = 0.0 if part.finished else self.missing_eos_penalty
        if self.scorer is not None and texts:
            scores = self.scorer([example for example, _ in texts], [part.text for _, part in texts])
            for (_, part), score in zip(texts, scores, strict=True):
                part.score = score

    def _gather_episodes(self, episodes: list[Episode]) -> list[Episode]:
        """The step's episodes, where every process wrote some, and what was counted while they were written."""
        self.generator.use.merge(self.processes)
        if self.generator.restarts.gate is not None:
            self.generator.restarts.gate.merge(self.processes)
        self.generator.counts = sum(self.processes.gather(self.generator.counts), Counter())
        return sorted((e for part in self.processes.gather(episodes) for e in part), key=lambda e: e.index)

    def _resample(self, regime: Regime, episodes: list[Episode], key: str) -> list[Episode]:
        """Replace groups whose scores are all equal by groups of prompts that the step does not have yet (of any, where
        it has them all): DAPO's dynamic sampling, arXiv 2503.14476, section 3.2."""
        flat = [g for g, members in by_group(episodes).items() if without_variance(members)]
        if not flat:
            return episodes
        size = self.spec.group_size
        used = {e.example.id for e in episodes}
        prompts = resampled_prompts(self.prompts, self.seed, key, used, groups=len(flat), group_size=size)
        counts = self.generator.counts
        new = self._scored_episodes(regime, prompts, key)
        self.generator.counts = counts + self.generator.counts
        self.resampled += len(new)
        for e in new:
            group, member = flat[e.group], e.index % size
            e.group, e.index = group, group * size + member
        return sorted([e for e in episodes if e.group not in set(flat)] + new, key=lambda e: e.index)

    def _restarts(self, regime: Regime, step: int) -> Restarts:
        """Inputs of the step's cuts of guide texts: the step, the current critic, the scores so far."""

        def score(episodes: list[Episode]) -> None:
            self.generator.conclude(episodes)
            self._score(episodes)

        rows, state = self.generator.sampling.batch_size, self.state
        return Restarts(
            age=self.spec.age(step),
            values=(lambda texts: values_along(self.model, texts, rows)) if regime.restart == "uncertain" else None,
            gate=Gate(state.own_scores, state.guide_scores, score) if regime.gate else None,
            share=state.guide_share,
            failing=failing_prompts(regime.on_failure, state.own_scores),
        )

    # advantages

    @property
    def _kl_coef(self) -> KLCoefficients:
        return KLCoefficients.of(self.kl.where, self.state.kl_coef)

    def _compute_advantages(self, regime: Regime, episodes: list[Episode]) -> StepData:
        """The episodes as tensors, with log-probabilities, values and advantages."""
        with self.clock.timed("annotate"):
            batch = build_batch(episodes, regime, self.spec.critics, self.model.loaded)
            if regime.estimator == "likelihood":
                return StepData(regime, batch, None, None, None)
            sampling = self.generator.sampling
            # step 0 checks the policy's log-probabilities before the update
            deferred = self.state.step > 0 and self._kl_coef.reward == 0 and self.correction_cap is None
            with_policy = not (deferred and update_gives_old_logprobs(batch, regime, self.update))
            stats = compute_stats(
                self.model, batch, regime, sampling,
                max_tokens=self.update.max_tokens, with_policy=with_policy, processes=self.processes,
            )  # fmt: skip
            advantages = compute_advantages(regime, batch, stats, self.advantage, self._advantage_inputs(episodes))
            weights = None
            if self.correction_cap is not None:
                weights = correction_weights(episodes, stats.old, self.correction_cap)
            guide = GuideTokens.of(regime, batch, advantages, self.spec.age(self.state.step))
            return StepData(regime, batch, stats, advantages, None, weights, guide)

    def _advantage_inputs(self, episodes: list[Episode]) -> AdvantageInputs:
        moments = self.state.moments.get("scores")
        # a step whose scores differ more than the run's so far does not weigh more for it
        values = [e.value for e in episodes if e.role == "own" and e.score is not None]
        own = pstdev(values) if moments else 0.0
        trusted = frozenset(name for name in self.spec.critics if self.critic.trusts(self.state, name))
        return AdvantageInputs(self._kl_coef.reward, max(own, spread_of(moments)) if moments else 0.0, trusted)

    def _probe_first_step(self, episodes: list[Episode], data: StepData) -> None:
        # sharded models answer only where all processes make the same passes
        if self.state.step == 0 and (probe := self.probe) is not None and not self.processes.lockstep:
            with self.clock.timed("check"):
                kl_coef = self._kl_coef.reward
                self.processes.raise_together(lambda: probe(episodes, data, kl_coef))

    # the update

    def _update(
        self, episodes: list[Episode], data: StepData, settings: UpdateSettings
    ) -> tuple[dict[str, float], StepData]:
        with self.clock.timed("update"):
            if self.update.reference_nll:
                limit, step = self.generator.sampling.max_new_tokens, self.state.step
                data = replace(data, references=draw_references(self.model.loaded, episodes, limit, self.seed, step))
            return update(
                self.model, self.optimizer, data, self.generator.sampling, settings,
                seed=self.seed, step=self.state.step, processes=self.processes,
            )  # fmt: skip

    def _update_settings(self, regime: Regime) -> UpdateSettings:
        """The policy is frozen while the critic that its advantages come from is not warm yet."""
        frozen = regime.critic is not None and self.critic.warming_up(self.state, regime.critic)
        return replace(self.update, policy_frozen=frozen, kl_coef=self._kl_coef.loss)

    # the state

    def _state_figures(self, data: StepData) -> dict[str, Any]:
        """The row's figures of the trainer's own state and of the guide."""
        regime, batch, advantages = data.regime, data.batch, data.advantages
        row: dict[str, Any] = {"tokens/learned": int(carries_loss(batch, self.update).sum())}
        row["tokens/control"] = int(torch.isin(batch.tokens.response_ids[batch.policy], self.model.control).sum())
        if regime.needs_live_guide:
            row["length/horizon"] = self.state.typical_length
        if regime.needs_guide:
            row |= figures.of_guide(regime, self.generator.counts) | {"guide/reuse": self.generator.use.reuse}
        if self.resample_groups:
            row["rollout/resampled"] = self.resampled
        if skipped := self.generator.counts["skipped"]:
            row["score/skipped"] = skipped
        if advantages is not None:
            row["kl/coef"] = self._kl_coef.reward + self._kl_coef.loss
            row |= {f"value/trusted_{name}": float(self.critic.trusts(self.state, name)) for name in advantages.returns}
        return row

    def _advance(
        self, regime: Regime, episodes: list[Episode], advantages: Advantages | None, row: dict[str, Any]
    ) -> None:
        """Move the trainer's state to the next step."""
        state = self.state
        note_fits(state, advantages.returns if advantages is not None else (), row)
        mean = fmean(e.length for e in episodes)
        state.typical_length = LENGTH_MEMORY * state.typical_length + (1 - LENGTH_MEMORY) * mean
        if self.kl.adaptive and advantages is not None:
            kl = row["kl/episode"]
            state.kl_coef = adapt_kl_coef(state.kl_coef, kl, self.kl.target, len(episodes), self.kl.horizon)
        state.guide_uses = dict(self.generator.use.uses)
        state.guide_texts = dict(self.generator.use.texts)
        if (gate := self.generator.restarts.gate) is not None:
            state.guide_scores |= gate.new
        if gate is not None or (regime.on_failure is not None and regime.on_failure.known_from == "record"):
            state.own_scores = update_own_scores(state.own_scores, episodes)
        if regime.restart == "steered":
            state.guide_share = steered_share(state.guide_share, episodes, regime.target_success, regime.failed_at)
        state.step += 1
        self.scheduler.step()

    # held-out prompts

    def _evaluated(self, evaluate: HeldOutEvaluator) -> HeldOutResult:
        with self.clock.timed("eval"), self.processes.gathered(self.model):
            return evaluate()

    def _evaluated_row(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row of a step that is done, with its held-out figures and times."""
        if self.evaluate is not None and self.state.step % self.eval_every == 0:
            self.state.unevaluated = row
            row = row | self._held_out_figures(self.evaluate)
            self.state.unevaluated = None
        return row | self.clock.lap()

    def _start_figures(self) -> dict[str, float]:
        """The held-out score (and the watched figure) before the first step: without it, the fall of a policy that
        degrades before the first evaluation would not be seen."""
        if self.evaluate is None:
            return {}
        start = self._evaluated(self.evaluate)
        figures = {"eval/start": start.figures["eval/score"], "eval/start_error": start.figures["eval/score_error"]}
        return figures | ({"eval/start_watch": fmean(start.watched.values())} if start.watched else {})

    def _held_out_figures(self, evaluate: HeldOutEvaluator) -> dict[str, float]:
        """The figures of the policy on held-out prompts, and their comparison with those of earlier steps."""
        result, state = self._evaluated(evaluate), self.state
        row = dict(result.figures)
        if result.watched is not None:
            state.watched, change = compare_watched(state.watched, result, step=state.step, patience=self.patience)
            row |= change
        state.note_score(row["eval/score"])
        return row

    @property
    def diverged(self) -> bool:
        """Whether the last ``patience`` held-out results all diverged."""
        return self.state.watched.streak >= self.patience
