"""One optimizer step against the objective written out, text by text; the two gradient norms; rates and schedules."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configured import config_of, trainer_of
from rl import AGGREVATED, PPO_PP, generator_for, loaded_from, parameters_of, prompts_for, step_data, update_settings
from rlgf_cli.config.common import OptimConfig
from rlgf_cli.errors import RlgfError
from rlgf_cli.models.actor_critic import ActorCritic
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.training.advantages import AdvantageSettings
from rlgf_cli.training.critics import CriticSettings
from rlgf_cli.training.episodes import Episode
from rlgf_cli.training.minibatches import StepData, UpdateSettings, carries_loss, minibatches
from rlgf_cli.training.optimizer import by_role, make_optimizer, make_scheduler
from rlgf_cli.training.update import update

RATE = 0.01
TEXTS: list[tuple[list[int], list[int], bool]] = [
    # the guide's tokens, the policy's, and whether the text ended with EOS
    ([40, 41], [300, 42, 1], True),
    ([], [299, 1], True),
    ([], [70, 71, 72], False),
    ([80], [81, 82, 83, 84], False),
]


@pytest.fixture
def gpt2(tiny_gpt2: Path) -> Loaded:
    return loaded_from(tiny_gpt2)


def case(loaded: Loaded, mode: str = "head") -> tuple[ActorCritic, StepData, Any]:
    """A policy that has left its reference, a critic that has learned something, four texts, random advantages."""
    model = ActorCritic(loaded, ["policy"], mode=mode, with_ref_model=True)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        model.head("policy").out.weight.normal_(std=0.3)
    model.head("policy").calibrate(1.5, 2.5, keep=False)
    episodes = []
    for i, (given, own, finished) in enumerate(TEXTS):
        prompt = prompts_for(loaded, 4)[i]
        segments: Any = [("guide", given), ("policy", own)] if given else [("policy", own)]
        e = Episode(i, prompt.example, prompt.ids, i, "policy", segments, len(given), finished=finished, text="x" * i)
        episodes.append(e)
    sampling = generator_for(loaded).sampling
    data = step_data(model, PPO_PP, episodes, sampling)
    assert data.advantages is not None
    advantages = torch.where(data.batch.learned, torch.randn(data.batch.real.shape), torch.zeros(()))
    return model, replace(data, advantages=replace(data.advantages, per_token=advantages)), sampling


def optimizer_of(model: ActorCritic, rate: float = RATE) -> torch.optim.Optimizer:
    groups = make_optimizer(model.trainable(), rate, 0.0).param_groups
    return torch.optim.SGD([{"params": g["params"], "role": g["role"]} for g in groups], lr=rate)


def moved(model: ActorCritic, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """How far the parameters of the policy and of the critic went, each as one vector."""
    found: dict[str, list[torch.Tensor]] = {"policy": [], "critics": []}
    for name, p in model.trainable():
        found[name.split(".")[0]].append((p.detach() - before[name]).flatten())
    return {role: torch.cat(parts) for role, parts in found.items()}


def weights_of(model: ActorCritic) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.trainable()}


def run(model: ActorCritic, data: StepData, sampling: Any, **changes: Any) -> tuple[Any, dict[str, float]]:
    before = weights_of(model)
    settings = update_settings(**{"max_grad_norm": 1e9, **changes})
    row, _ = update(model, optimizer_of(model), data, sampling, settings, seed=0, step=0)
    return moved(model, before), row


def estimate(r: torch.Tensor, rho: torch.Tensor, estimator: str) -> torch.Tensor:
    return {"k1": rho * r, "k2": r * r / 2, "k3": (-r).exp() - 1 + r}[estimator]


def by_hand(model: ActorCritic, data: StepData, settings: UpdateSettings, longest: int) -> dict[str, torch.Tensor]:
    """The terms of the objective from plain forward passes, one text at a time."""
    assert data.stats is not None and data.advantages is not None
    texts = []
    for row, (given, own, finished) in enumerate(TEXTS):
        ids = [*prompts_for(model.loaded, 4)[row].ids, *given, *own]
        outputs, places = [], range(len(ids) - len(own) - 1, len(ids) - 1)
        for network in (model.policy, model.ref_model):
            outputs.append(network(input_ids=torch.tensor([ids[:-1]]), output_hidden_states=True, use_cache=False))
        logprobs = outputs[0].logits[0].log_softmax(-1)[list(places)]
        reference = outputs[1].logits[0].detach().log_softmax(-1)[list(places)]
        chosen = logprobs[range(len(own)), own]
        ratio = chosen - reference[range(len(own)), own]
        advantages = data.advantages.per_token[row, len(given) : len(given) + len(own)]
        rho = (chosen - chosen.detach()).exp()
        values = model.head("policy")(outputs[0].hidden_states[-1][0].detach())[list(places)]
        errors = (values - data.advantages.returns["policy"][row, len(given) : len(given) + len(own)]) / 2.5
        texts.append(
            (
                finished or not settings.mask_truncated,
                rho * advantages,
                estimate(ratio, rho, settings.kl_estimator),
                -(logprobs.exp() * logprobs).sum(-1),
                errors.square(),
            )
        )
    carried = [text for text in texts if text[0]]
    tokens = sum(len(text[1]) for text in carried)
    divisors = {
        "tokens": lambda own: tokens,
        "sequences": lambda own: len(carried) * len(own),
        "constant": lambda own: len(carried) * longest,
    }
    divisor = divisors[settings.loss_average]
    gain, kl = (sum((text[i].sum() / divisor(text[i]) for text in carried), torch.zeros(())) for i in (1, 2))
    return {
        "gain": gain,
        "kl": kl,
        "entropy": torch.cat([text[3] for text in carried]).mean(),
        "value": 0.5 * torch.cat([text[4] for text in texts]).mean(),
    }


OBJECTIVES: dict[str, dict[str, Any]] = {
    "plain": {},
    "sequences": {"loss_average": "sequences", "kl_coef": 0.3, "accumulation": 3},
    "constant": {"loss_average": "constant", "kl_coef": 0.3, "kl_estimator": "k2", "entropy_coef": 0.1},
    "tokens": {"kl_coef": 0.3, "kl_estimator": "k1", "entropy_coef": 0.1, "accumulation": 4, "value_coef": 3.0},
    "whole_texts": {"mask_truncated": True, "kl_coef": 0.3, "entropy_coef": 0.1},
    "whole_texts_by_sequence": {"mask_truncated": True, "loss_average": "sequences", "accumulation": 2},
    "whole_texts_by_constant": {"mask_truncated": True, "loss_average": "constant", "entropy_coef": -0.1},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_update_is_one_step_down_the_stated_objective(gpt2: Loaded, name: str) -> None:
    """Loss = -gain + kl_coef KL - entropy_coef entropy for the policy, value_coef times the error in units of the
    returns' spread for the critic, whatever is averaged, left out, or run in parts."""
    model, data, sampling = case(gpt2)
    settings = update_settings(max_grad_norm=1e9, **OBJECTIVES[name])
    terms = by_hand(model, data, settings, sampling.max_new_tokens)
    entropy_coef = max(settings.entropy_coef, 0.0)  # one below 0 is no coefficient: configs refuse it
    policy = -terms["gain"] + settings.kl_coef * terms["kl"] - entropy_coef * terms["entropy"]
    parameters = [p for _, p in model.trainable()]
    gradients = torch.autograd.grad(policy + settings.value_coef * terms["value"], parameters, allow_unused=True)
    grads = {n: g for (n, _), g in zip(model.trainable(), gradients, strict=True)}
    found, row = run(model, data, sampling, **OBJECTIVES[name])
    for role, vector in found.items():
        own = [
            (torch.zeros_like(p) if grads[n] is None else grads[n]).flatten()
            for n, p in model.trainable()
            if n.startswith(role)
        ]
        expected = torch.cat(own)
        assert float(expected.norm()) > 1e-3
        assert torch.allclose(vector / RATE, -expected, atol=2e-4, rtol=1e-3), role
    assert row["loss/policy"] == pytest.approx(-float(terms["gain"].detach()), abs=1e-5)
    assert row["loss/value_policy"] == pytest.approx(float(terms["value"].detach()), rel=1e-4)
    assert row.get("loss/kl") == (pytest.approx(float(terms["kl"].detach()), rel=1e-3) if settings.kl_coef else None)
    assert row.get("ppo/entropy") == (
        pytest.approx(float(terms["entropy"].detach()), rel=1e-4) if entropy_coef else None
    )


def test_an_entropy_bonus_raises_the_entropy(gpt2: Loaded) -> None:
    model, data, sampling = case(gpt2)
    assert data.advantages is not None
    idle = replace(data, advantages=replace(data.advantages, per_token=torch.zeros_like(data.advantages.per_token)))
    settings = update_settings()
    before = float(by_hand(model, idle, settings, 12)["entropy"].detach())
    run(model, idle, sampling, entropy_coef=1.0, value_coef=0.0)
    assert float(by_hand(model, idle, settings, 12)["entropy"].detach()) > before + 1e-3


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_a_kl_as_a_loss_brings_the_policy_nearer_to_its_reference(gpt2: Loaded, estimator: Any) -> None:
    model, data, sampling = case(gpt2)
    assert data.advantages is not None
    idle = replace(data, advantages=replace(data.advantages, per_token=torch.zeros_like(data.advantages.per_token)))
    settings = update_settings(kl_estimator="k3")
    before = float(by_hand(model, idle, settings, 12)["kl"].detach())
    run(model, idle, sampling, kl_coef=0.1, kl_estimator=estimator)
    assert float(by_hand(model, idle, settings, 12)["kl"].detach()) < 0.99 * before


def test_a_value_moves_freely_within_the_clip_in_units_of_the_spread(gpt2: Loaded) -> None:
    """Old values that lie 0.4 units below the present ones: with a range of 0.2 the clipped error counts where it is
    the larger one."""
    model, data, sampling = case(gpt2)
    assert data.stats is not None and data.advantages is not None
    now, returns, fit = data.stats.values["policy"], data.advantages.returns["policy"], data.batch.fit["policy"]
    earlier = now - 0.4 * 2.5
    data = replace(data, stats=replace(data.stats, values={"policy": earlier}))
    _, row = run(model, data, sampling, value_clip_range=0.2)
    errors = []
    for v, old, r in zip(now[fit].tolist(), earlier[fit].tolist(), returns[fit].tolist(), strict=True):
        bounded = min(max(v, old - 0.2 * 2.5), old + 0.2 * 2.5)
        errors.append(max((v - r) ** 2, (bounded - r) ** 2) / 2.5**2)
    assert row["loss/value_policy"] == pytest.approx(0.5 * sum(errors) / len(errors), rel=1e-4)


@pytest.mark.parametrize(("ratio", "advantage", "high", "clipped"), [
    (1.25, 1.0, None, True),
    (1.25, 1.0, 0.28, False),
    (1.35, 1.0, 0.28, True),
    (0.75, -1.0, 0.28, True),
    (0.85, -1.0, None, False),
])  # fmt: skip
def test_tokens_beyond_the_clip_do_not_move_the_policy(
    gpt2: Loaded, ratio: float, advantage: float, high: float | None, clipped: bool
) -> None:
    model, data, sampling = case(gpt2)
    assert data.stats is not None and data.advantages is not None
    stats = replace(data.stats, old_logprobs=data.stats.old_logprobs - math.log(ratio))
    advantages = replace(data.advantages, per_token=advantage * data.batch.learned)
    found, row = run(model, replace(data, stats=stats, advantages=advantages), sampling, clip_range_high=high)
    assert bool(found["policy"].any()) is not clipped and row["ppo/clip_fraction"] == float(clipped)
    assert row["ppo/ratio"] == pytest.approx(ratio, rel=1e-4)
    assert row["ppo/approx_kl"] == pytest.approx(ratio - 1 - math.log(ratio), rel=1e-2)


def test_a_text_cut_at_the_limit_carries_no_loss_and_its_value_is_fitted(gpt2: Loaded) -> None:
    _, data, _ = case(gpt2)
    finished = torch.tensor([whole for _, _, whole in TEXTS])
    kept = carries_loss(data.batch, update_settings(mask_truncated=True))
    assert torch.equal(kept, data.batch.learned & finished[:, None])
    assert torch.equal(carries_loss(data.batch, update_settings()), data.batch.learned)
    assert data.batch.fit["policy"][~finished].any()


def test_the_guides_critic_is_fitted_on_what_the_guide_wrote(gpt2: Loaded) -> None:
    """And the policy's on the texts that the policy wrote alone."""
    model = ActorCritic(gpt2, ["policy", "guide"], mode="head", with_ref_model=True)
    model.head("guide").calibrate(0.3, 2.0, keep=False)
    episodes = []
    for i, (first, last, _) in enumerate(TEXTS):
        prompt = prompts_for(gpt2, 4)[i]
        segments: Any = [("policy", first), ("guide", last)] if first else [("policy", last)]
        episodes.append(Episode(i, prompt.example, prompt.ids, i, "guide", segments, len(first), text="x" * i))
    sampling = generator_for(gpt2).sampling
    data = step_data(model, AGGREVATED, episodes, sampling, critics=["policy", "guide"])
    assert data.stats is not None and data.advantages is not None
    _, row = run(model, data, sampling, accumulation=2)
    for critic, unit in (("policy", 1.0), ("guide", 2.0)):
        errors = [
            ((data.stats.values[critic][i, t] - data.advantages.returns[critic][i, t]) / unit) ** 2
            for i, (first, last, _) in enumerate(TEXTS)
            for t in range(len(first), len(first) + len(last))
            if bool(first) == (critic == "guide")
        ]
        assert row[f"loss/value_{critic}"] == pytest.approx(0.5 * float(sum(errors)) / len(errors), rel=1e-4)


@pytest.mark.parametrize("mode", ["shared", "head", "separate"])
def test_while_the_policy_waits_its_critic_alone_learns(gpt2: Loaded, mode: str) -> None:
    """Nothing reaches the policy: neither its own loss, nor a bonus, a reference text, or the critic's error."""
    model, data, sampling = case(gpt2, mode)
    data = replace(data, references=data.batch.tokens)
    found, row = run(model, data, sampling, policy_frozen=True, reference_nll=1.0, entropy_coef=0.1, kl_coef=0.1)
    assert not found["policy"].any() and float(found["critics"].norm()) > 1e-3
    said = {name for name in row if name.startswith(("loss/", "ppo/"))}
    assert said == {"loss/value_policy"}  # nothing else was taken on anything
    assert row["update/grad_norm"] == 0.0
    learning, row = run(model, data, sampling, reference_nll=1.0)
    assert learning["policy"].any() and row["loss/reference_nll"] > 0


# --- the two norms


@pytest.mark.parametrize("mode", ["shared", "head", "separate"])
def test_policy_and_critic_are_each_clipped_to_the_norm(gpt2: Loaded, mode: str) -> None:
    """A step of plain gradient descent is as long as the norm allows, for either of them; a smaller gradient stays."""
    for limit in (0.05, 1e9):
        model, data, sampling = case(gpt2, mode)
        found, row = run(model, data, sampling, max_grad_norm=limit, value_coef=20.0)
        norms = {"policy": row["update/grad_norm"], "critics": row["update/critic_grad_norm"]}
        assert min(norms.values()) > 0.1  # as they were before
        for role, vector in found.items():
            assert float(vector.norm()) / RATE == pytest.approx(min(limit, norms[role]), rel=1e-2), role


@pytest.mark.parametrize("mode", ["head", "separate"])
def test_the_critics_error_does_not_decide_how_far_the_policy_moves(tiny_gpt2: Path, mode: str) -> None:
    steps, norms = [], []
    for coefficient in (0.0, 0.5, 5e3):
        model, data, sampling = case(loaded_from(tiny_gpt2), mode)
        found, row = run(model, data, sampling, max_grad_norm=0.05, value_coef=coefficient)
        steps.append(found["policy"])
        norms.append(row["update/critic_grad_norm"])
    assert norms[2] > 1e3 * norms[1] > norms[0] == 0.0
    assert torch.equal(steps[0], steps[1]) and torch.equal(steps[1], steps[2])


@pytest.mark.parametrize("role", ["policy", "critic"])
def test_whose_gradient_is_not_finite_is_said_and_no_weight_moves(gpt2: Loaded, role: str) -> None:
    model, data, sampling = case(gpt2)
    assert data.advantages is not None
    broken = {"policy": {"per_token": data.advantages.per_token * math.inf}}
    broken["critic"] = {"returns": {"policy": torch.full_like(data.advantages.rewards, math.nan)}}  # type: ignore[dict-item]
    data = replace(data, advantages=replace(data.advantages, **broken[role]))
    before = parameters_of(model)
    with pytest.raises(RlgfError, match=f"the {role}'s gradient of step 1 is not finite"):
        run(model, data, sampling)
    assert torch.equal(before, parameters_of(model))


# --- the optimizer and its rates


@pytest.mark.parametrize(("critic_rate", "expected"), [(None, 1e-3), (5e-2, 5e-2)])
@pytest.mark.parametrize("mode", ["shared", "separate"])
def test_every_parameter_has_one_place_with_the_rate_and_the_decay_of_its_kind(
    gpt2: Loaded, mode: str, critic_rate: float | None, expected: float
) -> None:
    model = ActorCritic(gpt2, ["policy", "guide"], mode=mode, with_ref_model=True)
    optimizer = make_optimizer(model.trainable(), 1e-3, 0.1, critic_rate)
    places = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(places) == len(model.trainable())
    for name, parameter in model.trainable():
        critic = name.startswith("critics.")
        group = places[id(parameter)]
        assert group["role"] == ("critic" if critic else "policy")
        assert group["lr"] == (expected if critic else 1e-3)
        assert group["weight_decay"] == (0.1 if parameter.dim() > 1 else 0.0)
    roles = by_role(optimizer)
    assert set(roles) == {"policy", "critic"}
    assert {id(p) for p in roles["critic"]} == {id(p) for n, p in model.trainable() if n.startswith("critics.")}
    assert len(roles["policy"]) + len(roles["critic"]) == len(places)


def rates(config: OptimConfig, steps: int, count: int) -> list[float]:
    """The rates of the policy and of the critic, relative to their own, which move together."""
    policy, critic = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = make_optimizer([("policy.x", policy), ("critics.x", critic)], 2.0, 0.0, 6.0)
    scheduler = make_scheduler(optimizer, config, steps)
    found = []
    for _ in range(count):
        rate, other = scheduler.get_last_lr()
        assert other == pytest.approx(3 * rate)
        found.append(rate / 2.0)
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_the_schedule_over_the_iterations(schedule: Any, warmup: int) -> None:
    steps = 12
    expected = []
    for step in range(steps + 3):
        if step < warmup:
            expected.append((step + 1) / warmup)  # no iteration is spent on a rate of 0
            continue
        done = min(1.0, (step - warmup) / (steps - warmup))
        falling = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        expected.append(falling[schedule])
    found = rates(OptimConfig(schedule=schedule, warmup_steps=warmup), steps, steps + 3)
    assert found == pytest.approx(expected)
    assert min(found[:steps]) > 0


def test_a_warmup_as_long_as_the_run_ends_at_the_full_rate() -> None:
    assert rates(OptimConfig(warmup_steps=4), 4, 4) == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_a_run_falls_to_zero_over_its_own_steps(gpt2: Loaded) -> None:
    trainer = trainer_of(gpt2, max_steps=8, optim={"learning_rate": 0.5, "schedule": "linear"})
    found = []
    for _ in range(9):
        found.append(trainer.scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.scheduler.step()
    assert found == pytest.approx([0.5 * (1 - i / 8) for i in range(9)])


# --- from the config


def test_every_setting_reaches_its_place(gpt2: Loaded) -> None:
    ppo = {
        "gamma": 0.91, "gae_lambda": 0.81, "adaptive_lambda": 0.71, "guide_lambda": 0.61, "critic_lambda": 0.51,
        "advantage_scale": "batch", "epochs": 3, "minibatch_size": 5, "gradient_accumulation_steps": 2,
        "max_tokens_per_batch": 999, "clip_range": 0.11, "clip_range_high": 0.22, "loss_average": "constant",
        "mask_truncated": True, "value_clip_range": 0.33, "value_coef": 0.44, "entropy_coef": 0.055,
        "critic": "separate", "critic_learning_rate": 0.077, "critic_min_explained": 0.17, "critic_warmup_steps": 6,
        "critic_warmup_explained": 0.27,
    }  # fmt: skip
    trainer = trainer_of(
        gpt2,
        ppo=ppo,
        kl={"coef": 0.3, "estimator": "k2", "where": "loss"},
        aux={"reference_nll": 0.19},
        optim={"learning_rate": 0.003, "weight_decay": 0.2, "max_grad_norm": 0.37},
    )
    assert trainer.advantage == AdvantageSettings(0.91, 0.81, 0.61, 0.51, 0.71, "batch")
    assert trainer.critic == CriticSettings(warmup_steps=6, warmup_explained=0.27, min_explained=0.17)
    assert trainer.update == UpdateSettings(
        epochs=3, minibatch_size=5, accumulation=2, max_tokens=999, clip_range=0.11, value_clip_range=0.33,
        value_coef=0.44, entropy_coef=0.055, reference_nll=0.19, max_grad_norm=0.37, clip_range_high=0.22,
        loss_average="constant", mask_truncated=True, kl_estimator="k2",
    )  # fmt: skip
    assert {(g["role"], g["lr"]) for g in trainer.optimizer.param_groups} == {("policy", 0.003), ("critic", 0.077)}
    assert {g["weight_decay"] for g in trainer.optimizer.param_groups} == {0.0, 0.2}
    assert trainer.model.separate and trainer.state.kl_coef == 0.3
    plain = UpdateSettings.of(config_of().ppo, config_of().kl, config_of().aux, config_of().optim)
    assert plain.value_clip_range == math.inf and plain.clip_range_high is None


def test_every_epoch_has_an_order_of_its_own() -> None:
    """And takes every row once."""
    parts = list(minibatches(torch.ones(32, dtype=torch.bool), update_settings(epochs=2, minibatch_size=8), 0, 3))
    first, second = torch.cat(parts[:4]), torch.cat(parts[4:])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(32))
    assert not torch.equal(first, second)
