"""Mistakes that earlier implementations of these algorithms made, one check each.

Every check runs twice: on the code as it is, where it must pass, and with the mistake injected, where it must fail.
So each test shows that it can see what it is for.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from algorithms import spec_of
from rl import (
    PPO,
    actor_critic,
    both,
    caught_if,
    generator_for,
    guide,
    loaded_from,
    parameters_of,
    plain_logprobs,
    prompts_for,
    real_mask,
    state_of,
    step_data,
    token_batch,
    trainer_for,
    update_settings,
)
from rlgf_cli.algorithms.spec import Regime
from rlgf_cli.config.guide import GuideConfig
from rlgf_cli.functional import losses
from rlgf_cli.guides.make import make_live_guide
from rlgf_cli.models import actor_critic as actor_critic_module
from rlgf_cli.models.forward import TokenBatch
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.protocols import Example, GuideRequest, Score
from rlgf_cli.training import loop
from rlgf_cli.training import update as update_module
from rlgf_cli.training.advantages import AdvantageInputs
from rlgf_cli.training.episodes import Episode, build_batch
from rlgf_cli.training.update import update

TEXT = "the cat sees the river it ."


@pytest.fixture
def gpt2(tiny_gpt2: Path) -> Loaded:
    return loaded_from(tiny_gpt2)


@both
@pytest.mark.parametrize("name", ["aggrevated", "lols", "d2lols"])
def test_mistake_1_the_aggrevated_phase_learns_on_the_guides_tokens(
    gpt2: Loaded, monkeypatch: pytest.MonkeyPatch, name: str, injected: bool
) -> None:
    """LOLS and D2LOLS inherited the wrong mask: in their AggreVaTeD phase the gradient fell on the guide's tokens.
    Here: the gradient of the loss reaches the log-probabilities of the policy's tokens, all of them and no other."""
    if injected:
        monkeypatch.setattr(Regime, "learn_author", property(lambda self: self.roll_out))
    regime = next(r for r in spec_of(name, {"rollin_prob": 1.0}).regimes if r.roll_in == "policy")
    generator = generator_for(gpt2, guide())
    episodes = generator.generate(regime, prompts_for(gpt2, 8), 0, 5.0)
    model = actor_critic(gpt2, ["guide"])
    seen: list[torch.Tensor] = []
    score = model.forward_logprobs

    def watched(*args: Any, **kwargs: Any) -> Any:
        scored = score(*args, **kwargs)
        if scored.logprobs.requires_grad:
            scored.logprobs.retain_grad()
            seen.append(scored.logprobs)
        return scored

    with caught_if(injected):
        data = step_data(model, regime, episodes, generator.sampling, critics=["guide"])
        monkeypatch.setattr(model, "forward_logprobs", watched)
        monkeypatch.setattr(update_module, "minibatches", lambda *_: [torch.arange(8)])
        still = torch.optim.SGD(model.parameters(), 0.0)
        update(model, still, data, generator.sampling, update_settings(), seed=0, step=0)
        assert len(seen) == 1 and seen[0].grad is not None
        for row, e in enumerate(episodes):
            authors = [author for author, ids in e.segments for _ in ids]
            assert "guide" in authors
            moved = [bool(g) for g in seen[0].grad[row, : len(authors)]]
            assert moved == [author == "policy" for author in authors]


@both
def test_mistake_2_the_live_policy_generates_in_the_guides_place(tiny_gpt2: Path, injected: bool) -> None:
    """Guide and policy with one checkpoint name: one module was kept under that name, so the guide learned too.
    Here: the guide's weights and its text stay, while the policy with the same name moves."""
    policy = loaded_from(tiny_gpt2)
    teacher: Any = make_live_guide(GuideConfig(name=f"hf:{tiny_gpt2}"), seed=0)
    if injected:
        teacher._loaded = policy
    request = GuideRequest(Example("x", "cat sees"), prefix="the", max_new_tokens=12)
    before, text = state_of(teacher._loaded.model), teacher.complete([request])[0].text
    start = state_of(policy.model)
    trainer = trainer_for(policy, "aggrevated", teacher, learning_rate=3e-2)
    for _ in range(2):
        trainer.step()
    assert any(not torch.equal(start[name], tensor) for name, tensor in state_of(policy.model).items())
    with caught_if(injected):
        assert all(torch.equal(before[name], tensor) for name, tensor in state_of(teacher._loaded.model).items())
        assert teacher.complete([request])[0].text == text


@both
@pytest.mark.parametrize("name", ["ppo", "ppo++", "aggrevated", "lols", "d2lols", "grpo", "grpo++", "rloo", "rloo++"])
def test_mistake_3_the_kl_is_logged_but_not_trained_on(
    tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch, name: str, injected: bool
) -> None:
    """kl_coef 0 and 10 gave identical parameters in the guided algorithms. Here they differ in every one as soon as the
    policy has left the reference, in the reward or as a loss; ``kl.where: log`` measures it alone."""
    if injected:
        monkeypatch.setattr(loop, "AdvantageInputs", lambda kl_coef, *more: AdvantageInputs(0.0, *more))
        monkeypatch.setattr(losses, "kl_loss", lambda logprobs, *more: 0 * logprobs.sum())

    def train(kl_coef: float, where: str = "loss") -> torch.Tensor:
        groups = {"group_size": 4} if "po" in name and "g" in name else {}
        parameters = {"p_ppo_pp": 0.5} if name == "lols" else {"switch_step": 1} if name == "d2lols" else groups
        trainer = trainer_for(
            loaded_from(tiny_gpt2), name, guide(), parameters=parameters, kl_coef=kl_coef, kl_where=where
        )
        for _ in range(3):
            trainer.step()
        return parameters_of(trainer.model)

    free = train(0.0)
    with caught_if(injected):
        assert float((train(10.0) - free).abs().max()) > 1e-3
    with caught_if(injected and "grpo" not in name):
        assert "grpo" in name or float((train(10.0, where="reward") - free).abs().max()) > 1e-3
    assert torch.equal(train(10.0, where="log"), free)


class _Forward:
    """A model's forward that forgets an argument."""

    def __init__(self, model: Any, forgets: str) -> None:
        self.call, self.forgets = model.forward, forgets

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop(self.forgets, None)
        return self.call(*args, **kwargs)


def assert_batched_scores_are_plain_ones(loaded: Loaded, **options: Any) -> None:
    prompts = [p.ids for p in prompts_for(loaded, 4)]
    responses = [[40, 41, 42, 1], [50, 1], [60, 61, 1], [70, 71, 72, 73, 1]]
    assert len({len(p) for p in prompts}) > 1
    batch = token_batch(loaded, prompts, responses)
    scored = (
        actor_critic(loaded)
        .forward_logprobs(batch, real_mask(batch), **{"temperature": 1.0, "min_new_tokens": 0, **options})
        .logprobs
    )
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        expected = plain_logprobs(loaded, prompt, response, **options)
        assert torch.allclose(scored[row, : len(response)].double(), expected, atol=1e-4)


@both
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_mistake_4_an_encoder_decoder_scored_without_the_encoders_mask(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, name: str, injected: bool
) -> None:
    """The decoder looked at the encoder's padding: 2.15 nats off on a test model."""
    loaded = loaded_from(request.getfixturevalue(f"tiny_{name}"))
    if injected:
        # a plain call passes no mask at all, so forgetting it changes the batched one only
        monkeypatch.setattr(loaded.model, "forward", _Forward(loaded.model, "attention_mask"))
    with caught_if(injected):
        assert_batched_scores_are_plain_ones(loaded)


@both
@pytest.mark.parametrize("pad", ["eos", "distinct"])
def test_mistake_5_masks_are_read_off_the_padding(monkeypatch: pytest.MonkeyPatch, pad: str, injected: bool) -> None:
    """With pad = eos, ``token != pad`` never learned EOS and took the reward from an empty response; with a distinct
    pad the masks ran on past EOS. Here lengths decide."""
    eos, pad_id = 1, 1 if pad == "eos" else 0
    if injected:
        build = TokenBatch.build

        def from_ids(*args: Any, **kwargs: Any) -> TokenBatch:
            made = build(*args, **kwargs)
            real = made.response_ids != pad_id if pad == "eos" else torch.ones_like(made.response_ids)
            return replace(made, lengths=real.long().sum(-1))

        monkeypatch.setattr(TokenBatch, "build", from_ids)
    stub = SimpleNamespace(device=torch.device("cpu"), pad_id=pad_id, encoder_decoder=False)
    rows = [[7, 8, 9, eos], [eos], [7, eos]]
    episodes = [
        Episode(i, Example("e", "p"), [5], i, "policy", [("policy", ids)], finished=True, score=Score(1.0))
        for i, ids in enumerate(rows)
    ]
    with caught_if(injected):
        batch = build_batch(episodes, PPO, ["policy"], stub)
        for mask in (batch.real, batch.learned, batch.fit["policy"]):
            assert mask.sum(-1).tolist() == [4, 1, 2]
        assert batch.last.nonzero().tolist() == [[0, 3], [1, 0], [2, 1]]


@both
@pytest.mark.parametrize("what", ["scoring", "sampling"])
def test_mistake_6_left_padded_gpt2_without_position_ids(
    gpt2: Loaded, monkeypatch: pytest.MonkeyPatch, what: str, injected: bool
) -> None:
    """transformers 5 counts positions from the padding on: 1.49 nats off in scoring, and other text in sampling."""
    prompts = prompts_for(gpt2, 8)
    alone = [e.ids for e in generator_for(gpt2, batch_size=1).generate(PPO, prompts, 0, 9.0)]
    if injected:
        monkeypatch.setattr(gpt2.model, "forward", _Forward(gpt2.model, "position_ids"))
    with caught_if(injected):
        if what == "scoring":
            assert_batched_scores_are_plain_ones(gpt2)
        else:
            assert [e.ids for e in generator_for(gpt2, batch_size=8).generate(PPO, prompts, 0, 9.0)] == alone


@both
@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"min_new_tokens": 1}])
def test_mistake_8_scoring_ignores_what_sampling_did(
    gpt2: Loaded, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], injected: bool
) -> None:
    """The ratio is taken under the distribution that sampled: temperature-scaled, EOS impossible before its time.
    (What top-k and top-p cut off is not part of it: the run says so.)"""
    if injected:
        monkeypatch.setattr(actor_critic_module, "process_logits", lambda logits, *_: logits)
    with caught_if(injected):
        assert_batched_scores_are_plain_ones(gpt2, **options)
