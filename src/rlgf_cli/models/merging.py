"""Checks that a LoRA adapter can be merged into its base, and that the merged weights are the same model."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from rlgf_cli.errors import UserError
from rlgf_cli.models.loaded import Loaded

ROUNDING = 1e-4
"""The most that merging float32 weights may move a logit, as a share of the largest logit (or of 1, if smaller)."""


def refuse_tied(model: Any, where: str | None = None) -> None:
    """Raise UserError where an adapter changes weights that another layer shares, and not that layer with it.

    Merged into the shared weights, LoRA on one layer would change the other as well. PEFT's ``ensure_weight_tying``
    (0.21) does not help there: it gives the tied layers two parameters on one storage, each with a gradient of its own,
    and adds both changes to the shared weights when it merges. Layers that it replaces as a whole (``modules_to_save``)
    it does tie: they share the new weights as they shared the old.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in named.items():
        owners[parameter.data_ptr()].append(name)
    for names in owners.values():
        adapted = [name for name in names if ".base_layer." in name or ".original_module." in name]
        if not adapted or len(names) == 1 or _replaced_together(names, named):
            continue
        target = _module_of(adapted[0])
        others = " and ".join(_module_of(name) for name in names if name != adapted[0])
        raise UserError(
            f"an adapter on {target} cannot be merged: its weights are those of {others} too (tied embeddings)",
            where=where,
            hint=f"train with {target.rpartition('.')[2]} left out of lora.target_modules",
        )


def _replaced_together(names: list[str], named: dict[str, Any]) -> bool:
    """Whether all the layers that share weights get the same new ones."""
    olds = [name for name in names if ".original_module." in name]
    news = {id(named[name.replace(".original_module.", ".modules_to_save.default.")]) for name in olds}
    return len(olds) == len(names) and len(news) == 1


def _module_of(parameter: str) -> str:
    plain = parameter.removeprefix("base_model.model.")
    plain = plain.replace(".base_layer.", ".").replace(".original_module.", ".")
    return plain.rpartition(".")[0]


@torch.no_grad()
def probe_logits(loaded: Loaded) -> torch.Tensor:
    """Logits [T, V] in float32 for T token ids that are spread over the vocabulary. An encoder-decoder is given the ids
    as prompt and as response."""
    rows = loaded.model.get_input_embeddings().weight.shape[0]
    count = min(64, rows, loaded.max_positions or 64)
    ids = torch.arange(count, device=loaded.device)[None] * rows // count
    decoder = {"decoder_input_ids": ids} if loaded.encoder_decoder else {}
    logits = loaded.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **decoder).logits
    return logits[0].float()


def refuse_different(merged: torch.Tensor, adapter: torch.Tensor, where: str) -> None:
    """Raise UserError where two :func:`probe_logits` results, [T, V] each, are further apart than float32 rounds."""
    bound = ROUNDING * max(1.0, float(adapter.abs().max()))
    gap = float((merged - adapter).abs().max())
    if not gap <= bound:  # NaN is no match either
        raise UserError(
            f"merged, the weights are another model than the adapter's: logits differ by {gap:.2g}, "
            f"of which rounding explains {bound:.2g}",
            where=where,
            hint="use the adapter as it is: eval, generate and train load it",
        )
