"""A beginning that all rows of a batch share is run once: with the logits of whole rows, where the model allows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from test_load import _without_cache

from conftest import make_tokenizer
from families import FAMILIES, family_checkpoint
from rlgf_cli.config.common import LoraConfig, ModelConfig
from rlgf_cli.errors import UserError
from rlgf_cli.models import generate
from rlgf_cli.models.generate import _DecoderState, _shared_beginning, sample
from rlgf_cli.models.load import add_lora, load
from rlgf_cli.models.loaded import Loaded

SLIDING = {"gemma2", "gemma3", "gemma3 with vision", "phi3"}
BEGINNING = list(range(20, 33))
RESTS = [[40], [41, 42, 43, 44], [45, 46, 47, 48, 49, 50], [51 + i for i in range(16)], [40]]
"""The first and the last row are equal, and the longest rest is longer than the beginning."""
ROWS = [[*BEGINNING, *rest] for rest in RESTS]


@pytest.fixture(autouse=True)
def short_beginnings_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "_WORTH_SHARING", 8)


@pytest.fixture(scope="module", params=[*FAMILIES, "gpt2", "gpt_neo", "longrope"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Loaded]:
    name, folder = request.param, tmp_path_factory.mktemp("model")
    if name in FAMILIES:
        folder = family_checkpoint(folder, name)
    elif name == "gpt2":
        folder = request.getfixturevalue("tiny_gpt2")
    else:
        tokenizer = make_tokenizer()
        tokenizer.save_pretrained(folder)
        _made(name, len(tokenizer), tokenizer.eos_token_id).save_pretrained(folder)
    return name, load(ModelConfig(name=str(folder), device="cpu"))


def _made(name: str, vocabulary: int, eos: int) -> Any:
    torch.manual_seed(1)
    ids = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": eos}
    if name == "gpt_neo":  # its window counts columns, in a cache that holds all of them
        layers = {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 5}
        made: Any = hf.GPTNeoForCausalLM(hf.GPTNeoConfig(hidden_size=16, num_heads=2, **layers, **ids))
        for parameter in made.parameters():
            parameter.data.mul_(8.0 if parameter.dim() > 1 else 1.0)
        return made
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [9.0] * 8}
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    rope["original_max_position_embeddings"] = 16
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **ids, rope_parameters=rope, max_position_embeddings=64))


def logits_of(model: Any, rows: list[list[int]], pad_id: int) -> tuple[list[torch.Tensor], list[int]]:
    """The logits after the prefill and after each of three steps, the second of them without the first row; and the
    number of tokens in each pass of the prefill."""
    sizes: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    with torch.no_grad():
        state = _DecoderState(model, rows, pad_id)
        hook.remove()
        found = [state.logits]
        for step in range(3):
            if step == 1:
                state.keep(torch.arange(1, len(rows)))
            state.step(torch.arange(60, 60 + len(state.mask)))
            found.append(state.logits)
    return found, sizes


def test_the_logits_are_those_of_whole_rows(model: tuple[str, Loaded], monkeypatch: pytest.MonkeyPatch) -> None:
    name, loaded = model
    found, sizes = logits_of(loaded.model, ROWS, loaded.pad_id)
    width = max(map(len, ROWS))
    if name in SLIDING or name == "longrope":
        assert sizes == [4 * width]
    else:
        assert sizes == [len(BEGINNING), 4 * (width - len(BEGINNING))]
    monkeypatch.setattr(generate, "_WORTH_SHARING", 10**6)
    plain, sizes = logits_of(loaded.model, ROWS, loaded.pad_id)
    assert sizes == [4 * width]
    for own, whole in zip(found, plain, strict=True):
        assert float((own - whole).abs().max()) < 2e-4 * max(1.0, float(whole.abs().max()))


def test_rows_of_one_length_and_an_adapter(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = add_lora(
        load(ModelConfig(name=str(tiny_llama), device="cpu"), for_training=True), LoraConfig(enabled=True)
    )
    rows = [[*BEGINNING, i] for i in (40, 41, 42)]
    found, sizes = logits_of(loaded.model, rows, loaded.pad_id)
    assert sizes == [len(BEGINNING), 3]
    monkeypatch.setattr(generate, "_WORTH_SHARING", 10**6)
    for own, whole in zip(found, logits_of(loaded.model, rows, loaded.pad_id)[0], strict=True):
        assert torch.allclose(own, whole, atol=1e-5)


def test_greedy_texts_are_the_same(tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(ModelConfig(name=str(tiny_gpt2), device="cpu"))
    settings_ = {"max_new_tokens": 9, "uniforms": None, "eos_ids": loaded.eos_ids, "pad_id": loaded.pad_id}
    shared = sample(loaded.model, ROWS, prefixes=[[], [60], [61, 62], [], []], **settings_)
    monkeypatch.setattr(generate, "_WORTH_SHARING", 10**6)
    assert shared == sample(loaded.model, ROWS, prefixes=[[], [60], [61, 62], [], []], **settings_)


def test_a_batch_is_its_rows_alone_where_the_models_own_positions_begin_elsewhere() -> None:
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = hf.RobertaConfig(vocab_size=90, is_decoder=True, max_position_embeddings=64, **sizes)
    model = hf.RobertaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(8.0 if parameter.dim() > 1 else 1.0)
    with torch.no_grad():
        logits, passes = logits_of(model, ROWS, 1)
        assert passes[0] == len(BEGINNING)
        for own, row in zip(logits[0], ROWS, strict=True):
            assert torch.allclose(own, _DecoderState(model, [row], 1).logits[0], atol=1e-4)


def test_no_beginning_is_shared_where_the_model_takes_no_positions() -> None:
    torch.manual_seed(1)
    model = hf.BloomForCausalLM(hf.BloomConfig(vocab_size=90, hidden_size=16, n_layer=2, n_head=2)).eval()
    assert logits_of(model, ROWS, 0)[1] == [4 * max(map(len, ROWS))]


@pytest.mark.parametrize("kind", ["mamba", "rwkv", "lfm2"])
def test_a_model_without_a_cache_is_refused_as_ever(kind: str) -> None:
    tokenizer = make_tokenizer()
    model = _without_cache(kind, tokenizer).eval()
    with pytest.raises(UserError, match="no key-value cache for all of its layers"):
        sample(model, ROWS, max_new_tokens=3, uniforms=None, eos_ids=[1], pad_id=0)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), min_size=1, max_size=5), st.integers(0, 30))
@settings(max_examples=200, deadline=None)
def test_the_shared_beginning_is_one_of_all_rows(rows: list[list[int]], common: int) -> None:
    rows = [[0] * common + row for row in rows]
    shared = _shared_beginning(rows)
    longest = max(map(len, rows))
    if shared:
        assert len({tuple(row[:shared]) for row in rows}) == 1 and shared < min(map(len, rows))
        assert shared >= 8 and 4 * shared > longest and len(rows) > 1
    elif len(rows) > 1:
        assert common < 8 or 4 * common <= longest
