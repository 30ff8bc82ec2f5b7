"""Checkpoints that resume exactly: policy, critics, optimizer, schedule and the trainer's state.

A checkpoint is written under a temporary name; its ``COMPLETE`` file, written last, lists every file with its size. One
without it, or whose files do not match it, does not exist.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors.torch import load_file, save_file

from rlgf_cli.artifacts.disk import RememberingWriter, os_errors
from rlgf_cli.artifacts.jsonl import read_json, write_json
from rlgf_cli.errors import UserError
from rlgf_cli.models import load as loading
from rlgf_cli.models.actor_critic import ActorCritic


@dataclass
class TrainerState:
    """What the loop carries from step to step, apart from weights and optimizer.

    ``horizon``: recent mean response length, from which the policy's cut is drawn; ``critic_steps``: steps in which
    each critic was fitted; ``guide_uses``/``guide_texts``: see GuideUse.
    """

    step: int = 0
    kl_coef: float = 0.0
    horizon: float = 1.0
    critic_steps: dict[str, int] = field(default_factory=dict)
    guide_uses: dict[str, int] = field(default_factory=dict)
    guide_texts: dict[str, int] = field(default_factory=dict)


def save(
    folder: Path, model: ActorCritic, optimizer: torch.optim.Optimizer, scheduler: Any, state: TrainerState
) -> None:
    """Write ``folder`` whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        loading.save(temporary, model.loaded)
        with os_errors(temporary):
            save_file(_critic_tensors(model), temporary / "critics.safetensors")
        with RememberingWriter(temporary / "optimizer.pt") as stream:
            saved = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
            torch.save(saved, cast("IO[bytes]", stream))
        write_json(temporary / "state.json", asdict(state))
        files = {str(p.relative_to(temporary)): p.stat().st_size for p in sorted(temporary.rglob("*")) if p.is_file()}
        write_json(temporary / "COMPLETE", {"files": files})
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # on a full disk, half a checkpoint is all that is in the way
        raise


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint was written to its end and every file is still as long as it was."""
    if not (folder / "COMPLETE").is_file():
        return False
    files = read_json(folder / "COMPLETE")["files"]
    return all((folder / n).is_file() and (folder / n).stat().st_size == size for n, size in files.items())


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def complete_checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints below ``root``, oldest first."""
    return sorted((f for f in root.glob("step_*") if f.is_dir() and is_complete(f)), key=step_of)


def rotate(root: Path, keep: int | None) -> None:
    """Remove all but the newest ``keep`` complete checkpoints (None: keep all), and what a crash left half written."""
    for torn in root.glob(".step_*.tmp"):
        shutil.rmtree(torn, ignore_errors=True)
    if keep is not None:
        for old in complete_checkpoints(root)[:-keep]:
            shutil.rmtree(old)


def restore(folder: Path, model: ActorCritic, optimizer: torch.optim.Optimizer, scheduler: Any) -> TrainerState:
    """Put weights, optimizer and schedule back; returns the trainer's state. Bit-exact for float32 weights."""
    _load_policy(folder, model)
    tensors = load_file(folder / "critics.safetensors", device=str(model.loaded.device))
    model.critics.load_state_dict(_from_saved(tensors))
    saved = torch.load(folder / "optimizer.pt", map_location=model.loaded.device, weights_only=True)
    try:
        optimizer.load_state_dict(saved["optimizer"])
    except ValueError:
        raise UserError(
            "this checkpoint was made with other trainable weights",
            where=str(folder),
            hint="resume with the same config",
        ) from None
    scheduler.load_state_dict(saved["scheduler"])
    return TrainerState(**read_json(folder / "state.json"))


_NONE = "__none__"


def _critic_tensors(model: ActorCritic) -> dict[str, torch.Tensor]:
    """The critics' state without shared storage (tied embeddings are stored once per name)."""
    tensors = {n: t.detach().clone().contiguous() for n, t in model.critics.state_dict().items()}
    return tensors or {_NONE: torch.zeros(1)}


def _from_saved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t for n, t in tensors.items() if n != _NONE}


def _load_policy(folder: Path, model: ActorCritic) -> None:
    from peft import PeftModel, set_peft_model_state_dict

    if isinstance(model.policy, PeftModel):
        adapter = load_file(folder / "adapter_model.safetensors", device=str(model.loaded.device))
        set_peft_model_state_dict(model.policy, adapter, adapter_name="default")
        return
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        weights.update(load_file(file, device=str(model.loaded.device)))
    missing, unexpected = model.policy.load_state_dict(weights, strict=False)
    # tied weights are stored under one of their names: what is missing must be a tensor that was loaded
    loaded = {t.data_ptr() for n, t in model.policy.state_dict().items() if n in weights}
    lost = [n for n, t in model.policy.state_dict().items() if n in missing and t.data_ptr() not in loaded]
    if unexpected or lost:
        raise UserError("the checkpoint's weights are not those of this model", where=str(folder))
