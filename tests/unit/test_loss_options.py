"""The losses' options: what is averaged, an asymmetric clip, and the KL as a loss, against brute force."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rlgf_cli.functional import losses

AVERAGES: tuple[losses.LossAverage, ...] = ("tokens", "sequences", "constant")
ESTIMATORS: tuple[losses.KLEstimator, ...] = ("k1", "k2", "k3")
CONSTANT = 9


def numbers(low: float = -2.0, high: float = 2.0) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False).map(lambda x: round(x, 3))


def grid() -> Any:
    return arrays(np.float64, (4, 5), elements=numbers()).map(torch.from_numpy)


MASKS = arrays(np.bool_, (4, 5)).map(torch.from_numpy)


# --- what is averaged


def averaged(values: torch.Tensor, mask: torch.Tensor, average: str) -> float:
    rows = [[float(v) for v, m in zip(row, own, strict=True) if m] for row, own in zip(values, mask, strict=True)]
    rows = [row for row in rows if row]  # an episode without a learned token is in no average
    if not rows:
        return 0.0
    if average == "tokens":
        return fmean(v for row in rows for v in row)
    if average == "sequences":
        return fmean(fmean(row) for row in rows)
    return fmean(sum(row) / CONSTANT for row in rows)


@pytest.mark.parametrize("average", AVERAGES)
@given(values=grid(), mask=MASKS)
def test_each_average_is_the_one_that_it_is_called(
    average: losses.LossAverage, values: torch.Tensor, mask: torch.Tensor
) -> None:
    counts = losses.loss_counts(mask, average, CONSTANT)
    assert counts.shape == (4, 1)
    found = losses.likelihood_loss(-values, mask, counts)
    assert float(found) == pytest.approx(averaged(values, mask, average), abs=1e-9)


@pytest.mark.parametrize("average", AVERAGES)
@given(data=st.data())
def test_accumulated_parts_give_the_minibatchs_loss_and_gradient_whatever_is_averaged(
    average: losses.LossAverage, data: st.DataObject
) -> None:
    new, old, advantages, ref = (data.draw(grid()) for _ in range(4))
    mask = data.draw(MASKS)
    counts = losses.loss_counts(mask, average, CONSTANT)

    def loss(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        clipped, _ = losses.policy_loss(x[rows], old[rows], advantages[rows], mask[rows], 0.2, counts[rows])
        return clipped + 0.3 * losses.kl_loss(x[rows], old[rows], ref[rows], mask[rows], "k3", counts[rows])

    whole, parts = new.clone().requires_grad_(), new.clone().requires_grad_()
    loss(whole, torch.arange(4)).backward()
    for rows in torch.arange(4).chunk(data.draw(st.integers(2, 4))):
        loss(parts, rows).backward()
    assert torch.allclose(parts.grad, whole.grad, atol=1e-12)


# --- the clip's two sides


@given(data=st.data())
def test_the_clip_has_a_bound_of_its_own_on_either_side(data: st.DataObject) -> None:
    new, old, advantages = (data.draw(grid()) for _ in range(3))
    mask = data.draw(MASKS)
    low, high = data.draw(st.sampled_from([(0.2, 0.28), (0.3, 0.1)]))
    total, binds = 0.0, 0
    for n, o, a in zip(new[mask].tolist(), old[mask].tolist(), advantages[mask].tolist(), strict=True):
        ratio = math.exp(n - o)
        bounded = min(max(ratio, 1 - low), 1 + high)
        total -= min(ratio * a, bounded * a)
        binds += bounded * a < ratio * a
    loss, stats = losses.policy_loss(new, old, advantages, mask, low, 1, clip_range_high=high)
    assert float(loss) == pytest.approx(total, abs=1e-9)
    assert int(stats["clipped"]) == binds


@pytest.mark.parametrize(("ratio", "advantage", "moves"), [(1.25, 1.0, True), (1.35, 1.0, False), (0.75, -1.0, False)])
def test_dapos_higher_clip_lets_unlikely_tokens_rise_further(ratio: float, advantage: float, moves: bool) -> None:
    new = torch.tensor([[math.log(ratio)]], requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, _ = losses.policy_loss(
        new, torch.zeros(1, 1), torch.tensor([[advantage]]), mask, 0.2, 1, clip_range_high=0.28
    )
    loss.backward()
    assert new.grad is not None and bool(new.grad.any()) == moves


# --- the KL as a loss


def estimate(new: float, old: float, ref: float, estimator: str) -> float:
    r = new - ref
    return {"k1": math.exp(new - old) * r, "k2": r * r / 2, "k3": math.exp(-r) - 1 + r}[estimator]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(new=grid(), old=grid(), ref=grid(), mask=MASKS)
def test_kl_loss_against_a_literal_loop(
    estimator: losses.KLEstimator, new: torch.Tensor, old: torch.Tensor, ref: torch.Tensor, mask: torch.Tensor
) -> None:
    count = int(mask.sum())
    chosen = zip(new[mask].tolist(), old[mask].tolist(), ref[mask].tolist(), strict=True)
    expected = sum(estimate(n, o, r, estimator) for n, o, r in chosen) / max(count, 1)
    assert float(losses.kl_loss(new, old, ref, mask, estimator, count)) == pytest.approx(expected, abs=1e-9)


def expected_loss(
    logits: torch.Tensor, written_by: torch.Tensor, ref: torch.Tensor, estimator: losses.KLEstimator
) -> torch.Tensor:
    """The loss's expectation over one token that ``written_by`` [V] draws: every token, weighted by its probability."""
    new, old = logits.log_softmax(-1), written_by.log()
    one = torch.ones(1, 1, dtype=torch.bool)

    def at(x: torch.Tensor, token: int) -> torch.Tensor:
        return x[token].reshape(1, 1)

    found = [losses.kl_loss(at(new, v), at(old, v), at(ref.log(), v), one, estimator, 1) for v in range(len(logits))]
    return (written_by * torch.stack(found)).sum()


DISTRIBUTIONS = arrays(np.float64, 5, elements=numbers()).map(torch.from_numpy)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@given(start=DISTRIBUTIONS, reference=DISTRIBUTIONS, older=DISTRIBUTIONS)
def test_the_gradient_of_each_estimator_is_that_of_the_kl_that_it_is_said_to_have(
    estimator: losses.KLEstimator, start: torch.Tensor, reference: torch.Tensor, older: torch.Tensor
) -> None:
    """k1 and k2: KL(pi || ref), with derivative p (log p/q - KL) by a logit; k3: KL(ref || pi), with p - q. k1 holds
    for tokens of any older policy as well; the others hold where the policy itself wrote them."""
    logits = start.clone().requires_grad_()
    p, q = start.softmax(-1), reference.softmax(-1)
    kl = (p * (p / q).log()).sum()
    expected = p - q if estimator == "k3" else p * ((p / q).log() - kl)
    expected_loss(logits, older.softmax(-1) if estimator == "k1" else p, q, estimator).backward()
    assert torch.allclose(logits.grad, expected, atol=1e-9)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@given(start=DISTRIBUTIONS, reference=DISTRIBUTIONS, older=DISTRIBUTIONS)
def test_k1_and_k3_are_the_kl_in_expectation(
    estimator: losses.KLEstimator, start: torch.Tensor, reference: torch.Tensor, older: torch.Tensor
) -> None:
    p, q = start.softmax(-1), reference.softmax(-1)
    found = expected_loss(start, older.softmax(-1) if estimator == "k1" else p, q, estimator)
    assert float(found) == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-9)
