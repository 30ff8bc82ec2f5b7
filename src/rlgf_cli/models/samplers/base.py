"""What samples the policy's tokens: the training model itself, or vLLM with a copy of its weights.

The training model computes the log-probabilities of the loss, so an engine that computes in another type, or with other
kernels, changes only by its rounding which tokens are sampled. The gap between its log-probabilities and the training
model's is in every row of metrics.jsonl (``sampler/gap``) and is checked by the invariants of step 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rlgf_cli.models.generate import Generated, sample
from rlgf_cli.models.loaded import Loaded

OnBatch = Callable[[list[int], list[Generated]], None]


@dataclass(frozen=True)
class Distribution:
    """The distribution that the policy's tokens are sampled from. ``min_new_tokens``: no EOS before so many tokens,
    prefix included; ``ban_control``: no control token (:attr:`Loaded.control_ids`)."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_new_tokens: int = 0
    ban_control: bool = False


@dataclass(frozen=True)
class SampleRequest:
    """N texts to continue: prompts and prefixes [N] as ids, and at most ``max_new_tokens`` [N] more tokens for each.

    ``uniforms`` [N, T] in [0, 1): column t is the draw for the response's t-th token; a vLLM engine takes the seed of a
    row from that of its next token. None is greedy.
    """

    prompts: Sequence[Sequence[int]]
    prefixes: Sequence[Sequence[int]]
    max_new_tokens: Sequence[int]
    uniforms: np.ndarray | None
    distribution: Distribution = Distribution()


class Sampler(ABC):
    """Samples the policy's tokens. ``separate``: with weights of its own, which :meth:`send` renews before a step, and
    log-probabilities of its own, which :attr:`Generated.logprobs` reports."""

    separate: ClassVar[bool] = True

    @abstractmethod
    def sample(
        self, request: SampleRequest, *, batch_size: int = 64, on_batch: OnBatch | None = None
    ) -> list[Generated]:
        """Continue each prompt and prefix.

        The own loop samples ``batch_size`` rows at a time and calls ``on_batch`` with the rows and responses of each
        batch; vLLM makes the batches itself and does not.
        """

    def send(self) -> None:  # noqa: B027 - the own loop has nothing to do
        """Give the engine the policy's present weights. Every process of a run calls it."""

    def sleep(self) -> None:  # noqa: B027 - the own loop has nothing to do
        """Free the engine's memory on the device until the next :meth:`send`, where it can be freed."""

    def close(self) -> None:  # noqa: B027 - the own loop has nothing to do
        """End the engine."""


class OwnSampler(Sampler):
    """The project's own decoding loop on the training model: each token is a function of its uniform draw."""

    separate = False

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded

    def sample(
        self, request: SampleRequest, *, batch_size: int = 64, on_batch: OnBatch | None = None
    ) -> list[Generated]:
        loaded, distribution = self.loaded, request.distribution
        return sample(
            loaded.model,
            request.prompts,
            prefixes=request.prefixes,
            max_new_tokens=request.max_new_tokens,
            uniforms=request.uniforms,
            eos_ids=loaded.eos_ids,
            pad_id=loaded.pad_id,
            banned_ids=loaded.control_ids if distribution.ban_control else (),
            temperature=distribution.temperature,
            top_k=distribution.top_k,
            top_p=distribution.top_p,
            min_new_tokens=distribution.min_new_tokens,
            batch_size=batch_size,
            dtype=loaded.dtype,
            on_batch=on_batch,
        )
