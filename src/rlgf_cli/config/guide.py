"""The ``guide`` section of ``collect-guide`` and ``train``."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, model_validator

from rlgf_cli.config.common import Device, Dtype, checked_kwargs
from rlgf_cli.section import Flag, Strict

Api = Literal["chat", "completion"]

CONTINUE_TEMPLATE = (
    "{prompt}\n\n"
    "The answer below was begun and is not finished. Go on exactly where it stops. "
    "Write only what comes next, and do not repeat what is there.\n\n"
    "{prefix}"
)
"""The prompt that makes a chat model continue a text that another author began."""

Mode = Literal["live", "record", "replay"]
PrefillStyle = Literal["vllm", "prefix", "plain"]
TRANSPORT = {
    "mode",
    "provider",
    "base_url",
    "api_key_env",
    "headers",
    "timeout_s",
    "deadline_s",
    "outage_limit_s",
    "max_retries",
    "concurrency",
    "requests_per_minute",
    "tokens_per_minute",
    "batch_poll_s",
    "batch_size",
    "device",
    "accept_models",
    "context_length",
    "usd_per_million_input",
    "usd_per_million_output",
    "batch_price",
    "licence",
}
"""Keys that decide how requests are sent, not which texts the guide writes: they may differ when a run is resumed."""

_ADDED = (
    "tokenizer", "chat_template_kwargs", "examples", "prefill_style", "extra_body", "reasoning_effort",
    "reasoning_tokens",
)  # fmt: skip
"""Keys that came later: settings of texts that were bought before do not have them, where they are at their default."""

_OWN_BODY = {
    "model", "messages", "prompt", "n", "best_of", "stream", "max_tokens", "max_completion_tokens",
}  # fmt: skip
"""Keys of a request on which the reading of its answer or its price rests; ``extra_body`` has none of them."""
_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _null_is(value: Any) -> BeforeValidator:
    """Null is another name for a value that is not sent."""
    return BeforeValidator(lambda given: value if given is None else given)


def _as_text(value: Any) -> Any:
    """A header's value that YAML read as a number or truth value, as the text that was written."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else value


class GuideSampling(Strict):
    """The guide's sampling.

    ``temperature`` 0 is greedy. ``top_k`` 0 and ``top_p`` 1 mean all tokens (an API is not sent a ``top_k`` of 0; some
    servers then take one of their own). ``num_beams`` is for local checkpoints only. A text ends before the first of
    ``stop``. ``send_seed`` gives an API a seed with each request, made from the run's seed, the example and the sample
    index; servers that honour it answer equal requests with equal texts. Null for any of them: it is not sent, and the
    server decides; local checkpoints need a ``temperature`` and a ``top_p``.
    """

    temperature: Annotated[float | None, Flag("0 is greedy.")] = Field(1.0, ge=0)
    top_p: Annotated[float | None, Flag("Nucleus; 1 is all.")] = Field(1.0, gt=0, le=1)
    top_k: Annotated[int, _null_is(0), Flag("Best k tokens; 0 is all.")] = Field(0, ge=0)
    num_beams: Annotated[int, _null_is(1), Flag("Beam search (hf: only).")] = Field(1, ge=1)
    stop: Annotated[list[str], _null_is([])] = Field(default_factory=list)
    send_seed: Annotated[bool, _null_is(False)] = True

    @model_validator(mode="after")
    def _check(self) -> GuideSampling:
        if self.num_beams > 1 and (self.top_k or (self.top_p or 1) < 1):
            raise ValueError("beam search takes no top_k or top_p")
        if "" in self.stop:
            raise ValueError("an empty stop text would end every answer at once")
        return self


class GuideExample(Strict):
    """A prompt with its answer, which the guide is given as two earlier turns of the conversation."""

    prompt: str = Field(min_length=1)
    completion: str = Field(min_length=1)


class GuideConfig(Strict):
    """A guide and how texts are requested from it.

    ``name`` is a recorded ``FILE.jsonl``, a local checkpoint ``hf:PATH``, a model behind an OpenAI-compatible
    endpoint ``openai:MODEL``, a model of a known provider ``PROVIDER:MODEL`` (``rlgf ls providers``), or an alias such
    as ``gpt-3.5`` (``rlgf ls guides``).

    ``mode``: ``live`` requests every text; ``record`` takes texts from the cache and stores new ones there (the
    default for endpoints); ``replay`` takes texts from the cache alone and stops at the first one that is not
    there. Local checkpoints are ``live`` by default.

    ``api``: ``chat`` or ``completion``; for ``hf:`` and ``vllm:`` ``chat`` is the tokenizer's chat template and
    null the template stored with the checkpoint, else its chat template. ``prompt_template`` holds ``{prompt}``; null
    is the prompt as it is (``hf:``: the checkpoint's template). ``continuation`` and ``continue_template`` are for chat
    APIs.
    Of a conversation, templates are filled with the last message, and ``system`` stands before its own system message.
    ``examples`` are earlier turns before every prompt, a user's and an assistant's each, behind the system message;
    ``prompt_template`` is filled with their prompts too. ``system`` and ``examples`` are for chat APIs, and for guides
    whose prompts a chat template renders.
    ``tokenizer`` (a folder or hub name) renders prompts for a completion API with its chat template;
    ``chat_template_kwargs`` are that template's variables, or a local checkpoint's, or sent to a chat server.
    ``continuation`` says how a chat model is given a partial text: ``template`` puts it into
    ``continue_template``, where ``{prompt}`` is the filled ``prompt_template`` and ``{prefix}`` the partial text
    (null: the guide only writes whole texts); ``prefill`` begins the assistant's own message with it, which
    only some servers take. ``prefill_style`` is how that is said: ``vllm`` (``continue_final_message``), ``prefix``
    (``prefix: true`` in the message) or ``plain`` (the message comes last); null: as the provider does, ``vllm`` for an
    unknown one. ``clean`` selects the answers of a chat API from which chatter, quotes and a repeated
    prefix are removed: those to a partial text (``continuation``) or ``all``. Thinking before an answer (``<think>``)
    is removed from the answers of all APIs and local checkpoints; ``thinking`` removes nothing else, ``none`` nothing.

    ``provider`` is one of ``rlgf ls providers``, whose base URL, key variable and rules hold; null: that of the name or
    of the base URL's host. ``api_key_env`` is the environment variable with the key for this base URL; null: the
    provider's own, which is sent to the provider's host alone, else ``OPENAI_API_KEY``. ``headers`` are added to every
    request; ``${NAME}`` in a value is filled from the environment when it is sent, and no value is written to a file.
    ``extra_body`` is added to the JSON of every request, and wins over what is there. ``reasoning_effort`` is sent as
    it is; ``reasoning_tokens`` are allowed for reasoning besides the text's own: they are added to the limit that is
    sent, and to the most that a request can cost.

    ``accept_models`` are names that the server may report besides the one asked for; an answer from another model is
    refused. ``timeout_s`` is for one attempt, of which there are ``max_retries`` + 1 within ``deadline_s``; a 429 is
    not counted. When the endpoint is down the guide waits, and gives up after ``outage_limit_s``.
    ``requests_per_minute`` and ``tokens_per_minute`` are limits in addition to those that the server reports;
    ``batch_poll_s`` is the time between requests for a batch's state. ``context_length`` and the prices (US dollars per
    million tokens) win over the alias's; ``batch_price`` is the share of the price that a batch costs, ``licence`` a
    note on the terms of the guide's texts, kept with them.
    """

    scalar_key: ClassVar[str | None] = "name"
    name: str = Field(min_length=1)
    mode: Annotated[Mode | None, Flag("live, record (cache), or replay (cache alone).", "--guide-mode")] = None
    api: Annotated[Api | None, Flag("chat or completion.")] = None
    provider: str | None = Field(None, min_length=1)
    base_url: Annotated[str | None, Flag("OpenAI-compatible endpoint; else $OPENAI_BASE_URL.")] = None
    api_key_env: Annotated[str | None, Flag("Environment variable with the key of the endpoint.")] = None
    headers: dict[str, Annotated[str, BeforeValidator(_as_text)]] = Field(default_factory=dict)
    extra_body: dict[str, Any] = Field(default_factory=dict)
    system: Annotated[str | None, Flag("System message (chat API or chat template).")] = None
    examples: list[GuideExample] = Field(default_factory=list)
    prompt_template: Annotated[str | None, Flag("Template of the guide's prompt; holds {prompt}.")] = None
    tokenizer: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continuation: Literal["template", "prefill"] = "template"
    prefill_style: PrefillStyle | None = None
    continue_template: str | None = CONTINUE_TEMPLATE
    clean: Literal["none", "thinking", "continuation", "all"] = "continuation"
    sampling: GuideSampling = Field(default_factory=GuideSampling)
    reasoning_effort: Annotated[str | None, Flag("Sent as it is: none, low, high, ...")] = Field(None, min_length=1)
    reasoning_tokens: Annotated[int, Flag("Tokens for reasoning, besides the text's.")] = Field(0, ge=0)
    accept_models: list[str] = Field(default_factory=list)
    timeout_s: Annotated[float, Flag("Seconds per attempt (API).", "--timeout")] = Field(60.0, gt=0)
    deadline_s: float = Field(600.0, gt=0)
    outage_limit_s: float = Field(300.0, ge=0)
    max_retries: Annotated[int, Flag("Retries per request (API).")] = Field(5, ge=0)
    concurrency: Annotated[int, Flag("Requests at once (API).")] = Field(16, ge=1)
    requests_per_minute: Annotated[float | None, Flag("Requests per minute, at most.", "--rpm")] = Field(None, gt=0)
    tokens_per_minute: Annotated[float | None, Flag("Tokens per minute, at most.", "--tpm")] = Field(None, gt=0)
    batch_poll_s: float = Field(60.0, gt=0)
    context_length: int | None = Field(None, ge=1)
    usd_per_million_input: Annotated[float | None, Flag("Price of a million tokens in, in USD.")] = Field(None, ge=0)
    usd_per_million_output: Annotated[float | None, Flag("Price of a million tokens out, in USD.")] = Field(None, ge=0)
    batch_price: float | None = Field(None, gt=0, le=1)
    licence: str | None = None
    batch_size: Annotated[int, Flag("Texts at once (hf:).")] = Field(32, ge=1)
    device: Device = "auto"
    dtype: Dtype = "float32"
    max_prompt_tokens: int | None = Field(None, ge=1)
    on_overlong: Annotated[
        Literal["error", "truncate"], Flag("error or truncate, for prompts that do not fit (hf:).")
    ] = "error"

    # A validator of the whole section, because the message of a field's validator would show the field's
    # value, and a URL may hold a password.
    @model_validator(mode="after")
    def _check(self) -> GuideConfig:
        if self.prompt_template is not None and "{prompt}" not in self.prompt_template:
            raise ValueError("prompt_template must hold {prompt}")
        if self.continue_template is not None and "{prefix}" not in self.continue_template:
            raise ValueError("continue_template must hold {prefix}")
        checked_kwargs(self.chat_template_kwargs)
        if (self.usd_per_million_input is None) != (self.usd_per_million_output is None):
            raise ValueError("usd_per_million_input and usd_per_million_output go together")
        if self.base_url is not None and (problem := base_url_problem(self.base_url)):
            raise ValueError(f"base_url {problem}")
        if self.api_key_env is not None and not _VARIABLE.fullmatch(self.api_key_env):
            raise ValueError("api_key_env is the name of an environment variable, such as OPENAI_API_KEY, not a key")
        if problem := headers_problem(self.headers):
            raise ValueError(f"headers: {problem}")
        if own := sorted(_OWN_BODY & self.extra_body.keys()):
            raise ValueError(f"extra_body: {own[0]!r} is set by rlgf itself")
        try:
            json.dumps(self.extra_body, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError("extra_body must hold what JSON can say") from None
        return self

    def settings(self) -> dict[str, Any]:
        """The settings that decide the guide's text, as JSON: all keys but those of transport and hardware."""
        unset = {key for key in _ADDED if getattr(self, key) in (None, [], {}, 0)}
        return self.model_dump(mode="json", exclude=TRANSPORT | unset)


class BudgetConfig(Strict):
    """Hard caps on a run's guide requests and their cost, over all its resumptions; null is no cap.

    ``max_cost_usd`` needs a guide with a known price. ``max_calls`` counts answers and calls of unknown
    outcome, not what the server refused.
    """

    max_cost_usd: Annotated[float | None, Flag("Hard cap on what the guide may cost.")] = Field(None, ge=0)
    max_calls: Annotated[int | None, Flag("Hard cap on calls of the guide.")] = Field(None, ge=0)


def base_url_problem(url: str) -> str | None:
    """The fault of an endpoint's URL, or None. The text never has the URL, which may hold a secret."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "is not a URL"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "is not an http(s) URL; it looks like http://127.0.0.1:8000/v1"
    if parts.username or parts.password:
        return "holds a user name or password; the key is read from the environment variable of guide.api_key_env"
    if parts.query or parts.fragment:
        return "must end with the path (usually /v1), without ? or #"
    return None


def headers_problem(headers: dict[str, str]) -> str | None:
    """The fault of a request's headers, or None. The text never has a value, which may be a secret."""
    for name, value in headers.items():
        if not _HEADER.fullmatch(name):
            return f"{name!r} is no name of a header"
        if name.lower() == "authorization":
            return "the Authorization header is made of the key; name its variable: api_key_env"
        if not value.isascii() or not value.isprintable():
            return f"the value of {name!r} holds characters that a header cannot have"
    return None
