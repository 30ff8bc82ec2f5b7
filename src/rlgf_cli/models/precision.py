"""Weights in bfloat16 where they do not learn: half the memory, and no cast for every token.

Autocast rounds the weights of matrix products to bfloat16 and leaves the sums between the layers in float32. Rounded
weights that learn are kept as long as the autocast context lasts; frozen ones are rounded again in every call. Weights
that are stored in bfloat16 give the same numbers if everything else stays in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def compute_in_float32_between_layers(model: Any) -> None:
    """After loading in bfloat16: vectors (norms, biases) and what embeddings give are float32, as under autocast."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda module, args, output: output.float())


def cast_matrices(model: nn.Module, dtype: torch.dtype) -> None:
    """Store the float32 weights of a frozen model's matrix products in ``dtype``.

    A head that shares the embeddings' weights gets its own: the embeddings stay as they are.
    """
    for module in model.modules():
        weight = module._parameters.get("weight") if isinstance(module, (nn.Linear, Conv1D)) else None
        if weight is not None and weight.dtype == torch.float32 and dtype != torch.float32:
            module._parameters["weight"] = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
