"""Policies over operations: the baselines, and the rollout of a policy in the environment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from rlgf_cli import noise
from rlgf_cli.errors import UserError
from rlgf_cli.evolve.environment import Chain, Environment
from rlgf_cli.evolve.operations import Operation


class Policy(Protocol):
    """Chooses the next operation of every chain. ``draws``: one number in [0, 1) per chain, the only randomness."""

    @property
    def space(self) -> str | None:
        """The signature of the space that novelty was measured in when the policy learned; None: it has not learned."""
        ...

    def choose(self, chains: Sequence[Chain], draws: np.ndarray) -> list[int]:
        """The index of each chain's operation."""
        ...


class RandomPolicy:
    """Every operation with the same probability, as in WizardLM (Xu et al. 2023, arXiv 2304.12244)."""

    space: str | None = None

    def __init__(self, operations: Sequence[Operation]) -> None:
        self._n = len(operations)

    def choose(self, chains: Sequence[Chain], draws: np.ndarray) -> list[int]:
        return [int(draw * self._n) for draw in draws]


class RoundRobinPolicy(RandomPolicy):
    """One operation after the other, in the file's order."""

    def choose(self, chains: Sequence[Chain], draws: np.ndarray) -> list[int]:
        return [len(chain.steps) % self._n for chain in chains]


class PaperPolicy:
    """The schedule of TeaMs-RL's released code: breadth at the first and the fourth of six steps (and every third one
    after them), where its policy has no choice; at the others any operation in depth, with the same probability.
    """

    space: str | None = None

    def __init__(self, operations: Sequence[Operation]) -> None:
        self._breadth = [i for i, operation in enumerate(operations) if operation.breadth]
        self._depth = [i for i, operation in enumerate(operations) if not operation.breadth]
        if not self._breadth or not self._depth:
            raise UserError(
                f"the paper's schedule needs an operation with breadth: {'true' if self._depth else 'false'}",
                hint="take another policy, or say of the operations which of them have breadth",
            )

    def choose(self, chains: Sequence[Chain], draws: np.ndarray) -> list[int]:
        kinds = [self._breadth if len(chain.steps) % 3 == 0 else self._depth for chain in chains]
        return [kind[int(draw * len(kind))] for kind, draw in zip(kinds, draws, strict=True)]


BASELINES: dict[str, Callable[[Sequence[Operation]], Policy]] = {
    "random": RandomPolicy,
    "round-robin": RoundRobinPolicy,
    "paper": PaperPolicy,
}


def draws_for(chains: Sequence[Chain], seed: int) -> np.ndarray:
    """A number in [0, 1) for each chain's next choice, a function of the seed, the chain and the step. [chains]"""
    return np.array(
        [noise.uniforms(1, seed, "operation", c.seed.id, c.visit, len(c.steps))[0] for c in chains], dtype=float
    )


def rollout(environment: Environment, chains: Sequence[Chain], policy: Policy, steps: int, seed: int) -> None:
    """Take ``steps`` steps with every chain, all chains side by side."""
    for _ in range(steps):
        environment.step(chains, policy.choose(chains, draws_for(chains, seed)))
