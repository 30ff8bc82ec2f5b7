"""Any OpenAI-compatible endpoint as guide: ``openai:MODEL`` or an alias."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlgf_cli.config.guide import GuideConfig
from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.guides.base import LiveGuide
from rlgf_cli.guides.cleanup import mend
from rlgf_cli.guides.openai.endpoint import OPENAI_URL, LoopThread, T, api_key, endpoint_of, same_model
from rlgf_cli.guides.openai.rate_limits import Gate, back_off, retry_after
from rlgf_cli.guides.openai.request import Wording, likely_tokens, prompt_bytes
from rlgf_cli.guides.openai.response import Reply, read_reply
from rlgf_cli.ledger.batches import Orders
from rlgf_cli.ledger.meter import Meter
from rlgf_cli.ledger.store import Text
from rlgf_cli.protocols import Completion, Example, Failure, GuideAbilities, GuideRequest

if TYPE_CHECKING:
    import openai

_WRONG_AT_FIRST = 3
"""Answers by another model before any by the right one: the address or the name is wrong."""
_REFUSED_AT_FIRST = 10
"""Requests refused by status before any was answered: it is not the prompts' fault."""
_NEVER_SENT = {"ConnectError", "ConnectTimeout", "PoolTimeout"}


@dataclass
class _Attempt:
    """What one call came to. ``blame``: the failure uses up a retry; ``wait``: seconds before the next one."""

    outcome: Text | Failure
    blame: bool = True
    wait: float | None = None


class OpenAIGuide(LiveGuide):
    """One request per text, at most ``concurrency`` at once, through the asynchronous ``openai`` client.

    Each attempt is charged before it is sent. What the server refused with a status, or never received, is
    taken back; what came whole is put at its price; all else stays charged. A 429 waits and tries again as
    often as ``deadline_s`` allows; 5xx, timeouts, broken connections and unreadable answers are tried again
    ``max_retries`` times. What remains is a :class:`Failure`, but for what no request could survive: a refused
    key, a spent quota or budget, an outage, and, before anything has succeeded, a model or address that is not
    there; those are raised.
    """

    default_mode = "record"

    def __init__(self, config: GuideConfig, *, seed: int) -> None:
        super().__init__(config, seed=seed)
        self.endpoint = endpoint_of(config)
        self._config = config
        self.wording = Wording(self.endpoint, config, seed)
        # OpenAI's newer models refuse max_tokens by that name; other servers may know no other
        own = self.endpoint.base_url == OPENAI_URL and self.endpoint.api == "chat"
        self.limit_key = "max_completion_tokens" if own else "max_tokens"
        self._succeeded = False
        self._wrong = self._refusals = 0
        self.batch_poll_s = config.batch_poll_s
        self._overrun = 1.0
        self._client: openai.AsyncOpenAI | None = None
        self.licence = config.licence or (self.endpoint.alias.licence if self.endpoint.alias else None)
        self.nano_usd_per_token = self.endpoint.per_token
        self.has_price = self.nano_usd_per_token is not None
        self.batch_price = self.endpoint.alias.batch_price if self.endpoint.alias else 1.0
        self.lease_s = config.deadline_s + config.outage_limit_s + config.timeout_s
        self.settings.update(model=self.endpoint.model, api=self.endpoint.api)
        if self.mode != "replay":
            self._connect()

    def _connect(self) -> None:
        self._key = api_key(self.endpoint.base_url)
        import openai

        self._errors = openai
        self._client = openai.AsyncOpenAI(
            api_key=self._key, base_url=self.endpoint.base_url, timeout=self._config.timeout_s, max_retries=0
        )
        completions = self._client.completions if self.endpoint.api == "completion" else self._client.chat.completions
        self._create: Any = completions.with_raw_response.create
        self._gate = Gate(
            requests_per_minute=self._config.requests_per_minute,
            tokens_per_minute=self._config.tokens_per_minute,
            outage_limit=self._config.outage_limit_s,
            notify=lambda text: self.notify(text),
        )
        self._room = asyncio.Semaphore(self._config.concurrency)
        self._in_flight = 0
        self._loop = LoopThread()

    @classmethod
    def describe(cls, config: GuideConfig) -> GuideAbilities:
        endpoint = endpoint_of(config)
        if config.sampling.num_beams > 1:
            raise UserError("guide.sampling.num_beams is for local checkpoints; an API has no beam search")
        continues = True
        if endpoint.api == "completion":
            if config.system is not None:
                raise UserError(
                    "guide.system is for chat APIs, and this guide uses the completion API",
                    hint="put the instruction into guide.prompt_template, or set guide.api to chat",
                )
        elif config.continuation == "template":
            continues = config.continue_template is not None
        return GuideAbilities(live=True, continues=continues, remote=True, at_once=config.concurrency)

    def check(self, examples: Iterable[Example], max_new_tokens: int) -> None:
        alias = self.endpoint.alias
        if alias and alias.context_length is not None and max_new_tokens >= alias.context_length:
            raise UserError(
                f"max_new_tokens is {max_new_tokens}, and {self.name} takes {alias.context_length} in all",
                hint="lower --max-new-tokens",
            )

    def close(self) -> None:
        if self._client is not None:
            self._loop.close(self._client.close())
            self._client = None
        super().close()

    def identity(self) -> dict[str, Any]:
        return self.wording.identity()

    def asked(self, request: GuideRequest) -> dict[str, Any]:
        return self.wording.asked(request)

    def provenance(self) -> dict[str, Any]:
        alias = self.endpoint.alias
        return {
            **super().provenance(),
            "base_url": self.endpoint.base_url,
            "model": self.endpoint.model,
            "usd_per_million": [alias.usd_per_million_input, alias.usd_per_million_output] if alias else None,
            "price_noted": str(alias.noted) if alias and alias.noted else None,
        }

    @property
    def client(self) -> openai.AsyncOpenAI:
        """The client; its coroutines are run by :meth:`call`."""
        assert self._client is not None
        return self._client

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of the client's in its loop; the server's errors come as RlgfError."""
        try:
            return self._loop.submit(work).result()
        except self._errors.APIError as error:
            raise RlgfError(
                f"{self.endpoint.base_url}: {self.said(error)}", hint="run the same command with --resume"
            ) from None

    def prompt_bytes(self, request: GuideRequest) -> int:
        return prompt_bytes(self.wording.text(request))

    def check_batch(self) -> None:
        if self.mode != "record":
            raise UserError(f"--batch hands its texts over through the cache, and guide.mode is {self.mode}")

    def run_batch(self, requests: Iterator[GuideRequest], stop: threading.Event) -> None:
        from rlgf_cli.guides.openai import batch

        self.check_batch()
        batch.run(self, requests, stop)

    def refuse_open_batches(self, run: str) -> None:
        if Orders(Meter(self.store, run)).open():
            raise UserError(
                "a batch of this file is not collected yet, and its texts are paid for",
                hint="--batch --resume collects it; another -o leaves it alone",
            )

    def rates(self) -> tuple[float | None, float | None]:
        if self._client is None:
            return self._config.requests_per_minute, self._config.tokens_per_minute
        return self._gate.requests.rate, self._gate.tokens.rate

    def price(self, request: GuideRequest) -> int | None:
        """The most that an answer can cost, in billionths of a US dollar; None where no price is known."""
        # no tokenizer makes more tokens than the text has bytes
        return self.endpoint.cost(self.prompt_bytes(request), request.max_new_tokens)

    # asking

    def submit(self, request: GuideRequest, key: bytes | None) -> Future[Text | Failure]:
        if self._client is None:
            raise self.missed(request)
        return self._loop.submit(self._ask(request, key))

    async def _ask(self, request: GuideRequest, key: bytes | None) -> Text | Failure:
        config = self._config
        retries, spent = 0, 0.0
        async with self._room:
            while True:
                probing = await self._gate.enter(likely_tokens(request, self.wording.text(request)))
                began = time.monotonic()
                try:
                    attempt = await self._attempt(request, key, first=not retries)
                finally:
                    if probing:
                        self._gate.left()
                outcome = attempt.outcome
                if isinstance(outcome, Text) or outcome.final:
                    return outcome
                if attempt.blame:
                    retries += 1
                if retries > config.max_retries:
                    return outcome
                wait = attempt.wait if attempt.wait is not None else back_off(max(0, retries - 1), 30.0)
                spent += time.monotonic() - began + wait
                if spent > config.deadline_s:
                    why = f"no answer within guide.deadline_s ({config.deadline_s:g} s); the last: {outcome.message}"
                    return Failure(outcome.kind, why)
                if not self._gate.down:  # the gate does the waiting for a server that is down
                    await asyncio.sleep(wait)

    async def _attempt(self, request: GuideRequest, key: bytes | None, *, first: bool) -> _Attempt:
        """One call: charged, sent, and put right by what became of it."""
        body = self.wording.body(request)
        price = self.endpoint.cost(prompt_bytes(body), request.max_new_tokens)
        reserved = round((price or 0) * self._overrun)
        call = await self._reserve(reserved)
        gate, errors, meter = self._gate, self._errors, self.meter
        self._in_flight += 1
        began = time.monotonic()
        try:
            limit_key = self.limit_key
            response = await asyncio.wait_for(
                self._create(**body, **{limit_key: request.max_new_tokens}), self._config.timeout_s
            )
            content, headers = response.content, response.headers
        except errors.APIStatusError as error:
            meter.refund(call)
            return self._refused(error, limit_key, first=first, sent=began)
        except (errors.APITimeoutError, asyncio.TimeoutError) as error:
            if type(error.__cause__).__name__ in _NEVER_SENT:
                meter.refund(call)
            why = f"no answer within {self._config.timeout_s:g} s"
            return _Attempt(Failure("timeout", why), blame=gate.failed(why, sent=began))
        except errors.APIConnectionError as error:
            if type(error.__cause__).__name__ in _NEVER_SENT:
                meter.refund(call)
            said = f" ({self.said(error.__cause__)})" if error.__cause__ else ""
            why = f"no answer from {self.endpoint.base_url}{said}"
            return _Attempt(Failure("connection", why), blame=gate.failed(why, sent=began))
        except errors.APIError as error:
            return _Attempt(Failure("malformed", f"the answer cannot be read ({self.said(error)})"))
        finally:
            self._in_flight -= 1
        reply = read_reply(content, self.endpoint.api)
        usage = reply.usage
        known = len(usage) == 2
        gate.answered(headers, likely_tokens(request, body) - sum(usage.values()) if known else 0.0)
        # what came is charged at its price whatever it is worth; without usage at the bound
        amount = self.endpoint.cost(**usage) if known else None if price is None else reserved
        if amount is not None and price:
            self._overrun = max(self._overrun, amount / price)
        try:
            outcome = self.text_in(
                reply, self.request_json(request), prompt_bytes(body), seconds=time.monotonic() - began
            )
        except UserError:
            meter.settle(call, amount, usage)
            raise
        if isinstance(outcome, Text) or known:
            meter.settle(call, amount, usage, [(key, outcome)] if key is not None and isinstance(outcome, Text) else [])
        return _Attempt(outcome)

    async def _reserve(self, amount: int) -> int:
        """Room in the budget; waits while calls that are under way may still give some back."""
        while (call := self.meter.reserve(amount)) is None:
            if not self._in_flight:
                raise self.meter.spent()
            await asyncio.sleep(0.02)
        return call

    def _refused(self, error: openai.APIStatusError, limit_key: str, *, first: bool, sent: float) -> _Attempt:
        """What a status comes to; raises UserError where no other request could fare better."""
        status, said, gate = error.status_code, self.said(error), self._gate
        failure = Failure("server" if status >= 500 else "refused", f"status {status}: {said}")
        if status == 429 and error.code != "insufficient_quota":
            wait = gate.limited(error.response.headers)
            return _Attempt(Failure("rate_limit", f"status 429: {said}"), blame=False, wait=wait)
        if status >= 500:
            # a request that one prompt breaks (500 each time) is no outage, however often it is tried
            blame = gate.failed(failure.message, counts=first or status != 500, sent=sent)
            return _Attempt(failure, blame=blame, wait=retry_after(error.response.headers))
        gate.answered(error.response.headers)
        if status in (408, 409):
            return _Attempt(failure)
        if status == 400 and limit_key == "max_tokens" and "max_completion_tokens" in said:
            # newer chat models refuse max_tokens by that name; older servers know no other
            self.limit_key = "max_completion_tokens"
            return _Attempt(failure, blame=False, wait=0.0)
        if status == 401:
            raise UserError(
                f"the endpoint {self.endpoint.base_url} refused the key ({said})",
                hint="check OPENAI_API_KEY, and that it belongs to this endpoint",
            ) from None
        if status == 429:
            raise UserError(f"the account's quota is spent ({said})", hint="check the plan and its billing") from None
        if status in (403, 404) and not self._succeeded:
            raise UserError(
                f"{self.endpoint.base_url} has no model {self.endpoint.model!r} for this key ({said})",
                hint="check the model's name, and that the base URL ends as the server wants (usually /v1)",
            ) from None
        self._refusals += 1
        if not self._succeeded and self._refusals >= _REFUSED_AT_FIRST:
            raise UserError(
                f"{self.endpoint.base_url} has refused all of the first {self._refusals} requests ({said})",
                hint="something that all requests have in common does not suit it: check the guide's settings",
            ) from None
        return _Attempt(Failure("refused", failure.message, final=True))

    # reading

    def text_in(
        self, reply: Reply, request: str, size: int, *, seconds: float | None = None, price_share: float = 1.0
    ) -> Text | Failure:
        """What a reply to ``request`` (as JSON, ``size`` bytes of prompt) is to be kept as."""
        if isinstance(reply.found, Failure) and reply.model is None:
            return reply.found
        if failure := self._other_model(reply.model):
            return failure
        if isinstance(reply.found, Failure):
            return reply.found
        text, reason = reply.found
        if (whole := text.encode("utf-8", "ignore").decode()) != text:
            self.counts["half_characters_removed"] += 1  # JSON can hold half of a surrogate pair; no file can
        self._succeeded = True
        cost = self.endpoint.cost(**reply.usage) if len(reply.usage) == 2 else None
        return Text(
            guide=self.name,
            request=request,
            text=whole,
            finish_reason=reason,
            model=reply.model or "",
            prompt_bytes=size,
            prompt_tokens=reply.usage.get("prompt_tokens"),
            completion_tokens=reply.usage.get("completion_tokens"),
            nano_usd=None if cost is None else round(cost * price_share),
            seconds=None if seconds is None else round(seconds, 3),
            created=int(time.time()),
        )

    def _other_model(self, model: str | None) -> Failure | None:
        """A failure where the server reports a model that was not asked for."""
        if model is None:
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

    def read(self, request: GuideRequest, text: Text) -> Completion:
        chat = self.endpoint.api == "chat"
        mended, finish, done = mend(
            text.text,
            prefix=request.prefix,
            stops=self._config.sampling.stop,
            finish=text.finish_reason,
            chat=chat,
            clean=chat
            and (self._config.clean == "all" or (self._config.clean == "continuation" and bool(request.prefix))),
        )
        return Completion(mended, finish, text.model, repaired=done)

    def said(self, error: BaseException) -> str:
        """The first line of an error, without the key, which servers like to quote."""
        text = str(error)
        body = getattr(error, "body", None)
        if isinstance(body, dict) and not body.get("message") and body.get("detail"):
            text = (
                f"{text} - {body['detail']}"  # not OpenAI's shape, but that of a framework many servers are made with
            )
        if len(self._key) >= 8:  # a placeholder is too short to be searched for
            text = text.replace(self._key, "***")
        lines = text.strip().splitlines()
        return lines[0][:200] if lines else type(error).__name__
