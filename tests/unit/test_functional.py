"""The pure tensor math against its definitions: brute force, literal loops, and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rlgf_cli.functional import advantages as adv
from rlgf_cli.functional import kl, losses, masks
from rlgf_cli.functional.stats import explained_variance

NAN, INF = float("nan"), float("inf")
GARBAGE = [NAN, INF, -INF, 1e30, -1e30, 88.0]


def numbers(low: float = -3.0, high: float = 3.0) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False).map(lambda x: round(x, 3))


@st.composite
def grids(draw: st.DrawFn, count: int, least: int = 1) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """``(lengths [B], count tensors [B, T])`` in float64."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    lengths = draw(st.lists(st.integers(min(least, width), width), min_size=rows, max_size=rows))
    tensors = [torch.from_numpy(draw(arrays(np.float64, (rows, width), elements=numbers()))) for _ in range(count)]
    return torch.tensor(lengths), tensors


def bools(rows: int, width: int) -> st.SearchStrategy[torch.Tensor]:
    return arrays(np.bool_, (rows, width)).map(torch.from_numpy)


# --- GAE


def gae_by_definition(
    rewards: list[float], values: list[float], gamma: float, lambdas: list[float]
) -> tuple[list[float], list[float]]:
    """A_t = sum over l >= t of gamma^(l-t) (product of lambda_j, t < j <= l) delta_l, written out as a double sum."""
    length = len(rewards)
    following = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * following[t] - values[t] for t in range(length)]
    found = [
        sum(gamma ** (end - t) * math.prod(lambdas[t + 1 : end + 1]) * deltas[end] for end in range(t, length))
        for t in range(length)
    ]
    return found, [a + v for a, v in zip(found, values, strict=True)]


@given(grids(3, least=0), numbers(0.0, 1.0))
def test_gae_is_the_double_sum_of_its_definition(case: Any, gamma: float) -> None:
    lengths, (rewards, values, lambdas) = case
    lambdas = lambdas.abs() / 3
    real = masks.response_mask(lengths, rewards.shape[1])
    advantages, returns = adv.gae(rewards, values, real, gamma, lambdas)
    for row, length in enumerate(lengths.tolist()):
        pieces = [x[row, :length].tolist() for x in (rewards, values, lambdas)]
        expected, expected_returns = gae_by_definition(pieces[0], pieces[1], gamma, pieces[2])
        assert advantages[row, :length].tolist() == pytest.approx(expected, abs=1e-9)
        assert returns[row, :length].tolist() == pytest.approx(expected_returns, abs=1e-9)
        assert not advantages[row, length:].any() and not returns[row, length:].any()


@given(grids(2), numbers(0.0, 1.0))
def test_gae_with_lambda_1_is_monte_carlo_and_with_0_one_step(case: Any, gamma: float) -> None:
    lengths, (rewards, values) = case
    real = masks.response_mask(lengths, rewards.shape[1])
    monte_carlo, returns = adv.gae(rewards, values, real, gamma, torch.ones_like(rewards))
    one_step, _ = adv.gae(rewards, values, real, gamma, torch.zeros_like(rewards))
    for row, length in enumerate(lengths.tolist()):
        for t in range(length):
            ahead = sum(gamma ** (end - t) * float(rewards[row, end]) for end in range(t, length))
            assert float(returns[row, t]) == pytest.approx(ahead, abs=1e-9)
            assert float(monte_carlo[row, t]) == pytest.approx(ahead - float(values[row, t]), abs=1e-9)
            behind = float(values[row, t + 1]) if t + 1 < length else 0.0
            step = float(rewards[row, t]) + gamma * behind - float(values[row, t])
            assert float(one_step[row, t]) == pytest.approx(step, abs=1e-9)


def test_the_token_before_the_cut_sees_the_guides_monte_carlo_return() -> None:
    """lambda 1 on the guide's tokens, 0 on the policy's: the guide's values cancel, the prefix looks one step ahead."""
    rewards = torch.tensor([[0.0, -0.5, 0.0, 0.0, 2.0]], dtype=torch.float64)
    values = torch.tensor([[0.3, 0.7, 11.0, -5.0, 4.0]], dtype=torch.float64)  # 11, -5, 4 are on the guide's tokens
    lambdas = torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    found, _ = adv.gae(rewards, values, torch.ones(1, 5, dtype=torch.bool), 1.0, lambdas)
    assert float(found[0, 1]) == pytest.approx(-0.5 + 2.0 - 0.7)
    assert float(found[0, 0]) == pytest.approx(0.0 + 0.7 - 0.3)


# --- whitening and group baselines


@given(grids(1), st.data())
def test_whiten_is_mean_zero_and_variance_one_over_the_mask(case: Any, data: st.DataObject) -> None:
    _, (values,) = case
    mask = data.draw(bools(*values.shape))
    white = adv.whiten(values, mask)
    chosen = [float(v) for v in values[mask]]
    assert not white[~mask].any()
    if len(chosen) < 2:
        assert white[mask].tolist() == chosen
        return
    mean = sum(chosen) / len(chosen)
    variance = sum((v - mean) ** 2 for v in chosen) / len(chosen)
    expected = [(v - mean) / math.sqrt(variance + 1e-8) for v in chosen]
    assert white[mask].tolist() == pytest.approx(expected, abs=1e-6)
    assert float(white[mask].mean()) == pytest.approx(0.0, abs=1e-6)  # the mean is not added back


@given(st.lists(st.lists(numbers(), min_size=2, max_size=5), min_size=1, max_size=4), st.randoms())
def test_group_baselines_by_brute_force(groups: list[list[float]], random: Any) -> None:
    flat = [(g * 7 - 3, value) for g, group in enumerate(groups) for value in group]  # group numbers are only names
    random.shuffle(flat)
    returns = torch.tensor([v for _, v in flat], dtype=torch.float64)
    names = torch.tensor([g for g, _ in flat])
    grouped = adv.group_advantages(returns, names)
    left_out = adv.leave_one_out_advantages(returns, names)
    for i, (name, value) in enumerate(flat):
        members = [v for g, v in flat if g == name]
        others = [v for j, (g, v) in enumerate(flat) if g == name and j != i]
        mean = sum(members) / len(members)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in members) / (len(members) - 1))
        assert float(grouped[i]) == pytest.approx((value - mean) / (deviation + 1e-4), abs=1e-6)
        assert float(left_out[i]) == pytest.approx(value - sum(others) / len(others), abs=1e-9)


@pytest.mark.parametrize("baseline", [adv.group_advantages, adv.leave_one_out_advantages])
def test_a_group_of_one_has_no_baseline(baseline: Callable[..., torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="group of one"):
        baseline(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 1]))


def test_equal_returns_are_worth_nothing() -> None:
    assert adv.group_advantages(torch.full((4,), 0.3), torch.tensor([5, 5, 9, 9])).tolist() == [0.0] * 4


@given(grids(2), numbers(0, 2), st.data())
def test_episode_returns_charge_learned_tokens_only(case: Any, kl_coef: float, data: st.DataObject) -> None:
    _, (ratio, other) = case
    learned = data.draw(bools(*ratio.shape))
    scores = other[:, 0]
    found = kl.episode_returns(scores, ratio, learned, kl_coef)
    for row in range(len(scores)):
        charged = sum(float(r) for r, m in zip(ratio[row], learned[row], strict=True) if m)
        assert float(found[row]) == pytest.approx(float(scores[row]) - kl_coef * charged, abs=1e-9)


# --- rewards and KL


@given(grids(2), numbers(0, 2), st.data())
def test_the_score_lands_on_the_last_real_token_and_kl_is_charged_on_policy_tokens(
    case: Any, kl_coef: float, data: st.DataObject
) -> None:
    lengths, (logprobs, ref_logprobs) = case
    rows, width = logprobs.shape
    policy = data.draw(bools(rows, width)) & masks.response_mask(lengths, width)
    scores = torch.arange(1, rows + 1, dtype=torch.float64)
    ratio = kl.log_ratio(logprobs, ref_logprobs, policy)
    rewards = kl.token_rewards(scores, ratio, masks.last_token(lengths, width), kl_coef)
    for row in range(rows):
        for t in range(width):
            expected = float(scores[row]) if t == int(lengths[row]) - 1 else 0.0
            if policy[row, t]:
                # the policy likes the token more than the reference does: that is charged
                expected -= kl_coef * (float(logprobs[row, t]) - float(ref_logprobs[row, t]))
            assert float(rewards[row, t]) == pytest.approx(expected, abs=1e-9)


def test_an_episode_without_tokens_gets_no_reward_anywhere() -> None:
    last = masks.last_token(torch.tensor([0, 2]), 3)
    assert last.tolist() == [[False] * 3, [False, True, False]]


@given(st.lists(numbers(-20, 20), min_size=1, max_size=20))
def test_k3_is_never_negative(ratios: list[float]) -> None:
    assert bool((kl.k3(torch.tensor(ratios, dtype=torch.float64)) >= 0).all())


@given(arrays(np.float64, 5, elements=numbers()), arrays(np.float64, 5, elements=numbers()))
def test_k3_and_the_log_ratio_estimate_kl_without_bias(policy: np.ndarray, reference: np.ndarray) -> None:
    """Their exact expectation under pi, on a categorical of five, is KL(pi || ref)."""
    p, q = (torch.from_numpy(x).log_softmax(0) for x in (policy, reference))
    everywhere = torch.ones(1, 5, dtype=torch.bool)
    ratio = kl.log_ratio(p.unsqueeze(0), q.unsqueeze(0), everywhere)[0]
    exact = float((p.exp() * (p - q)).sum())
    assert float((p.exp() * ratio).sum()) == pytest.approx(exact, abs=1e-9)
    assert float((p.exp() * kl.k3(ratio)).sum()) == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize(
    ("measured", "expected"),
    [(6.0, 0.1), (6.6, 0.1 * (1 + 0.1 * 64 / 1000)), (60.0, 0.1 * (1 + 0.2 * 64 / 1000)), (0.0, 0.1 * (1 - 0.0128))],
)
def test_the_adaptive_coefficient_moves_towards_the_target(measured: float, expected: float) -> None:
    assert kl.adapt_kl_coef(0.1, measured, 6.0, 64, 1000) == pytest.approx(expected)


# --- losses


def clipped_loss_by_hand(new: float, old: float, advantage: float, clip: float) -> tuple[float, bool]:
    """PPO's rule, one case at a time: the gain stops where the ratio has moved far enough in its own favour."""
    ratio = math.exp(new - old)
    if advantage >= 0 and ratio > 1 + clip:
        return -(1 + clip) * advantage, advantage > 0
    if advantage < 0 and ratio < 1 - clip:
        return -(1 - clip) * advantage, True
    return -ratio * advantage, False


@given(grids(3), st.sampled_from([0.1, 0.2, 0.5]), st.data())
def test_policy_loss_against_a_literal_loop(case: Any, clip: float, data: st.DataObject) -> None:
    _, (new, old, advantages) = case
    mask = data.draw(bools(*new.shape))
    count = int(mask.sum())
    loss, stats = losses.policy_loss(new, old, advantages, mask, clip, count)
    by_hand = [
        clipped_loss_by_hand(float(n), float(o), float(a), clip)
        for n, o, a, m in zip(new.flatten(), old.flatten(), advantages.flatten(), mask.flatten(), strict=True)
        if m
    ]
    differences = [(float(n) - float(o)) for n, o in zip(new[mask], old[mask], strict=True)]
    assert float(loss) == pytest.approx(sum(value for value, _ in by_hand) / max(count, 1), abs=1e-9)
    assert int(stats["clipped"]) == sum(binds for _, binds in by_hand)
    assert float(stats["ratio"]) == pytest.approx(sum(math.exp(d) for d in differences), abs=1e-7)
    # k3 of KL(pi_old || pi): mean of (exp(d) - 1 - d) over samples of pi_old
    assert float(stats["approx_kl"]) == pytest.approx(sum(math.exp(d) - 1 - d for d in differences), abs=1e-7)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("difference", [-0.5, -0.1, 0.0, 0.1, 0.5])
def test_the_gradient_stops_exactly_where_the_clip_binds(advantage: float, difference: float) -> None:
    new = torch.tensor([[difference]], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, _ = losses.policy_loss(new, torch.zeros(1, 1), torch.tensor([[advantage]]), mask, 0.2, 1)
    loss.backward()
    _, binds = clipped_loss_by_hand(difference, 0.0, advantage, 0.2)
    assert new.grad is not None
    expected = 0.0 if binds else -advantage * math.exp(difference)
    assert float(new.grad) == pytest.approx(expected)


@given(grids(3), st.sampled_from([0.2, INF]), st.data())
def test_value_loss_against_a_literal_loop(case: Any, clip: float, data: st.DataObject) -> None:
    _, (values, old, returns) = case
    mask = data.draw(bools(*values.shape))
    count = int(mask.sum())
    total = 0.0
    for v, o, r, m in zip(values.flatten(), old.flatten(), returns.flatten(), mask.flatten(), strict=True):
        if m:
            near = min(max(float(v), float(o) - clip), float(o) + clip)
            total += max((float(v) - float(r)) ** 2, (near - float(r)) ** 2)
    found = losses.value_loss(values, old, returns, mask, clip, count)
    assert float(found) == pytest.approx(0.5 * total / max(count, 1), abs=1e-9)


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
    "policy": lambda x, old, target, mask, n: losses.policy_loss(x, old, target, mask, 0.2, n)[0],
    "value": lambda x, old, target, mask, n: losses.value_loss(x, old, target, mask, 0.2, n),
    "value_unclipped": lambda x, old, target, mask, n: losses.value_loss(x, old, target, mask, INF, n),
    "likelihood": lambda x, old, target, mask, n: losses.likelihood_loss(x, mask, n),
    "entropy": lambda x, old, target, mask, n: losses.entropy_bonus(x, mask, n),
    "kl_k1": lambda x, old, target, mask, n: losses.kl_loss(x, old, target, mask, "k1", n),
    "kl_k2": lambda x, old, target, mask, n: losses.kl_loss(x, old, target, mask, "k2", n),
    "kl_k3": lambda x, old, target, mask, n: losses.kl_loss(x, old, target, mask, "k3", n),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("garbage", GARBAGE)
def test_an_empty_selection_is_exactly_zero_with_a_zero_gradient(name: str, garbage: float) -> None:
    x = torch.full((2, 3), garbage, requires_grad=True)
    loss = LOSSES[name](
        x, torch.full((2, 3), -garbage), torch.full((2, 3), NAN), torch.zeros(2, 3, dtype=torch.bool), 0
    )
    loss.backward()
    assert loss.item() == 0.0 and not math.isnan(loss.item())
    assert x.grad is not None and x.grad.tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("name", LOSSES)
@given(case=grids(3), data=st.data())
def test_what_is_outside_the_mask_changes_no_loss_and_no_gradient(name: str, case: Any, data: st.DataObject) -> None:
    _, tensors = case
    mask = data.draw(bools(*tensors[0].shape))
    count = int(mask.sum())

    def run(inputs: list[torch.Tensor]) -> tuple[float, list[float]]:
        x = inputs[0].clone().requires_grad_()
        loss = LOSSES[name](x, inputs[1], inputs[2], mask, count)
        loss.backward()
        assert x.grad is not None
        assert not x.grad[~mask].any()
        return loss.item(), x.grad[mask].tolist()

    spoilt = [torch.where(mask, t, torch.tensor(data.draw(st.sampled_from(GARBAGE)), dtype=t.dtype)) for t in tensors]
    assert run(spoilt) == run(tensors)


@pytest.mark.parametrize("name", LOSSES)
@given(case=grids(3), data=st.data())
def test_accumulated_parts_give_the_whole_minibatchs_gradient(name: str, case: Any, data: st.DataObject) -> None:
    """The mean is over the whole minibatch's tokens, whatever the parts and however unevenly the tokens lie in them."""
    _, (x, old, target) = case
    mask = data.draw(bools(*x.shape))
    count = int(mask.sum())
    whole = x.clone().requires_grad_()
    loss = LOSSES[name](whole, old, target, mask, count)
    loss.backward()
    parts = x.clone().requires_grad_()
    total = 0.0
    for rows in torch.arange(len(x)).chunk(data.draw(st.integers(1, 4))):
        part = LOSSES[name](parts[rows], old[rows], target[rows], mask[rows], count)
        part.backward()
        total += part.item()
    assert total == pytest.approx(loss.item(), abs=1e-9)
    assert torch.allclose(parts.grad, whole.grad, atol=1e-12)


# --- padding


def credit_of(
    tensors: list[torch.Tensor], scores: torch.Tensor, lengths: torch.Tensor, authors: torch.Tensor
) -> dict[str, torch.Tensor | float | None]:
    """From log-probs and values to every figure that training uses, as training.credit does it."""
    logprobs, ref_logprobs, values, new = tensors
    width = logprobs.shape[1]
    real = masks.response_mask(lengths, width)
    policy = masks.author_mask(authors, real, masks.POLICY)
    ratio = kl.log_ratio(logprobs, ref_logprobs, policy)
    rewards = kl.token_rewards(scores, ratio, masks.last_token(lengths, width), 0.1)
    lambdas = torch.where(policy, 0.9, 1.0).to(rewards.dtype)
    advantages, returns = adv.gae(rewards, values, real, 0.99, lambdas)
    white = adv.whiten(advantages, policy)
    count = int(policy.sum())
    loss, stats = losses.policy_loss(new, logprobs, white, policy, 0.2, count)
    return {
        "ratio": ratio[real],
        "kl": kl.k3(ratio).sum(),
        "rewards": rewards[real],
        "advantages": white[real],
        "returns": returns[real],
        "episode_returns": kl.episode_returns(scores, ratio, policy, 0.1),
        "loss": loss,
        "value_loss": losses.value_loss(new, values, returns, real, 0.2, int(real.sum())),
        "explained": explained_variance(values, returns, real),
        "mean": masks.masked_mean(new, policy),
        **stats,
    }


@given(grids(4, least=0), st.integers(0, 3), st.data())
def test_padding_cannot_leak(case: Any, more: int, data: st.DataObject) -> None:
    """Anything on padding, and any width of it, gives the same rewards, advantages, losses and figures."""
    lengths, tensors = case
    rows, width = tensors[0].shape
    scores = torch.linspace(-1, 1, rows, dtype=torch.float64)
    authors = torch.from_numpy(data.draw(arrays(np.int64, (rows, width), elements=st.integers(0, 1))))
    real = masks.response_mask(lengths, width)
    garbage = data.draw(st.sampled_from(GARBAGE))

    def spoil(x: torch.Tensor, filler: float) -> torch.Tensor:
        filled = torch.where(real, x, torch.tensor(filler, dtype=x.dtype))
        return torch.nn.functional.pad(filled, (0, more), value=filler)

    clean = credit_of(tensors, scores, lengths, authors)
    spoilt = credit_of(
        [spoil(t, garbage) for t in tensors], scores, lengths, spoil(authors, data.draw(st.integers(-1, 3)))
    )
    for name, value in clean.items():
        if value is None:
            assert spoilt[name] is None
        else:
            assert torch.allclose(torch.as_tensor(spoilt[name]), torch.as_tensor(value), atol=1e-12), name


def test_explained_variance() -> None:
    returns = torch.tensor([[1.0, 2.0, 3.0, 99.0]])
    mask = torch.tensor([[True, True, True, False]])
    assert explained_variance(returns.clone(), returns, mask) == pytest.approx(1.0)
    assert explained_variance(torch.zeros(1, 4), returns, mask) == pytest.approx(0.0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3.0)
    assert explained_variance(returns, torch.ones(1, 4), mask) is None  # nothing varies: there is nothing to explain
    assert explained_variance(returns, returns, torch.tensor([[True, False, False, False]])) is None
    values = 0.003 + 0.001 * torch.rand(1, 50)  # every score is 0: a return is 0 but for the digits that a sum loses
    assert explained_variance(values, (0 - values) + values + 1e-10 * torch.rand(1, 50), values > 0) is None
