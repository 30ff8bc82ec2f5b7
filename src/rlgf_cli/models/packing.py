"""Rows that share a prompt as one packed row: ``[prompt and common prefix; rest of response 1; ...; of response G]``.

What the episodes of a group have in common is computed once ("prefix grouping", arXiv 2506.05433). A token attends to
the common part and to its own response alone, and its position is the one that it has in a row by itself, so hidden
states equal those of separate rows up to rounding.

Shapes: B rows, P prompt columns, T response columns; R packed rows of L columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

_GAIN = 0.9
"""Rows are packed where that costs at most this share of separate rows: masked attention is slower than causal."""


@dataclass(frozen=True)
class Packed:
    """Packed rows. ``ids``, ``positions`` [R, L]; ``allowed`` [R, L, L] bool: whether the query (second dimension) sees
    the key (third); ``index`` [B, T]: place in the flattened [R * L] of the state before each response token (0 for
    padding)."""

    ids: torch.Tensor
    positions: torch.Tensor
    allowed: torch.Tensor
    index: torch.Tensor

    def within(self, window: int | None) -> torch.Tensor:
        """``allowed``, restricted to keys fewer than ``window`` positions back (None: no restriction). [R, 1, L, L]"""
        allowed = self.allowed
        if window is not None:
            allowed = allowed & (self.positions.unsqueeze(-1) - self.positions.unsqueeze(-2) < window)
        return allowed.unsqueeze(1)


@dataclass(frozen=True)
class PromptGroup:
    """Rows with the same prompt: their numbers, the prompt's length, and how many tokens at the beginning of their
    responses are common to all of them. The last token of a response is not counted: it is no input."""

    rows: list[int]
    prompt: int
    common: int

    def columns(self, lengths: Sequence[int]) -> int:
        """Columns of the packed row. The last token of a response is predicted and is no input."""
        return self.prompt + self.common + sum(max(0, lengths[i] - 1 - self.common) for i in self.rows)


def groups_of(
    prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, response_ids: torch.Tensor, lengths: torch.Tensor
) -> list[PromptGroup]:
    """Rows with equal prompts, in the order of their first rows.

    prompt_ids, prompt_mask [B, P] (padded on one side); response_ids [B, T]; lengths [B].
    """
    keys = torch.cat([torch.where(prompt_mask.bool(), prompt_ids, -1), prompt_mask.to(prompt_ids.dtype)], dim=1)
    owners = torch.unique(keys.cpu(), dim=0, return_inverse=True)[1].tolist()
    members: dict[int, list[int]] = {}
    for row, owner in enumerate(owners):
        members.setdefault(owner, []).append(row)
    sizes, counts = prompt_mask.sum(-1).tolist(), lengths.tolist()
    return [
        PromptGroup(rows, sizes[rows[0]], _common(response_ids[rows], [counts[i] for i in rows]))
        for rows in members.values()
    ]


def _common(ids: torch.Tensor, lengths: list[int]) -> int:
    """Tokens at the beginning of all responses that are inputs of all of them. ids [G, T]"""
    room = max(0, min(lengths) - 1)
    same = (ids[:, :room] == ids[:1, :room]).all(0)
    return int(same.long().cumprod(0).sum())


def saves(groups: Sequence[PromptGroup], lengths: Sequence[int], hidden: int) -> bool:
    """Whether packed rows cost enough less than separate ones.

    A layer's matrix products take about 12 H^2 multiplications per token and its attention 2 H L, so that a row of L
    columns costs about L (6 H + L).
    """
    alone = max(g.prompt for g in groups) + max(lengths) - 1
    together = max(g.columns(lengths) for g in groups)
    rows = sum(len(g.rows) for g in groups)
    return _cost(len(groups), together, hidden) <= _GAIN * _cost(rows, alone, hidden)


def _cost(rows: int, columns: int, hidden: int) -> int:
    return rows * columns * (6 * hidden + columns)


def pack(
    groups: Sequence[PromptGroup],
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    response_ids: torch.Tensor,
    lengths: torch.Tensor,
) -> Packed:
    """The packed rows of ``groups``; the other arguments as in :func:`groups_of`, from which the groups are."""
    device, counts = prompt_ids.device, lengths.tolist()
    width = max(g.columns(counts) for g in groups)
    rows, columns = len(groups), response_ids.shape[1]
    ids = torch.zeros((rows, width), dtype=torch.long, device=device)
    positions = torch.zeros((rows, width), dtype=torch.long)
    segments = torch.full((rows, width), -1)  # 0: the common part; 1, 2, ...: a response's own; -1: padding
    index = torch.zeros((len(counts), columns), dtype=torch.long)
    for r, group in enumerate(groups):
        trunk = group.prompt + group.common
        first = group.rows[0]
        ids[r, : group.prompt] = prompt_ids[first][prompt_mask[first].bool()]
        ids[r, group.prompt : trunk] = response_ids[first, : group.common]
        positions[r, :trunk] = torch.arange(trunk)
        segments[r, :trunk] = 0
        at = trunk
        for segment, i in enumerate(group.rows, start=1):
            own = max(0, counts[i] - 1 - group.common)
            ids[r, at : at + own] = response_ids[i, group.common : group.common + own]
            positions[r, at : at + own] = torch.arange(trunk, trunk + own)
            segments[r, at : at + own] = segment
            shared = min(group.common + 1, counts[i])
            index[i, :shared] = r * width + group.prompt - 1 + torch.arange(shared)
            index[i, shared : shared + own] = r * width + at + torch.arange(own)
            at += own
    positions, segments = positions.to(device), segments.to(device)  # the mask is large: it is made on the device
    query, key = segments.unsqueeze(-1), segments.unsqueeze(-2)
    seen = ((key == 0) | ((key == query) & (key > 0))) & (positions.unsqueeze(-2) <= positions.unsqueeze(-1))
    itself = torch.eye(width, dtype=torch.bool, device=device)  # of padding: a row without a key has no softmax
    return Packed(ids, positions, seen | itself, index.to(device))


def attention_masks(config: Any, packed: Packed) -> torch.Tensor | dict[str, torch.Tensor] | None:
    """The mask as a model with this config takes it: one [R, 1, L, L], or one for each type of layer.

    None where none is known: an attention kernel without masks, or layers that are neither full nor sliding.
    """
    # GPT-Neo's local attention is a mask of its own over columns, which positions do not change
    if config._attn_implementation not in ("sdpa", "eager") or hasattr(config, "attention_types"):
        return None
    types = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)

    def mask(window: int | None) -> torch.Tensor:
        # added to the scores; a boolean mask would be turned into such a one, and be kept, once for each layer
        seen = packed.within(window)
        kind = seen.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))

    if not types:
        return mask(window if getattr(config, "use_sliding_window", True) else None)
    if types == {"full_attention"}:
        return mask(None)
    if types <= {"full_attention", "sliding_attention"}:
        return {name: mask(window if name == "sliding_attention" else None) for name in types}
    return None
