"""A policy's texts as requests to vLLM, in process or on a server, and vLLM's answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlgf_cli.models.generate import Generated
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.samplers.base import SampleRequest

_FORBIDDEN = -100.0
"""The bias (nats) of a token that must not be sampled; vLLM takes none below it."""


@dataclass(frozen=True)
class VllmRequest:
    """One row for a vLLM engine: the ids to continue, and vLLM's sampling parameters by name."""

    ids: list[int]
    params: dict[str, Any]


def requests_of(loaded: Loaded, request: SampleRequest) -> list[VllmRequest]:
    """One request a row, so that each has its own limit, and its own seed from the row's draw for its next token."""
    uniforms, distribution = request.uniforms, request.distribution
    rows = zip(request.prompts, request.prefixes, request.max_new_tokens, strict=True)
    fixed: dict[str, Any] = {
        "temperature": 0.0 if uniforms is None else distribution.temperature,
        "top_k": distribution.top_k,
        "top_p": distribution.top_p,
        "logprobs": 0,  # that of the sampled token alone
        "stop_token_ids": sorted(loaded.eos_ids),
    }
    if distribution.ban_control:
        fixed["logit_bias"] = dict.fromkeys(sorted(loaded.control_ids), _FORBIDDEN)
    requests = []
    for row, (prompt, prefix, limit) in enumerate(rows):
        own = {"max_tokens": limit, "min_tokens": min(limit, max(0, distribution.min_new_tokens - len(prefix)))}
        if uniforms is not None:
            own["seed"] = int(uniforms[row][len(prefix)] * (1 << 31))
        requests.append(VllmRequest([*prompt, *prefix], {**fixed, **own}))
    return requests


def generated(loaded: Loaded, ids: Sequence[int], logprobs: Sequence[float]) -> Generated:
    """A vLLM engine's answer to one request."""
    tokens = [int(token) for token in ids]
    return Generated(tokens, bool(tokens) and tokens[-1] in loaded.eos_ids, [float(value) for value in logprobs])
