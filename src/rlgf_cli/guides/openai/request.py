"""Requests to an endpoint: prompt or messages, sampling, and seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from rlgf_cli.config.guide import GuideConfig
from rlgf_cli.errors import UserError
from rlgf_cli.guides.cleanup import fill
from rlgf_cli.guides.conversation import with_turns
from rlgf_cli.guides.openai.endpoint import Endpoint
from rlgf_cli.protocols import GuideRequest, Prompt
from rlgf_cli.protocols.messages import as_messages, last_words, with_last_words

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
            **({"chat_template_kwargs": self._sent_kwargs} if self._sent_kwargs else {}),
        }

    @property
    def _sent_kwargs(self) -> dict[str, Any] | None:
        """The chat template's variables, for a server that renders the messages itself."""
        return self.config.chat_template_kwargs if self.endpoint.api == "chat" else None

    def fields(self, request: GuideRequest) -> dict[str, Any]:
        """The part of the request that a text depends on."""
        return {**self.prompt(request), "max_tokens": request.max_new_tokens, "sample_index": request.sample_index}

    def prompt(self, request: GuideRequest) -> dict[str, Any]:
        """``prompt`` or ``messages``, as they are sent."""
        config, given = self.config, request.example.given
        text = last_words(given)
        if config.prompt_template is not None:
            text = fill(config.prompt_template, text)
        if self.endpoint.api == "completion":
            return {"prompt": self._as_text(with_turns(config, with_last_words(given, text))) + request.prefix}
        if request.prefix and config.continuation == "template":
            if config.continue_template is None:
                raise UserError("this guide has no continue_template, so it cannot go on from a prefix")
            text = fill(config.continue_template, text, request.prefix)
        messages = [asdict(message) for message in as_messages(with_turns(config, with_last_words(given, text)))]
        if request.prefix and config.continuation == "prefill":
            messages.append({"role": "assistant", "content": request.prefix})
        return {"messages": messages}

    def _as_text(self, prompt: Prompt) -> str:
        """The prompt for a completion API: a text as it is, or rendered by the chat template of ``guide.tokenizer``."""
        if self.config.tokenizer is not None:
            return rendered(self.config.tokenizer, prompt, self.config.chat_template_kwargs or {})
        if isinstance(prompt, str):
            return prompt
        raise UserError(
            "the prompt is a conversation, and a completion API takes one text",
            hint="use the chat API (guide.api: chat), or name the model's tokenizer, whose chat template makes a text "
            "of it (--set guide.tokenizer=NAME)",
        )

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
        if self._sent_kwargs:
            extra["chat_template_kwargs"] = self._sent_kwargs  # vLLM's, SGLang's and llama.cpp's
        if request.prefix and self.endpoint.api == "chat" and self.config.continuation == "prefill":
            extra |= {"add_generation_prompt": False, "continue_final_message": True}  # vLLM's; others need neither
        if extra:
            body["extra_body"] = extra
        if sampling.send_seed:
            body["seed"] = request_seed(self.seed, json.dumps(self.fields(request), ensure_ascii=False))
        return body


def rendered(name: str, prompt: Prompt, kwargs: Mapping[str, Any]) -> str:
    """The prompt in the chat template of a tokenizer, without a BOS that the server's tokenizer adds as well."""
    from rlgf_cli.models.text import TextFormat

    tokenizer = _tokenizer(name)
    text = TextFormat(chat=True, chat_template_kwargs=kwargs).render_prompt(tokenizer, prompt)
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if adds_bos else text


@cache
def _tokenizer(name: str) -> Any:
    from rlgf_cli.models.gguf import plain_checkpoint
    from rlgf_cli.models.load import load_tokenizer

    return load_tokenizer(plain_checkpoint(name)[0])


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
