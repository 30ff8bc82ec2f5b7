"""What the tests of the training engine share: scripted authors, loaded tiny models, and short ways to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from conftest import toy_examples
from rlgf_cli.algorithms.spec import Regime
from rlgf_cli.config.common import LengthConfig, ModelConfig
from rlgf_cli.models.generate import Generated
from rlgf_cli.models.load import Loaded, load
from rlgf_cli.models.prompts import Encoded, encode_prompts
from rlgf_cli.protocols import Completion, Example, FinishReason, GuideAbilities, GuideRequest
from rlgf_cli.training.rollout import Roller, Sampling

PPO = Regime()
PPO_PP = Regime(roll_in="guide")
AGGREVATED = Regime(roll_in="policy", roll_out="guide")
BC = Regime(roll_out="guide", estimator="likelihood")

Answer = tuple[str, FinishReason]


class ScriptedGuide:
    """Answers from a function of the request, and remembers what it was asked."""

    def __init__(self, answer: Answer | Callable[[GuideRequest], Answer], *, live: bool = True) -> None:
        self.name = "scripted"
        self.abilities = GuideAbilities(live=live, continues=live)
        self._answer = answer if callable(answer) else lambda request: answer
        self.asked: list[GuideRequest] = []

    def complete(self, requests: Sequence[GuideRequest]) -> list[Completion]:
        self.asked += requests
        return [Completion(*self._answer(request), model="scripted") for request in requests]


def loaded_from(path: Path, **changes: Any) -> Loaded:
    return load(ModelConfig(name=str(path), device="cpu", **changes), for_training=True)


def examples(count: int) -> list[Example]:
    rows = toy_examples(count, seed=3)
    return [Example(r["id"], r["prompt"], tuple(r["references"]), r["meta"]) for r in rows]


def prompts_for(loaded: Loaded, count: int, *, repeat: int = 1) -> list[Encoded]:
    encoded, _ = encode_prompts(loaded, examples(count), LengthConfig(max_new_tokens=16))
    return [e for e in encoded for _ in range(repeat)]


def roller_for(loaded: Loaded, guide: Any = None, *, seed: int = 0, **changes: Any) -> Roller:
    """``changes``: fields of Sampling (12 new tokens by default), or of Roller."""
    own = {k: changes.pop(k) for k in ("covered", "whole_words", "use") if k in changes}
    return Roller(loaded, Sampling(**{"max_new_tokens": 12, **changes}), seed, guide=guide, **own)


class ScriptedPolicy:
    """In the place of ``sample``: every prompt's response is the same given ids, as far as the limit lets it."""

    def __init__(self, ids: Sequence[int], eos_id: int) -> None:
        self.ids, self.eos_id = list(ids), eos_id

    def __call__(
        self, model: Any, prompts: Any, *, prefixes: Any, max_new_tokens: Sequence[int], **_: Any
    ) -> list[Generated]:
        rows = []
        for prefix, limit in zip(prefixes, max_new_tokens, strict=True):
            assert prefix == self.ids[: len(prefix)]
            ids = self.ids[len(prefix) : len(prefix) + limit]
            rows.append(Generated(ids, bool(ids) and ids[-1] == self.eos_id))
        return rows


def chi_square(observed: Sequence[int]) -> float:
    """Of counts that should be equal."""
    expected = sum(observed) / len(observed)
    return sum((o - expected) ** 2 / expected for o in observed)


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
