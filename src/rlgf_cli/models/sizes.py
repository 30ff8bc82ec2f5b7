"""What a model takes of memory, found without its weights: counts of parameters, and a forward pass of fake tensors.

``FakeTensorMode`` runs the model's own operations on shapes alone, so that what autograd keeps of a pass is what the
architecture really keeps (grouped key-value heads, gated layers, masks, casts of autocast).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.pytorch_utils import Conv1D

from rlgf_cli.config.common import LoraConfig, ModelConfig
from rlgf_cli.functional.logprobs import LOGITS_BYTES
from rlgf_cli.models.adapter import ADAPTER_CONFIG, Base, find_base
from rlgf_cli.models.device import autocast
from rlgf_cli.models.gguf import plain_checkpoint
from rlgf_cli.models.head import HeadInput
from rlgf_cli.models.load import put_adapter
from rlgf_cli.models.packing import Packed, attention_masks
from rlgf_cli.models.precision import compute_in_float32_between_layers


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of parameters, each counted once, and the sizes of one state.

    ``parameters``: of the plain weights; ``matrices`` among them: of linear layers, without the LM head; ``vectors``:
    norms and biases; ``head``: the LM head's, which are the embeddings' where they are ``tied``; ``adapter``: those of
    a LoRA adapter (0: all plain weights learn).
    """

    parameters: int
    matrices: int
    vectors: int
    head: int
    tied: bool
    adapter: int
    hidden: int
    layers: int
    vocabulary: int


@dataclass(frozen=True)
class PassShape:
    """One forward pass: ``rows`` x ``columns`` tokens, padding included (of an encoder-decoder's decoder), that hold
    ``responses`` responses; ``prompt``: columns of an encoder-decoder's prompts, in ``prompts`` rows."""

    rows: int
    columns: int
    responses: int
    prompt: int
    prompts: int


@dataclass(frozen=True)
class TracedBytes:
    """``saved``: what autograd saves of a pass for the backward pass; ``cached``: the key-value cache of a token."""

    saved: int
    cached: int


def model_without_weights(config: ModelConfig) -> tuple[Any, Base]:
    """A model of a checkpoint's shape on the device ``meta``, without its adapter if it has one, and its base.

    Only config.json is read, and the adapter's base is looked for as :func:`.load.load` does.
    """
    name, gguf = plain_checkpoint(config.name)
    base = find_base(name) if Path(name, ADAPTER_CONFIG).is_file() else Base.at(name, config.revision, gguf)
    code = {"trust_remote_code": config.trust_remote_code}
    shape = AutoConfig.from_pretrained(base.name, revision=base.revision or config.revision, **code)
    auto = AutoModelForSeq2SeqLM if shape.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(shape, **code), base


def with_adapter(model: Any, config: ModelConfig, lora: LoraConfig) -> Any:
    """A model without weights with the adapter that its checkpoint has, or that training would put on it."""
    name, _ = plain_checkpoint(config.name)
    if not Path(name, ADAPTER_CONFIG).is_file():
        return put_adapter(model, lora) if lora.enabled else model
    from peft import PeftConfig, get_peft_model

    adapter = PeftConfig.from_pretrained(name)
    adapter.inference_mode = False
    return get_peft_model(model, adapter)


def sizes_of(model: Any) -> ModelSizes:
    """Count a model's parameters; it may be without weights."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    parameters = dict(model.named_parameters())  # tied ones once
    adapter = sum(p.numel() for name, p in parameters.items() if "lora_" in name)
    head = base.get_output_embeddings().weight
    plain = {id(p): p for name, p in parameters.items() if "lora_" not in name}
    linear = {id(p): p.numel() for name, p in _matrices(model) if p is not head}
    config = base.config.get_text_config()
    layers = sum(isinstance(module, GradientCheckpointingLayer) for module in base.modules())
    return ModelSizes(
        parameters=sum(p.numel() for p in plain.values()),
        matrices=sum(linear.values()),
        vectors=sum(p.numel() for p in plain.values() if p.dim() == 1),
        head=head.numel(),
        tied=head is base.get_input_embeddings().weight,
        adapter=adapter,
        hidden=head.shape[-1],
        layers=layers or config.num_hidden_layers,
        vocabulary=config.vocab_size,
    )


def chunk_bytes(tokens: int, vocabulary: int) -> int:
    """The float32 logits that :func:`rlgf_cli.functional.logprobs.in_chunks` holds at a time for ``tokens``."""
    return min(LOGITS_BYTES, 4 * tokens * vocabulary)


def trace(model: Any, shape: PassShape, dtype: torch.dtype, *, checkpointing: bool) -> TracedBytes:
    """The memory of a pass of a model without weights, which is used up. Computations are in ``dtype``.

    Raises RuntimeError for an architecture whose operations depend on values, or have no shapes alone.
    """
    model.float().eval()
    if hasattr(model, "peft_config") and dtype != torch.float32:
        _store_frozen(model, dtype)
    device, layers = torch.device("cpu"), sizes_of(model).layers
    with _no_log(), FakeTensorMode(allow_non_fake_inputs=True), device, autocast(device, dtype):
        model.to_empty(device=device)
        own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        storages: dict[int, Any] = {}  # the storages are held, so that no address is used twice

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                storages[storage._cdata] = storage
            return tensor

        with HeadInput(model) as head, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(**_inputs(model, shape), use_cache=False)
        total = sum(storage.nbytes() for storage in storages.values())
        if checkpointing:  # the input of each layer, and what one layer keeps while it is computed again
            total = layers * head.hidden.nbytes + total // layers
        with torch.no_grad():
            return TracedBytes(total, _cache_bytes(model))


@contextmanager
def _no_log() -> Iterator[None]:
    """Without torch's report of an operation that has no shapes alone: the caller says what that means."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _matrices(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The plain weights of linear layers."""
    return [
        (name, module.weight)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and "lora_" not in name
    ]


def _store_frozen(model: Any, dtype: torch.dtype) -> None:
    """Store an adapter's base as training does."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
    compute_in_float32_between_layers(model)


def _inputs(model: Any, shape: PassShape) -> dict[str, Any]:
    ids = torch.zeros(shape.rows, shape.columns, dtype=torch.long)
    if model.config.is_encoder_decoder:
        prompts = torch.zeros(shape.prompts, shape.prompt, dtype=torch.long)
        owners = torch.zeros(shape.rows, dtype=torch.long)
        encoded = model.get_encoder()(input_ids=prompts).last_hidden_state[owners]
        return {"encoder_outputs": BaseModelOutput(last_hidden_state=encoded), "decoder_input_ids": ids}
    config = model.config.get_text_config()
    allowed = torch.ones(shape.rows, shape.columns, shape.columns, dtype=torch.bool)
    masks = attention_masks(config, Packed(ids, ids, allowed, ids))
    return {"input_ids": ids, "position_ids": ids, "attention_mask": masks}


def _cache_bytes(model: Any) -> int:
    """Bytes that one more token adds to one row of the key-value cache."""
    tokens = 8
    ids = torch.zeros(1, tokens, dtype=torch.long)
    if model.config.is_encoder_decoder:
        encoded = model.get_encoder()(input_ids=ids)
        cache = model(encoder_outputs=encoded, decoder_input_ids=ids, use_cache=True).past_key_values
        layers = [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    else:
        layers = model(input_ids=ids, use_cache=True).past_key_values.layers
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) // tokens
