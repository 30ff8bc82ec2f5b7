"""Presets: providers of OpenAI-compatible endpoints, and aliases for models with their context length and price."""

from __future__ import annotations

import datetime
import os
import re
from functools import cache
from ipaddress import ip_address
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from rlgf_cli.config.guide import Api, PrefillStyle
from rlgf_cli.config.loader import resolve
from rlgf_cli.errors import UserError, did_you_mean
from rlgf_cli.section import Strict

SamplingKey = Literal["temperature", "top_p", "top_k"]
NEUTRAL: dict[SamplingKey, float] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
"""The values that change nothing about a model's distribution."""
_FOLDER = Path(__file__).parent
_VARIABLE = re.compile(r"\{(\w+)\}")


class Provider(Strict):
    """The rules of one provider's endpoint; ``providers.yaml`` says what each field means."""

    name: str = Field(min_length=1)
    base_url: str | None = None
    hosts: list[str] = Field(default_factory=list)
    api_key_env: str | None = None
    limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    prefill: PrefillStyle | None = None
    prefill_base_url: str | None = None
    prefill_echo: bool = False
    seed: Literal["seed", "random_seed"] | None = "seed"
    neutral: list[SamplingKey] = Field(default_factory=list)
    refuses: list[SamplingKey] = Field(default_factory=list)
    source: str | None = None
    noted: datetime.date | None = None

    @property
    def url(self) -> str | None:
        """The base URL with its variables filled; None where one of them is not set."""
        if self.base_url is None or any(not os.environ.get(name) for name in _VARIABLE.findall(self.base_url)):
            return None
        return _VARIABLE.sub(lambda match: os.environ[match[1]].strip().rstrip("/"), self.base_url)

    def has(self, host: str) -> bool:
        """Whether a host is the provider's own."""
        return any(
            host == own or (own.startswith(".") and host.endswith(own)) for own in (host_of(self.url), *self.hosts)
        )


class Alias(Strict):
    """A model behind an OpenAI-compatible endpoint. Prices: US dollars per million tokens, null: unknown.

    ``provider`` is one of ``rlgf ls providers``; ``api_key_env`` the variable with the key, if it is not the
    provider's. ``refuses`` are sampling keys that the model takes at their default alone. ``batch_price`` is the share
    of the price that a batch costs; ``licence`` a note on the terms of its texts.
    """

    name: str = Field(min_length=1)
    model: str = Field(min_length=1)
    provider: str | None = None
    api: Api = "chat"
    base_url: str | None = None
    api_key_env: str | None = None
    context_length: int | None = Field(None, ge=1)
    usd_per_million_input: float | None = Field(None, ge=0)
    usd_per_million_output: float | None = Field(None, ge=0)
    batch_price: float = Field(0.5, gt=0, le=1)
    refuses: list[SamplingKey] = Field(default_factory=list)
    noted: datetime.date | None = None
    licence: str | None = None

    def is_at(self, host: str) -> bool:
        """Whether the alias's price and terms are those of a host: its own, or any where it names none."""
        if self.base_url is not None:
            return host == host_of(self.base_url)
        return self.provider is None or provider(self.provider).has(host)


class PresetFile(Strict):
    """``providers.yaml`` and ``aliases.yaml``."""

    providers: list[Provider] = Field(default_factory=list)
    aliases: list[Alias] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check(self) -> PresetFile:
        for what, presets in (("provider", self.providers), ("alias", self.aliases)):
            names = [preset.name for preset in presets]
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"the {what} {twice[0]!r} is here twice")
        return self


def user_file() -> Path:
    """The file of the user's own aliases and providers."""
    folder = os.environ.get("RLGF_CONFIG_DIR")
    return (Path(folder) if folder else Path.home() / ".config" / "rlgf") / "aliases.yaml"


def _files() -> list[PresetFile]:
    """What comes with rlgf, and the user's, which wins."""
    own = user_file()
    return [*_builtin(), *([resolve(PresetFile, files=[own]).config] if own.is_file() else [])]


@cache
def _builtin() -> tuple[PresetFile, ...]:
    return tuple(resolve(PresetFile, files=[_FOLDER / name]).config for name in ("providers.yaml", "aliases.yaml"))


def known() -> dict[str, Alias]:
    """All aliases by name."""
    return {alias.name: alias for file in _files() for alias in file.aliases}


def providers() -> dict[str, Provider]:
    """All providers by name."""
    return {provider.name: provider for file in _files() for provider in file.providers}


def find(name: str) -> Alias | None:
    """The alias of that name, or the one for the model of that name."""
    aliases = known()
    if name in aliases:
        return aliases[name]
    return next((alias for alias in aliases.values() if alias.model == name), None)


def find_at(model: str, host: str) -> Alias | None:
    """The alias for a model at a host, of those that name a host."""
    of_model = (alias for alias in known().values() if alias.model == model and (alias.base_url or alias.provider))
    return next((alias for alias in of_model if alias.is_at(host)), None)


def provider(name: str) -> Provider:
    """The provider of a name. Raises UserError."""
    every = providers()
    if name not in every:
        raise UserError(f"unknown provider {name!r}", hint=did_you_mean(name, every))
    return every[name]


def provider_at(host: str) -> Provider | None:
    """The provider whose own host it is; a host of this machine is nobody's."""
    if is_loopback(host):
        return None
    return next((provider for provider in providers().values() if provider.has(host)), None)


def host_of(url: str | None) -> str:
    """The host of a URL; empty where there is none."""
    try:
        return urlsplit(url or "").hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether a host is this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
