"""What an endpoint is asked: the request's text, its sampling, and the seed that goes with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlgf_cli.config.guide import GuideConfig
from rlgf_cli.errors import UserError
from rlgf_cli.guides.cleanup import fill
from rlgf_cli.guides.openai.endpoint import Endpoint
from rlgf_cli.protocols import GuideRequest

_PER_MESSAGE = 16
"""Tokens that a message may need besides its text, at most."""


@dataclass(frozen=True)
class Wording:
    """How requests to an endpoint are put. ``seed`` is the run's."""

    endpoint: Endpoint
    config: GuideConfig
    seed: int

    def identity(self) -> dict[str, Any]:
        """What decides a text besides the request."""
        sampling = self.config.sampling
        return {
            "kind": "openai",
            "base_url": self.endpoint.base_url,
            "model": self.endpoint.model,
            "api": self.endpoint.api,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "stop": sampling.stop,
            "seed": self.seed if sampling.send_seed else None,
            "prefill": self.config.continuation == "prefill",
        }

    def asked(self, request: GuideRequest) -> dict[str, Any]:
        """The part of the request that decides the text."""
        return {**self.text(request), "max_tokens": request.max_new_tokens, "sample_index": request.sample_index}

    def text(self, request: GuideRequest) -> dict[str, Any]:
        """``prompt`` or ``messages``, as they are sent."""
        config = self.config
        text = request.example.prompt
        if config.prompt_template is not None:
            text = fill(config.prompt_template, text)
        if self.endpoint.api == "completion":
            return {"prompt": text + request.prefix}
        messages = [{"role": "system", "content": config.system}] if config.system is not None else []
        if request.prefix and config.continuation == "template":
            if config.continue_template is None:
                raise UserError("this guide has no continue_template, so it cannot go on from a prefix")
            text = fill(config.continue_template, text, request.prefix)
        messages.append({"role": "user", "content": text})
        if request.prefix and config.continuation == "prefill":
            messages.append({"role": "assistant", "content": request.prefix})
        return {"messages": messages}

    def body(self, request: GuideRequest) -> dict[str, Any]:
        """All of a request but its limit, whose name depends on the server. ``extra_body`` is not OpenAI's."""
        sampling = self.config.sampling
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            **self.text(request),
        }
        extra: dict[str, Any] = {}
        if sampling.stop:
            body["stop"] = sampling.stop
        if sampling.top_k:
            extra["top_k"] = sampling.top_k  # not OpenAI's; vLLM, llama.cpp and others have it
        if request.prefix and self.endpoint.api == "chat" and self.config.continuation == "prefill":
            extra |= {"add_generation_prompt": False, "continue_final_message": True}  # vLLM's; others need neither
        if extra:
            body["extra_body"] = extra
        if sampling.send_seed:
            body["seed"] = request_seed(self.seed, as_json(self.asked(request)))
        return body


def as_json(asked: Mapping[str, Any]) -> str:
    """What is hashed and kept of a request."""
    return json.dumps(asked, ensure_ascii=False)


def request_seed(seed: int, request: str) -> int:
    """The seed that goes with a request, in [0, 2**31)."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{request}".encode()).digest()[:4], "big") >> 1


def prompt_bytes(body: Mapping[str, Any]) -> int:
    """Bytes of what is asked, with what its messages need besides: more than it can have tokens."""
    texts = [body["prompt"]] if "prompt" in body else [message["content"] for message in body["messages"]]
    return sum(len(text.encode("utf-8", "surrogatepass")) + _PER_MESSAGE for text in texts)


def likely_tokens(request: GuideRequest, body: Mapping[str, Any]) -> float:
    """What a rate limit in tokens is likely to count, before the answer is there."""
    return prompt_bytes(body) / 4 + request.max_new_tokens
