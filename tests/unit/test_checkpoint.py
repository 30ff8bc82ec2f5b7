"""Checkpoints: bit-exact, whole or not there, and honest about a full disk."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from rl import PPO, generator_for, loaded_from, prompts_for, state_of, step_data, update_settings
from rlgf_cli.artifacts import checkpoints
from rlgf_cli.artifacts.disk import RememberingWriter, os_errors
from rlgf_cli.config.common import LoraConfig
from rlgf_cli.errors import UserError
from rlgf_cli.models.actor_critic import ActorCritic
from rlgf_cli.models.load import add_lora
from rlgf_cli.training import checkpoint
from rlgf_cli.training.checkpoint import TrainerState
from rlgf_cli.training.optimizer import make_optimizer
from rlgf_cli.training.update import update

STATE = TrainerState(7, 0.1 + 0.2, 11 / 3, {"policy": 4}, {"a": 3}, {"a\x1fdeadbeef": 2})


def build(path: Path, *, mode: str = "shared", lora: bool = False) -> tuple[ActorCritic, Any, Any]:
    loaded = loaded_from(path)
    if lora:
        loaded = add_lora(loaded, LoraConfig(enabled=True, r=2, target_modules="all-linear"))
    model = ActorCritic(loaded, ["policy", "guide"], mode=mode, with_ref_model=True)
    optimizer = make_optimizer(model.trainable(), 1e-2, 0.1)
    return model, optimizer, get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=9)


def train(model: ActorCritic, optimizer: Any, scheduler: Any, step: int) -> None:
    generator = generator_for(model.loaded)
    episodes = generator.generate(PPO, prompts_for(model.loaded, 6), step, 9.0)
    data = step_data(model, PPO, episodes, generator.sampling, critics=["policy", "guide"])
    update(model, optimizer, data, generator.sampling, update_settings(), seed=0, step=step)
    scheduler.step()


def assert_equal(one: tuple[ActorCritic, Any, Any], other: tuple[ActorCritic, Any, Any]) -> None:
    for a, b in ((one[0].policy, other[0].policy), (one[0].critics, other[0].critics)):
        first, second = state_of(a), state_of(b)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert str(one[1].state_dict()) == str(other[1].state_dict())
    assert one[2].state_dict() == other[2].state_dict()


@pytest.mark.parametrize(("mode", "lora"), [("shared", False), ("separate", False), ("shared", True)])
def test_a_restored_run_is_bit_equal_and_goes_on_bit_equal(
    any_model: Path, tmp_path: Path, mode: str, lora: bool
) -> None:
    """All states, and the next update from them; a fresh adapter begins elsewhere and is brought back."""
    original = build(any_model, mode=mode, lora=lora)
    for step in range(2):  # the first one's learning rate is 0: the schedule warms up
        train(*original, step=step)
    checkpoint.save(tmp_path / "step_1", *original, STATE)
    torch.manual_seed(99)
    resumed = build(any_model, mode=mode, lora=lora)
    assert checkpoint.restore(tmp_path / "step_1", *resumed) == STATE
    assert_equal(original, resumed)
    for setup in (original, resumed):
        train(*setup, step=2)
    assert_equal(original, resumed)


@pytest.fixture
def saved(tiny_gpt2: Path, tmp_path: Path) -> tuple[Path, tuple[ActorCritic, Any, Any]]:
    setup = build(tiny_gpt2)
    for step in (2, 10):
        checkpoint.save(tmp_path / f"step_{step}", *setup, STATE)
    return tmp_path, setup


def test_the_newest_is_by_number_and_what_is_not_whole_does_not_exist(saved: Any) -> None:
    root, _ = saved
    assert [f.name for f in checkpoints.complete_checkpoints(root)] == ["step_2", "step_10"]
    listed = json.loads((root / "step_10" / "COMPLETE").read_text())["files"]
    assert {"model.safetensors", "critics.safetensors", "optimizer.pt", "state.json", "rlgf_text.json"} <= set(listed)
    assert set(listed) | {"COMPLETE"} == {p.name for p in (root / "step_10").iterdir()}
    weights = root / "step_10" / "model.safetensors"
    content = weights.read_bytes()
    for damage in (lambda: weights.write_bytes(content[:-1]), weights.unlink, (root / "step_10" / "COMPLETE").unlink):
        damage()
        assert [f.name for f in checkpoints.complete_checkpoints(root)] == ["step_2"]


def test_rotation_keeps_the_newest_and_clears_what_a_crash_left(saved: Any) -> None:
    root, _ = saved
    (root / ".step_11.tmp").mkdir()
    (root / ".step_11.tmp" / "optimizer.pt").write_bytes(b"half")
    (root / "mine").mkdir()
    checkpoints.rotate(root, None)
    assert sorted(p.name for p in root.iterdir()) == ["mine", "step_10", "step_2"]
    checkpoints.rotate(root, 1)
    assert sorted(p.name for p in root.iterdir()) == ["mine", "step_10"]


def test_a_checkpoint_of_another_model_is_refused(saved: Any, tiny_llama: Path, tiny_gpt2: Path) -> None:
    root, _ = saved
    with pytest.raises(UserError, match="not those of this model"):
        checkpoint.restore(root / "step_2", *build(tiny_llama))
    with pytest.raises((UserError, RuntimeError)):
        checkpoint.restore(root / "step_2", *build(tiny_gpt2, mode="separate"))


@pytest.mark.parametrize("failing", ["save_pretrained", "save_file", "write_json"])
def test_a_save_that_fails_leaves_the_old_checkpoint_and_nothing_half_made(
    saved: Any, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """The Rust libraries wrap the system's error; it must come out as the OSError that it was."""
    root: Path = saved[0]
    model, optimizer, scheduler = saved[1]

    def full(*_: Any, **__: Any) -> None:
        raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")

    if failing == "save_pretrained":
        monkeypatch.setattr(model.loaded.model, "save_pretrained", full)
    elif failing == "save_file":
        monkeypatch.setattr(checkpoint, failing, full)
    else:
        monkeypatch.setattr(checkpoint, failing, lambda *_: open("/dev/full", "w").write("x" * 10_000))  # noqa: PTH123, SIM115
    with pytest.raises(OSError) as refused:
        checkpoint.save(root / "step_11", model, optimizer, scheduler, STATE)
    assert refused.value.errno == errno.ENOSPC
    assert sorted(p.name for p in root.iterdir()) == ["step_10", "step_2"]


def test_torch_save_on_a_full_disk_is_an_oserror() -> None:
    """By itself torch reports an inconsistency of its own."""
    with pytest.raises(OSError) as refused, RememberingWriter(Path("/dev/full")) as stream:
        torch.save({"a": torch.zeros(100_000)}, stream)  # type: ignore[arg-type]
    assert (refused.value.errno, refused.value.filename) == (errno.ENOSPC, "/dev/full")


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(KeyError), os_errors(tmp_path):
        raise KeyError("x")
    with pytest.raises(ZeroDivisionError), RememberingWriter(tmp_path / "x") as stream:
        stream.write(b"abc")
        raise ZeroDivisionError
    with RememberingWriter(tmp_path / "y") as stream:
        torch.save({"a": torch.arange(5)}, stream)  # type: ignore[arg-type]
    assert torch.load(tmp_path / "y")["a"].tolist() == [0, 1, 2, 3, 4]
