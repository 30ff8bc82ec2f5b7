"""Mistakes in the update that earlier implementations made: 7 and 9 to 12 of the list. See test_mistakes.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rl
from rlgf_cli import noise
from rlgf_cli.errors import RlgfError
from rlgf_cli.functional import losses
from rlgf_cli.models.forward import TokenBatch
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.protocols import Example
from rlgf_cli.training import update as update_module
from rlgf_cli.training.episodes import Episode, draw_references
from rlgf_cli.training.minibatches import Counts
from rlgf_cli.training.optimizer import make_optimizer
from rlgf_cli.training.update import Sums, update


@pytest.fixture
def gpt2(tiny_gpt2: Path) -> Loaded:
    return rl.loaded_from(tiny_gpt2)


def _unguarded_mean(values: torch.Tensor, mask: torch.Tensor, count: Any) -> torch.Tensor:
    return torch.where(mask, values, values.new_zeros(())).sum() / torch.as_tensor(count)


@rl.both
def test_mistake_7_a_minibatch_without_policy_tokens_divides_by_zero(
    gpt2: Loaded, monkeypatch: pytest.MonkeyPatch, injected: bool
) -> None:
    """In AggreVaTeD the guide may have written every text of a minibatch. Such a minibatch fits the critic and is
    finite; one with nothing at all takes no optimizer step."""
    if injected:  # everything is divided by the number of policy tokens
        monkeypatch.setattr(losses, "_mean", _unguarded_mean)
        counts = Counts.of

        def of_policy_tokens(data: Any, rows: torch.Tensor, tokens: Any, *more: Any) -> Counts:
            return replace(counts(data, rows, tokens, *more), fitted=tokens.learned[rows].sum())

        monkeypatch.setattr(Counts, "of", of_policy_tokens)
        monkeypatch.setattr(Counts, "empty", False)
    regime = rl.AGGREVATED.model_copy(update={"rollin_prob": 0.0})
    generator = rl.generator_for(gpt2, rl.guide())
    episodes = generator.generate(regime, rl.prompts_for(gpt2, 4), 0, 5.0)
    model = rl.actor_critic(gpt2, ["guide"])
    data = rl.step_data(model, regime, episodes, generator.sampling, critics=["guide"])
    assert int(data.batch.learned.sum()) == 0 < int(data.batch.fit["guide"].sum())
    optimizer = make_optimizer(model.trainable(), 1e-2, 0.0)
    settings = rl.update_settings(entropy_coef=0.01)
    with rl.caught_if(injected, RlgfError):
        figures, _ = update(model, optimizer, data, generator.sampling, settings, seed=0, step=0)
        assert bool(rl.parameters_of(model).isfinite().all())
        assert figures["update/skipped"] == 0 and "loss/policy" not in figures and figures["loss/value_guide"] > 0
    unguided = rl.generator_for(gpt2).generate(rl.PPO, rl.prompts_for(gpt2, 4), 0, 5.0)
    nothing = rl.step_data(model, rl.BC, unguided, generator.sampling, critics=[])
    before = rl.state_of(model)
    with rl.caught_if(injected, RlgfError):
        figures, _ = update(model, optimizer, nothing, generator.sampling, settings, seed=0, step=1)
        assert figures == {"update/skipped": 1}
        assert all(torch.equal(before[name], tensor) for name, tensor in rl.state_of(model).items())


def _diluted(self: Sums, name: str, total: Any, count: Any, add: Callable[..., None] = Sums.add) -> None:
    add(self, name, total, 8 * 12 if name.startswith("ppo/") else count)


@rl.both
def test_mistake_9a_approx_kl_is_averaged_over_masked_tokens(
    gpt2: Loaded, monkeypatch: pytest.MonkeyPatch, injected: bool
) -> None:
    """It is the mean over learned tokens, as a plain call of the old and of the new policy gives it."""
    generator = rl.generator_for(gpt2, rl.guide())
    episodes = generator.generate(rl.AGGREVATED, rl.prompts_for(gpt2, 8), 0, 5.0)
    model = rl.actor_critic(gpt2, ["guide"])
    data = rl.step_data(model, rl.AGGREVATED, episodes, generator.sampling, critics=["guide"])

    def logprobs() -> torch.Tensor:
        rows = []
        for e in episodes:
            mask = torch.tensor([author == "policy" for author, ids in e.segments for _ in ids], dtype=torch.bool)
            rows.append(rl.plain_logprobs(gpt2, e.prompt_ids, e.ids)[mask])
        return torch.cat(rows)

    old = logprobs()
    update(
        model, torch.optim.SGD(model.parameters(), 0.3), data, generator.sampling, rl.update_settings(), seed=0, step=0
    )
    difference = logprobs() - old
    expected = float((difference.exp() - 1 - difference).mean())
    assert expected > 1e-4
    if injected:
        monkeypatch.setattr(Sums, "add", _diluted)
    with rl.caught_if(injected):
        still = torch.optim.SGD(model.parameters(), 0.0)
        settings = rl.update_settings(minibatch_size=3)
        figures, _ = update(model, still, data, generator.sampling, settings, seed=0, step=1)
        assert figures["ppo/approx_kl"] == pytest.approx(expected, rel=1e-2)
        assert figures["ppo/ratio"] == pytest.approx(float(difference.exp().mean()), rel=1e-3)


@rl.both
def test_mistake_9b_nothing_is_seeded(tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch, injected: bool) -> None:
    """The same seed is the same run, whatever the global generators were doing; another seed is another one."""
    if injected:
        monkeypatch.setattr(noise, "generator", lambda *_: np.random.default_rng())

    def train(seed: int, disturbance: int) -> tuple[torch.Tensor, list[str]]:
        torch.manual_seed(disturbance)
        np.random.seed(disturbance)
        trainer = rl.trainer_for(rl.loaded_from(tiny_gpt2), "lols", rl.guide(), seed=seed)
        texts = [e.text for _ in range(2) for e in trainer.step()[1]]
        return rl.parameters_of(trainer.model), texts

    (one, texts), (two, again), (_, other) = train(0, 1), train(0, 2), train(1, 1)
    assert texts != other
    with rl.caught_if(injected):
        assert texts == again and torch.equal(one, two)


@rl.both
def test_mistake_10a_layernorm_weights_are_decayed(gpt2: Loaded, injected: bool) -> None:
    """Vectors (norms, biases) keep their values without a gradient; matrices decay."""

    def all_alike(named: Any, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for _, p in named], lr=learning_rate, weight_decay=weight_decay)

    model = rl.actor_critic(gpt2)
    make = all_alike if injected else make_optimizer
    optimizer = make(model.trainable(), 0.1, 0.5)
    before = {name: p.detach().clone() for name, p in model.trainable()}
    for _, parameter in model.trainable():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)
    assert {"policy.transformer.ln_f.weight", "policy.transformer.h.0.attn.c_attn.bias"} <= set(before)
    with rl.caught_if(injected):
        for name, parameter in model.trainable():
            assert torch.equal(parameter.detach(), before[name]) == (parameter.dim() < 2), name


@rl.both
def test_mistake_10b_references_are_looked_up_by_decoded_prompt(gpt2: Loaded, injected: bool) -> None:
    """Two examples with one prompt and different references: each keeps its own."""
    pair = [Example("a", "cat", ("the cat sees it .",)), Example("b", "cat", ("in the river a dog .",))]
    episodes = [Episode(i, example, [260], i, "policy") for i, example in enumerate(pair)]
    if injected:
        by_prompt = {example.prompt: example for example in pair}
        episodes = [replace(e, example=by_prompt[e.example.prompt]) for e in episodes]
    batch = draw_references(gpt2, episodes, 12, seed=0, step=0)
    with rl.caught_if(injected):
        for row, example in enumerate(pair):
            ids = batch.response_ids[row, : batch.lengths[row]].tolist()
            assert gpt2.text.decode_response(gpt2.tokenizer, ids) == example.references[0]
            assert ids[-1] == gpt2.eos_id


def _exp_first(
    logprobs: torch.Tensor,
    old: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip: float,
    count: Any,
    **_: Any,
) -> Any:
    ratio = (logprobs - old).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    zero = torch.zeros(())
    return -(gain * mask / count).sum(), {"ratio": zero, "clipped": zero, "approx_kl": zero}


@rl.both
def test_mistake_11_the_ratio_is_taken_before_the_mask(
    gpt2: Loaded, monkeypatch: pytest.MonkeyPatch, injected: bool
) -> None:
    """On the guide's tokens the ratio overflows, and infinity times 0 is NaN. Here: whatever stands on the guide's
    tokens and on padding, the update and its figures are the same."""
    if injected:
        monkeypatch.setattr(losses, "policy_loss", _exp_first)
    generator = rl.generator_for(gpt2, rl.guide())
    episodes = generator.generate(rl.AGGREVATED, rl.prompts_for(gpt2, 8), 0, 5.0)

    def train(poison: float | None) -> tuple[torch.Tensor, dict[str, float]]:
        model = rl.actor_critic(rl.loaded_from(Path(gpt2.name)), ["guide"])
        data = rl.step_data(model, rl.AGGREVATED, episodes, generator.sampling, critics=["guide"])
        assert data.stats is not None and data.advantages is not None
        if poison is not None:
            data.stats.old_logprobs[~data.batch.policy] = poison
            data.advantages.per_token[~data.batch.policy] = poison
        optimizer = make_optimizer(model.trainable(), 1e-2, 0.0)
        figures, _ = update(model, optimizer, data, generator.sampling, rl.update_settings(), seed=0, step=0)
        return rl.parameters_of(model), figures

    with rl.caught_if(injected, RlgfError):
        clean, figures = train(None)
        for poison in (-1e4, float("-inf"), float("nan")):
            spoilt, same = train(poison)
            assert torch.equal(spoilt, clean) and same == figures


@rl.both
@pytest.mark.parametrize("size", [8, 4, 2, 3])
def test_mistake_12_the_number_of_minibatches_has_no_effect_and_ratios_are_diluted(
    gpt2: Loaded, monkeypatch: pytest.MonkeyPatch, size: int, injected: bool
) -> None:
    """One optimizer step per minibatch and epoch; every episode once an epoch; a ratio of 1 is logged as 1."""
    model = rl.actor_critic(gpt2, ["guide"])
    generator = rl.generator_for(gpt2, rl.guide())
    episodes = generator.generate(rl.AGGREVATED, rl.prompts_for(gpt2, 8), 0, 5.0)
    data = rl.step_data(model, rl.AGGREVATED, episodes, generator.sampling, critics=["guide"])
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    steps: list[int] = []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    if injected and size != 2:
        monkeypatch.setattr(update_module, "minibatches", lambda n, s, *_: [*torch.arange(len(n)).split(2)] * s.epochs)
    elif injected:
        monkeypatch.setattr(Sums, "add", _diluted)
    rows: list[int] = []
    whole = TokenBatch.rows

    def watched(self: TokenBatch, index: torch.Tensor) -> TokenBatch:
        rows.extend(index.tolist())
        return whole(self, index)

    monkeypatch.setattr(TokenBatch, "rows", watched)
    settings = rl.update_settings(epochs=3, minibatch_size=size)
    figures, _ = update(model, optimizer, data, generator.sampling, settings, seed=0, step=0)
    with rl.caught_if(injected):
        assert len(steps) == 3 * -(-8 // size)
        assert sorted(rows) == sorted([*range(8)] * 3)
        assert figures["ppo/ratio"] == pytest.approx(1.0, abs=1e-4)
        assert figures["ppo/clip_fraction"] == 0
