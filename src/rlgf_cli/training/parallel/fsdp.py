"""FSDP2: the policy, the reference model and the critics in shards, by torch's own ``fully_shard``.

Weights are whole on every device while episodes are written and scored, where processes make different numbers of
forward passes; in the update they are gathered layer by layer. There every process makes the same passes: a process
without tokens to learn makes one whose loss is 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from rlgf_cli.models.actor_critic import ActorCritic
from rlgf_cli.models.forward import TokenBatch
from rlgf_cli.training.parallel.processes import Processes


class ShardedProcesses(Processes):
    """Processes that each hold a shard of the states."""

    lockstep = True

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self.loss_scale = size  # FSDP takes the mean of the processes' gradients

    def prepare(self, model: ActorCritic) -> None:
        """Shard in place: every layer by itself, then what is left of each network. All processes call it."""
        # of a value head's output; nothing is done to it in place
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(model.loaded.device.type, (self.size,))
        networks: list[nn.Module] = [model.policy, *model.critics.values()]
        networks += [model.ref_model] if model.ref_model is not None else []
        for network in networks:
            _shard(network, mesh)
        self._first_pass(model)

    def add_gradients(self, parameters: Sequence[torch.Tensor]) -> None:
        """Do nothing: the backward pass has summed them."""

    @contextmanager
    def gathered(self, model: ActorCritic) -> Iterator[None]:
        """All weights whole on this device, and no process waits for another in a forward pass."""
        modules = [m for m in model.modules() if isinstance(m, FSDPModule)]
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in modules:
                module.set_reshard_after_forward(isinstance(module, GradientCheckpointingLayer), recurse=False)
                module.reshard()

    def whole(self, value: Any) -> Any:
        """A state without shards, on the CPU of the main process; the others help, and get empty tensors."""
        return _mapped(value, self._whole_tensor, {})

    def _whole_tensor(self, tensor: Any) -> torch.Tensor:
        whole = tensor.detach().full_tensor()
        return whole.cpu() if self.main else torch.empty(0)

    def like(self, value: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
        """A whole tensor, sharded as ``current`` is."""
        if not isinstance(current, DTensor):
            return value
        return distribute_tensor(value.to(current.device), current.device_mesh, current.placements)

    def _first_pass(self, model: ActorCritic) -> None:
        """A network learns in its first forward pass which module is its root; sampling may begin with an encoder."""
        loaded = model.loaded
        tiny = TokenBatch.build(
            [[loaded.eos_id]], [[loaded.eos_id]], pad_id=loaded.pad_id, encoder_decoder=loaded.encoder_decoder,
            device=loaded.device,
        )  # fmt: skip
        select = torch.ones((1, 1), dtype=torch.bool, device=loaded.device)
        with torch.no_grad():
            model.forward_logprobs(tiny, select, temperature=1.0, min_new_tokens=0, values=list(model.critics))
            if model.ref_model is not None:
                model.ref_logprobs(tiny, select, temperature=1.0, min_new_tokens=0)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Shard a network. What is outside of its layers, the LM head above all, stays whole from the forward pass to the
    end of the backward pass: the head is run behind the forward pass, on the positions that are scored."""
    layers = [m for m in network.modules() if isinstance(m, GradientCheckpointingLayer)]
    for module in layers:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(network, mesh=mesh, reshard_after_forward=False)


def _mapped(value: Any, whole: Any, seen: dict[int, torch.Tensor]) -> Any:
    """Nested states with every sharded tensor replaced, and tied ones tied again."""
    if isinstance(value, dict):
        return {key: _mapped(item, whole, seen) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(item, whole, seen) for item in value)
    if not isinstance(value, DTensor):
        return value
    local = value.to_local()
    place = local.data_ptr() if local.numel() else -id(value)
    if place not in seen:
        seen[place] = whole(value)
    return seen[place]
