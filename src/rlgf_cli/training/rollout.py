"""Writing episodes: who begins, where the cut falls, who finishes.

All randomness is a function of (seed, step, episode), so batch sizes and resuming change nothing.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from rlgf_cli import noise
from rlgf_cli.algorithms.spec import Regime
from rlgf_cli.config.common import LengthConfig
from rlgf_cli.config.train import RolloutConfig
from rlgf_cli.models.generate import Generated, sample
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.prompts import Encoded
from rlgf_cli.models.server import PolicyServer
from rlgf_cli.models.token_boundaries import is_boundary
from rlgf_cli.protocols import Completion, Example, Guide, GuideRequest
from rlgf_cli.training import branches
from rlgf_cli.training.episodes import Episode, scored_texts
from rlgf_cli.training.guide_use import GuideUse
from rlgf_cli.training.parallel.processes import SINGLE, Processes
from rlgf_cli.training.restarts import Restarts

_CHUNK = 8
"""Tokens that the policy writes at a time while it looks for the next word boundary."""


@dataclass(frozen=True)
class Sampling:
    """How the policy writes: a plain description of the distribution that is sampled."""

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    ban_control: bool = False
    batch_size: int = 64

    @property
    def scored(self) -> dict[str, Any]:
        """The distribution that the policy's tokens are scored under, as :class:`ActorCritic`'s methods take it."""
        return {
            "temperature": self.temperature,
            "min_new_tokens": self.min_new_tokens,
            "ban_control": self.ban_control,
        }

    @classmethod
    def of(cls, rollout: RolloutConfig, lengths: LengthConfig) -> Sampling:
        return cls(
            max_new_tokens=lengths.max_new_tokens,
            min_new_tokens=lengths.min_new_tokens,
            temperature=rollout.temperature,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
            ban_control=rollout.ban_control_tokens,
            batch_size=rollout.batch_size,
        )


@dataclass
class RolloutGenerator:
    """What a rollout needs: the policy's weights and tokenizer, the guide, and the sampling.

    ``covered``: ids of the prompts that the guide has text for (None: all). ``whole_words``: the guide has another
    tokenizer, so it is given prefixes that end where a word ends; with the policy's own tokenizer whole characters
    are enough. ``restarts``: what this step's cuts of the guide's texts follow. ``server``: where the policy writes, if
    not here. ``prefetch``: is told of texts that will be scored, as soon as they are there.
    """

    loaded: Loaded
    sampling: Sampling
    seed: int
    guide: Guide | None = None
    use: GuideUse = field(default_factory=GuideUse)
    restarts: Restarts = field(default_factory=Restarts)
    covered: frozenset[str] | None = None
    whole_words: bool = False
    server: PolicyServer | None = None
    prefetch: Callable[[Sequence[Example], Sequence[str]], None] | None = None
    guide_seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)

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
        draws = np.stack(
            [noise.uniforms(self.sampling.max_new_tokens, self.seed, "tokens", step, e.index) for e in every]
        )
        plan = [noise.uniforms(4, self.seed, "plan", step, e.group) for e in every]
        episodes = [every[i] for i in processes.prompts([e.example.id for e in every])]
        started = [plan[e.index][0] < regime.rollin_prob and self._covers(e) for e in episodes]
        begun = [e for e, s in zip(episodes, started, strict=True) if s]
        if regime.roll_in == "guide":
            texts = self._guide_begins(begun, plan, regime)
            if self._remote and regime.roll_out == "policy":  # what does not wait for the guide goes on
                alone = [e for e, s in zip(episodes, started, strict=True) if not s]
                self._policy_writes(alone, draws, self._room, ends=True)
            texts()
        if regime.roll_out == "guide":
            self._guide_rolls_out(
                episodes, begun if regime.roll_in == "policy" else [], plan, draws, regime, typical_length
            )
        else:
            if regime.roll_in == "policy":
                self._policy_begins(begun, plan, draws, regime, typical_length)
            self._policy_writes(self._open(episodes), draws, self._room, ends=True)
        self.conclude(episodes)
        return episodes

    def conclude(self, episodes: Sequence[Episode]) -> None:
        """Say of episodes that were written to their end whether they finished, and what their text is."""
        for _, part in scored_texts(episodes):
            ids = part.ids
            part.finished = bool(ids) and ids[-1] in self.loaded.eos_ids
            part.text = self.loaded.text.decode_response(self.loaded.tokenizer, ids)

    def _guide_rolls_out(
        self,
        episodes: list[Episode],
        begun: list[Episode],
        plan: list[np.ndarray],
        draws: np.ndarray,
        regime: Regime,
        typical_length: float,
    ) -> None:
        """The guide finishes what is open. A guide elsewhere is asked for a batch while the policy begins the next."""
        size = self.sampling.batch_size if self._remote else max(1, len(episodes))
        starts = {e.index for e in begun}
        pending = []
        for at in range(0, len(episodes), size):
            some = episodes[at : at + size]
            if mine := [e for e in some if e.index in starts]:
                self._policy_begins(mine, plan, draws, regime, typical_length)
            if regime.estimator == "guide_mc":
                pending.append(self._guide_branches(mine, plan, regime.mc_samples))
            else:
                pending.append(self._guide_finishes([e for e in self._open(some) if self._covers(e)], plan))
        answered = set().union(*(finish() for finish in pending))
        # where the guide has no text, or gave none, the policy goes on: a text that merely stops would be scored
        unguided = [e for e in self._open(episodes) if e.index not in answered]
        for e in unguided:
            e.cut, e.reached_cut = 0, False
        self._policy_writes(unguided, draws, self._room)
        self.counts["unguided"] += len(unguided)

    def _covers(self, episode: Episode) -> bool:
        return self.covered is None or episode.example.id in self.covered

    def _open(self, episodes: list[Episode]) -> list[Episode]:
        return [e for e in episodes if not e.finished and e.length < self.sampling.max_new_tokens]

    @property
    def _remote(self) -> bool:
        return self.guide is not None and self.guide.abilities.remote

    def _room(self, episode: Episode) -> int:
        return self.sampling.max_new_tokens - episode.length

    # the policy writes

    def _policy_writes(self, episodes: list[Episode], draws: np.ndarray, room: Any, *, ends: bool = False) -> None:
        """Append policy tokens, at most ``room(episode)`` each. ``ends``: nobody goes on behind them."""
        limits = [room(e) for e in episodes]
        pairs = [(e, n) for e, n in zip(episodes, limits, strict=True) if n > 0]
        if not pairs:
            return
        sampling = self.sampling
        write = self.server.sample if self.server is not None else sample
        rows = write(
            self.loaded.model,
            [e.prompt_ids for e, _ in pairs],
            prefixes=[e.ids for e, _ in pairs],
            max_new_tokens=[n for _, n in pairs],
            uniforms=draws[[e.index for e, _ in pairs]],
            eos_ids=self.loaded.eos_ids,
            pad_id=self.loaded.pad_id,
            banned_ids=self.loaded.control_ids if sampling.ban_control else (),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_new_tokens=sampling.min_new_tokens,
            batch_size=sampling.batch_size,
            dtype=self.loaded.dtype,
            on_batch=partial(self._tell, [e for e, _ in pairs]) if ends and self.prefetch is not None else None,
        )
        for (episode, _), row in zip(pairs, rows, strict=True):
            episode.server_logprobs |= {episode.length + i: value for i, value in enumerate(row.logprobs or ())}
            self._append_policy(episode, row.ids)
            episode.finished = row.finished

    def _tell(self, episodes: list[Episode], batch: list[int], rows: list[Generated]) -> None:
        """Let who scores texts begin with those of a batch, while the next one is written."""
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

    def _policy_begins(
        self,
        episodes: list[Episode],
        plan: list[np.ndarray],
        draws: np.ndarray,
        regime: Regime,
        typical_length: float,
    ) -> None:
        """The policy's roll-in, up to the cut.

        cut first: k is uniform on 1..h and independent of this episode; an ending of the policy's own stands. cut
        inner (as released by earlier code): the whole text, then k uniform on 1..L-1.
        """
        if regime.cut == "inner":
            self._policy_writes(episodes, draws, self._room)
            for e in episodes:
                self._cut_inside(e, plan[e.index][1])
            return
        longest = max(1, min(regime.cut_horizon or math.ceil(typical_length), self.sampling.max_new_tokens))
        drawn = {e.index: 1 + int(plan[e.index][1] * longest) for e in episodes}
        self._policy_writes(episodes, draws, lambda e: drawn[e.index])
        for e in episodes:
            e.reached_cut = e.length == drawn[e.index]
            e.action_start = max(0, e.length - 1)
        self._move_to_boundaries([e for e in episodes if not e.finished and self._room(e) > 0], draws)
        for e in episodes:
            e.cut = e.length

    def _cut_inside(self, e: Episode, draw: float) -> None:
        """Cut a whole text at k uniform on 1..L-1; where that is no boundary, at the next one behind it."""
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

    def _move_to_boundaries(self, episodes: list[Episode], draws: np.ndarray) -> None:
        """Where the text is not stable at the cut, the policy goes on to the next boundary.

        Moving the cut back instead would select on what came after. All tokens of the word are one action.
        Whether a word is over shows in the token behind it, which is written for that and dropped again.
        """
        moving = [e for e in episodes if not self._boundary(e.ids, len(e.ids))]
        cuts = {e.index: e.length for e in moving}
        for e in moving:
            e.action_start = next((n for n in range(e.length - 1, 0, -1) if self._boundary(e.ids, n)), 0)
        while moving:
            searched = {e.index: e.length for e in moving}
            self._policy_writes(moving, draws, lambda e: min(_CHUNK, self._room(e)))
            still = []
            for e in moving:
                ids = e.ids
                end = next((n for n in range(searched[e.index], len(ids)) if self._boundary(ids, n)), None)
                if end is not None:
                    self.counts["cuts_moved"] += end != cuts[e.index]
                    e.truncate(end)
                elif not e.finished and self._room(e) > 0:
                    still.append(e)
            moving = still

    def _boundary(self, ids: list[int], n: int) -> bool:
        """Whether the text of ``ids[:n]`` stays as it is whatever follows, as far as ``ids`` shows what follows."""
        loaded = self.loaded
        return is_boundary(loaded.text, loaded.tokenizer, ids, n, whole_words=self.whole_words)

    def _text(self, ids: list[int]) -> str:
        return self.loaded.text.decode_response(self.loaded.tokenizer, ids, strip=False)

    # the guide writes

    def _guide_begins(self, episodes: list[Episode], plan: list[np.ndarray], regime: Regime) -> Callable[[], None]:
        """The guide's text, cut at k on 1..L-1: never its EOS. A group shares one text and one cut.

        Asks now; the texts are there when what is returned has been called.
        """
        heads = list({e.group: e for e in episodes}.values())
        asked = self._ask([(e, e.ids) for e in heads], plan)

        def apply() -> None:
            answered = [(e, c) for e, c in zip(heads, asked(), strict=True) if c is not None]
            texts = [replace(e, segments=[("guide", self._guide_ids(c, e.length))]) for e, c in answered]
            whole = {e.group: e for e in texts if e.length >= 2}
            cuts = self.restarts.cuts(regime, list(whole.values()), [plan[e.index][1] for e in whole.values()])
            for episode in [e for e in episodes if e.group in whole]:
                episode.cut = cuts[episode.group]
                episode.segments = [("guide", whole[episode.group].ids[: episode.cut])] if episode.cut else []
                self.counts["gated"] += episode.cut == 0

        return apply

    def _guide_finishes(self, episodes: list[Episode], plan: list[np.ndarray]) -> Callable[[], set[int]]:
        """The guide goes on from what is there, within the total length.

        Asks now; what is returned waits for the texts and gives the episodes that the guide wrote for.
        """
        asked = self._ask([(e, e.ids) for e in episodes], plan)

        def apply() -> set[int]:
            answered = set()
            for episode, completion in zip(episodes, asked(), strict=True):
                if completion is not None and (ids := self._guide_ids(completion, episode.length)):
                    episode.segments.append(("guide", ids))
                    answered.add(episode.index)
            return answered

        return apply

    def _guide_branches(self, begun: list[Episode], plan: list[np.ndarray], samples: int) -> Callable[[], set[int]]:
        """As :meth:`_guide_finishes`, with ``samples`` texts from before and from after each action at the cut."""
        places = branches.places(begun, samples, self.sampling.max_new_tokens, self._boundary)
        asked = self._ask([(p.episode, p.prefix) for p in places], plan)

        def apply() -> set[int]:
            answers = [(p, c) for p, c in zip(places, asked(), strict=True) if c is not None]
            found = [(p, ids) for p, c in answers if (ids := self._guide_ids(c, len(p.prefix)))]
            return branches.attach(found, places, self.counts)

        return apply

    def _ask(
        self, begun: Sequence[tuple[Episode, list[int]]], plan: list[np.ndarray]
    ) -> Callable[[], Sequence[Completion | None]]:
        """Ask the guide to go on from so much of an episode: at once where it writes elsewhere, else when wanted.

        An answer is None where the guide refused this one text.
        """
        if not begun:
            return list
        assert self.guide is not None
        requests = []
        for e, ids in begun:
            live = self.guide.abilities.live
            # recorded text: one of the samples at random per use; live: a fresh sample per use of the prompt
            index = self.use.next_index(e.example.id) if live else int(plan[e.index][2] * (1 << 30))
            requests.append(GuideRequest(e.example, self._text(ids), index, self.sampling.max_new_tokens - len(ids)))
        ask = self.guide.attempt
        future = self._elsewhere.submit(ask, requests) if self._remote else None

        def answers() -> Sequence[Completion | None]:
            before = time.perf_counter()
            found = future.result() if future is not None else ask(requests)
            self.guide_seconds += time.perf_counter() - before
            for request, text in zip(requests, found, strict=True):
                if text is not None:
                    self.use.note_text(f"{request.example.id}\x1f{noise.short_hash(request.prefix + text.text)}")
            self.counts["guide_requests"] += len(requests)
            self.counts["guide_failed"] += sum(text is None for text in found)
            return found

        return answers

    @cached_property
    def _elsewhere(self) -> ThreadPoolExecutor:
        """Threads that wait for a guide which writes elsewhere, one per batch of requests."""
        return ThreadPoolExecutor(max_workers=8, thread_name_prefix="rlgf-ask")

    def _guide_ids(self, completion: Completion, behind: int) -> list[int]:
        """A guide's text as the policy's tokens, to stand behind so many of them: with EOS where the guide stopped by
        itself or spelled an ending, capped at the room that is left."""
        text, tokenizer = self.loaded.text, self.loaded.tokenizer
        # tokens decide, not their text: a response prefix that the policy wrote decodes to nothing
        encode = text.encode_continuation if behind else text.encode_response
        words = text.without_ending(tokenizer, completion.text)
        spelled = words != completion.text
        self.counts["guide_endings"] += spelled
        ids = encode(tokenizer, words) if words else []
        if spelled or completion.finish_reason == "stop":
            ids = [*ids, self.loaded.eos_id]
        room = self.sampling.max_new_tokens - behind
        self.counts["guide_capped"] += len(ids) > room
        return ids[:room]
