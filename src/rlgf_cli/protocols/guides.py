"""Guides: the base class, requests and completions."""

from __future__ import annotations

import itertools
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlgf_cli.errors import UserError
from rlgf_cli.protocols.data import Example
from rlgf_cli.protocols.messages import transcript

FinishReason = Literal["stop", "length"]
"""``stop``: the author ended the text (it gets an EOS); ``length``: it ran out of tokens (it does not)."""


@dataclass(frozen=True)
class Completion:
    """A guide's text after ``prompt + prefix``: the continuation only, without the prefix.

    ``model`` is the model as the server reported it; empty: it reported none. ``usage`` counts tokens
    (``prompt_tokens``, ``completion_tokens``) where they are known. ``nano_usd`` is the price at which the text was
    bought, in billionths of a US dollar; None: not known. ``seconds`` is how long the guide took, ``created`` when the
    text was written (UTC, ISO 8601). ``repaired`` names the repairs of the text, and ``raw`` is the text before them.
    ``cached``: the text is from the cache, and nothing was paid for it now.
    """

    text: str
    finish_reason: FinishReason
    model: str
    usage: Mapping[str, int] = field(default_factory=dict)
    nano_usd: int | None = None
    seconds: float | None = None
    created: str = ""
    repaired: tuple[str, ...] = ()
    raw: str | None = None
    cached: bool = False


@dataclass(frozen=True)
class GuideRequest:
    """A request for one text of a guide.

    ``prefix`` is what the policy has already written (empty: the guide writes it all);
    ``max_new_tokens`` counts what may still be written after the prefix. ``sample_index`` tells several
    requests for the same text apart: equal requests with equal indices may be answered with one text.
    """

    example: Example
    prefix: str = ""
    sample_index: int = 0
    max_new_tokens: int = 64


@dataclass(frozen=True)
class Failure:
    """A request that brought no text.

    Failures are counted by ``kind``; ``message`` holds no API key; ``final``: another request would not help. ``model``
    and ``usage`` are those of an answer without a usable text, where the server sent them.
    """

    kind: str
    message: str
    final: bool = False
    model: str = ""
    usage: Mapping[str, int] = field(default_factory=dict)

    @property
    def refused(self) -> bool:
        """Whether the model chose not to answer, or the server's filter kept the answer back."""
        return self.kind in ("refusal", "content_filter")

    @property
    def settled(self) -> bool:
        """Whether the request counts as answered, without a text. A later session would fare no better, or as badly as
        with the answers that could not be read in all attempts of this one."""
        return self.final or self.refused or self.kind == "malformed"


@dataclass(frozen=True)
class Answer:
    """The outcome of the ``index``-th request of a stream."""

    index: int
    request: GuideRequest
    outcome: Completion | Failure


@dataclass(frozen=True)
class GuideAbilities:
    """``live``: answers new requests. ``continues``: can go on from a prefix it did not write. ``remote``: it
    writes elsewhere, so that this process can do something else meanwhile. ``at_once``: how many texts it
    writes at a time.
    """

    live: bool
    continues: bool
    remote: bool = False
    at_once: int = 1


class Guide(ABC):
    """A stronger text generator that only ever gives text: the base class of all guides, builtin or not.

    A subclass must have :meth:`complete`; every other method has a default, that of a guide which costs nothing, keeps
    no text and no account. A guide of another package is registered under the entry-point group ``rlgf.guides`` and
    made by ``Kind(config, seed=seed)`` from the ``guide`` section of a config. ``guides.base.LiveGuide`` is the base
    class of guides with a cache and an account.
    """

    name: str
    abilities: GuideAbilities
    tokenizer: Any = None
    """A local checkpoint's tokenizer: a policy with the same one may be cut inside a word."""
    device: str | None = None
    """The device of a local model."""
    licence: str | None = None
    """A note on the terms of the texts."""
    notes: Sequence[str] = ()
    """Lines that a command says first, such as how a local checkpoint reads its prompts."""
    default_mode: Literal["live", "record", "replay"] = "live"
    mode: Literal["live", "record", "replay"] = "live"
    """``live`` requests every text, ``record`` stores the texts in the cache, ``replay`` only reads the cache."""
    has_price: bool = False
    """Whether the price of a request is known, so that a cap in US dollars can be held."""
    nano_usd_per_token: tuple[float, float] | None = None
    """Price per token in and out, in billionths of a US dollar."""
    batch_price: float = 1.0
    """The share of the price that a request in a batch costs."""

    def __init__(self, name: str, abilities: GuideAbilities) -> None:
        self.name, self.abilities = name, abilities
        self.counts: Counter[str] = Counter()
        """Repairs of the texts, and texts that were not used, by kind."""
        self.models: Counter[str] = Counter()
        """Texts by the model that the server reported."""
        self.settings: dict[str, Any] = {}
        """The settings that decide a text: the manifest has them, and a collection is only resumed under equal ones."""
        self.notify: Callable[[str], None] = lambda text: None
        """Called with a message for the user."""

    @classmethod
    def describe(cls, config: Any) -> GuideAbilities:
        """The abilities of such a guide; no model is loaded, no server called. Raises UserError for a bad config."""
        return GuideAbilities(live=True, continues=True)

    # texts

    @abstractmethod
    def complete(self, requests: Sequence[GuideRequest]) -> list[Completion]:
        """One completion per request, in order. Raises instead of returning less."""

    def attempt(self, requests: Sequence[GuideRequest]) -> list[Completion | None]:
        """As :meth:`complete`, with None for a request that failed alone, such as one that the model refused."""
        return list(self.complete(requests))

    def stream(self, requests: Iterable[GuideRequest]) -> Generator[Answer, None, None]:
        """Answers as they arrive, in any order; a request that fails alone is answered with a :class:`Failure`.

        Requests are drawn only as fast as they can be answered.
        """
        source = enumerate(requests)
        while window := list(itertools.islice(source, self.abilities.at_once)):
            completions = self.complete([request for _, request in window])
            for (index, request), completion in zip(window, completions, strict=True):
                yield Answer(index, request, completion)

    def samples(self, example: Example) -> list[Completion]:
        """The whole texts that a recorded guide has for an example, by sample index."""
        return []

    def check(self, examples: Iterable[Example], max_new_tokens: int) -> None:  # noqa: B027 - nothing to check is fine
        """Refuse prompts that could not be answered, before a request is paid for. Raises UserError."""

    def close(self) -> None:  # noqa: B027 - most guides hold nothing
        """Give back connections, threads and files."""

    # cache

    def cached(self, requests: Sequence[GuideRequest]) -> list[bool]:
        """For each request, whether the cache answers it."""
        return [False] * len(requests)

    def stored(self, requests: Iterable[GuideRequest]) -> Generator[Answer, None, None]:
        """As :meth:`stream`, but no request is sent: one that the cache does not answer is a failure."""
        for index, request in enumerate(requests):
            yield Answer(index, request, Failure("not_answered", "this guide keeps no texts", final=True))

    # money

    def check_budget(self, budget: Any) -> None:
        """Refuse a cap (a ``BudgetConfig``) that cannot be held. Raises UserError."""
        if budget.max_cost_usd is not None or budget.max_calls is not None:
            raise UserError(
                f"the guide {self.name} keeps no account, so it cannot keep to a cap",
                hint="leave --max-cost-usd and --max-calls out, or derive the guide from guides.base.LiveGuide",
            )

    def charge_to(
        self, run: str, budget: Any = None, spend: Mapping[str, Any] | None = None, *, shared: bool = False
    ) -> None:
        """Charge the account of ``run`` from now on, and keep to the caps of ``budget``.

        ``spend``: the charges of earlier sessions, from the run's manifest. ``shared``: other guides or processes
        charge the same account.
        """
        if budget is not None:
            self.check_budget(budget)

    def keep_account(self, path: Path) -> None:  # noqa: B027 - there is no account
        """Write the account of the run to this file of its folder too, with every charge, and take over what an earlier
        session wrote there."""

    def spend(self) -> dict[str, Any]:
        """The run's charges so far, in the form of its manifest."""
        return {
            "calls": 0,
            "cached": 0,
            "usage": {"prompt_tokens": 0, "completion_tokens": 0},
            "charged_usd": None,
            "unknown_outcome": 0,
            "unpriced": 0,
        }

    def has_texts(self) -> None:  # noqa: B027 - most guides do not ask
        """Note that an earlier session has texts of this guide: it works, and some answers without a text are no
        reason to stop."""

    def add_cached(self, texts: int) -> None:  # noqa: B027 - without a cache there are none
        """Count texts that another process took from the cache."""

    def provenance(self) -> dict[str, Any]:
        """The origin of the texts, for manifests and model cards."""
        return {"guide": self.name, "mode": self.mode, "models": dict(self.models), "licence": self.licence}

    # estimates

    def prompt_bytes(self, request: GuideRequest) -> int:
        """The size of what a request sends, in UTF-8."""
        return len((transcript(request.example.given) + request.prefix).encode())

    def answer_tokens(self, request: GuideRequest) -> int:
        """The most tokens that an answer can have, reasoning included."""
        return request.max_new_tokens

    def rates(self) -> tuple[float | None, float | None]:
        """Limits in requests and in tokens per minute, where they are known."""
        return None, None

    def history(self) -> list[tuple[int, int | None, int | None, float | None]]:
        """``(prompt bytes, prompt tokens, completion tokens, seconds)`` of the guide's newest texts in the cache."""
        return []

    # batches

    def check_batch(self) -> None:
        """Refuse ``--batch`` where the guide has no batch API, or does not store the texts of a batch."""
        raise UserError("--batch is for endpoints; a local checkpoint has no batch API")

    def run_batch(self, requests: Iterator[GuideRequest], stop: threading.Event) -> None:
        """Send the requests that the cache does not answer as a batch, and wait for it until ``stop`` is set."""
        self.check_batch()

    def refuse_open_batches(self, run: str) -> None:  # noqa: B027 - without a batch API there are none
        """Refuse to drop a run whose batches are not collected yet: they are paid for. Raises UserError."""
