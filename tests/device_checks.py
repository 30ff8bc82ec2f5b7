"""Steps of training on the pretended device, for test_devices.py: in a process of its own, as the device is the whole
process's.

``python device_checks.py CHECKPOINTS`` (JSON: name to folder) prints JSON: for each check the error, or null.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

import pretended_device
from pretended_device import PretendedDevice, to_device
from rl import guide, loaded_from, trainer_for
from rlgf_cli.config.common import LoraConfig
from rlgf_cli.functional import masks
from rlgf_cli.models import forward, generate, packing
from rlgf_cli.models.load import add_lora
from rlgf_cli.training import episodes, minibatches, update

STEPS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ppo": ("gpt2", "ppo", {"kl_coef": 0.1}),
    "ppo, kl in the reward, entropy": (
        "llama", "ppo", {"kl_coef": 0.1, "kl_where": "reward", "accumulation": 2, "entropy_coef": 0.01},
    ),
    "ppo, encoder-decoder": ("t5", "ppo", {"kl_coef": 0.1}),
    "ppo++": ("llama", "ppo++", {"guide": True}),
    "aggrevated": ("gpt2", "aggrevated", {"guide": True}),
    "grpo, lora": ("qwen3", "grpo", {"lora": True}),
    "grpo, packed rows": ("llama", "grpo", {"packed": True}),
    "luffy": ("llama", "luffy", {"guide": True}),
    "prefix-rft": ("gpt2", "prefix-rft", {"guide": True}),
    "on-failure": ("llama", "on-failure", {"guide": True, "parameters": {"failed_at": 9.0}}),
}  # fmt: skip
"""A checkpoint, an algorithm, and what else: two steps of it are run on the device and on the CPU."""
FAMILIES = sorted({family for family, _, _ in STEPS.values()})


def step_rows(folder: str, algorithm: str, on_device: bool, options: dict[str, Any]) -> list[dict[str, float]]:
    """Two rows of metrics.jsonl. ``packed``: groups are packed though rows this short do not pay."""
    given = dict(options)
    if given.pop("packed", False):
        with mock.patch.object(forward, "saves", return_value=True):
            return step_rows(folder, algorithm, on_device, given)
    loaded = loaded_from(Path(folder))
    torch.manual_seed(0)
    if given.pop("lora", False):
        loaded = add_lora(loaded, LoraConfig(enabled=True, r=2, target_modules="all-linear"))
    if on_device:
        to_device(loaded.model)
    writer = guide() if given.pop("guide", False) else None
    torch.manual_seed(0)
    trainer = trainer_for(loaded, algorithm, writer, learning_rate=1e-3, **given)
    trainer.probe = None
    assert not trainer.model.sharing_problem, trainer.model.sharing_problem  # it would hide a tensor left on the CPU
    rows = [trainer.step()[0] for _ in range(2)]
    assert all(parameter.device == loaded.device for _, parameter in trainer.model.named_parameters())
    return rows


def run_step(folder: str, algorithm: str, options: dict[str, Any]) -> None:
    """The device's figures are the CPU's."""
    expected = step_rows(folder, algorithm, False, options)
    with PretendedDevice():
        found = step_rows(folder, algorithm, True, options)
    for row, plain in zip(found, expected, strict=True):
        for name, value in plain.items():
            if isinstance(value, float) and not name.startswith("time/"):
                assert math.isclose(row[name], value, rel_tol=1e-3, abs_tol=1e-6), (name, row[name], value)


@contextlib.contextmanager
def left_on_cpu(module: Any, function: str) -> Iterator[None]:
    """Plant the fault: ``torch.FUNCTION`` of a module makes its tensors on the CPU."""
    torch_of_module = module.torch

    def forgetful(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return getattr(torch, function)(*args, **kwargs)

    names = {name: getattr(torch, name) for name in dir(torch)}
    module.torch = SimpleNamespace(**{**names, function: forgetful})
    try:
        yield
    finally:
        module.torch = torch_of_module


PLANTED = [
    (forward, "arange"), (generate, "tensor"), (masks, "arange"), (episodes, "tensor"),
    (update, "zeros"), (minibatches, "zeros"), (packing, "zeros"),
]  # fmt: skip
"""Where a tensor can be left on the CPU."""


def label(module: Any, function: str) -> str:
    return f"planted: {module.__name__.rpartition('.')[2]}.{function}"


def planted(module: Any, function: str, folder: str) -> None:
    with left_on_cpu(module, function), PretendedDevice():
        # the update keeps the log-probabilities of its own passes where one minibatch is the whole step
        by_module = {packing: ("grpo", {"packed": True}), update: ("grpo", {"minibatch_size": 8})}
        algorithm, options = by_module.get(module, ("ppo", {"kl_coef": 0.1}))
        step_rows(folder, algorithm, True, options)


def checks(checkpoints: dict[str, str]) -> Iterator[tuple[str, Callable[[], None]]]:
    for name, (family, algorithm, options) in STEPS.items():
        yield name, lambda f=checkpoints[family], a=algorithm, o=options: run_step(f, a, o)  # type: ignore[misc]
    for module, function in PLANTED:
        yield label(module, function), lambda m=module, f=function: planted(m, f, checkpoints["llama"])  # type: ignore[misc]


def main() -> None:
    pretended_device.install()
    found: dict[str, str | None] = {}
    for name, check in checks(json.loads(sys.argv[1])):
        try:
            check()
            found[name] = None
        except Exception:  # noqa: BLE001 - whatever a check raises is its result
            found[name] = traceback.format_exc()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
