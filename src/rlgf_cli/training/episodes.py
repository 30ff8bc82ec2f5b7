"""An episode: one response, with the author of every token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

import torch

from rlgf_cli import noise
from rlgf_cli.algorithms.spec import Author, Regime
from rlgf_cli.functional import masks
from rlgf_cli.models.forward import TokenBatch
from rlgf_cli.models.prompts import encode_target
from rlgf_cli.protocols import Example, Score
from rlgf_cli.protocols.messages import to_json

Role = Literal["own", "member", "beside"]
AUTHOR_CODE: dict[Author, int] = {"policy": masks.POLICY, "guide": masks.GUIDE}


@dataclass
class Branch:
    """Another end of an episode, by the guide: from just before the action at the cut, or from just after it.

    ``ids`` is the whole response, of which the first ``start`` tokens are the episode's own.
    """

    side: Literal["before", "after"]
    start: int
    ids: list[int]
    finished: bool = False
    text: str = ""
    score: Score | None = None
    penalty: float = 0.0

    @property
    def value(self) -> float:
        """The score less the penalty for a missing EOS."""
        assert self.score is not None
        return self.score.value - self.penalty

    def to_record(self) -> dict[str, Any]:
        return {
            "side": self.side,
            "ids": self.ids[self.start :],
            "text": self.text,
            "finished": self.finished,
            "score": self.value if self.score else None,
        }


@dataclass
class Episode:
    """One response to one prompt.

    ``segments`` are (author, ids) in order; ``cut`` is the roll-in's length in tokens (0: no roll-in) and
    ``action_start`` where the last action before the cut begins (one token before it, or a whole word where the cut
    had to move). ``finished``: the last token is EOS. ``reached_cut``: the roll-in wrote all of the k tokens drawn.
    ``branches`` (guide_mc alone): the guide's other ends; the episode itself is the first from after the action.
    ``drawn``: the step and index that its sampling draws are a function of. ``sampler_logprobs``: where
    another engine than the own loop samples, its log-probability (nats) of the policy's token at a position.
    ``role``: ``own``, or a whole text of the guide as a ``member`` of its group or ``beside`` it (the guide-token
    term); ``learns``: whether the policy gradient is taken on its tokens.
    """

    index: int
    example: Example
    prompt_ids: list[int]
    group: int
    roll_out: Author
    segments: list[tuple[Author, list[int]]] = field(default_factory=list)
    cut: int = 0
    action_start: int = 0
    reached_cut: bool = False
    finished: bool = False
    text: str = ""
    score: Score | None = None
    penalty: float = 0.0
    drawn: tuple[int | str, int] = (0, 0)
    sampler_logprobs: dict[int, float] = field(default_factory=dict)
    branches: list[Branch] = field(default_factory=list)
    role: Role = "own"
    learns: bool = True

    @property
    def ids(self) -> list[int]:
        return [token for _, ids in self.segments for token in ids]

    @property
    def authors(self) -> list[int]:
        return [AUTHOR_CODE[author] for author, ids in self.segments for _ in ids]

    @property
    def length(self) -> int:
        return sum(len(ids) for _, ids in self.segments)

    @property
    def fits(self) -> Author:
        """The author whose critic is fitted on this episode: the one who finished it. A roll-in of the policy that
        ended by itself is a policy roll-out from the first token on.
        """
        return "policy" if self.policy_alone else self.roll_out

    @property
    def policy_alone(self) -> bool:
        return all(author == "policy" for author, _ in self.segments)

    @property
    def rollout_start(self) -> int:
        """The first token of the roll-out that a critic is fitted on."""
        return 0 if self.policy_alone else self.cut

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` tokens of a response that the policy alone wrote; it is then not finished."""
        self.segments = [("policy", self.ids[:length])] if length else []
        self.sampler_logprobs = {at: value for at, value in self.sampler_logprobs.items() if at < length}
        self.finished = False

    @property
    def value(self) -> float:
        """The score less the penalty for a missing EOS."""
        assert self.score is not None
        return self.score.value - self.penalty

    @property
    def mc_returns(self) -> tuple[float, float] | None:
        """Mean value of the texts from before and from after the action at the cut; None without branches or scores."""
        if self.score is None or not self.branches:
            return None
        before = [b.value for b in self.branches if b.side == "before"]
        after = [self.value, *(b.value for b in self.branches if b.side == "after")]
        return fmean(before), fmean(after)

    def to_record(self, loaded: Any) -> dict[str, Any]:
        """A line of ``rollouts/step_N.jsonl``: segment by segment, with authors."""
        texts = [text for _, text in segment_texts(self, loaded)]
        record = {
            "schema_version": 1,
            "id": self.example.id,
            "prompt": to_json(self.example.given),
            "segments": [
                {"author": author, "text": text, "ids": ids}
                for (author, ids), text in zip(self.segments, texts, strict=True)
            ],
            "text": self.text,
            "cut": self.cut,
            "finished": self.finished,
            "score": self.value if self.score else None,
            "parts": dict(self.score.parts) if self.score else {},
        }
        if self.role != "own":
            record["role"] = self.role
        if self.branches:
            record |= {"action_start": self.action_start, "branches": [b.to_record() for b in self.branches]}
        return record


def scored_texts(episodes: Iterable[Episode]) -> Iterator[tuple[Example, Episode | Branch]]:
    """Every text that the reward scores, with its example: each episode, followed by its branches."""
    for e in episodes:
        yield e.example, e
        yield from ((e.example, branch) for branch in e.branches)


def by_group(episodes: Iterable[Episode]) -> dict[int, list[Episode]]:
    """Episodes by the group that they are compared in."""
    groups: dict[int, list[Episode]] = {}
    for e in episodes:
        groups.setdefault(e.group, []).append(e)
    return groups


def without_variance(group: Sequence[Episode]) -> bool:
    """Whether all scores of a group are equal, so that it teaches nothing."""
    return len({e.value for e in group}) == 1


@dataclass(frozen=True)
class EpisodeBatch:
    """Episodes as tensors. B episodes, T response positions; masks are bool [B, T].

    ``real``: response tokens; ``policy``: those that the policy wrote; ``learned``: those that carry the loss;
    ``fit[author]``: those that the author's critic is fitted on; ``last``: the last token; ``scores``, ``groups``,
    ``finished`` (the text ended with EOS) [B]. ``differences`` [B]: mean value after the action at the cut less that
    before it, 0 where none is known. ``guide``: the guide's tokens that the guide-token term is taken on; ``own`` [B]:
    episodes of the policy; ``compared`` [B]: those that a group's baseline may count.
    """

    tokens: TokenBatch
    real: torch.Tensor
    policy: torch.Tensor
    learned: torch.Tensor
    fit: dict[str, torch.Tensor]
    last: torch.Tensor
    scores: torch.Tensor
    groups: torch.Tensor
    finished: torch.Tensor
    differences: torch.Tensor
    guide: torch.Tensor
    own: torch.Tensor
    compared: torch.Tensor


def build_batch(episodes: Sequence[Episode], regime: Regime, critics: Sequence[str], loaded: Any) -> EpisodeBatch:
    """Tensors of a step's episodes under its regime."""
    device = loaded.device
    tokens = TokenBatch.build(
        [e.prompt_ids for e in episodes],
        [e.ids for e in episodes],
        pad_id=loaded.pad_id,
        encoder_decoder=loaded.encoder_decoder,
        device=device,
    )
    width = tokens.response_ids.shape[1]
    authors = torch.full((len(episodes), width), masks.POLICY, dtype=torch.long)
    for i, episode in enumerate(episodes):
        authors[i, : episode.length] = torch.tensor(episode.authors)
    authors = authors.to(device)

    def column(values: list[int] | list[float]) -> torch.Tensor:
        return torch.tensor(values, device=device)

    real = masks.response_mask(tokens.lengths, width)
    own = column([int(e.role == "own") for e in episodes]).bool()
    learned = masks.author_mask(authors, real, AUTHOR_CODE[regime.learn_author])
    if regime.credit == "cut":
        reached = column([int(e.reached_cut) for e in episodes]).bool().unsqueeze(-1)
        starts, cuts = column([e.action_start for e in episodes]), column([e.cut for e in episodes])
        learned = learned & reached & masks.action_mask(starts, cuts, real)
    learned = learned & column([int(e.learns) for e in episodes]).bool().unsqueeze(-1)
    after_cut = masks.rollout_mask(column([e.rollout_start for e in episodes]), real)
    fit = {name: after_cut & column([int(e.fits == name) for e in episodes]).bool().unsqueeze(-1) for name in critics}
    return EpisodeBatch(
        tokens=tokens,
        real=real,
        policy=masks.author_mask(authors, real, masks.POLICY),
        learned=learned,
        fit=fit,
        last=masks.last_token(tokens.lengths, width),
        scores=torch.tensor([e.value if e.score is not None else 0.0 for e in episodes], device=device),
        groups=column([e.group for e in episodes]),
        finished=column([int(e.finished) for e in episodes]).bool(),
        differences=column([after - before for before, after in (e.mc_returns or (0.0, 0.0) for e in episodes)]),
        guide=_guide_tokens(regime, authors, real, own),
        own=own,
        compared=column([int(e.role != "beside") for e in episodes]).bool(),
    )


def _guide_tokens(regime: Regime, authors: torch.Tensor, real: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """The tokens of the guide-token term: the guide's, in its own texts or in roll-ins. [B, T] bool"""
    if regime.guide_term is None:
        return torch.zeros_like(real)
    rows = own if regime.guide_term.tokens == "prefix" else ~own
    return masks.author_mask(authors, real, masks.GUIDE) & rows.unsqueeze(-1)


def draw_references(loaded: Any, episodes: Sequence[Episode], limit: int, seed: int, step: int) -> TokenBatch:
    """One reference text per episode, drawn at random, with its EOS; at most ``limit`` tokens each, none for a text of
    the guide."""
    rows: list[list[int]] = []
    for e in episodes:
        if e.role != "own":
            rows.append([])
            continue
        draw = noise.uniforms(1, seed, "reference", step, e.index)[0]
        text = e.example.references[int(draw * len(e.example.references))]
        rows.append(encode_target(loaded, text, limit)[0])
    return TokenBatch.build(
        [e.prompt_ids for e in episodes],
        rows,
        pad_id=loaded.pad_id,
        encoder_decoder=loaded.encoder_decoder,
        device=loaded.device,
    )


def segment_texts(episode: Episode, loaded: Any) -> list[tuple[Author, str]]:
    """The text of each segment with its author. A character whose bytes two authors wrote is the second one's."""
    texts, ids, before = [], [], ""
    for author, own in episode.segments:
        ids += own
        text = loaded.text.decode_response(loaded.tokenizer, ids, strip=False)
        whole = text.rstrip("\ufffd") if len(ids) < episode.length else text
        texts.append((author, whole[len(before) :]))
        before = whole
    return texts
