"""Checkpoints that resume exactly: policy, critics, optimizer, schedule and the trainer's state.

They are written whole or not at all, see :mod:`rlgf_cli.artifacts.checkpoints`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rlgf_cli.artifacts.checkpoints import written_whole
from rlgf_cli.artifacts.disk import os_errors, save_torch
from rlgf_cli.artifacts.jsonl import read_json, write_json
from rlgf_cli.errors import UserError
from rlgf_cli.models import load as loading
from rlgf_cli.models.actor_critic import ActorCritic
from rlgf_cli.training.divergence import Watched
from rlgf_cli.training.parallel.processes import SINGLE, Processes


@dataclass
class TrainerState:
    """The state that the loop carries from step to step, besides weights and optimizer.

    ``typical_length``: running mean response length [tokens], from which the policy's cut is drawn (on disk:
    ``horizon``); ``critic_steps``: steps in which each critic was fitted; ``explained``: each critic's running share of
    explained variance; ``moments``: running moments (functional.stats) of the scores, and of those that each critic is
    fitted on; ``guide_uses``, ``guide_texts``: see GuideUse; ``own_scores``, ``guide_scores``: see Gate;
    ``guide_share``: the share of a guide's text that ``restart: steered`` keeps;
    ``best_step``, ``best_score``: the step with the best held-out score so far (None: there was none yet);
    ``watched``: see training.divergence; ``unevaluated``: the row of the last step, where its evaluation on held-out
    prompts was due and did not come to its end.
    """

    step: int = 0
    kl_coef: float = 0.0
    typical_length: float = 1.0
    critic_steps: dict[str, int] = field(default_factory=dict)
    explained: dict[str, float] = field(default_factory=dict)
    moments: dict[str, list[float]] = field(default_factory=dict)
    guide_uses: dict[str, int] = field(default_factory=dict)
    guide_texts: dict[str, int] = field(default_factory=dict)
    best_step: int = 0
    best_score: float | None = None
    own_scores: dict[str, float] = field(default_factory=dict)
    guide_scores: dict[str, float] = field(default_factory=dict)
    guide_share: float = 0.5
    watched: Watched = field(default_factory=Watched)
    unevaluated: dict[str, Any] | None = None

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> TrainerState:
        """The state that :meth:`to_json` wrote."""
        fields = {("typical_length" if name == "horizon" else name): value for name, value in saved.items()}
        return cls(**{**fields, "watched": Watched(**saved.get("watched", {}))})

    def note_score(self, score: float) -> None:
        """Remember the best held-out score and its step; of equal ones the first."""
        if self.best_score is None or score > self.best_score:
            self.best_step, self.best_score = self.step, score

    def to_json(self) -> dict[str, Any]:
        fields = {("horizon" if name == "typical_length" else name): value for name, value in asdict(self).items()}
        return fields if self.unevaluated is not None else {k: v for k, v in fields.items() if k != "unevaluated"}


@dataclass(frozen=True)
class States:
    """The states in a checkpoint, without shards. ``policy`` None: the model has its whole weights."""

    policy: dict[str, torch.Tensor] | None
    critics: dict[str, torch.Tensor]
    optimizer: dict[str, Any]


def collect(model: ActorCritic, optimizer: torch.optim.Optimizer, processes: Processes = SINGLE) -> States:
    """Gather the states from the shards. All processes call it."""
    return States(
        processes.whole(model.policy.state_dict()) if processes.lockstep else None,
        processes.whole(model.critics.state_dict()),
        processes.whole(optimizer.state_dict()),
    )


def save(
    folder: Path,
    model: ActorCritic,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    state: TrainerState,
    states: States | None = None,
) -> None:
    """Write ``folder`` whole or not at all. ``states``: from :func:`collect`, where there are shards."""
    states = states or collect(model, optimizer)
    with written_whole(folder) as temporary:
        loading.save(temporary, model.loaded, weights=states.policy)
        with os_errors(temporary):
            save_file(_critic_tensors(states.critics), temporary / "critics.safetensors")
        save_torch(temporary / "optimizer.pt", {"optimizer": states.optimizer, "scheduler": scheduler.state_dict()})
        write_json(temporary / "state.json", state.to_json())


def restore(
    folder: Path, model: ActorCritic, optimizer: torch.optim.Optimizer, scheduler: Any, processes: Processes = SINGLE
) -> TrainerState:
    """Put weights, optimizer and schedule back; returns the trainer's state. Bit-exact for float32 weights."""
    _load_policy(folder, model, processes)
    tensors = load_file(folder / "critics.safetensors", device=str(model.loaded.device))
    model.critics.load_state_dict(_as_sharded(_from_saved(tensors), model.critics, processes))
    saved = torch.load(folder / "optimizer.pt", map_location=model.loaded.device, weights_only=True)
    if processes.lockstep:
        _shard_moments(saved["optimizer"], optimizer, processes)
    try:
        optimizer.load_state_dict(saved["optimizer"])
    except ValueError:
        raise UserError(
            "this checkpoint was made with other trainable weights",
            where=str(folder),
            hint="resume with the same config",
        ) from None
    scheduler.load_state_dict(saved["scheduler"])
    return TrainerState.from_json(read_json(folder / "state.json"))


_NONE = "__none__"


def _as_sharded(
    tensors: dict[str, torch.Tensor], module: torch.nn.Module, processes: Processes
) -> dict[str, torch.Tensor]:
    """A saved state, in the shards that a module is in."""
    current = module.state_dict()
    return {name: processes.like(t, current[name]) if name in current else t for name, t in tensors.items()}


def _shard_moments(saved: dict[str, Any], optimizer: torch.optim.Optimizer, processes: Processes) -> None:
    """A saved optimizer's moments, in the shards of their parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, moments in saved["state"].items():
        for name, value in moments.items():
            if number < len(parameters) and value.shape == parameters[number].shape:
                moments[name] = processes.like(value, parameters[number])


def _critic_tensors(critics: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The critics' state without shared storage (tied embeddings are stored once per name)."""
    tensors = {n: t.detach().clone().contiguous() for n, t in critics.items()}
    return tensors or {_NONE: torch.zeros(1)}


def _from_saved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t for n, t in tensors.items() if n != _NONE}


def _load_policy(folder: Path, model: ActorCritic, processes: Processes) -> None:
    from peft import PeftModel, set_peft_model_state_dict

    if isinstance(model.policy, PeftModel):
        adapter = load_file(folder / "adapter_model.safetensors", device=str(model.loaded.device))
        set_peft_model_state_dict(model.policy, adapter, adapter_name="default")
        return
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        weights.update(load_file(file, device=str(model.loaded.device)))
    weights = _as_sharded(weights, model.policy, processes)
    missing, unexpected = model.policy.load_state_dict(weights, strict=False)
    # tied weights are stored under one of their names: a missing name must share a tensor that was loaded
    places = {n: _local(t).data_ptr() for n, t in model.policy.state_dict().items()}
    loaded = {place for n, place in places.items() if n in weights}
    lost = [n for n, place in places.items() if n in missing and place not in loaded]
    if unexpected or lost:
        raise UserError("the checkpoint's weights are not those of this model", where=str(folder))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()
