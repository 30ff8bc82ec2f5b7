"""Frozen weights in bfloat16, and the key-value cache of sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import rl
from rlgf_cli.config.common import LoraConfig, ModelConfig
from rlgf_cli.models import cache as cache_module
from rlgf_cli.models.cache import ReservedLayer, reserve
from rlgf_cli.models.generate import sample
from rlgf_cli.models.load import add_lora, load
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.precision import cast_matrices

PROMPTS = [[20, 21, 22], [30, 31, 32, 33, 34], [40]]


@pytest.fixture(params=["tiny_llama", "tiny_gpt2", "tiny_t5", "tiny_qwen3"])
def rounded(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint whose weights are bfloat16 numbers, as those of published models are."""
    loaded = load(ModelConfig(name=str(request.getfixturevalue(request.param)), device="cpu"))
    loaded.model.to(torch.bfloat16).float().save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    loaded.text.save(tmp_path)
    return tmp_path


def with_adapter(path: Path, *, lora: bool) -> Loaded:
    """A policy in bfloat16 with a fresh LoRA; ``lora``: its base is loaded as frozen."""
    torch.manual_seed(0)
    loaded = load(ModelConfig(name=str(path), device="cpu", dtype="bfloat16"), for_training=True, lora=lora)
    return add_lora(loaded, LoraConfig(enabled=True, r=4, target_modules="all-linear"))


def results(loaded: Loaded) -> dict[str, Any]:
    """Log-probabilities, reference and gradients of a batch, and sampled texts, with a LoRA that changes the policy."""
    model = rl.actor_critic(loaded)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    batch = rl.token_batch(loaded, PROMPTS, rl.RESPONSES)
    mask = rl.real_mask(batch)
    scored = model.forward_logprobs(batch, mask, temperature=1.0, min_new_tokens=0, values=["policy"])
    (scored.logprobs.sum() + scored.values["policy"].sum()).backward()
    uniforms = torch.rand((3, 9), generator=torch.Generator().manual_seed(3)).numpy()
    texts = sample(
        loaded.model, PROMPTS, max_new_tokens=9, uniforms=uniforms, eos_ids=loaded.eos_ids, pad_id=loaded.pad_id,
        dtype=torch.bfloat16,
    )  # fmt: skip
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {
        "logprobs": scored.logprobs, "values": scored.values["policy"],
        "reference": model.ref_logprobs(batch, mask, temperature=1.0, min_new_tokens=0), **gradients,
        "texts": [row.ids for row in texts],
    }  # fmt: skip


def test_a_frozen_base_in_bfloat16_gives_what_autocast_gives(rounded: Path) -> None:
    """To the bit: autocast rounds the same weights, and between the layers everything stays float32."""
    loaded = with_adapter(rounded, lora=True)
    own = {n: p for n, p in loaded.model.named_parameters() if "lora_" not in n}
    assert {p.dtype for p in own.values() if p.dim() > 1} == {torch.bfloat16}
    assert {p.dtype for n, p in loaded.model.named_parameters() if "lora_" in n} == {torch.float32}
    whole = with_adapter(rounded, lora=False)
    assert {p.dtype for p in whole.model.parameters()} == {torch.float32}
    found, expected = results(loaded), results(whole)
    assert set(found) == set(expected) and any("lora_" in name for name in found)
    assert found.pop("texts") == expected.pop("texts")
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert float((expected["reference"] - expected["logprobs"].detach()).abs().max()) > 0.01


def test_a_reference_of_bfloat16_matrices_gives_the_same_log_probabilities(rounded: Path) -> None:
    loaded = load(ModelConfig(name=str(rounded), device="cpu", dtype="bfloat16"), for_training=True)
    model = rl.actor_critic(loaded)
    batch = rl.token_batch(loaded, PROMPTS, rl.RESPONSES)
    options: dict[str, Any] = {"temperature": 1.0, "min_new_tokens": 0}
    before = model.ref_logprobs(batch, rl.real_mask(batch), **options)
    cast_matrices(model.ref_model, torch.bfloat16)
    kinds = {type(m): m.weight.dtype for m in model.ref_model.modules() if hasattr(m, "weight")}
    assert kinds[nn.Embedding] == torch.float32 and torch.bfloat16 in kinds.values()
    assert torch.equal(model.ref_logprobs(batch, rl.real_mask(batch), **options), before)
    assert all(p.dtype == torch.float32 for p in model.policy.parameters())


def test_a_float32_run_keeps_everything_in_float32(tiny_llama: Path) -> None:
    loaded = load(ModelConfig(name=str(tiny_llama), device="cpu"), for_training=True, lora=True)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    cast_matrices(loaded.model, torch.float32)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}


def test_the_trainer_holds_its_reference_in_bfloat16(tiny_llama: Path) -> None:
    loaded = load(ModelConfig(name=str(tiny_llama), device="cpu", dtype="bfloat16"), for_training=True)
    trainer = rl.configured_trainer(loaded, rl.prompts_for(loaded, 2), None, seed=0, sets=["kl.coef=0.1"])
    assert torch.bfloat16 in {p.dtype for p in trainer.model.ref_model.parameters()}
    assert {p.dtype for p in trainer.model.policy.parameters()} == {torch.float32}


@pytest.mark.parametrize("room", [1, 2, 9])
def test_a_reserved_cache_holds_what_a_growing_one_holds(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens appended, rows selected and repeated in between, beyond the room that was made."""
    plain, reserved = DynamicCache(), DynamicCache()
    generator = torch.Generator().manual_seed(0)
    for cache in (plain, reserved):
        generator.manual_seed(0)
        cache.update(*torch.randn((2, 3, 2, 4, 5), generator=generator), 0)
    monkeypatch.setattr(cache_module, "ROOM", room)
    reserve(reserved)
    layer = reserved.layers[0]
    assert isinstance(layer, ReservedLayer)
    start = layer._all_keys.data_ptr()
    reserved.update(*torch.zeros((2, 3, 2, 1, 5)), 0)
    plain.update(*torch.zeros((2, 3, 2, 1, 5)), 0)
    assert layer._all_keys.data_ptr() == start
    for step, rows in enumerate([[0, 1, 2], [0, 1, 2], [2, 0], [1, 1, 0], [2]]):
        for cache in (plain, reserved):
            cache.batch_select_indices(torch.tensor(rows))
            generator.manual_seed(step + 1)
            keys, values = torch.randn((2, len(rows), 2, 1, 5), generator=generator)
            shown = cache.update(keys, values, 0)
            assert shown[0].shape[-2] == cache.get_seq_length() == 6 + step
        assert torch.equal(plain.layers[0].keys, reserved.layers[0].keys)
        assert torch.equal(plain.layers[0].values, reserved.layers[0].values)


def test_a_critic_of_its_own_learns_in_float32(tiny_llama: Path) -> None:
    """It starts from the base of the policy's adapter, which is stored in bfloat16."""
    model = rl.actor_critic(with_adapter(tiny_llama, lora=True), mode="separate")
    assert {parameter.dtype for _, parameter in model.trainable()} == {torch.float32}
