"""Any OpenAI-compatible endpoint as guide: ``openai:MODEL`` or an alias."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Coroutine, Generator, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from rlgf_cli import noise
from rlgf_cli.config.guide import Api, GuideConfig, base_url_problem
from rlgf_cli.errors import RlgfError, UserError, did_you_mean
from rlgf_cli.guides import aliases
from rlgf_cli.guides.aliases import Alias
from rlgf_cli.guides.base import Answer, Failure, LiveGuide
from rlgf_cli.guides.texts import cut_at_stop, fill, mend_continuation
from rlgf_cli.protocols import Completion, Example, FinishReason, GuideAbilities, GuideRequest

if TYPE_CHECKING:
    import openai

T = TypeVar("T")
OPENAI_URL = "https://api.openai.com/v1"
_FINISH: dict[Any, FinishReason] = {"stop": "stop", "length": "length"}


@dataclass(frozen=True)
class Endpoint:
    """Where requests go. ``alias`` has the price and the context length, where they are known."""

    model: str
    api: Api
    base_url: str
    alias: Alias | None


def endpoint_of(config: GuideConfig) -> Endpoint:
    """The endpoint that a config names. URL: config, else alias, else OPENAI_BASE_URL, else OpenAI's own.

    Raises UserError for an unknown alias and an unusable URL.
    """
    named = config.name.startswith("openai:")
    alias = None if named else aliases.find(config.name)
    if not named and alias is None:
        raise UserError(f"unknown guide {config.name!r}", hint=did_you_mean(config.name, aliases.known()))
    model = alias.model if alias else config.name.removeprefix("openai:")
    own_url = config.base_url or (alias.base_url if alias else None)
    url = own_url or os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
    if problem := base_url_problem(url):
        raise UserError(f"{'base_url' if own_url else 'OPENAI_BASE_URL'} {problem}")
    if alias is None and url == OPENAI_URL:
        alias = aliases.find(model)  # these prices are OpenAI's own; another server's are not known
    return Endpoint(model, config.api or (alias.api if alias else "chat"), url, alias)


def api_key(base_url: str) -> str:
    """The key from OPENAI_API_KEY. A server on this machine may do without; the client wants some text."""
    if key := os.environ.get("OPENAI_API_KEY", "").strip():
        if not key.isascii() or not key.isprintable() or " " in key:
            raise UserError(
                "OPENAI_API_KEY holds characters that no key has (a space, a line break, or none of ASCII)",
                hint="export it again, without quotes or line breaks inside",
            )
        return key
    if _is_loopback(urlsplit(base_url).hostname or ""):
        return "none"
    raise UserError(
        "no API key: the environment variable OPENAI_API_KEY is not set",
        hint="export OPENAI_API_KEY=..., or give --base-url for a server on this machine, which needs none",
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


class _LoopThread:
    """An event loop in a thread of its own, so that connections outlive a single call."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rlgf-guide", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self, last: Coroutine[Any, Any, None]) -> None:
        """Cancel what is under way, run ``last``, and end the thread."""
        self.submit(self._wind_down(last)).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _wind_down(self, last: Coroutine[Any, Any, None]) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await last


class OpenAIGuide(LiveGuide):
    """One request per text, at most ``concurrency`` at once, through the asynchronous ``openai`` client.

    The client retries timeouts, broken connections, 408, 409, 429 and 5xx ``max_retries`` times. What remains
    is a :class:`Failure`, but for what no request could survive: a refused key, a spent quota, and, before
    anything has succeeded, a model or address that is not there; those are raised as UserError.
    """

    def __init__(self, config: GuideConfig, *, seed: int) -> None:
        super().__init__(config, seed=seed)
        self.endpoint = endpoint_of(config)
        self._key = api_key(self.endpoint.base_url)
        import openai

        self._errors = openai
        self._client = openai.AsyncOpenAI(
            api_key=self._key,
            base_url=self.endpoint.base_url,
            timeout=config.timeout_s,
            max_retries=config.max_retries,
        )
        self._config = config
        self._seed = seed
        self._limit_key = "max_tokens"
        self._succeeded = False
        self._loop = _LoopThread()
        self.settings.update(model=self.endpoint.model, api=self.endpoint.api)

    @classmethod
    def describe(cls, config: GuideConfig) -> GuideAbilities:
        endpoint = endpoint_of(config)
        if config.sampling.num_beams > 1:
            raise UserError("guide.sampling.num_beams is for local checkpoints; an API has no beam search")
        if endpoint.api == "completion":
            if config.system is not None:
                raise UserError(
                    "guide.system is for chat APIs, and this guide uses the completion API",
                    hint="put the instruction into guide.prompt_template, or set guide.api to chat",
                )
            return GuideAbilities(live=True, continues=True)
        return GuideAbilities(live=True, continues=config.continue_template is not None)

    def check(self, examples: Sequence[Example], max_new_tokens: int) -> None:
        alias = self.endpoint.alias
        if alias and alias.context_length is not None and max_new_tokens >= alias.context_length:
            raise UserError(
                f"max_new_tokens is {max_new_tokens}, and {self.name} takes {alias.context_length} in all",
                hint="lower --max-new-tokens",
            )

    def stream(self, requests: Iterable[GuideRequest]) -> Generator[Answer, None, None]:
        source = enumerate(requests)
        done: queue.SimpleQueue[tuple[int, GuideRequest, Future[Completion | Failure]]] = queue.SimpleQueue()
        flying: set[Future[Completion | Failure]] = set()
        fatal: RlgfError | None = None

        def ask(index: int, request: GuideRequest) -> None:
            future = self._loop.submit(self._ask(request))
            flying.add(future)
            future.add_done_callback(lambda answered: done.put((index, request, answered)))

        try:
            while True:
                while fatal is None and len(flying) < self._config.concurrency:
                    if (following := next(source, None)) is None:
                        break
                    ask(*following)
                if not flying:
                    break
                index, request, future = done.get()
                flying.discard(future)
                try:
                    outcome = future.result()
                except RlgfError as error:
                    fatal = fatal or error  # no new requests; what is on its way may be paid for, so it is awaited
                    continue
                yield Answer(index, request, outcome)
        finally:
            for future in flying:
                future.cancel()
        if fatal is not None:
            raise fatal

    def close(self) -> None:
        self._loop.close(self._client.close())

    async def _ask(self, request: GuideRequest) -> Completion | Failure:
        errors = self._errors
        try:
            response = await self._post(request)
        except errors.APIStatusError as error:
            return self._status_failure(error)
        except errors.APITimeoutError:
            return Failure("timeout", f"no answer within {self._config.timeout_s:g} s")
        except errors.APIConnectionError as error:
            why = f" ({self._said(error.__cause__)})" if error.__cause__ else ""
            return Failure("connection", f"no answer from {self.endpoint.base_url}{why}")
        except (errors.APIError, ValueError) as error:
            # ValueError: the body was no JSON, or not of the shape that the client reads.
            return Failure("malformed", f"the answer cannot be read ({self._said(error)})")
        outcome = self._read(response, request)
        self._succeeded = self._succeeded or isinstance(outcome, Completion)
        return outcome

    async def _post(self, request: GuideRequest) -> Any:
        limit_key = self._limit_key
        try:
            return await self._create(request, limit_key)
        except self._errors.BadRequestError as error:
            # Newer chat models refuse max_tokens by that name; older servers know no other.
            if limit_key != "max_tokens" or "max_completion_tokens" not in error.message:
                raise
            self._limit_key = "max_completion_tokens"
            return await self._create(request, self._limit_key)

    async def _create(self, request: GuideRequest, limit_key: str) -> Any:
        config, sampling = self._config, self._config.sampling
        options: dict[str, Any] = {
            "model": self.endpoint.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            limit_key: request.max_new_tokens,
        }
        if sampling.stop:
            options["stop"] = sampling.stop
        if sampling.top_k:
            options["extra_body"] = {"top_k": sampling.top_k}  # not OpenAI's; vLLM, llama.cpp and others have it
        if sampling.send_seed:
            options["seed"] = request_seed(self._seed, request)
        text = fill(config.prompt_template or "{prompt}", request.example.prompt)
        if self.endpoint.api == "completion":
            return await self._client.completions.create(prompt=text + request.prefix, **options)
        if request.prefix:
            if config.continue_template is None:
                raise UserError("this guide has no continue_template, so it cannot go on from a prefix")
            text = fill(config.continue_template, text, request.prefix)
        messages: list[dict[str, str]] = [{"role": "user", "content": text}]
        if config.system is not None:
            messages.insert(0, {"role": "system", "content": config.system})
        return await self._client.chat.completions.create(messages=messages, **options)  # type: ignore[arg-type]

    def _read(self, response: Any, request: GuideRequest) -> Completion | Failure:
        """The text in a response. The client does not check what servers send, so this does."""
        choices = getattr(response, "choices", None)
        if not isinstance(choices, list) or not choices:
            return Failure("malformed", "the answer holds no choice")
        choice = choices[0]
        if self.endpoint.api == "chat":
            message = getattr(choice, "message", None)
            if getattr(message, "refusal", None):
                return Failure("refusal", "the model refused to answer")
            text = getattr(message, "content", None)
        else:
            text = getattr(choice, "text", None)
        reason = getattr(choice, "finish_reason", None)
        if reason not in _FINISH:
            kind = "content_filter" if reason == "content_filter" else "finish_reason"
            return Failure(kind, f"the answer ended with the reason {reason!r}, neither stop nor length")
        if not isinstance(text, str):
            return Failure("malformed", "the answer holds no text")
        finish = _FINISH[reason]
        if (whole := text.encode("utf-8", "ignore").decode()) != text:
            self.counts["half_characters_removed"] += 1  # JSON can hold half of a surrogate pair; no file can
            text = whole
        text, stopped = cut_at_stop(text, self._config.sampling.stop)
        if stopped:
            self.counts["cut_at_stop"] += 1
            finish = "stop"
        if not request.prefix:
            text = text.strip()
        elif self.endpoint.api == "completion":
            text = text.rstrip()
        else:
            text = mend_continuation(request.prefix, text, self.counts)
        model = getattr(response, "model", None)
        usage = _usage(getattr(response, "usage", None))
        return Completion(text, finish, model if isinstance(model, str) else "", usage, self._cost(usage))

    def _cost(self, usage: dict[str, int]) -> float | None:
        alias = self.endpoint.alias
        if alias is None or not {"prompt_tokens", "completion_tokens"} <= usage.keys():
            return None
        return alias.cost_usd(usage["prompt_tokens"], usage["completion_tokens"])

    def _status_failure(self, error: openai.APIStatusError) -> Failure:
        """The failure that a status stands for; raises UserError where no other request could fare better."""
        status, said = error.status_code, self._said(error)
        if status == 401:
            raise UserError(
                f"the endpoint {self.endpoint.base_url} refused the key ({said})",
                hint="check OPENAI_API_KEY, and that it belongs to this endpoint",
            ) from None
        if status == 429 and error.code == "insufficient_quota":
            raise UserError(f"the account's quota is spent ({said})", hint="check the plan and its billing") from None
        if status in (403, 404) and not self._succeeded:
            raise UserError(
                f"{self.endpoint.base_url} has no model {self.endpoint.model!r} for this key ({said})",
                hint="check the model's name, and that the base URL ends as the server wants (usually /v1)",
            ) from None
        kind = "rate_limit" if status == 429 else "server" if status >= 500 else "refused"
        return Failure(kind, f"status {status}: {said}")

    def _said(self, error: BaseException) -> str:
        """The first line of an error, without the key, which servers like to quote."""
        text = str(error)
        if len(self._key) >= 8:  # a placeholder is too short to be searched for
            text = text.replace(self._key, "***")
        lines = text.strip().splitlines()
        return lines[0][:200] if lines else type(error).__name__


def request_seed(seed: int, request: GuideRequest) -> int:
    """The seed that goes with a request, in [0, 2**31)."""
    key = (seed, "guide", request.example.id, request.prefix, request.sample_index)
    return int(noise.generator(*key).integers(2**31))


def _usage(usage: Any) -> dict[str, int]:
    counts = {name: getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")}
    return {name: count for name, count in counts.items() if isinstance(count, int) and count >= 0}
