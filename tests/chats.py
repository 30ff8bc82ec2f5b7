"""Shortened chat templates of real models, on a tiny tokenizer and a tiny model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from transformers import AddedToken, GPT2Config, GPT2LMHeadModel

from conftest import make_tokenizer
from rlgf_cli.models.text import TextFormat

_EACH = "{% for message in messages %}"
_ASK = "{% if add_generation_prompt %}"


def _turns(user: str, assistant: str, ask: str, last: str = "") -> str:
    """A template from what it makes of a user's message and of the assistant's, and what it asks with."""
    role = "{% if message.role == 'user' %}"
    ends = "{% else %}" + last if last else ""
    return f"{_EACH}{role}{user}{{% else %}}{assistant}{{% endif %}}{{% endfor %}}{_ASK}{ask}{ends}{{% endif %}}"


CONTENT, TRIMMED, EOS = "{{ message.content }}", "{{ message.content | trim }}", "{{ eos_token }}"
TEMPLATES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "chatml": (
            _EACH + "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{% endfor %}"
            f"{_ASK}{{{{ '<|im_start|>assistant\\n' }}}}{{% endif %}}",
            "<|im_end|>",
        ),
        "gemma": (
            "{{ bos_token }}"
            + _turns(
                f"{{{{ '<start_of_turn>user\\n' }}}}{TRIMMED}{{{{ '<end_of_turn>\\n' }}}}",
                f"{{{{ '<start_of_turn>model\\n' }}}}{TRIMMED}{{{{ '<end_of_turn>\\n' }}}}",
                "{{ '<start_of_turn>model\\n' }}",
            ),
            "<end_of_turn>",
        ),
        "phi3": (
            _turns(
                "{{ '<|user|>\\n' + message.content + '<|end|>\\n' }}",
                "{{ '<|assistant|>\\n' + message.content + '<|end|>\\n' }}",
                "{{ '<|assistant|>\\n' }}",
                last=EOS,
            ),
            "<|end|>",
        ),
        "llama3": (
            "{{ bos_token }}"
            + _EACH
            + "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}"
            + TRIMMED
            + "{{ '<|eot_id|>' }}{% endfor %}"
            + f"{_ASK}{{{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}}}{{% endif %}}",
            "<|eot_id|>",
        ),
        "mistral": ("{{ bos_token }}" + _turns(f"[INST] {CONTENT} [/INST]", f" {CONTENT}{EOS}", ""), "<eos>"),
        "llama2": ("{{ bos_token }}" + _turns(f"[INST] {CONTENT} [/INST]", f" {CONTENT} {EOS}", ""), "<eos>"),
        "zephyr": (
            _turns(
                f"{{{{ '<|user|>\\n' }}}}{CONTENT}{EOS}{{{{ '\\n' }}}}",
                f"{{{{ '<|assistant|>\\n' }}}}{CONTENT}{EOS}{{{{ '\\n' }}}}",
                "{{ '<|assistant|>\\n' }}",
            ),
            "<eos>",
        ),
    }
)
"""Name -> template, and the token that ends the assistant's turn in it."""

MARKS = [
    "<bos>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]",
]  # fmt: skip


def chat_tokenizer(template: str, *, special: bool = True) -> Any:
    """The tiny tokenizer with EOS ``<eos>``, every template's marks as tokens (``special`` or merely added ones), and
    a template: one of TEMPLATES, or its text."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(mark, special=special, normalized=False) for mark in MARKS])
    tokenizer.bos_token = "<bos>"
    tokenizer.chat_template = TEMPLATES[template][0] if template in TEMPLATES else template
    return tokenizer


def chat_checkpoint(folder: Path, template: str, *, special: bool = True) -> Path:
    """A tiny GPT-2 whose generation_config knows ``<eos>`` alone, as a base model's does."""
    tokenizer = chat_tokenizer(template, special=special)
    torch.manual_seed(1)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 128, "vocab_size": len(tokenizer)}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    GPT2LMHeadModel(GPT2Config(**sizes, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    TextFormat(chat=True).save(folder)
    return folder


def always_ends(model: Any, token: int) -> None:
    """Make the model generate only one token wherever it is allowed."""
    with torch.no_grad():
        direction = torch.zeros(model.config.n_embd)
        direction[0] = 10.0
        model.transformer.wte.weight[:, 0] = 0.0
        model.transformer.wte.weight[token] = direction
        model.transformer.ln_f.bias[0] = 10.0
