"""An endpoint: its address, its price, and the rules of its provider."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from rlgf_cli.config.guide import Api, GuideConfig, base_url_problem
from rlgf_cli.errors import UserError, did_you_mean
from rlgf_cli.guides.openai import presets
from rlgf_cli.guides.openai.presets import Alias, Provider, SamplingKey
from rlgf_cli.ledger.meter import NANO

OPENAI_URL = "https://api.openai.com/v1"


@dataclass(frozen=True)
class Endpoint:
    """The address of a model. ``alias`` has its price, context length and terms, where they are known; ``provider`` the
    rules of the server, None for an unknown one. ``api_key_env``: the variable that was named for the key."""

    model: str
    api: Api
    base_url: str
    alias: Alias | None
    provider: Provider | None = None
    api_key_env: str | None = None

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

    @property
    def limit_key(self) -> str:
        """The name of the limit of new tokens."""
        return self.provider.limit if self.provider and self.api == "chat" else "max_tokens"

    @property
    def refuses(self) -> frozenset[SamplingKey]:
        """Sampling keys that the model takes at their neutral value alone, or not at all."""
        return frozenset(
            (*(self.provider.refuses if self.provider else ()), *(self.alias.refuses if self.alias else ()))
        )

    @property
    def neutral(self) -> frozenset[SamplingKey]:
        """Sampling keys that are left out at their neutral value."""
        return self.refuses | frozenset(self.provider.neutral if self.provider else ())


def is_endpoint(name: str) -> bool:
    """Whether a guide of that name is a model behind an endpoint."""
    kind, colon, _ = name.partition(":")
    return (bool(colon) and kind in presets.providers()) or presets.find(name) is not None


def endpoint_of(config: GuideConfig) -> Endpoint:
    """The endpoint that a config names. URL: config, else alias, else the named provider's, else OPENAI_BASE_URL, else
    OpenAI's own.

    Provider: the config's, else that of the name, else that of the URL's host. Prices and context length of the config
    win over the alias's, whose price holds on its own host alone. Raises UserError for an unknown alias or provider,
    and for an unusable URL.
    """
    kind, colon, model = config.name.partition(":")
    known = presets.providers()
    prefixed = bool(colon) and kind in known
    alias = None if prefixed else presets.find(config.name)
    if not prefixed and alias is None:
        raise UserError(f"unknown guide {config.name!r}", hint=did_you_mean(config.name, presets.known()))
    model = alias.model if alias else model
    provider = _named_provider(config, kind if prefixed else None)
    own_url = config.base_url or (alias.base_url if alias else None)
    url = own_url or _provider_url(provider or _provider_of(alias), config)
    if problem := base_url_problem(url):
        raise UserError(f"{'base_url' if own_url else _source(provider)} {problem}")
    host = presets.host_of(url)
    if provider is None:
        provider = presets.provider_at(host) or (_provider_of(alias) if alias and alias.is_at(host) else None)
    if alias is None:
        alias = presets.find_at(model, host)  # another host's price is not known
    elif not alias.is_at(host):
        alias = alias.model_copy(update=_ELSEWHERE)
    api = config.api or (alias.api if alias else "chat")
    named = config.api_key_env or (alias.api_key_env if alias else None)
    own = {
        key: value
        for key in ("context_length", "usd_per_million_input", "usd_per_million_output", "batch_price", "licence")
        if (value := getattr(config, key)) is not None
    }
    if own:
        alias = (alias or Alias(name=config.name, model=model, batch_price=1.0)).model_copy(update=own)
    return Endpoint(model, api, url.rstrip("/"), alias, provider, named)


_ELSEWHERE = {
    "usd_per_million_input": None, "usd_per_million_output": None, "batch_price": 1.0, "noted": None, "licence": None,
    "api_key_env": None,
}  # fmt: skip
"""An alias's values on another host than its own."""


def _named_provider(config: GuideConfig, prefix: str | None) -> Provider | None:
    """The provider that ``guide.provider`` or the name's prefix names; ``openai:`` names none, for it is the prefix of
    every endpoint."""
    prefix = None if prefix == "openai" else prefix
    if config.provider is not None and prefix is not None and config.provider != prefix:
        raise UserError(
            f"two providers are named: {prefix!r} by the guide's name, and guide.provider {config.provider!r}",
            hint="leave guide.provider out",
        )
    name = config.provider or prefix
    return presets.provider(name) if name is not None else None


def _provider_of(alias: Alias | None) -> Provider | None:
    return presets.provider(alias.provider) if alias and alias.provider else None


def _source(provider: Provider | None) -> str:
    """What a base URL that no config gives is made of."""
    return "OPENAI_BASE_URL" if provider is None or provider.base_url is None else provider.base_url


def _provider_url(provider: Provider | None, config: GuideConfig) -> str:
    """The base URL where none is given: a provider's own, or OPENAI_BASE_URL in the place of OpenAI's."""
    if provider is None or provider.name == "openai":
        return os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
    url = provider.prefill_base_url if config.continuation == "prefill" else None
    if url := url or provider.url:
        return url
    raise UserError(
        f"the provider {provider.name} has no base URL that holds for everyone",
        hint=f"give yours: --base-url, or set the variable in {provider.base_url}",
    )


_VERSION = re.compile(r"[@:].+|[-_]v?\d[\w.-]*|[-_](latest|preview)")


def same_model(requested: str, reported: str) -> bool:
    """Whether the name that a server reports stands for the requested model.

    Folders in front, a revision, a tag or a version behind may differ: ``gpt-4o`` may come as
    ``gpt-4o-2024-08-06``, never as ``gpt-4o-mini``.
    """
    requested, reported = (name.lower().rstrip("/").rpartition("/")[2] for name in (requested, reported))
    rest = reported.removeprefix(requested)
    return not rest or (rest != reported and _VERSION.fullmatch(rest) is not None)
