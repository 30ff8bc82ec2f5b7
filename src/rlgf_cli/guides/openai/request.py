"""Requests to an endpoint: prompt or messages, sampling, and seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from rlgf_cli.config.guide import GuideConfig, PrefillStyle
from rlgf_cli.errors import UserError
from rlgf_cli.guides.cleanup import fill
from rlgf_cli.guides.conversation import refuse_turns, with_turns
from rlgf_cli.guides.openai.endpoint import Endpoint
from rlgf_cli.guides.openai.presets import NEUTRAL, SamplingKey
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
        """The settings that a text depends on besides the request. Keys that came later are in it where they are
        given, so that texts that were bought before are found."""
        config, sampling = self.config, self.config.sampling
        style = self.prefill_style
        added = {
            "chat_template_kwargs": self._sent_kwargs,
            "prefill_style": style if style != "vllm" else None,
            "extra_body": config.extra_body,
            "reasoning_effort": config.reasoning_effort,
            "reasoning_tokens": config.reasoning_tokens,
        }
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
            "prefill": config.continuation == "prefill",
            **{key: value for key, value in added.items() if value},
        }

    @property
    def prefill_style(self) -> PrefillStyle | None:
        """How a chat model's own message is begun with a partial text; None: it is not."""
        if self.endpoint.api != "chat" or self.config.continuation != "prefill":
            return None
        provider = self.endpoint.provider
        return self.config.prefill_style or (provider.prefill if provider else "vllm")

    @property
    def echoes(self) -> bool:
        """Whether the answer to a message that was begun repeats its beginning: llama.cpp's server does, and at an
        unknown provider the style ``plain`` stands for it."""
        style, provider = self.prefill_style, self.endpoint.provider
        return style is not None and (provider.prefill_echo if provider else style == "plain")

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
        if request.prefix and (style := self.prefill_style):
            mark = {"prefix": True} if style == "prefix" else {}
            messages.append({"role": "assistant", "content": request.prefix, **mark})
        return {"messages": messages}

    def limit(self, request: GuideRequest) -> int:
        """The limit of new tokens that is sent: the text's, and what is allowed for reasoning."""
        return request.max_new_tokens + self.config.reasoning_tokens

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
        """The body without its token limit, whose name depends on the server. ``extra_body``: not OpenAI's keys, and
        the user's, which win."""
        sampling, provider = self.config.sampling, self.endpoint.provider
        body: dict[str, Any] = {"model": self.endpoint.model}
        keys: tuple[SamplingKey, ...] = ("temperature", "top_p")
        for key in keys:
            value = getattr(sampling, key)
            if value is not None and not (value == NEUTRAL[key] and key in self.endpoint.neutral):
                body[key] = value
        body |= self.prompt(request)
        if self.config.reasoning_effort is not None:
            body["reasoning_effort"] = self.config.reasoning_effort
        extra: dict[str, Any] = {}
        if sampling.stop:
            body["stop"] = sampling.stop
        if sampling.top_k:
            extra["top_k"] = sampling.top_k  # not OpenAI's; vLLM, llama.cpp and others have it
        if self._sent_kwargs:
            extra["chat_template_kwargs"] = self._sent_kwargs  # vLLM's, SGLang's and llama.cpp's
        if request.prefix and self.prefill_style == "vllm":
            extra |= {"add_generation_prompt": False, "continue_final_message": True}
        if sampling.send_seed and (name := provider.seed if provider else "seed"):
            seed = request_seed(self.seed, json.dumps(self.fields(request), ensure_ascii=False))
            (body if name == "seed" else extra)[name] = seed
        extra |= self.config.extra_body
        if extra:
            body["extra_body"] = extra
        return body


def check_request(config: GuideConfig, endpoint: Endpoint) -> None:
    """Refuse settings that the endpoint does not take. Raises UserError."""
    if config.sampling.num_beams > 1:
        raise UserError("guide.sampling.num_beams is for local checkpoints; an API has no beam search")
    for key in sorted(endpoint.refuses):
        value = getattr(config.sampling, key)
        if value is not None and value != NEUTRAL[key]:
            raise UserError(
                f"{endpoint.model} takes no {key}, and guide.sampling.{key} is {value:g}",
                hint=f"leave it out: --set guide.sampling.{key}=null (guide.extra_body is sent as it is)",
            )
    if endpoint.api == "completion":
        _check_completion(config)
        return
    if config.tokenizer is not None:
        raise UserError("guide.tokenizer is for completion APIs; a chat API renders the messages itself")
    if config.continuation == "prefill" and RequestBuilder(endpoint, config, 0).prefill_style is None:
        assert endpoint.provider is not None
        raise UserError(
            f"{endpoint.provider.name} does not say that it goes on from an assistant's message that is begun",
            hint="use guide.continuation: template, or say how: guide.prefill_style: plain, prefix or vllm",
        )


def _check_completion(config: GuideConfig) -> None:
    """Refuse settings of chats, for a completion API. Raises UserError."""
    if config.tokenizer is None:
        refuse_turns(
            config,
            "this guide uses the completion API, which takes one text",
            "name the model's tokenizer, whose chat template makes a text of them "
            "(--set guide.tokenizer=NAME), or set guide.api to chat; guide.prompt_template takes them as text",
        )
    if config.chat_template_kwargs and config.tokenizer is None:
        raise UserError(
            "guide.chat_template_kwargs is given, and a completion API has no chat template",
            hint="name the tokenizer that has one: --set guide.tokenizer=NAME",
        )
    for key in ("reasoning_effort", "prefill_style"):
        if getattr(config, key) is not None:
            raise UserError(f"guide.{key} is for chat APIs, and this guide uses the completion API")


def hint_of_refusal(why: str) -> str:
    """The hint for a request that a server refused: the sampling key that its message names can be left out."""
    named = [key for key in ("temperature", "top_p", "top_k") if key in why]
    if named:
        return f"leave it out: --set guide.sampling.{named[0]}=null"
    if "seed" in why:
        return "leave it out: --set guide.sampling.send_seed=false"
    return "something that all requests have in common does not suit it: check the guide's settings"


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


def likely_tokens(body: Mapping[str, Any], limit: int) -> float:
    """Tokens that a rate limit is likely to count for a request of at most ``limit`` new tokens, before its answer."""
    return prompt_bytes(body) / 4 + limit
