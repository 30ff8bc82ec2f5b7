"""Sampling with a key-value cache, for rollouts and evaluation: prompt ids in, response ids out.

Prompt and prefix are prefilled, finished rows leave the batch, and the caller gives each row's noise, so that batching
does not change the responses.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlgf_cli.errors import UserError
from rlgf_cli.functional.logprobs import process_logits, warp_logits
from rlgf_cli.models.cache import holds_all_tokens, reserve, spread_row
from rlgf_cli.models.device import autocast
from rlgf_cli.models.loaded import Loaded

_WORTH_SHARING = 32
"""Tokens that all rows must begin with, for their beginning to be run once."""


@dataclass(frozen=True)
class Generated:
    """New tokens after prompt and prefix. ``finished``: the last of ``ids`` is an EOS. ``logprobs``: their
    log-probabilities (nats) as a server reports them."""

    ids: list[int]
    finished: bool
    logprobs: list[float] | None = None


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids to ``(ids, mask)``, both [B, longest], int64; the mask comes from lengths."""
    width = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        if row:
            columns = slice(width - len(row), width) if left else slice(0, len(row))
            ids[i, columns] = torch.tensor(row, dtype=torch.long)
            mask[i, columns] = 1
    return ids, mask


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    """Position ids [B, L] from an attention mask [B, L]: the first real token is at 0, whatever the padding."""
    return (mask.cumsum(-1) - 1).clamp_min(0)


class _DecoderState:
    """Key-value cache of a decoder-only model, rows left-padded. Equal rows are prefilled once, and so is a long
    beginning of all rows."""

    def __init__(self, model: Any, rows: list[list[int]], pad_id: int) -> None:
        self.model = model
        different, owners = _different(rows)
        ids, mask = pad_rows(different, pad_id, left=True)
        self.mask = mask.to(model.device)
        self.cache: Any = None
        positions, done = positions_of(self.mask), 0
        if (shared := _shared_beginning(different)) and holds_all_tokens(model.config) and _takes_positions(model):
            lengths = torch.tensor([len(row) for row in different], device=model.device)
            done = self._prefill_beginning(different[0][:shared], ids.shape[1] - lengths)
        self.logits = self._forward(ids[:, done:].to(model.device), positions[:, done:])
        if len(different) < len(rows):
            self.keep(torch.tensor(owners, device=model.device))
            self.logits = self.logits[owners]

    def _prefill_beginning(self, beginning: list[int], shifts: torch.Tensor) -> int:
        """Run the beginning of all rows once, and fill with it the first columns of the rows' cache. Returns how many
        columns that are: those of the beginning, or none where the model's cache cannot be filled so.

        ``shifts`` [B] are the rows' columns of padding. The cache is that of a prefill of whole rows, column by column:
        what is left of a shorter row begins inside the beginning and is run again.
        """
        ids = torch.tensor([beginning], device=self.model.device)
        positions = torch.arange(len(beginning), device=ids.device)[None]
        out = self.model(input_ids=ids, position_ids=positions, use_cache=True, logits_to_keep=1)
        self.cache = _cache_of(self.model, out)
        if spread_row(self.cache, shifts):
            return len(beginning)
        self.cache = None
        return 0

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        out = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = _cache_of(self.model, out)
        return out.logits[:, -1]

    def step(self, tokens: torch.Tensor) -> None:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self.logits = self._forward(tokens[:, None], self.mask.sum(-1, keepdim=True) - 1)

    def keep(self, rows: torch.Tensor) -> None:
        _keep_rows(self.model, self.cache, rows)
        self.mask = self.mask[rows]


class _EncoderDecoderState:
    """Encoder output and decoder cache; the decoder starts from its start token and the prefix, left-padded."""

    def __init__(self, model: Any, prompts: list[list[int]], prefixes: list[list[int]], pad_id: int) -> None:
        self.model = model
        different, owners = _different(prompts)
        ids, mask = pad_rows(different, pad_id, left=False)
        self.encoder_mask = mask.to(model.device)
        self.encoded = model.get_encoder()(input_ids=ids.to(model.device), attention_mask=self.encoder_mask)
        if len(different) < len(prompts):
            self._keep_encoded(torch.tensor(owners, device=model.device))
        start = decoder_start_id(model)
        ids, mask = pad_rows([[start, *prefix] for prefix in prefixes], pad_id, left=True)
        self.mask = mask.to(model.device)
        self.cache: Any = None
        self.logits = self._forward(ids.to(model.device))

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        out = self.model(
            encoder_outputs=self.encoded,
            attention_mask=self.encoder_mask,
            decoder_input_ids=ids,
            decoder_attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = _cache_of(self.model, out)
        return out.logits[:, -1]

    def step(self, tokens: torch.Tensor) -> None:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        self.logits = self._forward(tokens[:, None])

    def keep(self, rows: torch.Tensor) -> None:
        _keep_rows(self.model, self.cache, rows)
        self.mask = self.mask[rows]
        self._keep_encoded(rows)

    def _keep_encoded(self, rows: torch.Tensor) -> None:
        self.encoder_mask = self.encoder_mask[rows]
        self.encoded.last_hidden_state = self.encoded.last_hidden_state[rows]


def _different(rows: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """The rows without repetitions, and the place of each row among them."""
    places: dict[tuple[int, ...], int] = {}
    owners = [places.setdefault(tuple(row), len(places)) for row in rows]
    return [list(row) for row in places], owners


def _shared_beginning(rows: list[list[int]]) -> int:
    """The tokens that all of several rows begin with, at least one fewer than the shortest has; 0 where they are too
    few to be worth a pass of their own."""
    if len(rows) < 2:
        return 0
    first, last = min(rows), max(rows)  # what these two share, all rows between them have
    common = next((i for i, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))
    shared = min(common, min(map(len, rows)) - 1)
    return shared if shared >= _WORTH_SHARING and 4 * shared > max(map(len, rows)) else 0


def _takes_positions(model: Any) -> bool:
    """Whether the model's positions are those that it is given."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # of an adapter
    return "position_ids" in inspect.signature(base.forward).parameters


def _cache_of(model: Any, output: Any) -> Any:
    """The key-value cache in a forward pass's output. Raises UserError where there is none."""
    if (cache := getattr(output, "past_key_values", None)) is None:
        raise _no_cache(model)
    return cache


def _keep_rows(model: Any, cache: Any, rows: torch.Tensor) -> None:
    try:
        cache.batch_select_indices(rows)
    except AttributeError:  # the state of a recurrent layer
        raise _no_cache(model) from None


def _no_cache(model: Any) -> UserError:
    return UserError(
        f"a model of type {model.config.model_type!r} has no key-value cache for all of its layers, and rlgf samples "
        "with one",
        hint="use a transformer with attention in every layer, such as GPT-2, Llama, Qwen 3 or T5",
    )


@torch.no_grad()
def check_cache(loaded: Loaded) -> None:
    """Raise UserError for a model that cannot be sampled from: run one token and select a row of its cache."""
    model, ids = loaded.model, [[loaded.pad_id]]
    try:
        if loaded.encoder_decoder:
            state: _DecoderState | _EncoderDecoderState = _EncoderDecoderState(model, ids, [[]], loaded.pad_id)
        else:
            state = _DecoderState(model, ids, loaded.pad_id)
        state.keep(torch.zeros(1, dtype=torch.long, device=loaded.device))
    except UserError as error:
        raise UserError(error.message, where=loaded.name, hint=error.hint) from None


def decoder_start_id(model: Any) -> int:
    """The id that precedes an encoder-decoder's response."""
    for config in (model.config, model.generation_config):
        if (start := getattr(config, "decoder_start_token_id", None)) is not None:
            return int(start)
    raise ValueError("the encoder-decoder's config has no decoder_start_token_id")


@torch.no_grad()
def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    prefixes: Sequence[Sequence[int]] | None = None,
    max_new_tokens: int | Sequence[int],
    uniforms: np.ndarray | None,
    eos_ids: Collection[int],
    pad_id: int,
    banned_ids: Collection[int] = (),
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_new_tokens: int = 0,
    batch_size: int = 64,
    dtype: torch.dtype = torch.float32,
    on_batch: Callable[[list[int], list[Generated]], None] | None = None,
) -> list[Generated]:
    """Generate a response to each prompt (+ prefix), of at most ``max_new_tokens`` more (an int, or one per row).

    ``uniforms`` [N, T] in [0, 1): column t is the draw for the response's t-th token, prefix included, by inverse
    transform on the distribution; None is greedy. ``min_new_tokens`` counts the prefix too; no EOS is generated before.
    ``banned_ids`` are never generated. ``on_batch`` is called with the rows of each batch and their responses.
    """
    count = len(prompts)
    before = [list(p) for p in prefixes] if prefixes is not None else [[] for _ in range(count)]
    limits = [max_new_tokens] * count if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if not len(before) == len(limits) == count:
        raise ValueError(f"{count} prompts, {len(before)} prefixes, {len(limits)} limits")
    eos = torch.tensor(sorted(eos_ids), device=model.device)
    banned = torch.tensor(sorted(banned_ids), device=model.device) if banned_ids else None
    generated: list[Generated] = [Generated([], False)] * count
    for batch in _batches(model, prompts, before, limits, batch_size):
        with autocast(model.device, dtype):
            rows = _sample_batch(
                model,
                [list(prompts[i]) for i in batch],
                [before[i] for i in batch],
                [limits[i] for i in batch],
                None if uniforms is None else uniforms[batch],
                eos,
                banned,
                pad_id,
                temperature,
                top_k,
                top_p,
                min_new_tokens,
            )
        for i, row in zip(batch, rows, strict=True):
            generated[i] = row
        if on_batch is not None:
            on_batch(batch, rows)
    return generated


def _batches(
    model: Any,
    prompts: Sequence[Sequence[int]],
    prefixes: list[list[int]],
    limits: list[int],
    size: int,
) -> list[list[int]]:
    """Row numbers in batches of similar length; rows with a limit of 0 are left out.

    Decoders of encoder-decoder models with absolute positions (BART) take no position ids, so their rows are batched by
    equal prefix length and need no padding.
    """
    rows = [i for i in range(len(prompts)) if limits[i] > 0]
    rows.sort(
        key=lambda i: (
            (len(prefixes[i]), len(prompts[i]))
            if model.config.is_encoder_decoder
            else (len(prompts[i]) + len(prefixes[i]), 0)
        )
    )
    absolute = model.config.is_encoder_decoder and not hasattr(model.config, "relative_attention_num_buckets")
    batches: list[list[int]] = []
    for i in rows:
        current = batches[-1] if batches else None
        fits = current is not None and len(current) < size
        if fits and absolute and current is not None:
            fits = len(prefixes[current[0]]) == len(prefixes[i])
        if fits and current is not None:
            current.append(i)
        else:
            batches.append([i])
    return batches


def _sample_batch(
    model: Any,
    prompts: list[list[int]],
    prefixes: list[list[int]],
    limits: list[int],
    uniforms: np.ndarray | None,
    eos: torch.Tensor,
    banned: torch.Tensor | None,
    pad_id: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_new_tokens: int,
) -> list[Generated]:
    device = model.device
    state: _DecoderState | _EncoderDecoderState
    if model.config.is_encoder_decoder:
        state = _EncoderDecoderState(model, prompts, prefixes, pad_id)
    else:
        state = _DecoderState(model, [p + q for p, q in zip(prompts, prefixes, strict=True)], pad_id)
    reserve(state.cache)
    live = torch.arange(len(prompts), device=device)  # row of each line that is still in the batch
    index = torch.tensor([len(p) for p in prefixes], device=device)  # response position of the next token
    ends = index + torch.tensor(limits, device=device)
    noise_device = _float64_device(device)
    draws = None if uniforms is None else torch.as_tensor(uniforms, dtype=torch.float64, device=noise_device)
    columns: list[torch.Tensor] = []
    while True:
        logits = process_logits(state.logits.float(), temperature or 1.0, index < min_new_tokens, eos, banned)
        if draws is None or temperature == 0:
            tokens = logits.argmax(-1)
        else:
            tokens = draw_tokens(
                warp_logits(logits, top_k, top_p), draws[live.to(noise_device), index.to(noise_device)]
            )
        columns.append(torch.stack([live, tokens]))
        index = index + 1
        alive = ~torch.isin(tokens, eos) & (index < ends)
        if not bool(alive.any()):
            break
        if not bool(alive.all()):
            rows = alive.nonzero()[:, 0]
            state.keep(rows)
            live, index, ends, tokens = live[rows], index[rows], ends[rows], tokens[rows]
        state.step(tokens)
    ids: list[list[int]] = [[] for _ in prompts]
    for column in columns:
        for row, token in zip(*column.tolist(), strict=True):
            ids[row].append(token)
    eos_set = set(eos.tolist())
    return [Generated(row, bool(row) and row[-1] in eos_set) for row in ids]


def draw_tokens(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Inverse-transform sampling: the token [B] at quantile ``uniforms`` [B] of softmax(``logits`` [B, V]).

    The cumulative sum is float64: in float32 the tail of a large vocabulary is lost in rounding. Banned
    tokens (minus infinity) have no mass and cannot be drawn.
    """
    device = _float64_device(logits.device)
    cumulative = torch.softmax(logits, -1).to(device).double().cumsum(-1)
    total = cumulative[:, -1]
    target = torch.minimum(uniforms.to(device).double() * total, torch.nextafter(total, torch.zeros_like(total)))
    # right=True: the first token whose cumulative mass exceeds the target, so zero-mass tokens are passed over
    return torch.searchsorted(cumulative, target.unsqueeze(-1), right=True).squeeze(-1).to(logits.device)


def _float64_device(device: torch.device) -> torch.device:
    """The device for float64, which Apple's GPUs lack."""
    return torch.device("cpu") if device.type == "mps" else device
