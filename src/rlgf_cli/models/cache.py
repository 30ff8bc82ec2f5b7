"""A key-value cache with room for tokens to come: appending one seldom copies those before it."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

ROOM = 32
"""Tokens that there is room for beyond those of a cache, each time that it is copied."""


class ReservedLayer(DynamicLayer):
    """A layer of a cache whose ``keys`` and ``values`` [B, heads, length, D] are views of longer tensors."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._reserve(keys, values)

    def _reserve(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._all_keys, self._all_values = (
            torch.cat([states, states.new_empty((*states.shape[:-2], ROOM, states.shape[-1]))], dim=-2)
            for states in (keys, values)
        )
        self._show(keys.shape[-2])

    def _show(self, length: int) -> None:
        self.keys, self.values = self._all_keys[..., :length, :], self._all_values[..., :length, :]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        before = self.keys.shape[-2]
        after = before + key_states.shape[-2]
        if after > self._all_keys.shape[-2]:
            self._reserve(self.keys, self.values)
        self._all_keys[..., before:after, :] = key_states
        self._all_values[..., before:after, :] = value_states
        self._show(after)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._reserve(self.keys[indices], self.values[indices])


def holds_all_tokens(config: Any) -> bool:
    """Whether a model's cache holds the keys and values of all tokens, in every layer, and nothing else; and whether
    they do not depend on the tokens that come later, as positions scaled by the text's length make them."""
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    return plain and not kinds & {"dynamic", "longrope"}


def spread_row(cache: Any, shifts: torch.Tensor) -> bool:
    """Make a cache of one row the cache of B rows, in each of which the tokens lie ``shifts`` [B] columns further on.

    The number of columns stays: the last tokens of a shifted row fall out, its first columns hold padding. Returns
    False, with the cache as it was, where a layer holds anything but the keys and values of all tokens.
    """
    layers = getattr(cache, "layers", None)
    if not layers or not all(type(layer) is DynamicLayer for layer in layers):
        return False
    for layer in layers:
        columns = torch.arange(layer.keys.shape[-2], device=layer.keys.device)
        source = (columns - shifts.to(columns.device)[:, None]).clamp_min(0)
        layer.keys, layer.values = (states[0][:, source].transpose(0, 1) for states in (layer.keys, layer.values))
    return True


def reserve(cache: Any) -> None:
    """Make room for more tokens in a cache that holds the prompts. Layers of other kinds (a sliding window, a
    recurrent state) stay as they are."""
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    for i, layer in enumerate(getattr(own, "layers", ())):
        if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
            own.layers[i] = ReservedLayer(layer.keys, layer.values)
