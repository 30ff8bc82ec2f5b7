"""Requests to an endpoint: prompt or messages, sampling, and seed."""

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
class RequestBuilder:
    """Makes the bodies of requests to an endpoint. ``seed`` is the run's."""

    endpoint: Endpoint
    config: GuideConfig
    seed: int

    def identity(self) -> dict[str, Any]:
        """The settings that a text depends on besides the request."""
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

    def fields(self, request: GuideRequest) -> dict[str, Any]:
        """The part of the request that a text depends on."""
        return {**self.prompt(request), "max_tokens": request.max_new_tokens, "sample_index": request.sample_index}

    def prompt(self, request: GuideRequest) -> dict[str, Any]:
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
        """The body without its token limit, whose name depends on the server. ``extra_body``: not OpenAI's keys."""
        sampling = self.config.sampling
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            **self.prompt(request),
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
            body["seed"] = request_seed(self.seed, json.dumps(self.fields(request), ensure_ascii=False))
        return body


def request_seed(seed: int, request: str) -> int:
    """The seed that goes with a request, in [0, 2**31)."""
    return int.from_bytes(hashlib.sha256(f"{seed}|{request}".encode()).digest()[:4], "big") >> 1


def prompt_bytes(body: Mapping[str, Any]) -> int:
    """Bytes of the prompt, with an allowance for each message: more than it can have tokens."""
    texts = [body["prompt"]] if "prompt" in body else [message["content"] for message in body["messages"]]
    return sum(len(text.encode("utf-8", "surrogatepass")) + _PER_MESSAGE for text in texts)


def likely_tokens(request: GuideRequest, body: Mapping[str, Any]) -> float:
    """Tokens that a rate limit is likely to count for a request, before the answer is there."""
    return prompt_bytes(body) / 4 + request.max_new_tokens
