"""Rows of a forward pass by a budget of tokens. What is computed does not depend on the budget, up to rounding."""

from __future__ import annotations

import torch

from rlgf_cli.models.forward import TokenBatch
from rlgf_cli.models.packing import PromptGroup, saves


def split_by_tokens(
    tokens: TokenBatch, rows: torch.Tensor, limit: int | None, *, packing_hidden: int | None
) -> list[torch.Tensor]:
    """Positions in ``rows`` [n], in parts of at most ``limit`` tokens each (None: one part).

    The tokens of a part are its columns times its rows, padding included, as they are computed. Rows with the same
    prompt are one packed row where a model packs them; ``packing_hidden``: its hidden size (None: it does not pack). A
    single row that is larger is a part by itself. Rows of like length are together, so that little is padding; where
    one part is enough, their order is kept.
    """
    everything = torch.arange(len(rows), device=rows.device)
    if limit is None or not len(rows):
        return [everything]
    own = tokens.rows(rows)
    lengths = own.lengths.tolist()
    alone = _alone(own.prompt_mask, lengths)
    if packing_hidden is None:
        parts = _parts(alone, lengths, limit)
    else:
        parts = []
        for part in _parts(own.groups, lengths, limit):
            # a part that would not be packed is computed row by row
            fits = saves(part, lengths, packing_hidden)
            parts += [part] if fits else _parts([alone[i] for row in part for i in row.rows], lengths, limit)
    if len(parts) == 1:
        return [everything]
    return [everything[sorted(i for row in part for i in row.rows)] for part in parts]


def _parts(groups: list[PromptGroup], lengths: list[int], limit: int) -> list[list[PromptGroup]]:
    """Packed rows of groups, in parts of at most ``limit`` tokens."""
    packed = sorted((row for g in groups for row in _packed_rows(g, lengths, limit)), key=lambda r: r.columns(lengths))
    parts: list[list[PromptGroup]] = [[]]
    for row in packed:  # in ascending order: the new row is the widest of its part
        if parts[-1] and (len(parts[-1]) + 1) * row.columns(lengths) > limit:
            parts.append([])
        parts[-1].append(row)
    return parts


def _alone(prompt_mask: torch.Tensor, lengths: list[int]) -> list[PromptGroup]:
    return [PromptGroup([i], size, max(0, lengths[i] - 1)) for i, size in enumerate(prompt_mask.sum(-1).tolist())]


def _packed_rows(group: PromptGroup, lengths: list[int], limit: int) -> list[PromptGroup]:
    """A group as packed rows of at most ``limit`` columns."""
    packed = [PromptGroup([], group.prompt, group.common)]
    for i in group.rows:
        longer = PromptGroup([*packed[-1].rows, i], group.prompt, group.common)
        if len(longer.rows) > 1 and longer.columns(lengths) > limit:
            packed.append(PromptGroup([i], group.prompt, group.common))
        else:
            packed[-1] = longer
    return packed
