"""The loop: roll, score, annotate, credit, update; one iteration reads top to bottom in :meth:`Trainer.step`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import Any, Protocol

import torch

from rlgf_cli import noise
from rlgf_cli.algorithms.spec import AlgorithmSpec, Regime
from rlgf_cli.functional.shaping import adapt_kl_coef, k3
from rlgf_cli.functional.stats import explained_variance
from rlgf_cli.models.actor_critic import ActorCritic
from rlgf_cli.models.forward import TokenBatch
from rlgf_cli.models.prompts import Encoded
from rlgf_cli.protocols import Example, Score
from rlgf_cli.training.checkpoint import TrainerState
from rlgf_cli.training.credit import Credit, CreditSettings, Notes, annotate, assign, sampler_gap
from rlgf_cli.training.distributed import ALONE, Group
from rlgf_cli.training.divergence import Evaluation, watch
from rlgf_cli.training.episodes import Episode, EpisodeBatch, build_batch, written
from rlgf_cli.training.gate import Gate, own_scores
from rlgf_cli.training.restarts import Restarts, values_along
from rlgf_cli.training.rollout import Roller
from rlgf_cli.training.timing import Clock
from rlgf_cli.training.update import StepData, UpdateSettings, update

Scorer = Callable[[Sequence[Example], Sequence[str]], list[Score]]
ScorerAt = Callable[[int], tuple[Scorer, dict[str, float]]]
"""What scores in an iteration (counted from 0), and the figures that say how, for its row."""
HORIZON_MEMORY = 0.9
"""Weight of the past in the running mean of response lengths."""


class Examine(Protocol):
    """Looks at the first step's episodes before anything is learned from them; raises where it must not go on."""

    def __call__(
        self,
        regime: Regime,
        episodes: Sequence[Episode],
        batch: EpisodeBatch,
        notes: Notes | None,
        credit: Credit | None,
        kl_coef: float,
    ) -> None: ...


class Evaluate(Protocol):
    """The policy alone on held-out prompts."""

    def __call__(self) -> Evaluation: ...


@dataclass(frozen=True)
class KLSettings:
    """How the KL is charged; see functional.shaping for its sign."""

    in_reward: bool
    adaptive: bool
    target: float
    horizon: int


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
    roller: Roller
    scorer: Scorer | None
    credit: CreditSettings
    update: UpdateSettings
    kl: KLSettings
    state: TrainerState
    seed: int
    episodes: int
    missing_eos_penalty: float
    critic_warmup_steps: int
    eval_every: int
    scorer_at: ScorerAt | None = None
    evaluate: Evaluate | None = None
    patience: int = 2
    examine: Examine | None = None
    group: Group = ALONE
    clock: Clock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = Clock(lambda: self.roller.guide_seconds)

    def step(self) -> tuple[dict[str, Any], list[Episode]]:
        """One iteration. Returns its row for metrics.jsonl and its episodes."""
        step = self.state.step
        self.clock.begin()
        regime = self.spec.regime_at(step, noise.uniforms(1, self.seed, "regime", step)[0])
        moving: dict[str, float] = {}
        if self.scorer_at is not None:
            self.scorer, moving = self.scorer_at(step)
        if (server := self.roller.server) is not None:
            with self.clock.timed("sync"):
                self.group.main_does(server.send)
        with self.group.gathered(self.model):
            episodes, batch, notes, credit = self._experience(regime, step)
        with self.clock.timed("update"):
            settings = self._settings(regime)
            data = StepData(regime, batch, notes, credit, self._references(episodes, step))
            losses = update(
                self.model,
                self.optimizer,
                data,
                self.roller.sampling,
                settings,
                seed=self.seed,
                step=step,
                group=self.group,
            )
        row: dict[str, Any] = {
            "step": step + 1,
            **self._figures(regime, episodes, batch, notes, credit),
            **moving,
            **losses,
        }
        row["lr"] = self.scheduler.get_last_lr()[0]
        row["update/policy_frozen"] = float(settings.policy_frozen)
        if notes is not None and credit is not None:
            for name, mask in batch.fit.items():
                if name in credit.returns:
                    explained = explained_variance(notes.values[name], credit.returns[name], mask)
                    row |= {} if explained is None else {f"value/explained_{name}": explained}
        self._advance(episodes, credit, row)
        if self.evaluate is not None and self.state.step % self.eval_every == 0:
            with self.clock.timed("eval"), self.group.gathered(self.model):
                found = self.evaluate()
            row |= self._compared(found)
            self._note_best(row)
        row |= self.clock.lap()
        return row, episodes

    def _experience(self, regime: Regime, step: int) -> tuple[list[Episode], EpisodeBatch, Notes | None, Credit | None]:
        """The step's episodes, with their scores, what the models say of them, and their credit."""
        with self.clock.timed("rollout"):
            prompts = self._prompts_of(step)
            self.roller.restarts = self._restarts(regime, step)
            episodes = self._rolled(regime, prompts, step)
        with self.clock.timed("reward"):
            self.group.agree(lambda: self._score(episodes))
            episodes = self._everyones(episodes)
        with self.clock.timed("annotate"):
            batch = build_batch(episodes, regime, self.spec.critics, self.model.loaded)
            notes = credit = None
            charged = self.state.kl_coef if self.kl.in_reward else 0.0
            if regime.estimator != "likelihood":
                notes = annotate(
                    self.model,
                    batch,
                    regime,
                    self.roller.sampling,
                    rows_at_once=self.roller.sampling.batch_size,
                    group=self.group,
                )
                credit = assign(regime, batch, notes, kl_coef=charged, settings=self.credit)
        # sharded models answer only where all processes ask alike
        if step == 0 and self.examine is not None and not self.group.lockstep:
            examine = self.examine
            with self.clock.timed("check"):
                self.group.agree(lambda: examine(regime, episodes, batch, notes, credit, charged))
        return episodes, batch, notes, credit

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
            self.roller.conclude(episodes)
            self._score(episodes)

        rows, state = self.roller.sampling.batch_size, self.state
        return Restarts(
            age=self.spec.age(step),
            values=(lambda texts: values_along(self.model, texts, rows)) if regime.restart == "uncertain" else None,
            gate=Gate(state.own_scores, state.guide_scores, score) if regime.gate else None,
        )

    def _rolled(self, regime: Regime, prompts: list[Encoded], step: int) -> list[Episode]:
        """The episodes of this process."""
        horizon, size = self.state.horizon, self.spec.group_size
        return self.group.agree(lambda: self.roller.roll(regime, prompts, step, horizon, size, among=self.group))

    def _everyones(self, episodes: list[Episode]) -> list[Episode]:
        """All episodes of the step, in their order, and the guide's books and counts with them."""
        self.roller.use.share(self.group)
        if self.roller.restarts.gate is not None:
            self.roller.restarts.gate.share(self.group)
        self.roller.counts = sum(self.group.gather(self.roller.counts), Counter())
        return sorted((e for part in self.group.gather(episodes) for e in part), key=lambda e: e.index)

    def _score(self, episodes: list[Episode]) -> None:
        texts = list(written(episodes))
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
        loaded, limit = self.model.loaded, self.roller.sampling.max_new_tokens
        rows = []
        for e in episodes:
            draw = noise.uniforms(1, self.seed, "reference", step, e.index)[0]
            text = e.example.references[int(draw * len(e.example.references))]
            rows.append([*loaded.text.encode_response(loaded.tokenizer, text), loaded.eos_id][:limit])
        return TokenBatch.build(
            [e.prompt_ids for e in episodes],
            rows,
            pad_id=loaded.pad_id,
            encoder_decoder=loaded.encoder_decoder,
            device=loaded.device,
        )

    def _settings(self, regime: Regime) -> UpdateSettings:
        """The policy waits while the critic that its advantages come from is not warm yet."""
        fitted = self.state.critic_steps.get(regime.critic, 0) if regime.critic else self.critic_warmup_steps
        frozen = fitted < self.critic_warmup_steps
        return UpdateSettings(**{**self.update.__dict__, "policy_frozen": frozen})

    def _advance(self, episodes: list[Episode], credit: Credit | None, row: dict[str, Any]) -> None:
        """Move the trainer's state to the next step."""
        state = self.state
        for name in credit.returns if credit is not None else ():
            state.critic_steps[name] = state.critic_steps.get(name, 0) + 1
        mean = fmean(e.length for e in episodes)
        state.horizon = HORIZON_MEMORY * state.horizon + (1 - HORIZON_MEMORY) * mean
        if self.kl.adaptive and credit is not None:
            state.kl_coef = adapt_kl_coef(
                state.kl_coef, row["kl/episode"], self.kl.target, len(episodes), self.kl.horizon
            )
        state.guide_uses = dict(self.roller.use.uses)
        state.guide_texts = dict(self.roller.use.texts)
        if (gate := self.roller.restarts.gate) is not None:
            state.guide_scores |= gate.fresh
            state.own_scores = own_scores(state.own_scores, episodes)
        state.step += 1
        self.scheduler.step()

    def _compared(self, found: Evaluation) -> dict[str, float]:
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

    def _figures(
        self,
        regime: Regime,
        episodes: list[Episode],
        batch: EpisodeBatch,
        notes: Notes | None,
        credit: Credit | None,
    ) -> dict[str, Any]:
        """What the step's row says of its episodes, taken from what the losses use."""
        row: dict[str, Any] = {
            "regime": regime.roll_out if regime.roll_in == "none" else f"{regime.roll_in}>{regime.roll_out}",
            "episodes": len(episodes),
            "length/mean": fmean(e.length for e in episodes),
            "length/truncated": fmean(not e.finished for e in episodes),
            "tokens/policy": float(batch.policy.sum() / batch.real.sum()),
            "tokens/learned": int(batch.learned.sum()),
        }
        scored = [e for e in episodes if e.score is not None]
        if scored:
            values = [e.value for e in scored]
            row |= {"score/mean": fmean(values), "score/std": pstdev(values)}
            parts = [e.score.parts for e in scored if e.score]
            for name in sorted({name for found in parts for name in found}):  # a reward may log a part for some only
                row[f"score/part/{name}"] = fmean(found[name] for found in parts if name in found)
        begun = [e for e in episodes if e.cut > 0]
        if regime.roll_in != "none":
            row["rollin/share"] = len(begun) / len(episodes)
            row |= {"rollin/tokens": fmean(e.cut for e in begun)} if begun else {}
        if regime.needs_live_guide:
            row["length/horizon"] = self.state.horizon
            row |= {"rollin/self_ended": fmean(e.policy_alone and e.finished for e in begun)} if begun else {}
        if regime.needs_guide:
            counts = self.roller.counts
            row |= {f"guide/{name}": counts[name] for name in ("cuts_moved", "unguided")}
            row |= {"guide/requests": counts["guide_requests"], "guide/capped": counts["guide_capped"]}
            row |= {"guide/failed": counts["guide_failed"]} if counts["guide_failed"] else {}
            row |= {"guide/gated": counts["gated"]} if regime.gate else {}
            row["guide/reuse"] = self.roller.use.reuse
        if regime.estimator == "guide_mc":
            sides = [e.sides for e in scored if e.sides is not None]
            row |= {"mc/before": fmean(b for b, _ in sides), "mc/after": fmean(a for _, a in sides)} if sides else {}
            row["mc/one_sided"] = self.roller.counts["one_sided"]
        if notes is not None and bool(batch.policy.any()):
            row["policy/entropy"] = -float(notes.logprobs[batch.policy].mean())
        if notes is not None and (gap := sampler_gap(episodes, notes.logprobs)) is not None:
            row["sampler/gap"] = float(gap.abs().mean())
        if credit is not None:
            policy_tokens = batch.policy.sum().clamp_min(1)
            row["reward/sum"] = float(credit.rewards.sum(-1).mean())
            row["kl/mean"] = float(credit.log_ratio.sum() / policy_tokens)
            row["kl/k3"] = float(k3(credit.log_ratio).sum() / policy_tokens)
            row["kl/episode"] = float(credit.log_ratio.sum(-1).mean())
            row["kl/coef"] = self.state.kl_coef if self.kl.in_reward else 0.0
            if int(batch.learned.sum()) > 1:
                row["advantage/std"] = float(credit.advantages[batch.learned].std())
        return row
