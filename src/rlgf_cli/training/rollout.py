"""Writing episodes: who begins, where the cut falls, who finishes.

All randomness is a function of (seed, step, episode), so batch sizes and resuming change nothing.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlgf_cli import noise
from rlgf_cli.algorithms.spec import Regime
from rlgf_cli.models.generate import sample
from rlgf_cli.models.load import Loaded
from rlgf_cli.models.prompts import Encoded
from rlgf_cli.protocols import Completion, Guide, GuideRequest
from rlgf_cli.training.episodes import Episode

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
    batch_size: int = 64


@dataclass
class GuideUse:
    """How often the guide was asked, and with which sample index: part of the trainer's state, saved and restored.

    ``uses`` counts requests per prompt; inside training it is the sample index of a live guide, so that a cache
    never replays one text for ever.
    """

    uses: Counter[str] = field(default_factory=Counter)
    texts: Counter[str] = field(default_factory=Counter)

    def next_index(self, example_id: str) -> int:
        index = self.uses[example_id]
        self.uses[example_id] += 1
        return index

    @property
    def reuse(self) -> float:
        """Mean number of uses of each distinct text that was used."""
        return sum(self.texts.values()) / len(self.texts) if self.texts else 0.0


@dataclass
class Roller:
    """What a rollout needs: the policy's weights and tokenizer, the guide, and the sampling.

    ``covered``: ids of the prompts that the guide has text for (None: all). ``whole_words``: the guide has another
    tokenizer, so it is given prefixes that end where a word ends; with the policy's own tokenizer whole characters
    are enough.
    """

    loaded: Loaded
    sampling: Sampling
    seed: int
    guide: Guide | None = None
    use: GuideUse = field(default_factory=GuideUse)
    covered: frozenset[str] | None = None
    whole_words: bool = False
    guide_seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)

    def roll(
        self, regime: Regime, prompts: Sequence[Encoded], step: int, horizon: float, group_size: int = 1
    ) -> list[Episode]:
        """One episode per prompt. ``horizon``: the typical response length from which a policy's cut is drawn.

        With ``group_size`` above 1, neighbouring prompts are equal and share the roll-in.
        """
        self.counts = Counter()
        episodes = [Episode(i, p.example, p.ids, i // group_size, regime.roll_out) for i, p in enumerate(prompts)]
        draws = np.stack(
            [noise.uniforms(self.sampling.max_new_tokens, self.seed, "tokens", step, e.index) for e in episodes]
        )
        plan = [noise.uniforms(4, self.seed, "plan", step, e.group) for e in episodes]
        started = [p[0] < regime.rollin_prob and self._covers(e) for p, e in zip(plan, episodes, strict=True)]
        if regime.roll_in == "guide":
            self._guide_begins([e for e, s in zip(episodes, started, strict=True) if s], plan)
        elif regime.roll_in == "policy":
            self._policy_begins([e for e, s in zip(episodes, started, strict=True) if s], plan, draws, regime, horizon)
        open_ = [e for e in episodes if not e.finished and e.length < self.sampling.max_new_tokens]
        if regime.roll_out == "guide":
            asked = [e for e in open_ if self._covers(e)]
            answered = self._guide_finishes(asked, plan)
            # where the guide has no text, or gave none, the policy goes on: a text that merely stops would be scored
            unguided = [e for e in open_ if e.index not in answered]
            for e in unguided:
                e.cut, e.reached_cut = 0, False
            self._policy_writes(unguided, draws, self._room)
            self.counts["unguided"] += len(unguided)
        else:
            self._policy_writes(open_, draws, self._room)
        for episode in episodes:
            episode.finished = episode.length > 0 and episode.ids[-1] in self.loaded.eos_ids
            episode.text = self.loaded.text.decode_response(self.loaded.tokenizer, episode.ids)
        return episodes

    def _covers(self, episode: Episode) -> bool:
        return self.covered is None or episode.example.id in self.covered

    def _room(self, episode: Episode) -> int:
        return self.sampling.max_new_tokens - episode.length

    # the policy writes

    def _policy_writes(self, episodes: list[Episode], draws: np.ndarray, room: Any) -> None:
        """Append policy tokens, at most ``room(episode)`` each."""
        limits = [room(e) for e in episodes]
        pairs = [(e, n) for e, n in zip(episodes, limits, strict=True) if n > 0]
        if not pairs:
            return
        sampling = self.sampling
        rows = sample(
            self.loaded.model,
            [e.prompt_ids for e, _ in pairs],
            prefixes=[e.ids for e, _ in pairs],
            max_new_tokens=[n for _, n in pairs],
            uniforms=draws[[e.index for e, _ in pairs]],
            eos_ids=self.loaded.eos_ids,
            pad_id=self.loaded.pad_id,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_new_tokens=sampling.min_new_tokens,
            batch_size=sampling.batch_size,
            dtype=self.loaded.dtype,
        )
        for (episode, _), row in zip(pairs, rows, strict=True):
            self._append_policy(episode, row.ids)
            episode.finished = row.finished

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
        horizon: float,
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
        longest = max(1, min(regime.cut_horizon or math.ceil(horizon), self.sampling.max_new_tokens))
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
            e.segments, e.finished = [], False
            return
        drawn = 1 + int(draw * (len(whole) - 1))
        e.cut = next((n for n in range(drawn, len(whole)) if self._boundary(whole, n)), len(whole))
        e.action_start, e.reached_cut = e.cut - 1, True
        self.counts["cuts_moved"] += e.cut != drawn
        if e.cut < len(whole):
            e.segments, e.finished = [("policy", whole[: e.cut])], False

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
                    e.segments, e.finished = [("policy", ids[:end])], False
                elif not e.finished and self._room(e) > 0:
                    still.append(e)
            moving = still

    def _boundary(self, ids: list[int], n: int) -> bool:
        """Whether the text of ``ids[:n]`` stays as it is whatever follows, as far as ``ids`` shows what follows.

        Never inside a character (the decoder shows a replacement character). With ``whole_words`` not inside a
        word either: its end shows in a following token that goes on with something else, EOS included.
        """
        before = self._text(ids[:n])
        if before.endswith("\ufffd"):
            return False
        if not self.whole_words or not before or not before[-1].isalnum():
            return True
        if n == len(ids):
            return False
        behind = self._text(ids[: n + 1])[len(before) :]
        return not behind or not (behind[0].isalnum() or behind[0] == "\ufffd")

    def _text(self, ids: list[int]) -> str:
        return self.loaded.text.decode_response(self.loaded.tokenizer, ids, strip=False)

    # the guide writes

    def _guide_begins(self, episodes: list[Episode], plan: list[np.ndarray]) -> None:
        """The guide's text, cut at k uniform on 1..L-1: never its EOS. A group shares one text and one cut."""
        heads = list({e.group: e for e in episodes}.values())
        texts = {e.group: self._guide_ids(c, e) for e, c in zip(heads, self._ask(heads, plan), strict=True)}
        for episode in episodes:
            ids = texts[episode.group]
            if len(ids) >= 2:
                episode.cut = 1 + int(plan[episode.index][1] * (len(ids) - 1))
                episode.segments = [("guide", ids[: episode.cut])]

    def _guide_finishes(self, episodes: list[Episode], plan: list[np.ndarray]) -> set[int]:
        """The guide goes on from what is there, within the total length. Returns the episodes that it wrote for."""
        answered = set()
        for episode, completion in zip(episodes, self._ask(episodes, plan), strict=True):
            if ids := self._guide_ids(completion, episode):
                episode.segments.append(("guide", ids))
                answered.add(episode.index)
        return answered

    def _ask(self, episodes: list[Episode], plan: list[np.ndarray]) -> list[Completion]:
        if not episodes:
            return []
        assert self.guide is not None
        requests = []
        for e in episodes:
            live = self.guide.abilities.live
            # recorded text: one of the samples at random per use; live: a fresh sample per use of the prompt
            index = self.use.next_index(e.example.id) if live else int(plan[e.index][2] * (1 << 30))
            requests.append(GuideRequest(e.example, self._text(e.ids), index, self._room(e)))
        before = time.perf_counter()
        completions = self.guide.complete(requests)
        self.guide_seconds += time.perf_counter() - before
        for request, completion in zip(requests, completions, strict=True):
            self.use.texts[f"{request.example.id}\x1f{noise.short_hash(request.prefix + completion.text)}"] += 1
        self.counts["guide_requests"] += len(requests)
        return completions

    def _guide_ids(self, completion: Completion, episode: Episode) -> list[int]:
        """A guide's text as the policy's tokens, to stand behind what the episode holds: with EOS where the guide
        stopped by itself, capped at the room that is left."""
        text, tokenizer = self.loaded.text, self.loaded.tokenizer
        # tokens decide, not their text: a response prefix that the policy wrote decodes to nothing
        encode = text.encode_continuation if episode.segments else text.encode_response
        ids = encode(tokenizer, completion.text) if completion.text else []
        if completion.finish_reason == "stop":
            ids = [*ids, self.loaded.eos_id]
        room = self._room(episode)
        self.counts["guide_capped"] += len(ids) > room
        return ids[:room]
