"""The policy's weights as another engine takes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from rlgf_cli.models.loaded import Loaded


def policy_weights(loaded: Loaded) -> Iterator[tuple[str, torch.Tensor]]:
    """The policy's weights by their names in the checkpoint, in the type of its computations.

    An adapter's change is added to a copy, one layer at a time: merging it into the weights and out again would leave
    rounding errors in them, and in the ref_model.
    """
    model = loaded.model
    if not isinstance(model, PeftModel):
        for name, parameter in model.named_parameters():
            yield name, parameter.detach().to(loaded.dtype)
        return
    base = model.get_base_model()
    layers = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    for name, parameter in base.named_parameters():
        if "lora_" in name:
            continue
        owner, _, rest = name.rpartition(".base_layer.")
        weight = parameter.detach()
        if owner in layers and rest == "weight":
            layer: Any = layers[owner]
            weight = weight + layer.get_delta_weight("default").detach()
        yield name.replace(".base_layer.", "."), weight.to(loaded.dtype)
