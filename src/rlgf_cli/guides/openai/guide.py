"""Any OpenAI-compatible endpoint as guide: ``openai:MODEL`` or an alias."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlgf_cli.artifacts.rundir import now
from rlgf_cli.config.guide import GuideConfig
from rlgf_cli.errors import UserError
from rlgf_cli.guides.base import LiveGuide
from rlgf_cli.guides.cleanup import clean_text
from rlgf_cli.guides.conversation import adds_turns
from rlgf_cli.guides.openai import batch
from rlgf_cli.guides.openai.bounds import CallBounds
from rlgf_cli.guides.openai.concurrency import Concurrency
from rlgf_cli.guides.openai.connection import Connection, TooLarge
from rlgf_cli.guides.openai.endpoint import endpoint_of, same_model
from rlgf_cli.guides.openai.rate_limits import RateLimiter, Unreached, back_off, pause, retry_after
from rlgf_cli.guides.openai.request import (
    RequestBuilder,
    check_request,
    hint_of_refusal,
    likely_tokens,
    prompt_bytes,
)
from rlgf_cli.guides.openai.response import Read, oversized, read_response
from rlgf_cli.guides.openai.server_errors import error_in
from rlgf_cli.guides.openai.status import UNUSABLE, meaning
from rlgf_cli.guides.stream import Outcome, Unusable
from rlgf_cli.ledger.batch_jobs import BatchJobs
from rlgf_cli.ledger.meter import Meter
from rlgf_cli.ledger.store import StoredText
from rlgf_cli.protocols import Completion, Example, Failure, GuideAbilities, GuideRequest

if TYPE_CHECKING:
    import openai

_WRONG_AT_FIRST = 3
"""Answers by another model before any by the right one: the address or the name is wrong."""
_REFUSED_AT_FIRST = 10
"""Requests refused by status before any was answered: the prompts are not the reason."""
_NEVER_CONNECTED = {"ConnectError", "ConnectTimeout"}
_NEVER_SENT = {*_NEVER_CONNECTED, "PoolTimeout"}


class _Failed(Exception):
    """An attempt without a usable text. ``blame``: it uses up a retry; ``wait``: seconds before the next attempt."""

    def __init__(self, failure: Failure, *, blame: bool = True, wait: float | None = None) -> None:
        self.failure, self.blame, self.wait = failure, blame, wait


class OpenAIGuide(LiveGuide):
    """One request per text, at most ``concurrency`` at once, through the asynchronous ``openai`` client.

    Each attempt is charged before it is sent. The charge is refunded where the server refused the request with a
    status, or never received it; an answer is charged at its price; any other charge stands. A 429 waits and tries
    again as often as ``deadline_s`` allows; 5xx, timeouts, broken connections and unreadable answers are tried again
    ``max_retries`` times. After that the request is a :class:`Failure`. What no request could survive is raised: a
    spent budget, an outage, and what :data:`~rlgf_cli.guides.openai.status.UNUSABLE` lists.
    """

    default_mode = "record"

    def __init__(self, config: GuideConfig, *, seed: int) -> None:
        super().__init__(config, seed=seed)
        self.endpoint = endpoint_of(config)
        self._config = config
        self.builder = RequestBuilder(self.endpoint, config, seed)
        self.limit_key: str = self.endpoint.limit_key
        self._succeeded = False
        self._wrong = self._refusals = 0
        self._ended: Unusable | None = None
        self.batch_poll_s = config.batch_poll_s
        alias = self.endpoint.alias
        self.licence = config.licence or (alias.licence if alias else None)
        self.nano_usd_per_token = self.endpoint.nano_usd_per_token
        self.has_price = self.nano_usd_per_token is not None
        self.batch_price = alias.batch_price if alias else 1.0
        self.lease_s = config.deadline_s + config.outage_limit_s + config.timeout_s
        self.settings.update(model=self.endpoint.model, api=self.endpoint.api)
        self._connection: Connection | None = None
        if self.mode != "replay":
            self._connect()

    def _connect(self) -> None:
        config = self._config
        self._connection = Connection(self.endpoint, timeout_s=config.timeout_s, headers=config.headers)
        self._limiter = RateLimiter(
            requests_per_minute=self._config.requests_per_minute,
            tokens_per_minute=self._config.tokens_per_minute,
            outage_limit=self._config.outage_limit_s,
            notify=lambda text: self.notify(text),
        )
        self._places = Concurrency(config.concurrency, config.timeout_s, lambda text: self.notify(text))
        self._bounds = CallBounds(lambda: self.meter, lambda text: self.notify(text))

    @property
    def connection(self) -> Connection:
        assert self._connection is not None
        return self._connection

    @classmethod
    def describe(cls, config: GuideConfig) -> GuideAbilities:
        endpoint = endpoint_of(config)
        check_request(config, endpoint)
        templated = endpoint.api == "chat" and config.continuation == "template"
        continues = not templated or config.continue_template is not None
        return GuideAbilities(live=True, continues=continues, remote=True, at_once=config.concurrency)

    def check(self, examples: Iterable[Example], max_new_tokens: int) -> None:
        alias = self.endpoint.alias
        limit = max_new_tokens + self._config.reasoning_tokens
        if alias and alias.context_length is not None and limit >= alias.context_length:
            with_reasoning = " and guide.reasoning_tokens" if limit > max_new_tokens else ""
            raise UserError(
                f"max_new_tokens{with_reasoning} is {limit}, and {self.name} takes {alias.context_length} in all",
                hint="lower --max-new-tokens",
            )
        if self.endpoint.api == "completion":
            for example in examples:
                if example.messages or adds_turns(self._config):
                    self._check_text(example)

    def _check_text(self, example: Example) -> None:
        try:
            self.builder.prompt(GuideRequest(example))
        except UserError as error:
            raise UserError(error.message, where=f"example {example.id!r}", hint=error.hint) from None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        super().close()

    def identity(self) -> dict[str, Any]:
        return self.builder.identity()

    def request_fields(self, request: GuideRequest) -> dict[str, Any]:
        return self.builder.fields(request)

    def provenance(self) -> dict[str, Any]:
        alias = self.endpoint.alias
        return {
            **super().provenance(),
            "base_url": self.endpoint.base_url,
            "provider": self.endpoint.provider.name if self.endpoint.provider else None,
            "model": self.endpoint.model,
            "usd_per_million": [alias.usd_per_million_input, alias.usd_per_million_output] if alias else None,
            "price_noted": str(alias.noted) if alias and alias.noted else None,
        }

    def prompt_bytes(self, request: GuideRequest) -> int:
        return prompt_bytes(self.builder.prompt(request))

    def max_price(self, request: GuideRequest) -> int | None:
        """The most that an answer can cost, in billionths of a US dollar; None where no price is known."""
        # no tokenizer makes more tokens than the text has bytes
        return self.endpoint.cost(self.prompt_bytes(request), self.answer_tokens(request))

    def answer_tokens(self, request: GuideRequest) -> int:
        return self.builder.limit(request)

    def rates(self) -> tuple[float | None, float | None]:
        if self._connection is None:
            return self._config.requests_per_minute, self._config.tokens_per_minute
        return self._limiter.requests.rate, self._limiter.tokens.rate

    def check_batch(self) -> None:
        if self.mode != "record":
            raise UserError(f"--batch hands its texts over through the cache, and guide.mode is {self.mode}")

    def run_batch(self, requests: Iterator[GuideRequest], stop: threading.Event) -> None:
        self.check_batch()
        batch.run(self, requests, stop)

    def refuse_open_batches(self, run: str) -> None:
        if BatchJobs(Meter(self.store, run)).open():
            raise UserError(
                "a batch of this file is not collected yet, and its texts are paid for",
                hint="--batch --resume collects it; another -o leaves it alone",
            )

    # requests

    def submit(self, request: GuideRequest, key: bytes | None) -> Future[Outcome]:
        if self._connection is None:
            raise self.missed(request)
        return self._connection.submit(self._request(request, key))

    async def _request(self, request: GuideRequest, key: bytes | None) -> Outcome:
        """Attempts, until a completion, a failure that is final, or the last retry."""
        config = self._config
        retries, spent = 0, 0.0
        tokens = likely_tokens(self.builder.prompt(request), self.builder.limit(request))
        while True:
            async with self._places:
                probing = await self._limiter.enter(tokens)
                began = time.monotonic()
                try:
                    if self._ended is not None:
                        raise self._ended
                    return await self._attempt(request, key, first=not retries)
                except _Failed as error:
                    failed, failure = error, error.failure
                finally:
                    if probing:
                        self._limiter.left()
            retries += failed.blame
            if failure.final or retries > config.max_retries:
                return failure
            wait = failed.wait if failed.wait is not None else back_off(max(0, retries - 1), 30.0)
            spent += time.monotonic() - began + wait
            if spent > config.deadline_s:
                why = f"no answer within guide.deadline_s ({config.deadline_s:g} s); the last: {failure.message}"
                return Failure(failure.kind, why)
            if not self._limiter.down:  # the limiter does the waiting for a server that is down
                await pause(self._limiter.until_given_up(wait))

    async def _attempt(self, request: GuideRequest, key: bytes | None, *, first: bool) -> Completion:
        """One call: charged, sent, and settled by what the server returned. Raises _Failed."""
        body, limit = self.builder.body(request), self.builder.limit(request)
        price = self.endpoint.cost(prompt_bytes(body), limit)
        call = await self._bounds.reserve(price or 0)
        try:
            began = time.monotonic()
            response = await self._send(body, limit, call, first=first)
            return self._settle(request, key, call, price, response, seconds=time.monotonic() - began)
        finally:
            self._bounds.ended(call)

    def _settle(
        self, request: GuideRequest, key: bytes | None, call: int, price: int | None, response: Any, *, seconds: float
    ) -> Completion:
        """The completion in a response, charged at its price. Raises _Failed where it has no usable text."""
        meter, limit, size = self.meter, self.builder.limit(request), self.prompt_bytes(request)
        read = read_response(response.content, self.endpoint.api, limit)
        usage = read.outcome.usage
        known = len(usage) == 2
        likely = likely_tokens(self.builder.prompt(request), limit)
        self._limiter.answered(response.headers, likely - sum(usage.values()) if known else 0.0)
        self._places.answered(seconds)
        # an answer is charged at its price, usable or not; without usage at the bound
        amount = self.endpoint.cost(**usage) if known else None if price is None else self._bounds.of(price)
        self._bounds.answered(call, amount)
        try:
            outcome = self.accept(read, seconds=round(seconds, 3))
        except UserError:
            meter.settle(call, amount, usage)
            raise
        if isinstance(outcome, Failure):
            if known or outcome.final:  # an answer that cannot be read may be half of one
                meter.settle(call, amount, usage)
            self.first_answers.add(self.name, outcome)
            raise _Failed(outcome)
        stored = StoredText.of(self.name, self.request_json(request), size, outcome)
        meter.settle(call, amount, usage, [(key, stored)] if key is not None else [])
        self.first_answers.add(self.name, self.without_thinking(outcome))
        return outcome

    async def _send(self, body: dict[str, Any], limit: int, call: int, *, first: bool) -> Any:
        """The server's response. Raises _Failed where there is none, with the charge refunded if nothing was sent."""
        connection, limiter, timeout_s = self.connection, self._limiter, self._config.timeout_s
        errors, limit_key, began = connection.errors, self.limit_key, time.monotonic()
        try:
            response = await asyncio.wait_for(connection.create(**body, **{limit_key: limit}), timeout_s)
            if (within := error_in(response.content)) is not None and not within.begun:
                raise connection.status_error(within, response)
            return response
        except TooLarge:
            raise _Failed(oversized("more bytes than are read of an answer")) from None
        except errors.APIStatusError as error:
            self.meter.refund(call)
            raise self._refused(error, limit_key, first=first, sent=began) from None
        except (errors.APITimeoutError, asyncio.TimeoutError, errors.APIConnectionError) as error:
            cause_kind = type(error.__cause__).__name__
            if cause_kind in _NEVER_SENT:
                self.meter.refund(call)
            if isinstance(error, errors.APITimeoutError | asyncio.TimeoutError):
                kind, why = "timeout", f"no answer within {timeout_s:g} s"
            else:
                cause = f" ({connection.first_line(error.__cause__)})" if error.__cause__ else ""
                kind, why = "connection", f"no answer from {self.endpoint.base_url}{cause}"
            try:
                blame = limiter.failed(why, sent=began, connected=cause_kind not in _NEVER_CONNECTED)
            except Unreached:
                hint = "check the base URL (--base-url or OPENAI_BASE_URL), its port, and that the server is up"
                raise self.unusable(why, hint) from None
            if kind == "timeout" and self._places.timed_out(began):
                blame = False
            raise _Failed(Failure(kind, why), blame=blame) from None
        except errors.APIError as error:
            why = f"the answer cannot be read ({connection.first_line(error)})"
            raise _Failed(Failure("malformed", why)) from None

    def _refused(self, error: openai.APIStatusError, limit_key: str, *, first: bool, sent: float) -> Exception:
        """What a status means: a :class:`_Failed`, or an :class:`Unusable` where no other request could fare better."""
        status, why, limiter = error.status_code, self.connection.first_line(error), self._limiter
        message, headers = f"status {status}: {why}", error.response.headers
        means = meaning(status, error.body, succeeded=self._succeeded)
        if means == "limited":
            return _Failed(Failure("rate_limit", message), blame=False, wait=limiter.limited(headers, message))
        if means == "server":
            # a request that one prompt breaks (500 each time) is no outage, however often it is tried
            blame = limiter.failed(message, counts=first or status != 500, sent=sent)
            return _Failed(Failure("server", message), blame=blame, wait=retry_after(headers))
        limiter.answered(headers)
        if means == "again":
            return _Failed(Failure("refused", message))
        if means == "filtered":
            return _Failed(Failure("content_filter", f"the prompt was filtered: {message}", final=True))
        if status == 400 and limit_key == "max_tokens" and "max_completion_tokens" in why:
            # newer chat models refuse max_tokens by that name; older servers know no other
            self.limit_key = "max_completion_tokens"
            return _Failed(Failure("refused", message), blame=False, wait=0.0)
        if means in UNUSABLE:
            text, hint = UNUSABLE[means]
            endpoint, key = self.endpoint, self.connection.key_variable or "guide.api_key_env"
            return self.unusable(
                text.format(url=endpoint.base_url, model=endpoint.model, why=why), hint.format(key=key)
            )
        self._refusals += 1
        if not self._succeeded and self._refusals >= _REFUSED_AT_FIRST:
            return self.unusable(
                f"{self.endpoint.base_url} has refused all of the first {self._refusals} requests ({why})",
                hint_of_refusal(why),
            )
        return _Failed(Failure("refused", message, final=True))

    def unusable(self, message: str, hint: str) -> Unusable:
        """The error for an endpoint that can answer no request; those that still wait end with it."""
        self._ended = Unusable(message, hint=hint)
        return self._ended

    # completions

    def accept(self, read: Read, *, seconds: float | None = None, price_share: float = 1.0) -> Outcome:
        """The completion with its price and time; a failure where its text is unusable or by another model."""
        outcome = read.outcome
        for kind, message in read.notes:
            self.counts[kind] += 1
            if self.counts[kind] == 1:
                self.notify(message)
        if isinstance(outcome, Failure) and not outcome.model:
            return outcome
        if failure := self._other_model(outcome.model):
            return failure
        if isinstance(outcome, Failure):
            return outcome
        text = outcome.text.encode("utf-8", "ignore").decode()
        if text != outcome.text:
            self.counts["half_characters_removed"] += 1  # JSON can hold half of a surrogate pair; no file can
        self._succeeded = True
        cost = self.endpoint.cost(**outcome.usage) if len(outcome.usage) == 2 else None
        nano_usd = None if cost is None else round(cost * price_share)
        return replace(outcome, text=text, nano_usd=nano_usd, seconds=seconds, created=now())

    def _other_model(self, model: str) -> Failure | None:
        """A failure where the server reports another model than the requested one."""
        if not model:
            self.counts["model_not_reported"] += 1
            return None
        if same_model(self.endpoint.model, model) or model in self._config.accept_models:
            return None
        message = f"the answer is by {model!r}, and {self.endpoint.model!r} was asked for"
        self._wrong += 1
        if not self._succeeded and self._wrong >= _WRONG_AT_FIRST:
            raise UserError(
                f"{self.endpoint.base_url}: {message}",
                hint=f"name that model, or accept it: --set 'guide.accept_models=[{model}]'",
            )
        return Failure("wrong_model", message)

    def clean(self, request: GuideRequest, completion: Completion) -> Completion:
        chat, clean = self.endpoint.api == "chat", self._config.clean
        written = completion.text
        if self.builder.echoes:  # before stop texts are looked for: the partial text may hold one
            written = written.removeprefix(request.prefix)
        text, finish, repaired = clean_text(
            written,
            prefix=request.prefix,
            stops=self._config.sampling.stop,
            finish=completion.finish_reason,
            chat=chat,
            chatter=chat and (clean == "all" or (clean == "continuation" and bool(request.prefix))),
            thinking=clean != "none",
            begun=self.builder.prefill_style is not None,
        )
        return replace(completion, text=text, finish_reason=finish, repaired=repaired)
