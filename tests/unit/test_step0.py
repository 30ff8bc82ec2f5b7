"""What must be true before the first update, on every architecture: one distribution samples, is scored, and is the
reference; padding and batches do not matter; nothing random is left in scoring.

What a user's own run can be held against is in test_invariants.py; here is what needs a second opinion: plain calls,
other libraries, other settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper
from transformers.modeling_layers import GradientCheckpointingLayer

import rl
from rlgf_cli import noise
from rlgf_cli.algorithms.spec import Regime
from rlgf_cli.config.common import LoraConfig
from rlgf_cli.functional import losses
from rlgf_cli.models.generate import pad_rows
from rlgf_cli.models.load import add_lora
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.training.optimizer import make_optimizer
from rlgf_cli.training.rollout import Sampling
from rlgf_cli.training.update import update
from runs import assert_tensors

TEXT = "the cat sees the river it ."


@pytest.fixture
def loaded(any_model: Path) -> Loaded:
    return rl.loaded_from(any_model)


def with_lora(loaded: Loaded, **changes: object) -> Loaded:
    """A fresh adapter, on all the projections that the architecture has."""
    torch.manual_seed(0)
    names = ["c_attn", "q_proj", "v_proj", "q", "v"]
    have = sorted({n.rpartition(".")[2] for n, _ in loaded.model.named_modules()} & set(names))
    settings = {"enabled": True, "r": 4, "alpha": 16, "dropout": 0.5, "target_modules": have, **changes}
    return add_lora(loaded, LoraConfig.model_validate(settings))


def some_texts(loaded: Loaded) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and responses of unlike lengths; EOS last, and a pad token in the middle of a text."""
    prompts = [p.ids for p in rl.prompts_for(loaded, 5)]
    eos, pad = loaded.eos_id, loaded.pad_id
    responses = [[40, 41, 300, 42, eos], [299, eos], [70, pad, 71, 72, 73, 74, eos], [eos], [55, 56, 57]]
    return prompts, responses


# --- scoring


@pytest.mark.parametrize(("temperature", "min_new_tokens"), [(1.0, 0), (0.6, 0), (1.0, 1)])
def test_logprobs_are_those_of_a_plain_call_whatever_the_batch(
    loaded: Loaded, temperature: float, min_new_tokens: int
) -> None:
    """Against one unpadded call per text: in a batch, alone, in another order, with more padding."""
    prompts, responses = some_texts(loaded)
    responses[3] = [60, loaded.eos_id]
    options = {"temperature": temperature, "min_new_tokens": min_new_tokens}
    model = rl.actor_critic(loaded)
    expected = [rl.plain_logprobs(loaded, p, r, **options) for p, r in zip(prompts, responses, strict=True)]  # type: ignore[arg-type]
    values: dict[int, torch.Tensor] = {}
    for rows in ([0, 1, 2, 3, 4], [4, 2], [3], [1, 3], [2, 0, 1]):
        batch = rl.token_batch(loaded, [prompts[i] for i in rows], [responses[i] for i in rows])
        scored = model.forward_logprobs(batch, rl.real_mask(batch), values=["policy"], **options)  # type: ignore[arg-type]
        reference = model.ref_logprobs(batch, rl.real_mask(batch), **options)  # type: ignore[arg-type]
        for at, i in enumerate(rows):
            length = len(responses[i])
            for found in (scored.logprobs, reference):
                assert torch.allclose(found[at, :length].double(), expected[i], atol=2e-5)
                assert not found[at, length:].any()
            value = scored.values["policy"][at, :length]
            assert torch.allclose(value, values.setdefault(i, value.detach()), atol=2e-5)
    assert max(float(v.detach().std()) for v in values.values() if len(v) > 1) > 0.05  # there was something to compare


@torch.no_grad()
def padded_on_the_other_side(loaded: Loaded, prompts: list[list[int]], responses: list[list[int]]) -> torch.Tensor:
    """Logits [B, T, V] of one batch by a plain call: decoders get whole rows padded on the right (ours pads prompts on
    the left), encoders get theirs padded on the left."""
    batch = rl.token_batch(loaded, prompts, responses)
    if loaded.encoder_decoder:
        ids, mask = pad_rows(prompts, loaded.pad_id, left=True)
        start = torch.full((len(prompts), 1), loaded.model.config.decoder_start_token_id)
        decoder = torch.cat([start, batch.response_ids[:, :-1]], dim=1)
        return loaded.model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder).logits
    rows = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    ids, mask = pad_rows(rows, loaded.pad_id, left=False)
    logits = loaded.model(input_ids=ids, attention_mask=mask).logits
    width = batch.response_ids.shape[1]
    return torch.stack([logits[i, len(p) - 1 :][:width] for i, p in enumerate(prompts)])


def test_left_and_right_padding_give_the_same(loaded: Loaded) -> None:
    """Point by point, and in the mean of the residuals. BART's encoder counts positions from the left, padding
    included: it is always padded on the right."""
    if loaded.model.config.model_type == "bart":
        assert rl.token_batch(loaded, [[5, 6], [7]], [[8], [9]]).prompt_mask.tolist() == [[1, 1], [1, 0]]
        return
    prompts, responses = some_texts(loaded)
    responses = [[*r, *[loaded.pad_id] * 9][:7] for r in responses]  # room for every row's logits
    batch = rl.token_batch(loaded, prompts, responses)
    mask = rl.real_mask(batch)
    scored = rl.actor_critic(loaded).forward_logprobs(batch, mask, temperature=1.0, min_new_tokens=0, entropy=True)
    logprobs = padded_on_the_other_side(loaded, prompts, responses).log_softmax(-1)
    other = {
        "logprobs": logprobs.gather(-1, batch.response_ids.unsqueeze(-1))[..., 0][mask],
        "entropies": -(logprobs.exp() * logprobs).sum(-1)[mask],
    }
    assert scored.entropies is not None
    ours = {"logprobs": scored.logprobs.detach()[mask], "entropies": scored.entropies.detach()[mask]}
    assert_tensors(ours, other, point=5e-5, mean=5e-6)


def test_only_selected_tokens_are_scored_and_each_at_its_place(loaded: Loaded) -> None:
    prompts, responses = some_texts(loaded)
    batch = rl.token_batch(loaded, prompts, responses)
    model = rl.actor_critic(loaded)
    whole = model.forward_logprobs(batch, rl.real_mask(batch), temperature=1.0, min_new_tokens=0, entropy=True)
    select = rl.real_mask(batch) & (
        torch.rand(batch.response_ids.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    )
    part = model.forward_logprobs(batch, select, temperature=1.0, min_new_tokens=0, entropy=True)
    zero = torch.zeros(())
    assert torch.allclose(part.logprobs, torch.where(select, whole.logprobs, zero), atol=1e-5)
    assert whole.entropies is not None and part.entropies is not None
    assert torch.allclose(part.entropies, torch.where(select, whole.entropies, zero), atol=1e-5)
    nothing = model.forward_logprobs(
        batch, torch.zeros_like(select), temperature=1.0, min_new_tokens=0, values=["policy"]
    )
    assert not nothing.logprobs.any() and nothing.values["policy"].shape == select.shape


def test_entropy_is_that_of_the_distribution_and_bears_banned_tokens(loaded: Loaded) -> None:
    prompt, response = rl.prompts_for(loaded, 1)[0].ids, [40, 41, 42]
    batch = rl.token_batch(loaded, [prompt], [response])
    scored = rl.actor_critic(loaded).forward_logprobs(
        batch, rl.real_mask(batch), temperature=0.8, min_new_tokens=2, entropy=True
    )
    logits = rl.plain_logits(loaded, prompt, response) / 0.8
    logits[:2, sorted(loaded.eos_ids)] = float("-inf")
    expected = torch.distributions.Categorical(logits=logits).entropy()
    assert scored.entropies is not None
    assert torch.allclose(scored.entropies[0], expected, atol=1e-4)


def test_a_value_is_of_the_state_before_its_token(loaded: Loaded) -> None:
    prompt, response = rl.prompts_for(loaded, 1)[0].ids, [40, 41, 42, 43]
    model = rl.actor_critic(loaded)

    def values(ids: list[int]) -> torch.Tensor:
        batch = rl.token_batch(loaded, [prompt], [ids])
        return model.forward_logprobs(
            batch, rl.real_mask(batch), temperature=1.0, min_new_tokens=0, values=["policy"]
        ).values["policy"][0]

    before, after = values(response), values([40, 41, 99, 43])
    assert torch.allclose(before[:3], after[:3], atol=1e-6)
    assert float((before[3] - after[3]).abs().detach()) > 1e-3


# --- sampling


@pytest.mark.parametrize("warped", [{}, {"top_k": 20}, {"top_p": 0.8}], ids=["plain", "top_k", "top_p"])
@pytest.mark.parametrize("regime", [rl.PPO, rl.PPO_PP])
def test_every_sampled_token_is_the_quantile_of_the_plain_distribution(
    loaded: Loaded, regime: Regime, warped: dict[str, float]
) -> None:
    """The draw of token t lies between the cumulative masses on both sides of it, as a plain call without cache,
    padding or prefill gives them: the sampler's distribution is the scorer's."""
    sampling = {"temperature": 0.9, "min_new_tokens": 3, "max_new_tokens": 8, **warped}
    generator = rl.generator_for(loaded, rl.ScriptedGuide((TEXT, "stop")), **sampling)  # type: ignore[arg-type]
    for e in generator.generate(regime, rl.prompts_for(loaded, 6), 2, 9.0):
        draws = noise.uniforms(8, 0, "tokens", 2, e.index)
        logits = rl.plain_logits(loaded, e.prompt_ids, e.ids).double() / 0.9
        logits[:3, sorted(loaded.eos_ids)] = float("-inf")
        if "top_k" in warped:
            logits = TopKLogitsWarper(20)(None, logits)
        if "top_p" in warped:
            logits = TopPLogitsWarper(0.8)(None, logits)
        cumulative = logits.softmax(-1).cumsum(-1)
        for t in range(e.cut, e.length):
            below = float(cumulative[t, e.ids[t] - 1]) if e.ids[t] else 0.0
            assert below - 1e-4 < draws[t] < float(cumulative[t, e.ids[t]]) + 1e-4
            assert torch.isfinite(logits[t, e.ids[t]])


def test_greedy_text_is_that_of_transformers(loaded: Loaded) -> None:
    from rlgf_cli.models.generate import sample

    prompts = [p.ids for p in rl.prompts_for(loaded, 4)]
    rows = sample(loaded.model, prompts, max_new_tokens=8, uniforms=None, eos_ids=loaded.eos_ids, pad_id=loaded.pad_id)
    for prompt, row in zip(prompts, rows, strict=True):
        ids = torch.tensor([prompt])
        out = loaded.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8
        )[0].tolist()
        out = out[1:] if loaded.encoder_decoder else out[len(prompt) :]
        assert row.ids == out[: len(row.ids)] and len(row.ids) in (8, len(out))


# --- ratio 1, KL 0


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("regime", [rl.PPO, rl.PPO_PP, rl.AGGREVATED])
def test_ratio_is_1_and_kl_0_before_the_first_update(loaded: Loaded, regime: Regime, lora: bool) -> None:
    loaded = with_lora(loaded) if lora else loaded
    model = rl.actor_critic(loaded, [regime.roll_out])
    sampling = Sampling(max_new_tokens=8, min_new_tokens=2, temperature=0.8)
    generator = rl.generator_for(
        loaded, rl.ScriptedGuide((TEXT, "stop")), max_new_tokens=8, min_new_tokens=2, temperature=0.8
    )
    episodes = generator.generate(regime, rl.prompts_for(loaded, 9), 0, 6.0)
    data = rl.step_data(model, regime, episodes, sampling, critics=[regime.roll_out])
    assert data.advantages is not None and data.stats is not None
    assert float(data.stats.log_ratio(data.batch).abs().max()) < 1e-5
    assert bool((data.stats.old_logprobs[data.batch.policy] < 0).all())
    for minibatch in torch.arange(9).split(2):  # other rows, other padding, other order than in annotation
        rows = minibatch.flip(0)
        tokens = data.batch.tokens.rows(rows)
        learned = data.batch.learned[rows][:, : tokens.response_ids.shape[1]]
        scored = model.forward_logprobs(tokens, learned, temperature=0.8, min_new_tokens=2)
        old = data.stats.old_logprobs[rows][:, : learned.shape[1]]
        _, stats = losses.policy_loss(scored.logprobs, old, torch.ones_like(old), learned, 0.2, 1)
        assert float(stats["ratio"]) == pytest.approx(int(learned.sum()), abs=1e-4)
        assert float(stats["approx_kl"]) == pytest.approx(0, abs=1e-6)


# --- nothing random, nothing shared


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_dropout_is_off_in_scoring_and_in_the_update(loaded: Loaded, lora: bool, checkpointing: bool) -> None:
    prompts, responses = some_texts(loaded)
    expected = [rl.plain_logprobs(loaded, p, r) for p, r in zip(prompts, responses, strict=True)]
    loaded = with_lora(loaded) if lora else loaded
    model = rl.actor_critic(loaded)
    if checkpointing:
        model.enable_checkpointing()
    batch = rl.token_batch(loaded, prompts, responses)
    for _ in range(2):
        scored = model.forward_logprobs(batch, rl.real_mask(batch), temperature=1.0, min_new_tokens=0)
        for row, logprobs in enumerate(expected):
            assert torch.allclose(scored.logprobs[row, : len(logprobs)].double(), logprobs, atol=2e-5)


def test_gradient_checkpointing_changes_neither_gradients_nor_text(any_model: Path) -> None:
    """Layers that checkpoint ignore the key-value cache; a rollout must not notice."""
    found = []
    for checkpointing in (False, True):
        loaded = rl.loaded_from(any_model)
        model = rl.actor_critic(loaded)
        if checkpointing:
            model.enable_checkpointing()
        prompts, responses = some_texts(loaded)
        batch = rl.token_batch(loaded, prompts, responses)
        model.forward_logprobs(batch, rl.real_mask(batch), temperature=1.0, min_new_tokens=0).logprobs.sum().backward()
        gradients = [p.grad for _, p in model.trainable() if p.grad is not None]
        texts = [e.ids for e in rl.generator_for(loaded).generate(rl.PPO, rl.prompts_for(loaded, 6), 0, 9.0)]
        found.append((gradients, texts))
    assert found[0][1] == found[1][1]
    assert len(found[0][0]) == len(found[1][0]) > 5
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found[0][0], found[1][0], strict=True))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_separate_critics_checkpoint_too(tiny_llama: Path, lora: bool) -> None:
    """Each layer runs a second time in the backward pass, and keeps less for it; the gradients are the same."""
    found = []
    for checkpointing in (False, True):
        loaded = rl.loaded_from(tiny_llama)
        model = rl.actor_critic(with_lora(loaded) if lora else loaded, ["policy", "guide"], mode="separate")
        if checkpointing:
            model.enable_checkpointing()
        calls: list[torch.nn.Module] = []
        for critic in model.critics.values():
            critic.backbone.model.layers[1].self_attn.register_forward_hook(lambda m, *_, to=calls: to.append(m))
        batch = rl.token_batch(loaded, *some_texts(loaded))
        nothing, kept = torch.zeros_like(rl.real_mask(batch)), 0

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            scored = model.forward_logprobs(
                batch, nothing, temperature=1.0, min_new_tokens=0, values=["policy", "guide"]
            )
        assert len(set(calls)) == len(calls) == 2
        sum(value.square().sum() for value in scored.values.values()).backward()  # type: ignore[union-attr]
        assert [calls.count(layer) for layer in set(calls)] == ([2, 2] if checkpointing else [1, 1])
        assert not any(m.training for m in model.critics.modules() if isinstance(m, GradientCheckpointingLayer))
        found.append((kept, [p.grad for p in model.critics.parameters() if p.grad is not None]))
    (plain, gradients), (less, others) = found
    assert less < 0.5 * plain and len(gradients) == len(others) > 20
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients, others, strict=True))


@pytest.mark.parametrize("mode", ["shared", "separate"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_warming_critic_leaves_the_policy_alone(loaded: Loaded, mode: str, lora: bool) -> None:
    """Value-only updates change the critics and nothing of the policy, with shared hidden states and decay too."""
    loaded = with_lora(loaded) if lora else loaded
    model = rl.actor_critic(loaded, mode=mode)
    generator = rl.generator_for(loaded)
    data = rl.step_data(
        model, rl.PPO, generator.generate(rl.PPO, rl.prompts_for(loaded, 8), 0, 9.0), generator.sampling
    )
    optimizer = make_optimizer(model.trainable(), 1e-2, 0.1)
    before = [rl.state_of(part) for part in (model.policy, model.critics)]
    for step in range(2):
        update(model, optimizer, data, generator.sampling, rl.update_settings(policy_frozen=True), seed=0, step=step)
    after = [rl.state_of(part) for part in (model.policy, model.critics)]
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert any(not torch.equal(before[1][name], after[1][name]) for name in before[1])
    update(model, optimizer, data, generator.sampling, rl.update_settings(), seed=0, step=2)
    assert any(not torch.equal(after[0][name], tensor) for name, tensor in rl.state_of(model.policy).items())


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_separate_critic_shares_no_weight_with_the_policy(loaded: Loaded, lora: bool) -> None:
    loaded = with_lora(loaded) if lora else loaded
    model = rl.actor_critic(loaded, ["policy", "guide"], mode="separate")
    parts = [model.policy, model.critics["policy"], model.critics["guide"]]
    if model.ref_model is not None:
        parts.append(model.ref_model)
    places = [{p.data_ptr() for p in part.parameters()} for part in parts]
    for i, own in enumerate(places):
        for other in places[i + 1 :]:
            assert not own & other
    prompts, responses = some_texts(loaded)
    batch = rl.token_batch(loaded, prompts, responses)
    mask = rl.real_mask(batch)
    values = model.forward_logprobs(batch, mask, temperature=1.0, min_new_tokens=0, values=["guide"]).values["guide"]
    values[mask].sum().backward()
    assert all(p.grad is None for p in model.policy.parameters())
    assert sum(p.grad is not None for p in model.critics["guide"].parameters()) > 5


def test_the_reference_does_not_move_with_the_policy(loaded: Loaded) -> None:
    model = rl.actor_critic(loaded)
    prompts, responses = some_texts(loaded)
    batch = rl.token_batch(loaded, prompts, responses)
    before = model.ref_logprobs(batch, rl.real_mask(batch), temperature=1.0, min_new_tokens=0)
    generator = rl.generator_for(loaded)
    data = rl.step_data(
        model, rl.PPO, generator.generate(rl.PPO, rl.prompts_for(loaded, 8), 0, 9.0), generator.sampling
    )
    optimizer = make_optimizer(model.trainable(), 1e-2, 0.0)
    update(model, optimizer, data, generator.sampling, rl.update_settings(), seed=0, step=0)
    after = model.ref_logprobs(batch, rl.real_mask(batch), temperature=1.0, min_new_tokens=0)
    scored = model.forward_logprobs(batch, rl.real_mask(batch), temperature=1.0, min_new_tokens=0).logprobs
    assert torch.equal(before, after)
    assert float((scored - after).abs().max().detach()) > 1e-3


def test_bfloat16_starts_at_ratio_1_too(tiny_gpt2: Path) -> None:
    loaded = rl.loaded_from(tiny_gpt2, dtype="bfloat16")
    assert next(loaded.model.parameters()).dtype == torch.float32  # small updates would be lost in bfloat16 weights
    model = rl.actor_critic(loaded)
    generator = rl.generator_for(loaded)
    data = rl.step_data(
        model, rl.PPO, generator.generate(rl.PPO, rl.prompts_for(loaded, 8), 0, 9.0), generator.sampling
    )
    assert data.advantages is not None and data.stats is not None
    assert float(data.stats.log_ratio(data.batch).abs().max()) < 1e-6
    scored = model.forward_logprobs(
        data.batch.tokens, data.batch.learned, temperature=1.0, min_new_tokens=0, values=["policy"]
    )
    assert scored.values["policy"].dtype == scored.logprobs.dtype == torch.float32
    difference = (scored.logprobs - data.stats.old_logprobs)[data.batch.learned]
    assert float(difference.abs().max().detach()) < 0.1 and np.isfinite(difference.detach().numpy()).all()
