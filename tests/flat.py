"""A task without anything to learn: every text scores ``mean`` +- 0.1, whatever it says.

A learner should not change. A value head that starts far from the mean score, with lambda below 1,
makes the advantage a function of the position instead, with EOS on top (or at the bottom, for negative scores): lengths
collapse (VC-PPO, arXiv 2503.01491).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from statistics import fmean
from typing import Any

from rl import configured_trainer
from rlgf_cli import noise
from rlgf_cli.algorithms.spec import Regime
from rlgf_cli.config.common import LengthConfig, ModelConfig
from rlgf_cli.config.scratch import ScratchConfig
from rlgf_cli.models import scratch
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.prompts import Encoded, encode_prompts
from rlgf_cli.models.text import TextFormat
from rlgf_cli.protocols import Example, Score
from rlgf_cli.training.loop import Trainer
from rlgf_cli.training.rollout import RolloutGenerator, Sampling

LIMIT = 64
PROMPTS = [f"w{i}" for i in range(7)]


def start(words: int = 14) -> Loaded:
    """A GPT-2 of one layer with random weights: it ends a text after about as many tokens as it has words."""
    sizes = {"layers": 1, "hidden": 32, "heads": 2, "max_positions": LIMIT + 8, "tokenizer": {"kind": "word"}}
    return scratch.build(
        ScratchConfig.model_validate({"architecture": "gpt2", **sizes}),
        model=ModelConfig(name="start", device="cpu"),
        prompts=PROMPTS,
        responses=[" ".join(f"w{i}" for i in range(words))],
        text=TextFormat(),
        seed=0,
    )


def trainer(start: Loaded, mean: float, seed: int, *, episodes: int = 32, sets: Sequence[str] = ()) -> Trainer:
    """The loop as ``rlgf train`` makes it, with its defaults but for the learning rate and the sizes; ``sets``: as
    after --set."""
    loaded = replace(start, model=deepcopy(start.model))
    sizes = [f"rollout.episodes={episodes}", f"rollout.batch_size={episodes}", f"ppo.minibatch_size={episodes // 2}"]
    own = [*sizes, f"lengths.max_new_tokens={LIMIT}", "optim.learning_rate=3e-4", "optim.schedule=constant"]
    calls = [0]

    def scorer(batch: Sequence[Example], texts: Sequence[str]) -> list[Score]:
        calls[0] += 1
        return [Score(mean + 0.1 * x) for x in noise.generator(seed, "flat", calls[0]).standard_normal(len(texts))]

    return configured_trainer(loaded, prompts(loaded), scorer, seed=seed, sets=[*own, *sets])


def prompts(loaded: Loaded) -> list[Encoded]:
    return encode_prompts(loaded, [Example(word, word) for word in PROMPTS], LengthConfig(max_new_tokens=LIMIT))[0]


def mean_length(loaded: Loaded, texts: int = 1000) -> float:
    """Mean length of texts that the policy generates, with the same draws every time."""
    generator = RolloutGenerator(loaded, Sampling(max_new_tokens=LIMIT, batch_size=500), 1)
    asked = prompts(loaded) * (texts // len(PROMPTS))
    return fmean(e.length for e in generator.generate(Regime(), asked, 0, 1.0))


def drift(start: Loaded, mean: float, seed: int, *, steps: int = 30, **more: Any) -> float:
    """Mean length after ``steps`` iterations, as a share of what it was before."""
    made = trainer(start, mean, seed, **more)
    for _ in range(steps):
        made.step()
    return mean_length(made.model.loaded) / mean_length(start)
