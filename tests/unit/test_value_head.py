"""Critics: the units of their values, what their error reaches, and the reference that need not be there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rl import RESPONSES, loaded_from, plain_logits, plain_logprobs, prompts_for, real_mask, token_batch
from rlgf_cli.config.common import LoraConfig
from rlgf_cli.models.actor_critic import ActorCritic, ValueHead
from rlgf_cli.models.load import add_lora
from rlgf_cli.models.loaded import Loaded

MODES = ["shared", "head", "separate"]
PLAIN: dict[str, Any] = {"temperature": 1.0, "min_new_tokens": 0}


@pytest.fixture
def gpt2(tiny_gpt2: Path) -> Loaded:
    return loaded_from(tiny_gpt2)


def head(seed: int = 0) -> tuple[ValueHead, torch.Tensor]:
    """A head that has learned something, and hidden states."""
    torch.manual_seed(seed)
    found = ValueHead(16)
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter)
    return found, torch.randn(3, 5, 16)


def mean_and_spread() -> st.SearchStrategy[tuple[float, float]]:
    return st.tuples(st.floats(-50, 50).map(lambda x: round(x, 2)), st.sampled_from([0.0, 0.03, 1.0, 20.0]))


# --- the units of the values


@given(st.lists(mean_and_spread(), min_size=1, max_size=4))
def test_calibrated_anew_a_head_that_has_learned_keeps_every_value(units: list[tuple[float, float]]) -> None:
    found, hidden = head()
    before = found(hidden)
    for mean, spread in units:
        found.calibrate(mean, spread, keep=True)
        assert float(found.mean) == pytest.approx(mean) and float(found.unit) == pytest.approx(spread or 1.0)
        assert torch.allclose(found(hidden), before, rtol=1e-4, atol=1e-3)


@given(mean_and_spread())
def test_a_head_that_has_learned_nothing_begins_at_the_mean(units: tuple[float, float]) -> None:
    found = ValueHead(16)
    found.calibrate(*units, keep=False)
    assert found(torch.randn(2, 4, 16)).tolist() == [[pytest.approx(units[0])] * 4] * 2


def test_values_are_the_mean_and_so_many_units_beside_it() -> None:
    found, hidden = head()
    plain = found(hidden)
    weights = [p.clone() for p in found.parameters()]
    found.calibrate(-3.0, 0.5, keep=False)
    assert all(torch.equal(p, w) for p, w in zip(found.parameters(), weights, strict=True))
    assert torch.allclose(found(hidden), -3.0 + 0.5 * plain, atol=1e-5)


def test_values_are_computed_in_float32_whatever_the_model_computes_in() -> None:
    found, hidden = head()
    expected = found(hidden.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(found(hidden.bfloat16()), expected)


@pytest.mark.parametrize("mode", ["shared", "separate"])
def test_the_units_are_saved_with_the_critic(gpt2: Loaded, tiny_gpt2: Path, mode: str) -> None:
    model = ActorCritic(gpt2, ["policy", "guide"], mode=mode, with_ref_model=False)
    model.head("guide").calibrate(4.0, 0.25, keep=False)
    other = ActorCritic(loaded_from(tiny_gpt2), ["policy", "guide"], mode=mode, with_ref_model=False)
    other.critics.load_state_dict(model.critics.state_dict())
    assert [float(other.value_unit(name)) for name in ("policy", "guide")] == [1.0, 0.25]
    assert [float(other.head(name).mean) for name in ("policy", "guide")] == [0.0, 4.0]


# --- what a critic's error reaches


def with_values(loaded: Loaded, mode: str) -> ActorCritic:
    """One whose critic has learned something, the same in every mode."""
    model = ActorCritic(loaded, ["policy"], mode=mode, with_ref_model=False)
    torch.manual_seed(3)
    torch.nn.init.normal_(model.head("policy").out.weight)
    return model


def gradients(model: ActorCritic, **options: Any) -> tuple[float, float]:
    """Size of the gradient that the policy and the critic get from an error of the values."""
    batch = token_batch(model.loaded, [p.ids for p in prompts_for(model.loaded, 3)], RESPONSES)
    scored = model.forward_logprobs(batch, real_mask(batch), values=["policy"], **PLAIN, **options)
    scored.values["policy"].square().sum().backward()
    sizes = {"policy": 0.0, "critics": 0.0}
    for name, parameter in model.trainable():
        if parameter.grad is not None:
            sizes[name.split(".")[0]] += float(parameter.grad.abs().sum())
    return sizes["policy"], sizes["critics"]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_only_a_shared_critics_error_reaches_the_policy(gpt2: Loaded, mode: str, frozen: bool) -> None:
    """``critic: head`` reads the policy's hidden states and changes none of its weights."""
    model = with_values(gpt2, mode)
    policy, critic = gradients(model, policy_frozen=frozen)
    assert critic > 0
    assert (policy > 0) == (mode == "shared" and not frozen)
    own = [p for p in model.critics.parameters() if p.grad is not None and bool(p.grad.any())]
    assert (sum(p.numel() for p in own) > 10_000) == (mode == "separate")  # of which all layers learn


@pytest.mark.parametrize("mode", ["shared", "head"])
def test_a_frozen_policys_log_probabilities_carry_no_gradient(gpt2: Loaded, mode: str) -> None:
    model = ActorCritic(gpt2, ["policy"], mode=mode, with_ref_model=False)
    batch = token_batch(gpt2, [p.ids for p in prompts_for(gpt2, 3)], RESPONSES)
    for frozen in (False, True):
        scored = model.forward_logprobs(batch, real_mask(batch), values=["policy"], **PLAIN, policy_frozen=frozen)
        assert scored.logprobs.requires_grad is not frozen and scored.values["policy"].requires_grad


@torch.no_grad()
def test_the_three_kinds_of_critic_begin_with_the_same_values(gpt2: Loaded) -> None:
    batch = token_batch(gpt2, [p.ids for p in prompts_for(gpt2, 3)], RESPONSES)
    shared, head, separate = (
        with_values(gpt2, mode).forward_logprobs(batch, real_mask(batch), values=["policy"], **PLAIN).values["policy"]
        for mode in MODES
    )
    assert float(shared.std()) > 0.1
    assert torch.equal(shared, head) and torch.allclose(shared, separate, atol=1e-6)


# --- no reference


@pytest.mark.parametrize("lora", [False, True])
def test_without_a_reference_nothing_of_it_is_held(tiny_gpt2: Path, lora: bool) -> None:
    """Neither a copy of the weights nor, where training goes on from an adapter, a second adapter."""
    sizes = {}
    for wanted in (False, True):
        loaded = loaded_from(tiny_gpt2)
        if lora:
            loaded = add_lora(loaded, LoraConfig(enabled=True, r=2, target_modules=["c_attn"]))
            for name, parameter in loaded.model.named_parameters():
                if "lora_B" in name:  # as one that was trained
                    torch.nn.init.normal_(parameter)
        model = ActorCritic(loaded, ["policy"], mode="shared", with_ref_model=wanted)
        assert model.has_ref_model is wanted
        assert (model.ref_model is not None) == (wanted and not lora)
        assert model.ref_model_is_frozen_adapter == (wanted and lora)
        sizes[wanted] = sum(p.numel() for p in model.parameters())
    assert sizes[True] > sizes[False]


# --- what is scored


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_of_bfloat16_logits_are_computed_in_float32(
    gpt2: Loaded, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = gpt2.model.lm_head.forward
    monkeypatch.setattr(gpt2.model.lm_head, "forward", lambda hidden: forward(hidden).bfloat16())
    model = ActorCritic(gpt2, [], mode="shared", with_ref_model=False)
    prompts = [p.ids for p in prompts_for(gpt2, 3)]
    batch = token_batch(gpt2, prompts, RESPONSES)
    found = model.forward_logprobs(batch, real_mask(batch), temperature=temperature, min_new_tokens=0).logprobs
    for row, (prompt, response) in enumerate(zip(prompts, RESPONSES, strict=True)):
        expected = plain_logprobs(gpt2, prompt, response, temperature=temperature)
        # a rounding of the hidden states may move a logit by one step of bfloat16, seldom
        near = np.isclose(found[row, : len(response)].detach().double().numpy(), expected.numpy(), atol=1e-5)
        assert near.mean() > 0.5


def test_the_entropy_of_a_position_is_that_of_its_whole_distribution(gpt2: Loaded) -> None:
    model = ActorCritic(gpt2, [], mode="shared", with_ref_model=False)
    prompts = [p.ids for p in prompts_for(gpt2, 3)]
    batch = token_batch(gpt2, prompts, RESPONSES)
    scored = model.forward_logprobs(batch, real_mask(batch), temperature=0.8, min_new_tokens=2, entropy=True)
    for row, (prompt, response) in enumerate(zip(prompts, RESPONSES, strict=True)):
        logits = plain_logits(gpt2, prompt, response).double() / 0.8
        logits[:2, sorted(gpt2.eos_ids)] = float("-inf")
        p = logits.softmax(-1)
        expected = -(p * p.clamp_min(1e-300).log()).sum(-1)
        assert scored.entropies is not None
        assert torch.allclose(scored.entropies[row, : len(response)].double(), expected, atol=1e-4)
