"""The families of pretrained chat models: sampling, log-probabilities, LoRA and files are transformers' own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import FAMILIES, family_checkpoint
from rl import (
    RESPONSES,
    actor_critic,
    loaded_from,
    of_responses,
    prompts_for,
    real_mask,
    token_batch,
)
from rlgf_cli.config.common import LoraConfig, ModelConfig
from rlgf_cli.models.generate import sample
from rlgf_cli.models.load import add_lora, load, save
from rlgf_cli.models.merging import probe_logits


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


def test_a_greedy_text_is_what_transformers_generates(family: Path) -> None:
    """Prompts of several lengths in one batch, longer than a sliding window, against one prompt at a time."""
    loaded = loaded_from(family)
    assert loaded.max_positions == 64
    prompts = [p.ids for p in prompts_for(loaded, 4)]
    ends = {"eos_ids": loaded.eos_ids, "pad_id": loaded.pad_id}
    own = sample(loaded.model, prompts, max_new_tokens=12, uniforms=None, **ends)
    model = AutoModelForCausalLM.from_pretrained(family).eval()
    for prompt, generated in zip(prompts, own, strict=True):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
        assert generated.ids == out.tolist()
    assert len({tuple(g.ids) for g in own}) > 1


def test_log_probabilities_and_gradients_are_those_of_plain_passes(family: Path) -> None:
    """The LM head gets the selected positions only: capped and scaled logits must still be capped and scaled."""
    loaded = loaded_from(family)
    model = actor_critic(loaded)
    prompts = [p.ids for p in prompts_for(loaded, 3)]
    batch = token_batch(loaded, prompts, RESPONSES)
    mask = real_mask(batch)
    found = model.forward_logprobs(batch, mask, temperature=1.0, min_new_tokens=0).logprobs[mask]
    assert (found.double() - of_responses(loaded)).abs().max() < 2e-5
    reference = model.ref_logprobs(batch, mask, temperature=1.0, min_new_tokens=0)[mask]
    assert (reference - found).abs().max() < 2e-5
    found.sum().backward()
    parts_for_images = ("vision", "multi_modal")
    named = loaded.model.named_parameters()
    learning = [(name, p) for name, p in named if not any(part in name for part in parts_for_images)]
    gradients = {name: p.grad.clone() for name, p in learning}
    loaded.model.zero_grad()
    for prompt, response in zip(prompts, RESPONSES, strict=True):
        logits = loaded.model(input_ids=torch.tensor([[*prompt, *response[:-1]]]), use_cache=False).logits
        logprobs = logits[0, len(prompt) - 1 :].log_softmax(-1)
        logprobs[torch.arange(len(response)), torch.tensor(response)].sum().backward()
    for name, parameter in learning:
        scale = float(parameter.grad.abs().max())
        assert scale > 0 and (gradients[name] - parameter.grad).abs().max() < 1e-4 * scale, name


def test_lora_on_all_linear_layers_is_saved_loaded_and_merged(family: Path, tmp_path: Path) -> None:
    lora = LoraConfig(enabled=True, r=4, target_modules="all-linear")
    loaded = add_lora(loaded_from(family), lora)
    adapted = {name.partition(".lora_A")[0] for name, _ in loaded.model.named_parameters() if ".lora_A." in name}
    layers = {name for name, m in loaded.model.get_base_model().named_modules() if hasattr(m, "base_layer")}
    assert len(adapted) == len(layers)
    assert len([name for name in layers if "vision" not in name]) == 2 * (4 if "phi3" in str(family) else 7)
    assert not any("lm_head" in name or "embed" in name for name in adapted)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    save(tmp_path / "adapter", loaded)
    again = load(ModelConfig(name=str(tmp_path / "adapter"), device="cpu"))
    expected = probe_logits(again)
    assert torch.equal(expected, probe_logits(loaded))
    assert (expected - probe_logits(loaded_from(family))).abs().max() > 0.1
    merged = again.model.merge_and_unload()
    plain = tmp_path / "plain"
    save(plain, replace(again, model=merged))
    product = load(ModelConfig(name=str(plain), device="cpu"))
    assert (probe_logits(product) - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()))
