"""What loading changes about a model: nothing that is saved, nothing beyond rounding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, T5Config
from transformers.activations import NewGELUActivation

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
