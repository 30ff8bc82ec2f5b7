"""LoRA: which weights are the reference, which learn, and what is saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rl import (
    PPO,
    RESPONSES,
    actor_critic,
    generator_for,
    loaded_from,
    of_responses,
    prompts_for,
    real_mask,
    state_of,
    step_data,
    token_batch,
    update_settings,
)
from rlgf_cli.config.common import LoraConfig
from rlgf_cli.models.actor_critic import ActorCritic
from rlgf_cli.models.load import add_lora, save
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.training.optimizer import make_optimizer
from rlgf_cli.training.update import update


def fresh_adapter(path: Path) -> Loaded:
    torch.manual_seed(0)
    return add_lora(loaded_from(path), LoraConfig(enabled=True, r=4, alpha=16))


def train(model: ActorCritic, steps: int = 2) -> None:
    generator = generator_for(model.loaded)
    data = step_data(model, PPO, generator.generate(PPO, prompts_for(model.loaded, 8), 0, 9.0), generator.sampling)
    optimizer = make_optimizer(model.trainable(), 2e-2, 0.0)
    for step in range(steps):
        update(model, optimizer, data, generator.sampling, update_settings(), seed=0, step=step)


def of(model: ActorCritic, score: Callable[..., torch.Tensor]) -> torch.Tensor:
    batch = token_batch(model.loaded, [p.ids for p in prompts_for(model.loaded, 3)], RESPONSES)
    mask = real_mask(batch)
    return score(batch, mask, temperature=1.0, min_new_tokens=0)[mask].detach().double()


def policy_of(model: ActorCritic) -> torch.Tensor:
    return of(model, lambda *a, **k: model.forward_logprobs(*a, **k).logprobs)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max())


@pytest.fixture(scope="module")
def adapter(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained adapter's checkpoint: what sft with LoRA leaves."""
    model = actor_critic(fresh_adapter(tiny_gpt2))
    train(model)
    folder = tmp_path_factory.mktemp("adapter")
    save(folder, model.loaded)
    return folder


def test_with_a_fresh_adapter_the_reference_is_the_plain_weights(tiny_gpt2: Path) -> None:
    base = of_responses(loaded_from(tiny_gpt2))
    model = actor_critic(fresh_adapter(tiny_gpt2))
    assert distance(policy_of(model), base) < 2e-5  # before training: the same
    train(model)
    assert model.ref_model is None  # no second copy of the weights
    assert distance(of(model, model.ref_logprobs), base) < 2e-5
    assert distance(policy_of(model), base) > 0.05


def test_with_an_adapter_that_goes_on_the_reference_is_that_adapter(tiny_gpt2: Path, adapter: Path) -> None:
    """Switching the adapter off would give the weights before sft: a reference that nobody meant."""
    base, tuned = of_responses(loaded_from(tiny_gpt2)), of_responses(loaded_from(adapter))
    assert distance(base, tuned) > 0.05
    model = actor_critic(loaded_from(adapter))
    assert distance(policy_of(model), tuned) < 2e-5
    assert distance(of(model, model.ref_logprobs), tuned) < 2e-5
    train(model)
    assert distance(of(model, model.ref_logprobs), tuned) < 2e-5
    assert distance(policy_of(model), tuned) > 0.05


@pytest.mark.parametrize("goes_on", [False, True])
def test_only_the_adapter_and_the_critics_learn(tiny_gpt2: Path, adapter: Path, goes_on: bool) -> None:
    model = actor_critic(loaded_from(adapter) if goes_on else fresh_adapter(tiny_gpt2))
    before = state_of(model.policy)
    of(model, model.ref_logprobs)  # switches adapters on the way
    learning = [name for name, _ in model.trainable()]
    assert learning and all(".default." in name or name.startswith("critics.") for name in learning)
    train(model)
    moved = {name for name, tensor in state_of(model.policy).items() if not torch.equal(before[name], tensor)}
    assert moved and all("lora_" in name and ".default." in name for name in moved)


def test_an_adapter_that_goes_on_is_saved_alone_and_loads_back(adapter: Path, tmp_path: Path) -> None:
    model = actor_critic(loaded_from(adapter))
    train(model)
    expected = policy_of(model)
    save(tmp_path, model.loaded)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]  # no folder of the reference adapter
    assert not list(tmp_path.glob("model*.safetensors"))
    assert not [name for name in load_file(tmp_path / "adapter_model.safetensors") if "reference" in name]
    again = loaded_from(tmp_path)
    assert distance(of_responses(again), expected) < 2e-5
    assert again.text == model.loaded.text
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(again.model.peft_config["default"].base_model_name_or_path), tmp_path
    )
    again.model = plain.eval()
    assert distance(of_responses(again), expected) < 2e-5


def test_a_separate_critic_starts_from_the_policy_with_its_adapter(adapter: Path) -> None:
    """Its backbone is the adapted policy as plain weights, all of which learn."""
    model = actor_critic(loaded_from(adapter), mode="separate")
    critic = model.critics["policy"]
    assert not [name for name, _ in critic.named_parameters() if "lora" in name]
    assert all(parameter.requires_grad for parameter in critic.parameters())
    merged = dict(critic.backbone.named_parameters())
    plain = dict(loaded_from(adapter).model.get_base_model().named_parameters())
    name = "transformer.h.0.attn.c_attn"
    assert distance(merged[f"{name}.weight"], plain[f"{name}.base_layer.weight"]) > 1e-4
