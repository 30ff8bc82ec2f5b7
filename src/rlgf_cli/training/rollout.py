"""Rollouts: the policy or the guide begins each response, the roll-in is cut, and one of them finishes it.

All randomness is a function of (seed, step, episode), so batch sizes and resuming change nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from rlgf_cli import noise
from rlgf_cli.algorithms.spec import Regime
from rlgf_cli.config.common import LengthConfig
from rlgf_cli.config.train import RolloutConfig
from rlgf_cli.errors import RlgfError
from rlgf_cli.models.generate import Generated
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.prompts import Encoded
from rlgf_cli.models.samplers.base import Distribution, OwnSampler, Sampler, SampleRequest
from rlgf_cli.models.token_boundaries import is_boundary
from rlgf_cli.protocols import Example, Guide
from rlgf_cli.training.branches import BranchPoint, attach, branch_points
from rlgf_cli.training.episodes import Episode, by_group, scored_texts
from rlgf_cli.training.guide_use import GuideUse
from rlgf_cli.training.guide_writer import Continuation, GuideWriter, PendingCompletions
from rlgf_cli.training.parallel.processes import SINGLE, Processes
from rlgf_cli.training.restarts import Restarts

_CHUNK = 8
"""Tokens that the policy writes at a time in search of the next word boundary."""


@dataclass(frozen=True)
class Sampling:
    """The distribution that the policy's tokens are sampled from, and how many responses are sampled at a time."""

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    ban_control: bool = False
    batch_size: int = 64

    @property
    def scored(self) -> dict[str, Any]:
        """The distribution that log-probabilities are taken under, as :class:`ActorCritic`'s methods take it."""
        return {
            "temperature": self.temperature,
            "min_new_tokens": self.min_new_tokens,
            "ban_control": self.ban_control,
        }

    @property
    def plain(self) -> bool:
        """Whether log-probabilities are those of the model's own distribution."""
        return self.temperature == 1 and self.min_new_tokens == 0 and not self.ban_control

    @property
    def distribution(self) -> Distribution:
        """The distribution that the sampler draws from."""
        return Distribution(self.temperature, self.top_k, self.top_p, self.min_new_tokens, self.ban_control)

    @classmethod
    def of(cls, rollout: RolloutConfig, lengths: LengthConfig) -> Sampling:
        return cls(
            max_new_tokens=lengths.max_new_tokens,
            min_new_tokens=lengths.min_new_tokens,
            ban_control=rollout.ban_control_tokens,
            **rollout.model_dump(include={"temperature", "top_k", "top_p", "batch_size"}),
        )


@dataclass(frozen=True)
class Draws:
    """An episode's uniform draws in [0, 1). The first three are the same for all episodes of a group.

    ``start``: whether there is a roll-in; ``cut``: where it ends; ``sample``: which of a recorded guide's texts is
    used; ``tokens`` [max_new_tokens]: the policy's token at each position.
    """

    start: float
    cut: float
    sample: float
    tokens: np.ndarray

    @classmethod
    def of(cls, seed: int, step: int | str, episode: Episode, max_new_tokens: int) -> Draws:
        start, cut, sample_draw = noise.uniforms(3, seed, "plan", step, episode.group)
        return cls(start, cut, sample_draw, noise.uniforms(max_new_tokens, seed, "tokens", step, episode.index))


@dataclass(frozen=True)
class _Plan:
    """One call of :meth:`RolloutGenerator.generate`: its arguments, and each episode's draws by its index."""

    regime: Regime
    typical_length: float
    draws: dict[int, Draws]


@dataclass
class RolloutGenerator:
    """Writes a step's episodes with the policy's weights and the guide.

    ``covered``: ids of the prompts that the guide has text for (None: all). ``whole_words``: the guide has another
    tokenizer, so it is given prefixes that end where a word ends; with the policy's own tokenizer whole characters
    are enough. ``restarts``: what this step's cuts of the guide's texts depend on. ``sampler``: what samples the
    policy's tokens. ``prefetch``: called with texts that will be scored, as soon as they are known.
    """

    loaded: Loaded
    sampling: Sampling
    seed: int
    guide: Guide | None = None
    use: GuideUse = field(default_factory=GuideUse)
    restarts: Restarts = field(default_factory=Restarts)
    covered: frozenset[str] | None = None
    whole_words: bool = False
    sampler: Sampler = field(default=None)  # type: ignore[assignment] # the own loop, which needs ``loaded``
    prefetch: Callable[[Sequence[Example], Sequence[str]], None] | None = None
    counts: Counter[str] = field(default_factory=Counter)
    guide_writer: GuideWriter = field(init=False)

    def __post_init__(self) -> None:
        self.sampler = self.sampler or OwnSampler(self.loaded)
        self.guide_writer = GuideWriter(self.loaded, self.guide, self.use, self.sampling.max_new_tokens)

    def generate(
        self,
        regime: Regime,
        prompts: Sequence[Encoded],
        step: int | str,
        typical_length: float,
        group_size: int = 1,
        *,
        processes: Processes = SINGLE,
    ) -> list[Episode]:
        """One episode per prompt, or those of this process among several.

        ``typical_length`` [tokens]: the response length from which a policy's cut is drawn.

        With ``group_size`` above 1, neighbouring prompts are equal and share the roll-in.
        """
        self.counts = Counter()
        every = [
            Episode(i, p.example, p.ids, i // group_size, regime.roll_out, drawn=(step, i))
            for i, p in enumerate(prompts)
        ]
        episodes = [every[i] for i in processes.prompts([e.example.id for e in every])]
        draws = {e.index: Draws.of(self.seed, step, e, self.sampling.max_new_tokens) for e in episodes}
        plan = _Plan(regime, typical_length, draws)
        started = [e for e in episodes if draws[e.index].start < regime.rollin_prob and self.covers(e)]
        if regime.roll_in == "guide":
            self._guide_rolls_in(episodes, [] if self.restarts.ended(regime) else started, plan)
        if regime.on_failure is not None and regime.on_failure.known_from == "record":
            failing = [e for e in episodes if e.example.id in self.restarts.failing]
            self._guide_rolls_in(episodes, self._begin_again(regime, failing, len(prompts)), plan)
        if regime.roll_out == "guide":
            self._guide_rolls_out(episodes, started if regime.roll_in == "policy" else [], plan)
        else:
            if regime.roll_in == "policy":
                self._policy_rolls_in(started, plan)
            self._policy_writes(self._open(episodes), plan, self._room, last_author=True)
        self.conclude(episodes)
        return episodes

    def write_again(self, regime: Regime, failed: Sequence[Episode], key: str, count: int) -> list[Episode]:
        """Episodes of failed groups, all of their members given, that begin behind a part of the guide's text in the
        place of some of them: those of the groups that the guide gave a text for. ``count``: the step's prompts."""
        again = self._begin_again(regime, [replace(e, segments=[], cut=0, sampler_logprobs={}) for e in failed], count)
        for e in again:
            e.drawn, e.finished, e.score, e.text = (key, e.index), False, None, ""
        draws = {e.index: Draws.of(self.seed, key, e, self.sampling.max_new_tokens) for e in again}
        plan = _Plan(regime, 0.0, draws)
        self._guide_rolls_in([], again, plan)
        begun = [e for e in again if e.cut > 0]
        self._policy_writes(self._open(begun), plan, self._room, last_author=True)
        self.conclude(begun)
        return begun

    def _begin_again(self, regime: Regime, failed: Sequence[Episode], count: int) -> list[Episode]:
        """Of each failed group the last episodes, as a group of their own unless they stay ``joined``."""
        rule = regime.on_failure
        assert rule is not None
        again = [e for members in by_group(failed).values() for e in members[-rule.restarted :] if self.covers(e)]
        for e in again:
            e.group += 0 if rule.joined else count
        return again

    def guide_texts(self, episodes: Sequence[Episode]) -> list[Episode]:
        """The episodes, one a group, as whole texts of the guide; without those that it gave no text for."""
        draws = [Draws.of(self.seed, e.drawn[0], e, 0) for e in episodes]
        pending = self.guide_writer.submit(
            [Continuation(e.example, [], draw.sample) for e, draw in zip(episodes, draws, strict=True)]
        )
        for e, ids in zip(episodes, self.guide_writer.collect(pending, self.counts), strict=True):
            e.segments = [("guide", ids)] if ids else []
        written = [e for e in episodes if e.length]
        self.counts["unguided"] += len(episodes) - len(written)
        self.conclude(written)
        return written

    def conclude(self, episodes: Sequence[Episode]) -> None:
        """Set ``finished`` and ``text`` of episodes that were written to their end."""
        for _, part in scored_texts(episodes):
            ids = part.ids
            part.finished = bool(ids) and ids[-1] in self.loaded.eos_ids
            part.text = self.loaded.text.decode_response(self.loaded.tokenizer, ids)

    def covers(self, episode: Episode) -> bool:
        """Whether the guide has text for the episode's prompt."""
        return self.covered is None or episode.example.id in self.covered

    def _open(self, episodes: list[Episode]) -> list[Episode]:
        """The episodes that can be continued."""
        return [e for e in episodes if not e.finished and self._room(e) > 0]

    def _room(self, episode: Episode) -> int:
        """Tokens that may still be written."""
        return self.sampling.max_new_tokens - episode.length

    def _boundary(self, ids: list[int], n: int) -> bool:
        """Whether the text of ``ids[:n]`` stays as it is whatever follows, as far as ``ids`` shows what follows."""
        loaded = self.loaded
        return is_boundary(loaded.text, loaded.tokenizer, ids, n, whole_words=self.whole_words)

    # the policy writes

    def _policy_writes(
        self, episodes: list[Episode], plan: _Plan, limit: Callable[[Episode], int], *, last_author: bool = False
    ) -> None:
        """Append policy tokens, at most ``limit(episode)`` each. ``last_author``: no other author's tokens follow."""
        limits = [limit(e) for e in episodes]
        pairs = [(e, n) for e, n in zip(episodes, limits, strict=True) if n > 0]
        if not pairs:
            return
        sampling = self.sampling
        request = SampleRequest(
            prompts=[e.prompt_ids for e, _ in pairs],
            prefixes=[e.ids for e, _ in pairs],
            max_new_tokens=[n for _, n in pairs],
            uniforms=np.stack([plan.draws[e.index].tokens for e, _ in pairs]),
            distribution=sampling.distribution,
        )
        rows = self.sampler.sample(
            request,
            batch_size=sampling.batch_size,
            on_batch=partial(self._prefetch, [e for e, _ in pairs]) if last_author and self.prefetch else None,
        )
        for (episode, _), row in zip(pairs, rows, strict=True):
            episode.sampler_logprobs |= {episode.length + i: value for i, value in enumerate(row.logprobs or ())}
            self._append_policy(episode, row.ids)
            episode.finished = row.finished

    def _prefetch(self, episodes: list[Episode], batch: list[int], rows: list[Generated]) -> None:
        """Pass the texts of one batch to the reward, while the next batch is written."""
        assert self.prefetch is not None
        decode = self.loaded.text.decode_response
        texts = [decode(self.loaded.tokenizer, episodes[i].ids + r.ids) for i, r in zip(batch, rows, strict=True)]
        self.prefetch([episodes[i].example for i in batch], texts)

    @staticmethod
    def _append_policy(episode: Episode, ids: list[int]) -> None:
        if episode.segments and episode.segments[-1][0] == "policy":
            episode.segments[-1][1].extend(ids)
        elif ids:
            episode.segments.append(("policy", ids))

    def _policy_rolls_in(self, episodes: list[Episode], plan: _Plan) -> None:
        """The policy's roll-in, up to the cut.

        cut first: k is uniform on 1..typical length and independent of this episode; a roll-in that ends before k is
        the whole response. cut inner (as released by earlier code): the whole response, then k uniform on 1..L-1.
        """
        if plan.regime.cut == "inner":
            self._policy_writes(episodes, plan, self._room)
            for e in episodes:
                self._cut_inside(e, plan.draws[e.index].cut)
            return
        longest = plan.regime.cut_horizon or math.ceil(plan.typical_length)
        longest = max(1, min(longest, self.sampling.max_new_tokens))
        cuts = {e.index: 1 + int(plan.draws[e.index].cut * longest) for e in episodes}
        self._policy_writes(episodes, plan, lambda e: cuts[e.index])
        for e in episodes:
            e.reached_cut = e.length == cuts[e.index]
            e.action_start = max(0, e.length - 1)
        self._move_to_boundaries(self._open(episodes), plan)
        for e in episodes:
            e.cut = e.length

    def _cut_inside(self, e: Episode, draw: float) -> None:
        """Cut a whole response at k uniform on 1..L-1; where that is no boundary, at the next one behind it."""
        whole = e.ids
        if len(whole) < 2:  # the guide writes all of it
            e.truncate(0)
            return
        drawn = 1 + int(draw * (len(whole) - 1))
        e.cut = next((n for n in range(drawn, len(whole)) if self._boundary(whole, n)), len(whole))
        e.action_start, e.reached_cut = e.cut - 1, True
        self.counts["cuts_moved"] += e.cut != drawn
        if e.cut < len(whole):
            e.truncate(e.cut)

    def _move_to_boundaries(self, episodes: list[Episode], plan: _Plan) -> None:
        """Let the policy write to the next boundary where the text is not stable at the cut.

        Moving the cut back instead would select on what came after. All tokens of the word are one action.
        Whether a word is over shows in the token behind it, which is written for that and dropped again.
        """
        moving = [e for e in episodes if not self._boundary(e.ids, len(e.ids))]
        cuts = {e.index: e.length for e in moving}
        for e in moving:
            e.action_start = next((n for n in range(e.length - 1, 0, -1) if self._boundary(e.ids, n)), 0)
        while moving:
            searched = {e.index: e.length for e in moving}
            self._policy_writes(moving, plan, lambda e: min(_CHUNK, self._room(e)))
            still_moving = []
            for e in moving:
                ids = e.ids
                end = next((n for n in range(searched[e.index], len(ids)) if self._boundary(ids, n)), None)
                if end is not None:
                    self.counts["cuts_moved"] += end != cuts[e.index]
                    e.truncate(end)
                elif not e.finished and self._room(e) > 0:
                    still_moving.append(e)
            moving = still_moving

    # the guide writes

    def _submit(self, points: Sequence[BranchPoint], plan: _Plan) -> PendingCompletions:
        return self.guide_writer.submit(
            [Continuation(p.episode.example, p.prefix, plan.draws[p.episode.index].sample) for p in points]
        )

    def _guide_rolls_in(self, episodes: list[Episode], started: list[Episode], plan: _Plan) -> None:
        """The guide's text, cut at k on 1..L-1: never its EOS. A group shares one text and one cut.

        While a remote guide writes, the policy writes the episodes without a roll-in.
        """
        heads = list({e.group: e for e in started}.values())
        pending = self._submit([BranchPoint(e, "after", e.ids) for e in heads], plan)
        if self.guide_writer.remote and plan.regime.roll_out == "policy":
            begun = {e.index for e in started}
            self._policy_writes([e for e in episodes if e.index not in begun], plan, self._room, last_author=True)
        texts = zip(heads, self.guide_writer.collect(pending, self.counts), strict=True)
        whole = {e.group: replace(e, segments=[("guide", ids)]) for e, ids in texts if ids is not None and len(ids) > 1}
        cut_draws = [plan.draws[e.index].cut for e in whole.values()]
        cuts = self.restarts.cuts(plan.regime, list(whole.values()), cut_draws)
        for e in (e for e in started if e.group in whole):
            e.cut = cuts[e.group]
            e.segments = [("guide", whole[e.group].ids[: e.cut])] if e.cut else []
            self.counts["gated"] += e.cut == 0

    def _guide_rolls_out(self, episodes: list[Episode], started: list[Episode], plan: _Plan) -> None:
        """The guide finishes the open episodes. While a remote guide writes a batch, the policy begins the next one."""
        size = self.sampling.batch_size if self.guide_writer.remote else max(1, len(episodes))
        starts = {e.index for e in started}
        batches: list[tuple[list[BranchPoint], PendingCompletions]] = []
        for at in range(0, len(episodes), size):
            batch = episodes[at : at + size]
            begun = [e for e in batch if e.index in starts]
            self._policy_rolls_in(begun, plan)
            if plan.regime.estimator == "guide_mc":
                limit = self.sampling.max_new_tokens
                points = branch_points(begun, plan.regime.mc_samples, limit, self._boundary)
            else:
                points = [BranchPoint(e, "after", e.ids) for e in self._open(batch) if self.covers(e)]
            batches.append((points, self._submit(points, plan)))
        answered: set[int] = set()
        for points, pending in batches:
            try:
                ids = self.guide_writer.collect(pending, self.counts)
            except RlgfError:
                self.guide_writer.settle()
                raise
            finished, one_sided = attach(points, ids)
            answered |= finished
            self.counts["one_sided"] += one_sided
        # where the guide has no text, or gave none, the policy goes on: a text that merely stops would be scored
        unguided = [e for e in self._open(episodes) if e.index not in answered]
        for e in unguided:
            e.cut, e.reached_cut = 0, False
        self._policy_writes(unguided, plan, self._room)
        self.counts["unguided"] += len(unguided)
