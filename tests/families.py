"""Tiny models of the families of pretrained chat models, each with what its real configs have and others lack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf

from conftest import make_tokenizer

_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
_GEMMA_LAYERS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "smollm": ("LlamaForCausalLM", "LlamaConfig", {"num_attention_heads": 3, "hidden_size": 48}),
    "llama3": ("LlamaForCausalLM", "LlamaConfig", {"tie_word_embeddings": False, "rope_parameters": _LLAMA3_ROPE}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 32}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {"final_logit_softcapping": 3.0, **_GEMMA_LAYERS}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {"query_pre_attn_scalar": 16, **_GEMMA_LAYERS}),
    "gemma3 with vision": ("Gemma3ForConditionalGeneration", "Gemma3TextConfig", _GEMMA_LAYERS),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {"tie_word_embeddings": False, "sliding_window": 5}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {"logits_scaling": 0.25, "embedding_multiplier": 3.0}),
    "cohere": ("CohereForCausalLM", "CohereConfig", {"logit_scale": 2.0}),
}  # fmt: skip
"""The model's class, its config's, and what differs from the small config below. Heads that cap or scale the logits are
set to do so by much."""


def save_sharpened(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Store a random model whose matrices are multiplied by eight: its distributions are far from uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def family_checkpoint(folder: Path, family: str) -> Path:
    """A checkpoint with random weights, sharper than the usual initialisation, so that mistakes show."""
    tokenizer = make_tokenizer()
    model_class, config_class, own = FAMILIES[family]
    config = getattr(hf, config_class)(
        **{
            "vocab_size": len(tokenizer) + 8, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "head_dim": 16,
            "tie_word_embeddings": True, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, **own,
        }
    )  # fmt: skip
    if family == "gemma3 with vision":
        config = hf.Gemma3Config(text_config=config, vision_config=_VISION, mm_tokens_per_image=4, eos_token_id=1)
    torch.manual_seed(1)
    model = getattr(hf, model_class)(config)
    return save_sharpened(model, tokenizer, folder)
