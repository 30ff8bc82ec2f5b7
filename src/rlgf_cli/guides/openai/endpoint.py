"""An endpoint: its address, its price, its API key, and the connection to it."""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, TypeVar
from urllib.parse import urlsplit

from rlgf_cli.config.guide import Api, GuideConfig, base_url_problem
from rlgf_cli.errors import RlgfError, UserError, did_you_mean
from rlgf_cli.guides.openai import presets as aliases
from rlgf_cli.guides.openai.presets import Alias
from rlgf_cli.guides.openai.server_errors import ServerError
from rlgf_cli.ledger.meter import NANO

T = TypeVar("T")
OPENAI_URL = "https://api.openai.com/v1"


@dataclass(frozen=True)
class Endpoint:
    """The address of a model. ``alias`` has its price, context length and terms, where they are known."""

    model: str
    api: Api
    base_url: str
    alias: Alias | None

    @property
    def nano_usd_per_token(self) -> tuple[float, float] | None:
        """Price per token in and out, in billionths of a US dollar; None where none is known."""
        alias = self.alias
        if alias is None or alias.usd_per_million_input is None or alias.usd_per_million_output is None:
            return None
        return alias.usd_per_million_input * NANO / 1e6, alias.usd_per_million_output * NANO / 1e6

    def cost(self, prompt_tokens: int, completion_tokens: int) -> int | None:
        """The price of an answer, in billionths of a US dollar; None where none is known."""
        if (per := self.nano_usd_per_token) is None:
            return None
        return round(prompt_tokens * per[0] + completion_tokens * per[1])


def endpoint_of(config: GuideConfig) -> Endpoint:
    """The endpoint that a config names. URL: config, else alias, else OPENAI_BASE_URL, else OpenAI's own.

    Prices and context length of the config win over the alias's. Raises UserError for an unknown alias and an
    unusable URL.
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
    api = config.api or (alias.api if alias else "chat")
    own = {
        key: value
        for key in ("context_length", "usd_per_million_input", "usd_per_million_output", "batch_price", "licence")
        if (value := getattr(config, key)) is not None
    }
    if own:
        alias = (alias or Alias(name=config.name, model=model, batch_price=1.0)).model_copy(update=own)
    return Endpoint(model, api, url.rstrip("/"), alias)


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
        hint="export OPENAI_API_KEY=...; a server on this machine needs none: name it by --base-url or OPENAI_BASE_URL",
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


_VERSION = re.compile(r"[@:].+|[-_]v?\d[\w.-]*|[-_](latest|preview)")


def same_model(requested: str, reported: str) -> bool:
    """Whether the name that a server reports stands for the requested model.

    Folders in front, a revision, a tag or a version behind may differ: ``gpt-4o`` may come as
    ``gpt-4o-2024-08-06``, never as ``gpt-4o-mini``.
    """
    requested, reported = (name.lower().rstrip("/").rpartition("/")[2] for name in (requested, reported))
    rest = reported.removeprefix(requested)
    return not rest or (rest != reported and _VERSION.fullmatch(rest) is not None)


class Connection:
    """The ``openai`` client of an endpoint, in an event loop of its own thread, so that connections outlive a call.

    ``errors`` is the ``openai`` module, for its exceptions; ``create`` sends a request and gives the raw response.
    """

    def __init__(self, endpoint: Endpoint, *, timeout_s: float) -> None:
        self._key = api_key(endpoint.base_url)
        import openai

        self._base_url = endpoint.base_url
        self.errors = openai
        self.client = openai.AsyncOpenAI(
            api_key=self._key, base_url=endpoint.base_url, timeout=timeout_s, max_retries=0
        )
        completions = self.client.completions if endpoint.api == "completion" else self.client.chat.completions
        self.create: Any = completions.with_raw_response.create
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rlgf-guide", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of the client's, and wait for it; the server's errors are raised as RlgfError."""
        try:
            return self.submit(work).result()
        except self.errors.APIError as error:
            raise RlgfError(
                f"{self._base_url}: {self.first_line(error)}", hint="run the same command with --resume"
            ) from None

    def status_error(self, error: ServerError, response: Any) -> Exception:
        """The error of a response with status 200, as the client raises one with the error's own status."""
        made = self.errors.APIStatusError(error.message, response=response.http_response, body=dict(error.body))
        made.status_code = error.status
        return made

    def first_line(self, error: BaseException) -> str:
        """The first line of an error's message, without the key, which servers like to quote."""
        text = str(error)
        body = getattr(error, "body", None)
        if isinstance(body, dict) and not body.get("message") and body.get("detail"):
            text = f"{text} - {body['detail']}"  # FastAPI's shape of an error, not OpenAI's
        if len(self._key) >= 8:  # a placeholder is too short to be searched for
            text = text.replace(self._key, "***")
        lines = text.strip().splitlines()
        return lines[0][:200] if lines else type(error).__name__

    def close(self) -> None:
        """Cancel the requests in flight, close the client, and end the thread."""
        self.submit(self._wind_down()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _wind_down(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.client.close()
