"""The learned policy: a small network over the features of a chain, and its folder.

A policy folder holds ``policy.safetensors`` and ``policy.json``: the operations with hashes of their prompts, the names
of the features, the steps of a chain (``horizon``), and the space that novelty was measured in.
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
_KEYS = {"operations", "features", "horizon", "hidden", "space"}


class PolicyNet(torch.nn.Module):
    """Two tanh layers, a head of logits that begins at zero (equal probabilities), and a value head."""

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

    def forward(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """observations [..., features] -> (logprobs [..., operations], values [...])."""
        hidden = self.body(observations)
        return self.logits(hidden).log_softmax(-1), self.value(hidden).squeeze(-1)


@dataclass
class LearnedPolicy:
    """Draws the operation from the network's probabilities. ``space``: the signature of the space it was trained in."""

    net: PolicyNet
    operations: Sequence[Operation]
    steps_per_chain: int
    space: str

    def observations(self, chain: Chain) -> np.ndarray:
        """The features before each of the chain's steps and after the last one. float32 [steps + 1, features]"""
        return np.stack([self._features(chain, t) for t in range(len(chain.steps) + 1)])

    def _features(self, chain: Chain, steps: int) -> np.ndarray:
        return features(chain.seed.prompt, chain.steps[:steps], self.operations, self.steps_per_chain)

    @torch.inference_mode()
    def choose(self, chains: Sequence[Chain], draws: np.ndarray) -> list[int]:
        """Inverse transform sampling: a draw in [0, 1) fixes the choice."""
        now = np.stack([self._features(chain, len(chain.steps)) for chain in chains])
        cumulative = self.net(torch.from_numpy(now))[0].double().exp().cumsum(-1).numpy()
        # the last sum may be a little under 1
        last = len(self.operations) - 1
        return [min(int(np.searchsorted(row, u, side="right")), last) for row, u in zip(cumulative, draws, strict=True)]

    def save(self, folder: Path) -> None:
        """Write the policy's two files into ``folder``."""
        with os_errors(folder):
            save_file({name: tensor.contiguous() for name, tensor in self.net.state_dict().items()}, folder / WEIGHTS)
        description = {
            "schema_version": SCHEMA_VERSION,
            "operations": _described(self.operations),
            "features": feature_names(self.operations),
            "horizon": self.steps_per_chain,
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
    where = str(folder / DESCRIPTION)
    saved = read_json(folder / DESCRIPTION)
    if not isinstance(saved, dict) or saved.get("schema_version") != SCHEMA_VERSION or not saved.keys() >= _KEYS:
        raise UserError("this is no policy that this rlgf reads", where=where, hint="train it anew")
    _refuse_other_operations(saved["operations"], _described(operations), where)
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


def _refuse_other_operations(trained: list[dict[str, Any]], given: list[dict[str, Any]], where: str) -> None:
    if trained == given:
        return
    theirs, ours = ([operation["name"] for operation in operations] for operations in (trained, given))
    if theirs != ours:
        message = f"the policy was trained with the operations {', '.join(theirs)}; these are {', '.join(ours)}"
    else:
        changed = next(a["name"] for a, b in zip(trained, given, strict=True) if a != b)
        message = f"the policy was trained with another prompt of the operation {changed!r}"
    raise UserError(message, where=where, hint="give --operations the file that it was trained with, or train anew")
