"""What a product says of generation: what rlgf does, and nothing of its base's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig

from rl import prompts_for
from rlgf_cli.config.common import DecodingConfig, LengthConfig, LoraConfig, ModelConfig
from rlgf_cli.models.completions import generate_texts
from rlgf_cli.models.load import add_lora, load, save, set_generation_config
from rlgf_cli.models.loaded import Loaded

LENGTHS = LengthConfig(max_new_tokens=14)
ANOTHER_TASK = {
    "no_repeat_ngram_size": 2, "repetition_penalty": 1.9, "min_length": 12, "max_length": 16, "forced_bos_token_id": 7,
    "forced_eos_token_id": 9, "length_penalty": 2.5, "early_stopping": True, "num_beams": 3, "bad_words_ids": [[20]],
    "suppress_tokens": [30, 31], "do_sample": True, "temperature": 0.4, "top_k": 5, "max_new_tokens": 3,
}  # fmt: skip
"""What a base may bring, as a summariser's or a chat model's does."""


@pytest.fixture
def base(any_model: Path, tmp_path: Path) -> Path:
    """A checkpoint whose generation_config is of another task."""
    folder = tmp_path / "base"
    shutil.copytree(any_model, folder)
    before = GenerationConfig.from_pretrained(folder)
    GenerationConfig(
        eos_token_id=before.eos_token_id,
        pad_token_id=before.pad_token_id,
        decoder_start_token_id=before.decoder_start_token_id,
        **ANOTHER_TASK,
    ).save_pretrained(folder)
    return folder


def texts(loaded: Loaded, **decoding: Any) -> list[str]:
    """As ``rlgf eval`` and ``rlgf generate`` write them."""
    given = DecodingConfig(temperature=0, **decoding)
    return [t.text for t in generate_texts(loaded, prompts_for(loaded, 4), given, LENGTHS, seed=0)]


def plain_texts(product: Path, loaded: Loaded, **options: Any) -> list[str]:
    """As transformers alone writes them, one prompt at a time."""
    auto = AutoModelForSeq2SeqLM if loaded.encoder_decoder else AutoModelForCausalLM
    model = auto.from_pretrained(product).eval()
    found = []
    for prompt in prompts_for(loaded, 4):
        out = model.generate(torch.tensor([prompt.ids]), **options)[0].tolist()
        skip = 1 if loaded.encoder_decoder else len(prompt.ids)
        ends = [i for i, token in enumerate(out) if i >= skip and token in loaded.eos_ids]
        found.append(loaded.text.decode_response(loaded.tokenizer, out[skip : ends[0] if ends else None]))
    return found


def test_transformers_generates_what_rlgf_does(any_model: Path, base: Path, tmp_path: Path) -> None:
    """Greedily and with beams, from the product of a training; and rlgf does the same with the base, whose penalties
    are as little in its beam search as in its sampling."""
    trained = load(ModelConfig(name=str(base), device="cpu"), for_training=True)
    plain = load(ModelConfig(name=str(any_model), device="cpu"))
    expected = {beams: texts(plain, num_beams=beams) for beams in (1, 3)}
    assert any(expected[3]) and expected[1] != expected[3]
    assert {beams: texts(trained, num_beams=beams) for beams in expected} == expected
    set_generation_config(trained, LENGTHS)
    save(tmp_path / "product", trained)
    loaded = load(ModelConfig(name=str(tmp_path / "product"), device="cpu"))
    assert texts(loaded, num_beams=3) == expected[3]
    assert plain_texts(tmp_path / "product", loaded) == expected[1]
    assert plain_texts(tmp_path / "product", loaded, num_beams=3) == expected[3]


def test_a_product_says_its_ids_and_lengths_and_no_more(base: Path, tmp_path: Path) -> None:
    several = GenerationConfig.from_pretrained(base, eos_token_id=[300, 1])  # as chat models have
    several.save_pretrained(base)
    trained = load(ModelConfig(name=str(base), device="cpu"), for_training=True)
    set_generation_config(trained, LengthConfig(max_new_tokens=14, min_new_tokens=2))
    save(tmp_path / "product", trained)
    said = json.loads((tmp_path / "product/generation_config.json").read_text())
    said.pop("transformers_version")
    start = trained.model.config.decoder_start_token_id if trained.encoder_decoder else None
    assert said == {
        "eos_token_id": [1, 300],
        "pad_token_id": trained.pad_id,
        "max_new_tokens": 14,
        "min_new_tokens": 2,
        **({"decoder_start_token_id": start} if start is not None else {}),
    }
    config = json.loads((tmp_path / "product/config.json").read_text())
    assert str(tmp_path) not in json.dumps(config)


def test_an_adapter_has_its_own(tiny_bart: Path, tmp_path: Path) -> None:
    """PEFT writes none: beside an adapter lies what the merged weights will say, whatever its base says."""
    shutil.copytree(tiny_bart, tmp_path / "base")
    GenerationConfig(eos_token_id=1, pad_token_id=0, decoder_start_token_id=1, **ANOTHER_TASK).save_pretrained(
        tmp_path / "base"
    )
    loaded = load(ModelConfig(name=str(tmp_path / "base"), device="cpu"), for_training=True)
    assert loaded.model.generation_config.max_new_tokens == ANOTHER_TASK["max_new_tokens"]
    loaded = add_lora(loaded, LoraConfig(enabled=True, r=2))
    set_generation_config(loaded, LENGTHS)
    save(tmp_path / "adapter", loaded)
    again = load(ModelConfig(name=str(tmp_path / "adapter"), device="cpu"))
    assert again.model.generation_config.max_new_tokens == LENGTHS.max_new_tokens
    assert again.model.generation_config.forced_eos_token_id is None
    (tmp_path / "adapter/generation_config.json").unlink()  # an earlier rlgf's
    assert (
        load(ModelConfig(name=str(tmp_path / "adapter"), device="cpu")).model.generation_config.max_new_tokens is None
    )
