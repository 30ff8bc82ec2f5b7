"""Chat templates as public models have them, on a tiny tokenizer that adds BOS by itself, as Llama's and Gemma's do.

The texts are those that TRL ships in its package. Phi 4 and ChatML are written here after the models' own.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import AddedToken

from chats import MARKS, TEMPLATES
from conftest import make_tokenizer

FROM_TRL = ("llama3", "gemma", "gemma3", "phi3", "qwen2_5", "qwen3")
ENDS = {
    "chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "gemma3": "<end_of_turn>",
    "phi3": "<|end|>", "phi4": "<|im_end|>", "phi4_mini": "<|end|>", "qwen2_5": "<|im_end|>", "qwen3": "<|im_end|>",
}  # fmt: skip
"""Template -> the token that ends the assistant's turn in it."""
WRITES_BOS = ("llama3", "gemma", "gemma3")
_EACH = "{% for m in messages %}"
_OWN = {
    "chatml": TEMPLATES["chatml"][0],
    # the question ends with the assistant's header, whether or not a generation prompt is wanted
    "phi4": _EACH + "{% if m.role == 'assistant' %}{{ m.content + '<|im_end|>' }}{% else %}"
    "{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}"
    "{% if m.role == 'user' %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}{% endif %}{% endfor %}",
    "phi4_mini": _EACH + "{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}",
}


def public_template(name: str) -> str:
    """The text of a template."""
    return _OWN.get(name) or files("trl").joinpath("chat_templates", f"{name}.jinja").read_text(encoding="utf-8")


def public_tokenizer(name: str) -> Any:
    """The tiny tokenizer with all marks, EOS ``<eos>``, a BOS that it puts before every text, and the template."""
    tokenizer = make_tokenizer()
    marks = [*MARKS, "<|system|>", "<|im_sep|>", "<think>", "</think>"]
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    tokenizer.bos_token = "<bos>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = public_template(name)
    return tokenizer
