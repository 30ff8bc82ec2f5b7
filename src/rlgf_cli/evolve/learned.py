"""The learned policy: a small network over a chain's features, and its folder.

A policy folder holds ``policy.safetensors`` and ``policy.json``: the operations with hashes of their prompts, the names
of the features, the horizon, the space that novelty was measured in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rlgf_cli import noise
from rlgf_cli.artifacts.disk import os_errors
from rlgf_cli.artifacts.jsonl import read_json, write_json
from rlgf_cli.artifacts.records import SCHEMA_VERSION
from rlgf_cli.errors import UserError, did_you_mean
from rlgf_cli.evolve.environment import Chain
from rlgf_cli.evolve.features import feature_names, features
from rlgf_cli.evolve.operations import Operation
from rlgf_cli.evolve.policies import BASELINES, Policy

DESCRIPTION, WEIGHTS = "policy.json", "policy.safetensors"
_SAID = {"operations", "features", "horizon", "hidden", "space"}


class PolicyNet(torch.nn.Module):
    """Two layers of tanh, a head of logits that begins at zero (every operation equally likely), a value head."""

    def __init__(self, n_features: int, n_operations: int, hidden: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = torch.nn.Sequential(
                torch.nn.Linear(n_features, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, hidden), torch.nn.Tanh()
            )
            self.logits = torch.nn.Linear(hidden, n_operations)
            self.value = torch.nn.Linear(hidden, 1)
        torch.nn.init.zeros_(self.logits.weight)
        torch.nn.init.zeros_(self.logits.bias)

    def forward(self, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """seen [..., features] -> (log-probabilities [..., operations], values [...])."""
        hidden = self.body(seen)
        return self.logits(hidden).log_softmax(-1), self.value(hidden).squeeze(-1)


@dataclass
class LearnedPolicy:
    """Draws the operation from the network's probabilities. ``space``: the signature of the one it learned in."""

    net: PolicyNet
    operations: Sequence[Operation]
    horizon: int
    space: str

    def seen(self, chain: Chain) -> np.ndarray:
        """What it sees before each of the chain's steps and after the last one. float32 [steps + 1, features]"""
        prompt, steps = chain.seed.prompt, chain.steps
        return np.stack([features(prompt, steps[:t], self.operations, self.horizon) for t in range(len(steps) + 1)])

    @torch.inference_mode()
    def choose(self, chains: Sequence[Chain], draws: np.ndarray) -> list[int]:
        """By the inverse of the distribution function: a draw in [0, 1) fixes the choice."""
        now = [features(c.seed.prompt, c.steps, self.operations, self.horizon) for c in chains]
        logprobs, _ = self.net(torch.from_numpy(np.stack(now)))
        below = logprobs.double().exp().cumsum(-1).numpy()
        # the last sum may be a little under 1
        return [
            min(int(np.searchsorted(row, u, side="right")), len(row) - 1) for row, u in zip(below, draws, strict=True)
        ]

    def save(self, folder: Path) -> None:
        """Write the policy's two files into ``folder``."""
        with os_errors(folder):
            save_file({name: tensor.contiguous() for name, tensor in self.net.state_dict().items()}, folder / WEIGHTS)
        description = {
            "schema_version": SCHEMA_VERSION,
            "operations": _described(self.operations),
            "features": feature_names(self.operations),
            "horizon": self.horizon,
            "hidden": self.net.logits.in_features,
            "space": self.space,
        }
        write_json(folder / DESCRIPTION, description)


def load_policy(name: str, operations: Sequence[Operation]) -> Policy:
    """``random``, ``round-robin``, ``paper``, or the folder of ``rlgf evolve train``.

    Raises UserError for another name, a folder without a policy, and a policy that was trained with other operations.
    """
    if name in BASELINES:
        return BASELINES[name](operations)
    folder = Path(name)
    if not folder.is_dir():
        hint = did_you_mean(name, BASELINES) + "; or the folder of rlgf evolve train"
        raise UserError(f"there is no policy {name!r}", hint=hint)
    if not (folder / DESCRIPTION).is_file():
        hint = "rlgf evolve train writes it when its first iteration is done; a baseline is given by its name"
        raise UserError("this folder holds no learned policy", where=name, hint=hint)
    saved = read_json(folder / DESCRIPTION)
    where = str(folder / DESCRIPTION)
    if not isinstance(saved, dict) or saved.get("schema_version") != SCHEMA_VERSION or not saved.keys() >= _SAID:
        raise UserError("this is no policy that this rlgf reads", where=where, hint="train it anew")
    _refuse_others(saved["operations"], _described(operations), where)
    if saved["features"] != feature_names(operations):
        raise UserError("the policy sees other features than this rlgf makes", where=where, hint="train it anew")
    net = PolicyNet(len(saved["features"]), len(operations), saved["hidden"], seed=0)
    try:
        net.load_state_dict(load_file(folder / WEIGHTS))
    except (SafetensorError, RuntimeError, FileNotFoundError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"the weights cannot be read: {first}", where=str(folder / WEIGHTS), hint="train it anew"
        ) from None
    return LearnedPolicy(net.eval(), operations, saved["horizon"], saved["space"])


def _described(operations: Sequence[Operation]) -> list[dict[str, Any]]:
    return [
        {"name": operation.name, "breadth": operation.breadth, "prompt_hash": noise.short_hash(operation.prompt)}
        for operation in operations
    ]


def _refuse_others(trained: list[dict[str, Any]], given: list[dict[str, Any]], where: str) -> None:
    if trained == given:
        return
    names = [[operation["name"] for operation in found] for found in (trained, given)]
    if names[0] != names[1]:
        what = f"the policy was trained with the operations {', '.join(names[0])}; these are {', '.join(names[1])}"
    else:
        other = next(a["name"] for a, b in zip(trained, given, strict=True) if a != b)
        what = f"the policy was trained with another prompt of the operation {other!r}"
    raise UserError(what, where=where, hint="give --operations the file that it was trained with, or train anew")
