"""A task so small that the best score of every algorithm is known exactly.

A response is two words and an end. After "left" one of four words is right, which one depends on the prompt, and the
text scores 0.7; after "right" another one is, and the text scores 1. The guide mostly goes left and mostly finishes
well there; after "right" it is lost. The start goes left more often than right, finishes badly left and well right. So

- the optimum is 1: go right;
- whoever imitates the guide ends at the guide's own value;
- the guide's values say that left is better (its texts from there score more): whoever acts best by them alone ends at
  0.7, twice the guide's value, which is all that one step of improvement over the guide can do;
- whoever learns from the policy's own roll-outs ends at the optimum.

A policy's value is not sampled: it is summed over every text that it can write.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

from rl import trainer_for
from rlgf_cli import noise
from rlgf_cli.config.common import LengthConfig, ModelConfig
from rlgf_cli.config.scratch import ScratchConfig
from rlgf_cli.models import scratch
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.prompts import Encoded, encode_prompts
from rlgf_cli.models.text import TextFormat
from rlgf_cli.protocols import Completion, Example, Guide, GuideAbilities, GuideRequest, Score
from rlgf_cli.training.rollout import RolloutGenerator, Sampling

PROMPTS = ("red", "green", "blue", "grey")
ANSWERS = ("one", "two", "three", "four")
LIMIT = 4
END = "."
"""Stands for EOS in a distribution over the next word."""

Next = Mapping[str, float]


def right_answer(prompt: str, side: str) -> str:
    return ANSWERS[(PROMPTS.index(prompt) + (side == "right")) % 4]


def score_of(prompt: str, text: str) -> float:
    worth = {"left": 0.7, "right": 1.0}
    return next((worth[side] for side in worth if text == f"{side} {right_answer(prompt, side)}"), 0.0)


def writer(first: Next, well: Next, prompt: str, words: Sequence[str]) -> Next:
    """The next word of an author that begins as ``first`` says and finds the right answer as ``well`` says."""
    if not words:
        return first
    if len(words) == 1 and words[0] in well:
        found = well[words[0]]
        rest = [*(a for a in ANSWERS if a != right_answer(prompt, words[0])), END]
        return {right_answer(prompt, words[0]): found, **dict.fromkeys(rest, (1 - found) / 4)}
    return {END: 0.9, **dict.fromkeys(ANSWERS, 0.025)}


def guide_next(prompt: str, words: Sequence[str]) -> Next:
    first = {"left": 0.7, "right": 0.2, **dict.fromkeys(ANSWERS, 0.025)}
    return writer(first, {"left": 0.8, "right": 0.02}, prompt, words)


def start_next(prompt: str, words: Sequence[str]) -> Next:
    first = {"left": 0.4, "right": 0.2, **dict.fromkeys(ANSWERS, 0.1)}
    return writer(first, {"left": 0.3, "right": 0.8}, prompt, words)


def worth(next_word: Callable[[str, Sequence[str]], Next], prompt: str, words: tuple[str, ...] = ()) -> float:
    """The expected score of an author's text, summed over all of its texts."""
    if len(words) == LIMIT:
        return score_of(prompt, " ".join(words))
    return sum(
        p * (score_of(prompt, " ".join(words)) if word == END else worth(next_word, prompt, (*words, word)))
        for word, p in next_word(prompt, words).items()
    )


GUIDE = fmean(worth(guide_next, prompt) for prompt in PROMPTS)
START = fmean(worth(start_next, prompt) for prompt in PROMPTS)
BEST, IMPROVED = 1.0, 0.7
"""The values of the guide and of the start, the optimum, and the best that one step over the guide can do."""


class Writer(Guide):
    """The guide: text from a known distribution, drawn by (seed, prompt, prefix, sample index) alone."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__("writer", GuideAbilities(live=True, continues=True))
        self.seed = seed

    def complete(self, requests: Sequence[GuideRequest]) -> list[Completion]:
        return [self._finish(request) for request in requests]

    def _finish(self, request: GuideRequest) -> Completion:
        prompt, words = request.example.prompt, request.prefix.split()
        begun = len(words)
        draws = noise.uniforms(LIMIT, self.seed, prompt, request.prefix, request.sample_index)
        for draw in draws[: request.max_new_tokens]:
            odds = guide_next(prompt, words)
            word = next(w for w, upto in zip(odds, itertools.accumulate(odds.values()), strict=True) if draw < upto)
            if word == END:
                return Completion(" ".join(words[begun:]), "stop", self.name)
            words.append(word)
        return Completion(" ".join(words[begun:]), "length", self.name)


def scorer(batch: Sequence[Example], texts: Sequence[str]) -> list[Score]:
    return [Score(score_of(example.prompt, text)) for example, text in zip(batch, texts, strict=True)]


def encoded(loaded: Loaded) -> list[Encoded]:
    return encode_prompts(loaded, [Example(p, p) for p in PROMPTS], LengthConfig(max_new_tokens=LIMIT))[0]


@torch.no_grad()
def value_of(loaded: Loaded) -> float:
    """The policy's mean value over the prompts: the probability of every text that it can write, times its score."""
    others = torch.tensor([i for i in range(len(loaded.tokenizer)) if i != loaded.eos_id])
    prompts = encoded(loaded)
    rows = torch.zeros(1, 0, dtype=torch.long)
    odds = [torch.ones(1, dtype=torch.double) for _ in prompts]
    total = 0.0
    for length in range(LIMIT + 1):
        texts = [loaded.text.decode_response(loaded.tokenizer, row) for row in rows.tolist()]
        for i, prompt in enumerate(prompts):
            scores = torch.tensor([score_of(prompt.example.prompt, text) for text in texts], dtype=torch.double)
            if length == LIMIT:
                total += float(odds[i] @ scores)
                continue
            ids = torch.cat([torch.tensor([prompt.ids]).expand(len(rows), -1), rows], dim=1)
            mask = torch.ones_like(ids)
            after = loaded.model(input_ids=ids, attention_mask=mask).logits[:, -1].double().softmax(-1)
            total += float((odds[i] * after[:, loaded.eos_id]) @ scores)
            odds[i] = (odds[i][:, None] * after[:, others]).flatten()
        rows = torch.cat([rows.repeat_interleave(len(others), 0), others.repeat(len(rows))[:, None]], dim=1)
    return total / len(prompts)


def start() -> Loaded:
    """A GPT-2 of one layer, fitted to the distribution of the start."""
    sizes = {"layers": 1, "hidden": 32, "heads": 2, "max_positions": 32, "tokenizer": {"kind": "word"}}
    loaded = scratch.build(
        ScratchConfig.model_validate({"architecture": "gpt2", **sizes}),
        model=ModelConfig(name="start", device="cpu"),
        prompts=PROMPTS,
        responses=[f"left right {' '.join(ANSWERS)}"],
        text=TextFormat(),
        seed=0,
    )
    ids = loaded.tokenizer.convert_tokens_to_ids
    texts = list(itertools.product(("left", "right", *ANSWERS), ANSWERS, ANSWERS))
    rows = torch.tensor([[*p.ids, *ids(list(words))] for p in encoded(loaded) for words in texts])
    targets = torch.full((len(rows), LIMIT, len(loaded.tokenizer)), 1e-6)
    for row, (prompt, words) in enumerate(itertools.product(PROMPTS, texts)):
        for place in range(LIMIT):
            for word, p in start_next(prompt, words[:place]).items():
                targets[row, place, loaded.eos_id if word == END else ids(word)] = p
    targets = targets / targets.sum(-1, keepdim=True)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.dim() > 1:  # GPT-2's own initialisation is made for width 768: it takes long to leave it here
                parameter.mul_(5.0)
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(200):
        logits = loaded.model(input_ids=rows).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loaded


def learned(
    start: Loaded,
    algorithm: str,
    seed: int,
    *,
    steps: int = 40,
    at: Sequence[int] = (),
    learning_rate: float = 2e-3,
    **parameters: Any,
) -> tuple[list[float], list[dict[str, Any]]]:
    """Train the start, 64 episodes a step; the policy's value after the steps ``at`` (the last one), and all rows."""
    loaded, guide = replace(start, model=deepcopy(start.model)), Writer(seed)
    trainer = trainer_for(
        loaded, algorithm, guide, parameters=parameters, learning_rate=learning_rate, episodes=64, seed=seed,
        scorer=scorer, minibatch_size=64, epochs=2,
    )  # fmt: skip
    trainer.prompts = encoded(loaded)
    trainer.generator = RolloutGenerator(loaded, Sampling(max_new_tokens=LIMIT), seed, guide=guide)
    trainer.scheduler = torch.optim.lr_scheduler.LinearLR(trainer.optimizer, 1.0, 0.05, steps)
    trainer.state.horizon = 3.0
    values, rows = [], []
    for step in range(1, steps + 1):
        rows.append(trainer.step()[0])
        if step in (at or (steps,)):
            values.append(value_of(loaded))
    return values, rows
