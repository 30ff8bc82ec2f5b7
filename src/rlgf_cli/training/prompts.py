"""Choice of the prompts of an iteration."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from rlgf_cli import noise
from rlgf_cli.models.prompts import Encoded


def step_prompts(prompts: Sequence[Encoded], seed: int, step: int, *, groups: int, group_size: int) -> list[Encoded]:
    """The step's prompts, each ``group_size`` times, in an order of each epoch's own.

    A function of (seed, step): a resumed run goes on where it was.
    """
    chosen: list[Encoded] = []
    permutations: dict[int, Any] = {}
    for i in range(step * groups, (step + 1) * groups):
        epoch, position = divmod(i, len(prompts))
        if epoch not in permutations:
            permutations[epoch] = noise.generator(seed, "order", epoch).permutation(len(prompts))
        chosen += [prompts[permutations[epoch][position]]] * group_size
    return chosen


def resampled_prompts(
    prompts: Sequence[Encoded], seed: int, key: str, used: Collection[str], *, groups: int, group_size: int
) -> list[Encoded]:
    """Prompts that the step does not have yet (``used``: ids of those that it has; of any, where it has them all).

    A function of (seed, key).
    """
    others = [p for p in prompts if p.example.id not in used] or prompts
    order = noise.generator(seed, "resample", key).permutation(len(others))
    return [others[order[i % len(others)]] for i in range(groups) for _ in range(group_size)]
