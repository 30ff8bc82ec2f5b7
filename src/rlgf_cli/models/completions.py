"""Responses as text from a policy or a local guide: greedy, sampled, or by transformers' beam search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import GenerationConfig

from rlgf_cli import noise
from rlgf_cli.config.common import DecodingConfig, LengthConfig
from rlgf_cli.models.device import autocast
from rlgf_cli.models.generate import Generated, decoder_start_id, pad_rows, sample
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.prompts import Encoded
from rlgf_cli.protocols import Completion, FinishReason


@dataclass(frozen=True)
class GeneratedText(Completion):
    """A completion of a model in memory, with the ids of its tokens as they were generated, EOS included."""

    token_ids: Sequence[int] = ()


def generate_texts(
    loaded: Loaded,
    encoded: Sequence[Encoded],
    decoding: DecodingConfig,
    lengths: LengthConfig,
    *,
    seed: int,
    sample_index: int | Sequence[int] = 0,
    prefixes: Sequence[str] | None = None,
    limits: Sequence[int] | None = None,
    on_rows: Callable[[int], None] | None = None,
) -> list[GeneratedText]:
    """Responses as text: greedy (temperature 0), sampled, or by beam search.

    ``prefixes``: partial responses to continue; a completion is the text after its prefix. ``limits``: new tokens for
    each row, ``lengths.max_new_tokens`` by default. Noise is a function of (seed, example id, sample index), so the
    order and the batch do not matter. ``usage["control_tokens"]`` counts the tokens that the text does not show
    (``Loaded.control_ids``).
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    count = len(encoded)
    indices = [sample_index] * count if isinstance(sample_index, int) else list(sample_index)
    starts = [loaded.text.encode_response(tokenizer, p) if p else [] for p in prefixes or [""] * count]
    room = list(limits) if limits is not None else [lengths.max_new_tokens] * count
    prompts = [e.ids for e in encoded]
    if decoding.num_beams > 1:
        rows = _beam(loaded, prompts, starts, room, decoding, lengths.min_new_tokens, on_rows)
    else:
        width = max((len(s) + r for s, r in zip(starts, room, strict=True)), default=0)
        draws = None
        if decoding.temperature > 0:
            keys = [(e.example.id, k) for e, k in zip(encoded, indices, strict=True)]
            draws = np.stack([noise.uniforms(width, seed, "text", name, k) for name, k in keys])
        rows = sample(
            model,
            prompts,
            prefixes=starts,
            max_new_tokens=room,
            uniforms=draws,
            eos_ids=loaded.eos_ids,
            pad_id=loaded.pad_id,
            min_new_tokens=lengths.min_new_tokens,
            **decoding.model_dump(include={"temperature", "top_k", "top_p", "batch_size"}),
            dtype=loaded.dtype,
            on_batch=None if on_rows is None else lambda batch, _: on_rows(len(batch)),
        )
    completions = []
    control = loaded.control_ids
    for prompt, start, row in zip(prompts, starts, rows, strict=True):
        whole = loaded.text.decode_response(tokenizer, [*start, *row.ids], strip=False)
        before = loaded.text.decode_response(tokenizer, start, strip=False) if start else ""
        text = whole.removeprefix(before) if start else whole
        usage = {"prompt_tokens": len(prompt) + len(start), "completion_tokens": len(row.ids)}
        usage["control_tokens"] = sum(i in control for i in row.ids)
        finish: FinishReason = "stop" if row.finished else "length"
        completions.append(GeneratedText(text.rstrip(), finish, loaded.name, usage=usage, token_ids=row.ids))
    return completions


@torch.no_grad()
def _beam(
    loaded: Loaded,
    prompts: list[list[int]],
    prefixes: list[list[int]],
    limits: list[int],
    decoding: DecodingConfig,
    min_new_tokens: int,
    on_rows: Callable[[int], None] | None,
) -> list[Generated]:
    """Beam search, rows of equal prefix length and limit together (their decoder inputs need no padding)."""
    model, device = loaded.model, loaded.device
    rows_of: dict[tuple[int, int], list[int]] = {}
    for i, (prefix, limit) in enumerate(zip(prefixes, limits, strict=True)):
        rows_of.setdefault((len(prefix), limit), []).append(i)
    generated: list[Generated] = [Generated([], False)] * len(prompts)
    for (width, limit), rows in rows_of.items():
        config = GenerationConfig(
            num_beams=decoding.num_beams,
            do_sample=False,
            max_new_tokens=limit,
            min_new_tokens=max(0, min_new_tokens - width),
            eos_token_id=sorted(loaded.eos_ids),
            pad_token_id=loaded.pad_id,
            decoder_start_token_id=decoder_start_id(model) if loaded.encoder_decoder else None,
        )
        rows.sort(key=lambda i: len(prompts[i]))
        for at in range(0, len(rows), decoding.batch_size):
            batch = rows[at : at + decoding.batch_size]
            if loaded.encoder_decoder:
                ids, mask = pad_rows([prompts[i] for i in batch], loaded.pad_id, left=False)
                start = decoder_start_id(model)
                decoder = {"decoder_input_ids": torch.tensor([[start, *prefixes[i]] for i in batch], device=device)}
                skip = 1 + width
            else:
                ids, mask = pad_rows([prompts[i] + prefixes[i] for i in batch], loaded.pad_id, left=True)
                decoder, skip = {}, ids.shape[1]
            with autocast(device, loaded.dtype):
                out = model.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    generation_config=config,
                    **decoder,
                )
            for i, row in zip(batch, out[:, skip:].tolist(), strict=True):
                end = next((n for n, token in enumerate(row) if token in loaded.eos_ids), None)
                generated[i] = Generated(row[:limit] if end is None else row[: end + 1], end is not None)
            if on_rows is not None:
                on_rows(len(batch))
    return generated
