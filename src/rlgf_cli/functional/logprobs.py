"""From logits to the policy's distribution: one definition for sampling and for log-probabilities.

Shapes: B rows, T response positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

LOGITS_BYTES = 128 * 2**20
"""The most memory of one chunk's float32 logits."""


def process_logits(
    logits: torch.Tensor,
    temperature: float,
    eos_banned: torch.Tensor,
    eos_ids: torch.Tensor,
    banned_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """The policy's distribution as logits: divided by ``temperature``, EOS forbidden where ``eos_banned``, and
    ``banned_ids`` everywhere.

    logits [..., V], eos_banned [...] bool, eos_ids [n], banned_ids [m]. Sampling and log-probabilities both
    use this, so the ratio of new to old probability is taken under the distribution that wrote the tokens. At
    temperature 1 the bans are written into ``logits`` itself: it is the largest tensor, and a copy of it costs as much
    as its softmax.
    """
    scaled = logits / temperature if temperature != 1.0 else logits
    # no gradient is lost: a logit of minus infinity has the probability 0, and what comes back to it is 0
    with torch.no_grad():
        if banned_ids is not None:
            scaled[..., banned_ids] = float("-inf")
        if bool(eos_banned.any()):
            columns = scaled[..., eos_ids]
            scaled[..., eos_ids] = columns.masked_fill(eos_banned.unsqueeze(-1), float("-inf"))
    return scaled


class _ChosenLogprobs(torch.autograd.Function):
    """log softmax at one index per row, with one buffer for the gradient where autograd's own needs four."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        norm = logits.logsumexp(-1)
        ctx.save_for_backward(logits, norm, tokens)
        return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """d/d logits of (logits[token] - logsumexp) = onehot(token) - softmax."""
        logits, norm, tokens = ctx.saved_tensors
        weight = gradient.unsqueeze(-1)
        softmax = (logits - norm.unsqueeze(-1)).exp_().mul_(-weight)
        return softmax.scatter_add_(-1, tokens.unsqueeze(-1), weight), None


def chosen_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log softmax(``logits`` [N, V], float32) at ``tokens`` [N] -> [N]. May be differentiated once."""
    return _ChosenLogprobs.apply(logits, tokens)


class _ChosenAndEntropy(torch.autograd.Function):
    """log softmax at one index per row, and the entropy of the row, with two buffers for the gradient.

    With p = softmax and H = -sum p log p: dH/d logits = -p (log p + H). ``entr(p)`` is -p log p, and 0 where p is 0 (a
    logit of minus infinity).
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        norm = logits.logsumexp(-1)
        entropy = torch.special.entr((logits - norm.unsqueeze(-1)).exp_()).sum(-1)
        ctx.save_for_backward(logits, norm, tokens, entropy)
        return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - norm, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_chosen: torch.Tensor, of_entropy: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, norm, tokens, entropy = ctx.saved_tensors
        shares = (logits - norm.unsqueeze(-1)).exp_()
        gradient = torch.special.entr(shares).mul_(of_entropy.unsqueeze(-1))
        gradient.sub_(shares.mul_((of_chosen + of_entropy * entropy).unsqueeze(-1)))
        return gradient.scatter_add_(-1, tokens.unsqueeze(-1), of_chosen.unsqueeze(-1)), None


def chosen_logprobs_and_entropies(logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`chosen_logprobs`, and the entropies (nats) of softmax(``logits``): [N] each."""
    return _ChosenAndEntropy.apply(logits, tokens)


def in_chunks(
    compute: Callable[..., tuple[torch.Tensor, ...]], rows: tuple[torch.Tensor, ...], vocabulary: int
) -> tuple[torch.Tensor, ...]:
    """``compute(*rows)`` on so many rows at a time that their logits take at most ``LOGITS_BYTES``.

    ``rows``: tensors with the same first dimension N; ``compute`` returns tensors [N]. With more than one chunk the
    backward pass computes a chunk's logits again instead of keeping them, so that the peak does not grow with N times
    ``vocabulary``.
    """
    size = max(1, LOGITS_BYTES // (4 * vocabulary))
    if len(rows[0]) <= size:
        return compute(*rows)
    chunks = zip(*(tensor.split(size) for tensor in rows), strict=True)
    if torch.is_grad_enabled():
        parts = [checkpoint(compute, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))
    # written into tensors made before: results between two chunks' logits would split the memory that is free again
    outputs: tuple[torch.Tensor, ...] = ()
    for number, chunk in enumerate(chunks):
        part = compute(*chunk)
        outputs = outputs or tuple(values.new_empty(len(rows[0])) for values in part)
        for output, values in zip(outputs, part, strict=True):
            output[number * size : number * size + len(values)] = values
    return outputs


def warp_logits(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Top-k, then top-p (Holtzman et al. 2020): what is outside gets minus infinity. logits [B, V]."""
    if top_k > 0 and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        outside = probabilities.cumsum(-1) - probabilities >= top_p  # the token that reaches top_p stays in
        logits = logits.masked_fill(outside.gather(-1, order.argsort(-1)), float("-inf"))
    return logits
