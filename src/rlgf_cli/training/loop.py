"""The loop: roll, score, annotate, advantages, update; one iteration reads top to bottom in :meth:`Trainer.step`."""

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
from rlgf_cli.functional.shaping import adapt_kl_coef
from rlgf_cli.functional.stats import running_moments, spread_of
from rlgf_cli.models.actor_critic import ActorCritic
from rlgf_cli.models.forward import TokenBatch
from rlgf_cli.models.prompts import Encoded, encode_target
from rlgf_cli.protocols import Example, Score
from rlgf_cli.training import figures
from rlgf_cli.training.advantages import (
    Advantages,
    AdvantageSettings,
    RolloutStats,
    Standing,
    compute_advantages,
    compute_stats,
)
from rlgf_cli.training.checkpoint import TrainerState
from rlgf_cli.training.divergence import HeldOutResult, watch
from rlgf_cli.training.episodes import Episode, EpisodeBatch, build_batch, by_group, scored_texts, without_variance
from rlgf_cli.training.gate import Gate, own_scores
from rlgf_cli.training.parallel.processes import SINGLE, Processes
from rlgf_cli.training.restarts import Restarts, values_along
from rlgf_cli.training.rollout import RolloutGenerator
from rlgf_cli.training.timing import Clock
from rlgf_cli.training.update import StepData, UpdateSettings, carries_loss, update

Scorer = Callable[[Sequence[Example], Sequence[str]], list[Score]]
ScorerAt = Callable[[int], tuple[Scorer, dict[str, float]]]
"""What scores in an iteration (counted from 0), and the figures that say how, for its row."""
LENGTH_MEMORY = 0.9
"""Weight of the past in the running mean of response lengths."""
TRUST_MEMORY = 0.8
"""Weight of the past in the running share of the returns' variance that a critic explains; single steps are noisy."""


class PolicyProbe(Protocol):
    """Looks at the first step's episodes before anything is learned from them; raises where it must not go on."""

    def __call__(
        self,
        regime: Regime,
        episodes: Sequence[Episode],
        batch: EpisodeBatch,
        stats: RolloutStats | None,
        advantages: Advantages | None,
        kl_coef: float,
    ) -> None: ...


class HeldOutEvaluator(Protocol):
    """The policy alone on held-out prompts."""

    def __call__(self) -> HeldOutResult: ...


@dataclass(frozen=True)
class CriticSettings:
    """When a critic may teach. The policy waits for at most ``warmup_steps`` fits of it, or until it explains
    ``warmup_explained`` of the returns' variance; below ``min_explained`` the mean score takes its place."""

    warmup_steps: int = 0
    warmup_explained: float | None = None
    min_explained: float = 0.05


@dataclass
class Trainer:
    """All that an iteration needs. ``prompts`` are visited epoch by epoch, each epoch in an order of its own.

    ``scorer_at``: for a reward that moves, what takes the place of ``scorer`` in an iteration. ``patience``: held-out
    evaluations in a row that diverge before the run counts as diverged.
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
    scorer_at: ScorerAt | None = None
    evaluate: HeldOutEvaluator | None = None
    patience: int = 2
    probe: PolicyProbe | None = None
    processes: Processes = SINGLE
    clock: Clock = field(init=False)
    resampled: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.clock = Clock(lambda: self.generator.guide_seconds)

    def step(self) -> tuple[dict[str, Any], list[Episode]]:
        """One iteration. Returns its row for metrics.jsonl and its episodes."""
        step = self.state.step
        self.clock.begin()
        regime = self.spec.regime_at(step, noise.uniforms(1, self.seed, "regime", step)[0])
        moving: dict[str, float] = {}
        if self.scorer_at is not None:
            self.scorer, moving = self.scorer_at(step)
        if (server := self.generator.server) is not None:
            with self.clock.timed("sync"):
                self.processes.on_main(server.send)
        start = self._start_figures() if step == 0 else {}
        with self.processes.gathered(self.model):
            episodes = self._episodes(regime, step)
        self._take_moments(regime, episodes)  # changes weights: done to gathered ones, it would be lost with them
        with self.processes.gathered(self.model):
            batch, stats, advantages = self._compute_advantages(regime, episodes, step)
        with self.clock.timed("update"):
            settings = self._settings(regime)
            data = StepData(regime, batch, stats, advantages, self._references(episodes, step))
            losses = update(
                self.model,
                self.optimizer,
                data,
                self.generator.sampling,
                settings,
                seed=self.seed,
                step=step,
                processes=self.processes,
            )
        row: dict[str, Any] = {
            "step": step + 1,
            **figures.of_episodes(regime, episodes),
            **figures.of_tensors(episodes, batch, stats, advantages),
            **self._standing_figures(regime, batch, advantages),
            **moving,
            **losses,
            **start,
        }
        row["lr"] = self.scheduler.get_last_lr()[0]
        row["update/policy_frozen"] = float(settings.policy_frozen)
        self._advance(episodes, advantages, row)
        if self.evaluate is not None and self.state.step % self.eval_every == 0:
            with self.clock.timed("eval"), self.processes.gathered(self.model):
                found = self.evaluate()
            row |= self._compared(found)
            self._note_best(row)
        row |= self.clock.lap()
        return row, episodes

    def _episodes(self, regime: Regime, step: int) -> list[Episode]:
        """The step's episodes, with their scores."""
        with self.clock.timed("rollout"):
            prompts = self._prompts_of(step)
            self.generator.restarts = self._restarts(regime, step)
            episodes = self._rolled(regime, prompts, step)
        with self.clock.timed("reward"):
            self.processes.raise_together(lambda: self._score(episodes))
            episodes = self._gather_episodes(episodes)
        self.resampled = 0
        for number in range(self.resample_groups):
            episodes = self._resample(regime, episodes, step, number)
        return episodes

    def _compute_advantages(
        self, regime: Regime, episodes: list[Episode], step: int
    ) -> tuple[EpisodeBatch, RolloutStats | None, Advantages | None]:
        """What the models say of the step's episodes, and their advantages."""
        with self.clock.timed("annotate"):
            batch = build_batch(episodes, regime, self.spec.critics, self.model.loaded)
            stats = advantages = None
            charged = self.state.kl_coef if self.kl.where == "reward" else 0.0
            if regime.estimator != "likelihood":
                stats = compute_stats(
                    self.model,
                    batch,
                    regime,
                    self.generator.sampling,
                    rows_at_once=self.generator.sampling.batch_size,
                    processes=self.processes,
                )
                advantages = compute_advantages(regime, batch, stats, self.advantage, self._standing(episodes, charged))
        # sharded models answer only where all processes ask alike
        if step == 0 and self.probe is not None and not self.processes.lockstep:
            probe = self.probe
            with self.clock.timed("check"):
                self.processes.raise_together(lambda: probe(regime, episodes, batch, stats, advantages, charged))
        return batch, stats, advantages

    def _take_moments(self, regime: Regime, episodes: list[Episode]) -> None:
        """Take the step's scores into the running moments, and put the critics' values into their units."""
        state = self.state
        for name in self.spec.critics:
            if values := [e.value for e in episodes if e.score is not None and e.fits == name]:
                moments = state.moments[name] = running_moments(state.moments.get(name), values)
                fitted = state.critic_steps.get(name, 0) > 0
                self.model.head(name).calibrate(moments[1], spread_of(moments), keep=fitted)
        if regime.estimator != "likelihood" and (values := [e.value for e in episodes if e.score is not None]):
            state.moments["scores"] = running_moments(state.moments.get("scores"), values)

    def _standing(self, episodes: list[Episode], kl_coef: float) -> Standing:
        """What the run knows when the step's advantages are computed."""
        moments = self.state.moments.get("scores")
        # a step whose scores differ more than the run's so far does not weigh more for it
        own = pstdev([e.value for e in episodes if e.score is not None]) if moments else 0.0
        trusted = frozenset(name for name in self.spec.critics if self._trusts(name))
        return Standing(kl_coef, max(own, spread_of(moments)) if moments else 0.0, trusted)

    def _resample(self, regime: Regime, episodes: list[Episode], step: int, number: int) -> list[Episode]:
        """Put groups of prompts that the step does not have yet (of any, where it has them all) in the place of those
        whose scores are all equal (DAPO's dynamic sampling, arXiv 2503.14476, section 3.2). Order and draws are a
        function of (seed, step, number)."""
        flat = [g for g, members in by_group(episodes).items() if without_variance(members)]
        if not flat:
            return episodes
        size, key = self.spec.group_size, f"{step}.{number}"
        here = {e.example.id for e in episodes}
        others = [p for p in self.prompts if p.example.id not in here] or self.prompts
        order = noise.generator(self.seed, "resample", key).permutation(len(others))
        chosen = [others[order[i % len(others)]] for i in range(len(flat)) for _ in range(size)]
        counts = self.generator.counts
        with self.clock.timed("rollout"):
            fresh = self._rolled(regime, chosen, key)
        with self.clock.timed("reward"):
            self.processes.raise_together(lambda: self._score(fresh))
            fresh = self._gather_episodes(fresh)
        self.generator.counts = counts + self.generator.counts
        self.resampled += len(fresh)
        kept = [e for e in episodes if e.group not in set(flat)]
        for e in fresh:
            place, member = flat[e.group], e.index % size
            e.group, e.index = place, place * size + member
        return sorted(kept + fresh, key=lambda e: e.index)

    def _prompts_of(self, step: int) -> list[Encoded]:
        """The step's prompts: a function of (seed, step), so a resumed run goes on where it was. Groups repeat one."""
        size = self.spec.group_size
        count = self.episodes // size
        chosen: list[Encoded] = []
        orders: dict[int, Any] = {}
        for i in range(step * count, (step + 1) * count):
            epoch, position = divmod(i, len(self.prompts))
            if epoch not in orders:
                orders[epoch] = noise.generator(self.seed, "order", epoch).permutation(len(self.prompts))
            chosen += [self.prompts[orders[epoch][position]]] * size
        return chosen

    def _restarts(self, regime: Regime, step: int) -> Restarts:
        """What the step's cuts of guide texts follow: the step, the critic as it is, the scores so far."""

        def score(episodes: list[Episode]) -> None:
            self.generator.conclude(episodes)
            self._score(episodes)

        rows, state = self.generator.sampling.batch_size, self.state
        return Restarts(
            age=self.spec.age(step),
            values=(lambda texts: values_along(self.model, texts, rows)) if regime.restart == "uncertain" else None,
            gate=Gate(state.own_scores, state.guide_scores, score) if regime.gate else None,
        )

    def _rolled(self, regime: Regime, prompts: list[Encoded], step: int | str) -> list[Episode]:
        """The episodes of this process."""
        horizon, size = self.state.typical_length, self.spec.group_size
        return self.processes.raise_together(
            lambda: self.generator.generate(regime, prompts, step, horizon, size, processes=self.processes)
        )

    def _gather_episodes(self, episodes: list[Episode]) -> list[Episode]:
        """All episodes of the step, in their order, and the guide's books and counts with them."""
        self.generator.use.share(self.processes)
        if self.generator.restarts.gate is not None:
            self.generator.restarts.gate.share(self.processes)
        self.generator.counts = sum(self.processes.gather(self.generator.counts), Counter())
        return sorted((e for part in self.processes.gather(episodes) for e in part), key=lambda e: e.index)

    def _score(self, episodes: list[Episode]) -> None:
        texts = list(scored_texts(episodes))
        for _, part in texts:
            part.penalty = 0.0 if part.finished else self.missing_eos_penalty
        if self.scorer is not None and texts:
            scores = self.scorer([example for example, _ in texts], [part.text for _, part in texts])
            for (_, part), score in zip(texts, scores, strict=True):
                part.score = score

    def _references(self, episodes: list[Episode], step: int) -> TokenBatch | None:
        """One reference per episode, drawn at random, with its EOS; None where the auxiliary loss is off."""
        if self.update.reference_nll == 0:
            return None
        loaded, limit = self.model.loaded, self.generator.sampling.max_new_tokens
        rows = []
        for e in episodes:
            draw = noise.uniforms(1, self.seed, "reference", step, e.index)[0]
            text = e.example.references[int(draw * len(e.example.references))]
            rows.append(encode_target(loaded, text, limit)[0])
        return TokenBatch.build(
            [e.prompt_ids for e in episodes],
            rows,
            pad_id=loaded.pad_id,
            encoder_decoder=loaded.encoder_decoder,
            device=loaded.device,
        )

    def _settings(self, regime: Regime) -> UpdateSettings:
        """The policy waits while the critic that its advantages come from is not warm yet."""
        frozen = False
        if regime.critic is not None:
            wanted = self.critic.warmup_explained
            warm = wanted is not None and self.state.explained.get(regime.critic, 0.0) >= wanted
            frozen = self.state.critic_steps.get(regime.critic, 0) < self.critic.warmup_steps and not warm
        charged = self.state.kl_coef if self.kl.where == "loss" else 0.0
        return replace(self.update, policy_frozen=frozen, kl_coef=charged)

    def _standing_figures(self, regime: Regime, batch: EpisodeBatch, advantages: Advantages | None) -> dict[str, Any]:
        """What the row says of the trainer's own state."""
        row: dict[str, Any] = {"tokens/learned": int(carries_loss(batch, self.update).sum())}
        row["tokens/control"] = int(torch.isin(batch.tokens.response_ids[batch.policy], self.model.control).sum())
        if regime.needs_live_guide:
            row["length/horizon"] = self.state.typical_length
        if regime.needs_guide:
            row |= figures.of_guide(regime, self.generator.counts) | {"guide/reuse": self.generator.use.reuse}
        if self.resample_groups:
            row["rollout/resampled"] = self.resampled
        if advantages is not None:
            row["kl/coef"] = 0.0 if self.kl.where == "log" else self.state.kl_coef
            row |= {f"value/trusted_{name}": float(self._trusts(name)) for name in advantages.returns}
        return row

    def _trusts(self, critic: str) -> bool:
        """Whether a critic explained enough, lately, for its values to be the baseline."""
        return self.state.explained.get(critic, 0.0) >= self.critic.min_explained

    def _advance(self, episodes: list[Episode], advantages: Advantages | None, row: dict[str, Any]) -> None:
        """Move the trainer's state to the next step."""
        state = self.state
        for name in advantages.returns if advantages is not None else ():
            state.critic_steps[name] = state.critic_steps.get(name, 0) + 1
            if (now := row.get(f"value/explained_{name}")) is not None:
                state.explained[name] = TRUST_MEMORY * state.explained.get(name, 0.0) + (1 - TRUST_MEMORY) * max(
                    now, -1.0
                )
        mean = fmean(e.length for e in episodes)
        state.typical_length = LENGTH_MEMORY * state.typical_length + (1 - LENGTH_MEMORY) * mean
        if self.kl.adaptive and advantages is not None:
            state.kl_coef = adapt_kl_coef(
                state.kl_coef, row["kl/episode"], self.kl.target, len(episodes), self.kl.horizon
            )
        state.guide_uses = dict(self.generator.use.uses)
        state.guide_texts = dict(self.generator.use.texts)
        if (gate := self.generator.restarts.gate) is not None:
            state.guide_scores |= gate.fresh
            state.own_scores = own_scores(state.own_scores, episodes)
        state.step += 1
        self.scheduler.step()

    def _start_figures(self) -> dict[str, float]:
        """The held-out score before the first step: else a policy that falls apart before the first evaluation would
        not be seen to fall."""
        if self.evaluate is None:
            return {}
        with self.clock.timed("eval"), self.processes.gathered(self.model):
            found = self.evaluate().figures
        return {"eval/start": found["eval/score"], "eval/start_error": found["eval/score_error"]}

    def _compared(self, found: HeldOutResult) -> dict[str, float]:
        """The figures of a held-out evaluation, and of how it stands to those before it."""
        figures = dict(found.figures)
        if found.watched is not None:
            state = self.state
            state.watched, more = watch(state.watched, found, step=state.step, patience=self.patience)
            figures |= more
        return figures

    @property
    def diverged(self) -> bool:
        """Whether the last held-out evaluations, as many as ``patience`` says, all diverged."""
        return self.state.watched.streak >= self.patience

    def _note_best(self, row: dict[str, Any]) -> None:
        """Remember the best held-out score and its step; of equal ones the first."""
        state, score = self.state, row.get("eval/score")
        if score is not None and (state.best_score is None or score > state.best_score):
            state.best_step, state.best_score = state.step, score
