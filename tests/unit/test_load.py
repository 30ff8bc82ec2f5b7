"""What loading changes about a model: nothing that is saved, nothing beyond rounding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, T5Config
from transformers.activations import NewGELUActivation

from conftest import make_tokenizer, toy_examples, write_rows
from rlgf_cli.config.common import ModelConfig
from rlgf_cli.models.load import load, save


@pytest.fixture(scope="module")
def tiny_t5_gated(tiny_t5: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """T5 1.1's kind: its gate is a GELU."""
    folder = tmp_path_factory.mktemp("t5-gated")
    shutil.copytree(tiny_t5, folder, dirs_exist_ok=True)
    tiny = AutoConfig.from_pretrained(tiny_t5).to_diff_dict()
    given = {k: v for k, v in tiny.items() if k not in ("dense_act_fn", "is_gated_act")}
    config = T5Config(**{**given, "feed_forward_proj": "gated-gelu"})
    torch.manual_seed(2)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("checkpoint", ["tiny_gpt2", "tiny_t5_gated"])
def test_gelu_is_torchs_own_and_the_model_the_same(
    checkpoint: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path = request.getfixturevalue(checkpoint)
    loaded = load(ModelConfig(name=str(path)))
    plain_class = AutoModelForSeq2SeqLM if loaded.encoder_decoder else AutoModelForCausalLM
    plain = plain_class.from_pretrained(path).eval()
    replaced = [m for m in plain.modules() if isinstance(m, NewGELUActivation)]
    assert replaced, "this checkpoint has no such GELU: the test tests nothing"
    assert not any(isinstance(m, NewGELUActivation) for m in loaded.model.modules())
    ids = torch.randint(3, 100, (3, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if loaded.encoder_decoder else {})
    with torch.no_grad():
        difference = (loaded.model(**inputs).logits - plain(**inputs).logits).abs()
    assert float(difference.max()) < 1e-5
    save(tmp_path / "saved", loaded)
    saved, before = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "saved", path))
    kept = ("activation_function", "feed_forward_proj", "dense_act_fn")
    assert [saved.get(key) for key in kept] == [before.get(key) for key in kept]


def _without_cache(kind: str, tokenizer: Any) -> Any:
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 2}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    if kind == "mamba":
        return hf.MambaForCausalLM(hf.MambaConfig(**sizes, state_size=4, **ids))
    if kind == "rwkv":
        return hf.RwkvForCausalLM(hf.RwkvConfig(**sizes, context_length=256, **ids))
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 16}
    return hf.Lfm2ForCausalLM(hf.Lfm2Config(**sizes, **heads, layer_types=["conv", "full_attention"], **ids))


@pytest.mark.parametrize("kind", ["mamba", "rwkv", "lfm2"])
def test_a_model_that_cannot_be_sampled_from_is_refused_before_it_is_trained(
    kind: str, tmp_path: Path, run_cli: Any
) -> None:
    """Recurrent models have a state instead of keys and values, hybrids beside them (lfm2)."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / kind)
    _without_cache(kind, tokenizer).save_pretrained(tmp_path / kind)
    data = write_rows(tmp_path / "train.jsonl", toy_examples(3))
    both = ("--model", tmp_path / kind, "--data", data)
    for arguments in (
        ("sft", *both, "--max-steps", 1, "-o", tmp_path / "run"),
        ("train", *both, "--reward", "repetition", "--max-steps", 1, "-o", tmp_path / "run"),
        ("doctor", *both),
        ("eval", *both, "--metrics", "length", "--batch-size", 1, "-o", tmp_path / "run"),
    )[: 3 if kind == "lfm2" else 4]:  # one text at a time needs no more of a hybrid's state than it has
        shown = run_cli(*arguments)
        assert shown.exit_code == 2, shown.stderr
        assert f"a model of type '{kind}' has no key-value cache for all of its layers" in shown.stderr
        assert "use a transformer with attention in every layer" in shown.stderr
    assert not (tmp_path / "run" / "config.json").exists()
    assert load(ModelConfig(name=str(tmp_path / kind), device="cpu")).model is not None  # perplexity wants no cache


def test_models_with_a_cache_are_taken(any_model: Path) -> None:
    assert load(ModelConfig(name=str(any_model), device="cpu"), for_training=True).model is not None
