"""The ``guide`` section of ``collect-guide`` and ``train``."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

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
TRANSPORT = {
    "mode",
    "base_url",
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

_ADDED = ("tokenizer", "chat_template_kwargs", "examples")
"""Keys that came later: settings of texts that were bought before do not have them, where they are null or empty."""


class GuideSampling(Strict):
    """The guide's sampling.

    ``temperature`` 0 is greedy. ``top_k`` 0 and ``top_p`` 1 mean all tokens (an API is not sent a ``top_k`` of 0; some
    servers then take one of their own). ``num_beams`` is for local checkpoints only. A text ends before the first of
    ``stop``. ``send_seed`` gives an API a seed with each request, made from the run's seed, the example and the sample
    index; servers that honour it answer equal requests with equal texts.
    """

    temperature: Annotated[float, Flag("0 is greedy.")] = Field(1.0, ge=0)
    top_p: Annotated[float, Flag("Nucleus; 1 is all.")] = Field(1.0, gt=0, le=1)
    top_k: Annotated[int, Flag("Best k tokens; 0 is all.")] = Field(0, ge=0)
    num_beams: Annotated[int, Flag("Beam search (hf: only).")] = Field(1, ge=1)
    stop: list[str] = Field(default_factory=list)
    send_seed: bool = True

    @model_validator(mode="after")
    def _check(self) -> GuideSampling:
        if self.num_beams > 1 and (self.top_k or self.top_p < 1):
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
    endpoint ``openai:MODEL``, or an alias such as ``gpt-3.5`` (``rlgf ls guides``).

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
    only some servers take. ``clean`` selects the answers of a chat API from which chatter, quotes and a repeated
    prefix are removed: those to a partial text (``continuation``) or ``all``. Thinking before an answer (``<think>``)
    is removed from the answers of all APIs and local checkpoints; ``thinking`` removes nothing else, ``none`` nothing.

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
    base_url: Annotated[str | None, Flag("OpenAI-compatible endpoint; else $OPENAI_BASE_URL.")] = None
    system: Annotated[str | None, Flag("System message (chat API or chat template).")] = None
    examples: list[GuideExample] = Field(default_factory=list)
    prompt_template: Annotated[str | None, Flag("Template of the guide's prompt; holds {prompt}.")] = None
    tokenizer: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continuation: Literal["template", "prefill"] = "template"
    continue_template: str | None = CONTINUE_TEMPLATE
    clean: Literal["none", "thinking", "continuation", "all"] = "continuation"
    sampling: GuideSampling = Field(default_factory=GuideSampling)
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
    usd_per_million_input: float | None = Field(None, ge=0)
    usd_per_million_output: float | None = Field(None, ge=0)
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
        return self

    def settings(self) -> dict[str, Any]:
        """The settings that decide the guide's text, as JSON: all keys but those of transport and hardware."""
        unset = {key for key in _ADDED if getattr(self, key) in (None, [])}
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
        return "holds a user name or password; the key is read from OPENAI_API_KEY alone"
    if parts.query or parts.fragment:
        return "must end with the path (usually /v1), without ? or #"
    return None
