"""The connection to an endpoint: its HTTP client, the key and the headers that it sends."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar
from urllib.request import getproxies

from rlgf_cli.artifacts.secrets import filled
from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.guides.openai.endpoint import OPENAI_URL, Endpoint
from rlgf_cli.guides.openai.keys import api_key
from rlgf_cli.guides.openai.presets import host_of, is_loopback
from rlgf_cli.guides.openai.server_errors import ServerError

T = TypeVar("T")
MOST_BYTES = 2**24
"""Bytes of an answer: a larger one is not read to its end."""
_MOST_PACKED_BYTES = 2**18
"""Bytes of an answer that the server has compressed, unasked: they may unpack to a thousand times as many."""
CONNECT_S = 5.0
"""The longest time for making a connection."""
_ONLY_OPENAI = ("OpenAI-Organization", "OpenAI-Project")
"""Headers that the client makes of OPENAI_ORG_ID and OPENAI_PROJECT_ID: they are OpenAI's alone."""
_LONG_ENOUGH = 8
"""Characters from which on a text is looked for: a placeholder is too short."""


class TooLarge(Exception):
    """An answer has more bytes than any text within its limit of tokens can have."""


class CallFailed(RlgfError):
    """A call of the client's failed; ``passes``: it may succeed later (an outage, a spent account)."""

    def __init__(self, message: str, *, passes: bool) -> None:
        super().__init__(message, hint="run the same command with --resume")
        self.passes = passes


class Connection:
    """The ``openai`` client of an endpoint, in an event loop of its own thread, so that connections outlive a call.

    ``errors`` is the ``openai`` module, for its exceptions; ``create`` sends a request and gives the raw response.
    ``key_variable`` is the variable that the key was read from. ``headers`` are sent with every request.
    """

    def __init__(self, endpoint: Endpoint, *, timeout_s: float, headers: Mapping[str, str] | None = None) -> None:
        key, self.key_variable = api_key(endpoint)
        own = filled(headers or {})
        self._secrets = [text for text in (key, *own.values()) if len(text) >= _LONG_ENOUGH]
        import openai

        self._base_url = endpoint.base_url
        self.errors = openai
        self.client = openai.AsyncOpenAI(
            api_key=key,
            base_url=endpoint.base_url,
            timeout=openai.Timeout(timeout_s, connect=min(timeout_s, CONNECT_S)),
            max_retries=0,
            default_headers={"Accept-Encoding": "identity", **_withheld(endpoint, key, openai.Omit()), **own},
            http_client=_http_client(openai, endpoint),
        )
        completions = self.client.completions if endpoint.api == "completion" else self.client.chat.completions
        self._create: Any = completions.with_raw_response.create
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rlgf-guide", daemon=True)
        self._thread.start()

    async def create(self, **body: Any) -> Any:
        """Send a request. Raises TooLarge, and the client's errors."""
        try:
            return await self._create(**body)
        except self.errors.APIConnectionError as error:
            if isinstance(error.__cause__, TooLarge):  # some versions of the client wrap every exception
                raise error.__cause__ from None
            raise

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of the client's, and wait for it; the server's errors are raised as CallFailed."""
        try:
            return self.submit(work).result()
        except self.errors.APIError as error:
            status = getattr(error, "status_code", None)
            passes = status is None or status in (401, 402, 403, 408, 429) or status >= 500
            raise CallFailed(f"{self._base_url}: {self.first_line(error)}", passes=passes) from None

    def status_error(self, error: ServerError, response: Any) -> Exception:
        """The error of a response with status 200, as the client raises one with the error's own status."""
        made = self.errors.APIStatusError(error.message, response=response.http_response, body=dict(error.body))
        made.status_code = error.status
        return made

    def first_line(self, error: BaseException) -> str:
        """The first line of an error's message, without the key and the headers, which servers like to quote."""
        text = str(error)
        body = getattr(error, "body", None)
        if isinstance(body, dict) and not body.get("message") and body.get("detail"):
            text = f"{text} - {body['detail']}"  # FastAPI's shape of an error, not OpenAI's
        for secret in self._secrets:
            text = text.replace(secret, "***")
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


def _withheld(endpoint: Endpoint, key: str, omit: Any) -> dict[str, Any]:
    """Headers that take the place of those that the client would make of OpenAI's variables, for other hosts."""
    if host_of(endpoint.base_url) == host_of(OPENAI_URL):
        return {}
    lines = os.environ.get("OPENAI_CUSTOM_HEADERS", "").split("\n")
    custom = [name.strip() for name, colon, _ in (line.partition(":") for line in lines) if colon]
    withheld = {name: omit for name in (*_ONLY_OPENAI, *custom) if name.lower() != "authorization"}
    return {**withheld, "Authorization": f"Bearer {key}"}


async def _limit_size(response: Any) -> None:
    """Let the body of a completion end with TooLarge where it is too long; files of batches may be of any length."""
    if not response.request.url.path.endswith("/completions"):
        return
    most = _MOST_PACKED_BYTES if response.headers.get("content-encoding", "identity") != "identity" else MOST_BYTES
    if response.headers.get("content-length", "").isdigit() and int(response.headers["content-length"]) > most:
        raise TooLarge
    base = next(base for base in type(response.stream).__mro__ if base.__name__ == "AsyncByteStream")
    inner = response.stream

    async def read(_: Any) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in inner:
            size += len(chunk)
            if size > most:
                raise TooLarge
            yield chunk

    async def close(_: Any) -> None:
        await inner.aclose()

    # a class of the HTTP package that the client was made with: its name differs between versions
    response.stream = type("Limited", (base,), {"__aiter__": read, "aclose": close})()


def _http_client(openai: Any, endpoint: Endpoint) -> Any:
    """The client for HTTP: without a proxy to this machine, and without redirects, which would take the headers to a
    host that nobody named. Raises UserError for a proxy or a certificate that cannot be used."""
    host = host_of(endpoint.base_url)
    direct = {f"all://{f'[{host}]' if ':' in host else host}": None} if is_loopback(host) else None
    try:
        return openai.DefaultAsyncHttpxClient(
            follow_redirects=False, mounts=direct, event_hooks={"response": [_limit_size]}
        )
    except ImportError:
        raise UserError(
            f"the proxy of {_proxy_variables()} speaks SOCKS, and the package for it is not installed",
            hint="pip install socksio, or unset the variable",
        ) from None
    except ValueError:
        raise UserError(
            f"the proxy of {_proxy_variables()} is not a URL that can be used",
            hint="it looks like http://proxy:3128 or socks5://proxy:1080",
        ) from None
    except OSError as error:
        name = next((name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)), None)
        raise UserError(
            f"the certificates of {name or 'this machine'} cannot be read ({error.strerror or type(error).__name__})",
            where=os.environ[name] if name else None,
            hint="SSL_CERT_FILE names a file of certificates in PEM; unset it for those that come with certifi",
        ) from None


def _proxy_variables() -> str:
    """The environment variables that give a proxy."""
    names = [f"{scheme.upper()}_PROXY" for scheme in getproxies() if scheme != "no"]
    return " or ".join(names) or "the system"
