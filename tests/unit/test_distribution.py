"""The distribution that samples and is scored: warping, bans, and the draw itself."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers import DynamicCache, TopKLogitsWarper, TopPLogitsWarper

from rlgf_cli.functional.logprobs import chosen_logprobs, process_logits, warp_logits
from rlgf_cli.models.generate import draw_tokens, sample

INF = float("inf")


def numbers(low: float = -3.0, high: float = 3.0) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False).map(lambda x: round(x, 3))


@given(arrays(np.float64, (3, 9), elements=numbers()), st.integers(1, 12))
def test_top_k_is_that_of_transformers(logits: np.ndarray, top_k: int) -> None:
    scores = torch.from_numpy(logits)
    expected = TopKLogitsWarper(top_k=min(top_k, 9))(None, scores)
    assert torch.equal(warp_logits(scores, top_k, 1.0), expected)


@given(arrays(np.float64, (3, 9), elements=numbers(), unique=True), numbers(0.01, 0.999))
def test_top_p_is_that_of_transformers(logits: np.ndarray, top_p: float) -> None:
    scores = torch.from_numpy(logits)
    sums = scores.softmax(-1).sort(-1, descending=True).values.cumsum(-1)
    assume(bool(((sums - top_p).abs() > 1e-6).all()))  # at the edge itself rounding decides
    expected = TopPLogitsWarper(top_p=top_p)(None, scores)
    assert torch.equal(warp_logits(scores, 0, top_p), expected)


def test_top_k_comes_before_top_p_and_something_always_stays() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    # over all four, 2.0 is needed to reach .7; over the top two, 3.0 alone holds .73
    assert torch.isfinite(warp_logits(logits, 0, 0.7)).tolist() == [[True, True, False, False]]
    assert torch.isfinite(warp_logits(logits, 2, 0.7)).tolist() == [[True, False, False, False]]
    assert torch.isfinite(warp_logits(logits, 1, 1e-9)).tolist() == [[True, False, False, False]]


def test_process_logits_scales_and_bans_eos_only_where_told() -> None:
    logits = torch.arange(8.0).reshape(2, 4)
    eos = torch.tensor([1, 3])
    found = process_logits(logits, 2.0, torch.tensor([True, False]), eos)
    assert found.tolist() == [[0.0, -INF, 1.0, -INF], [2.0, 2.5, 3.0, 3.5]]
    assert logits.tolist() == torch.arange(8.0).reshape(2, 4).tolist()
    assert process_logits(logits, 1.0, torch.tensor([False, False]), eos) is logits
    assert process_logits(logits, 1.0, torch.tensor([True, False]), eos) is logits  # the ban is written into them
    assert logits.tolist() == [[0.0, -INF, 2.0, -INF], [4.0, 5.0, 6.0, 7.0]]


def test_a_banned_eos_has_no_gradient_and_the_others_have_that_of_the_allowed_tokens() -> None:
    start = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, expected = (start.clone().requires_grad_() for _ in range(2))
    banned, eos, tokens = torch.tensor([True, False]), torch.tensor([1, 3]), torch.tensor([2, 3])
    chosen_logprobs(process_logits(found * 1, 1.0, banned, eos), tokens).sum().backward()
    allowed = torch.tensor([[True, False, True, False], [True] * 4])
    expected.masked_fill(~allowed, -INF).log_softmax(-1)[torch.arange(2), tokens].sum().backward()
    assert found.grad is not None and expected.grad is not None
    assert found.grad[0, 1] == found.grad[0, 3] == 0
    torch.testing.assert_close(found.grad, expected.grad)


def test_chosen_logprobs_and_their_gradient_are_those_of_log_softmax() -> None:
    start = 5 * torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens, weights = torch.tensor([6, 0, 3]), torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    mine, plain = (start.clone().requires_grad_() for _ in range(2))
    found = chosen_logprobs(mine, tokens)
    expected = plain.log_softmax(-1)[torch.arange(3), tokens]
    torch.testing.assert_close(found, expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(mine.grad, plain.grad)
    assert torch.autograd.gradcheck(chosen_logprobs, (start.requires_grad_(), tokens))


def test_draws_have_the_right_distribution() -> None:
    """Chi-square over seven tokens, 20,000 draws; the .999 quantile for six degrees of freedom is 22.46."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0, 1.5])
    count = 20_000
    uniforms = torch.from_numpy(np.random.default_rng(0).random(count))
    drawn = draw_tokens(logits.expand(count, -1), uniforms)
    observed = torch.bincount(drawn, minlength=7).double()
    expected = logits.double().softmax(0) * count
    assert float(((observed - expected).square() / expected).sum()) < 22.46


@given(arrays(np.float64, 6, elements=numbers()), st.lists(st.booleans(), min_size=6, max_size=6), st.data())
def test_banned_tokens_are_never_drawn_not_even_at_the_ends(
    logits: np.ndarray, banned: list[bool], data: st.DataObject
) -> None:
    assume(not all(banned))
    scores = torch.from_numpy(logits).float().masked_fill(torch.tensor(banned), -INF)
    ends = [0.0, float(np.nextafter(1.0, 0.0)), float(np.nextafter(0.0, 1.0))]
    more = data.draw(st.lists(st.floats(0, 1, exclude_max=True), max_size=5))
    uniforms = torch.tensor([*ends, *more], dtype=torch.float64)
    drawn = draw_tokens(scores.expand(len(uniforms), -1), uniforms)
    assert not any(banned[token] for token in drawn.tolist())
    allowed = [i for i, forbidden in enumerate(banned) if not forbidden]
    assert drawn[0] == allowed[0] and drawn[1] == allowed[-1]


def test_the_tail_of_a_distribution_can_be_drawn() -> None:
    """Four tokens of probability 1e-9 behind a certain one: in float32 their cumulative mass would all be 1."""
    logits = torch.tensor([[0.0, *[math.log(1e-9)] * 4]])
    for token in range(1, 5):
        assert draw_tokens(logits, torch.tensor([1 - (4.5 - token) * 1e-9], dtype=torch.float64)).tolist() == [token]


class Fixed:
    """A decoder that says the same of every text: logits in bfloat16, as one that computes in it does."""

    config = SimpleNamespace(is_encoder_decoder=False)
    device = torch.device("cpu")

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits.bfloat16()

    def __call__(self, *, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.logits.expand(len(input_ids), 1, -1), past_key_values=DynamicCache())


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.9)])
def test_bfloat16_logits_are_sampled_as_the_distribution_that_they_are(temperature: float, top_p: float) -> None:
    """Rounded are the logits; temperature, softmax, cut and draw are not. In bfloat16 itself, the probabilities have
    three digits, and one draw in about fifty falls on another token."""
    rng = np.random.default_rng(0)
    model, count = Fixed(torch.from_numpy(rng.normal(size=300))), 400
    uniforms = rng.random((count, 1))
    found = sample(
        model, [[5]] * count, max_new_tokens=1, uniforms=uniforms, eos_ids=[0], pad_id=0, temperature=temperature,
        top_p=top_p, batch_size=count,
    )  # fmt: skip
    shares = (model.logits.double() / temperature).softmax(-1)
    order = shares.argsort(descending=True)
    if top_p < 1:
        shares[order[1:][shares[order].cumsum(-1)[:-1] >= top_p]] = 0.0
    edges = (shares / shares.sum()).cumsum(-1).numpy()
    near = np.abs(edges[None] - uniforms).min(axis=1) < 1e-5  # float32 may round these to either side
    expected = np.searchsorted(edges, uniforms[:, 0], side="right")
    drawn = np.array([row.ids[0] for row in found])
    assert near.mean() < 0.05 and (drawn == expected)[~near].all()
