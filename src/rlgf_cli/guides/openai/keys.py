"""API keys: from which variable they are read, and to which hosts they are sent.

The key of a provider's variable goes to the provider's own hosts. OPENAI_API_KEY also goes to this machine, and to a
host that the user named: by OPENAI_BASE_URL, on the command line, or in the file of aliases. To any other host goes
only the key of a variable that was named for it, by ``api_key_env`` of the guide or of the alias.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from rlgf_cli.config.guide import GuideConfig
from rlgf_cli.config.loader import Resolved
from rlgf_cli.errors import UserError
from rlgf_cli.guides.openai.endpoint import Endpoint, endpoint_of, is_endpoint
from rlgf_cli.guides.openai.presets import host_of, is_loopback

DEFAULT = "OPENAI_API_KEY"
NO_KEY = "none"
"""What is sent where no key is: the client wants some text."""


def variable_of(endpoint: Endpoint) -> str | None:
    """The variable whose key is sent to an endpoint; None: no key is. Raises UserError where the key of the provider's
    variable would go to a host that is not the provider's."""
    host, provider = host_of(endpoint.base_url), endpoint.provider
    if endpoint.api_key_env is not None:
        return endpoint.api_key_env
    if provider is None or provider.api_key_env == DEFAULT:
        return DEFAULT
    if provider.api_key_env is None or provider.has(host):
        return provider.api_key_env
    if is_loopback(host):
        return None
    raise UserError(
        f"{provider.api_key_env} is the key of {provider.name}, and is not sent to {host}",
        hint=f"name the variable with that host's key: guide.api_key_env (--set guide.api_key_env="
        f"{provider.api_key_env} sends this one there)",
    )


def api_key(endpoint: Endpoint) -> tuple[str, str | None]:
    """The key for an endpoint, and its variable. A server on this machine may do without, and one of a provider that
    has no keys does. Raises UserError where a key is missing or none at all."""
    variable = variable_of(endpoint)
    if variable is None:
        return NO_KEY, None
    if key := os.environ.get(variable, "").strip():
        if not key.isascii() or not key.isprintable() or " " in key:
            raise UserError(
                f"{variable} holds characters that no key has (a space, a line break, or none of ASCII)",
                hint="export it again, without quotes or line breaks inside",
            )
        return key, variable
    if is_loopback(host_of(endpoint.base_url)) and endpoint.api_key_env is None:
        return NO_KEY, variable
    raise UserError(
        f"no API key: the environment variable {variable} is not set",
        hint=f"export {variable}=..., or name the variable that has the key: guide.api_key_env; a server on this "
        "machine needs none: name it by --base-url or OPENAI_BASE_URL",
    )


def refuse_unnamed_hosts(resolved: Resolved[Any]) -> None:
    """Refuse a base URL of a recipe, for a guide, judge or reviewer, to which OPENAI_API_KEY would be sent though the
    user did not name the host or the key for it. Raises UserError with the place of the URL."""
    if not os.environ.get(DEFAULT, "").strip():
        return
    values = resolved.config.model_dump(mode="json")
    sections = [(key, section) for key, section in _sections(values, "") if section.get("base_url")]
    named = {host_of(os.environ.get("OPENAI_BASE_URL"))}
    named |= {host_of(s["base_url"]) for key, s in sections if resolved.on_command_line(f"{key}.base_url")}
    for key, section in sections:
        host = host_of(section["base_url"])
        if host in named or is_loopback(host) or section.get("mode") == "replay" or not is_endpoint(section["name"]):
            continue
        given = {name: section[name] for name in _DECIDING if section.get(name) is not None}
        endpoint = endpoint_of(GuideConfig.model_validate(given))
        own = endpoint.provider is not None and (
            endpoint.provider.api_key_env != DEFAULT or endpoint.provider.has(host)
        )
        if endpoint.api_key_env is None and not own:
            raise UserError(
                f"{key}.base_url names {host}, and a recipe alone does not send {DEFAULT} to a host",
                where=resolved.places.get(f"{key}.base_url"),
                hint=f"name the variable with the key of that host ({key}.api_key_env: NAME; {DEFAULT} is one), or "
                "name the host: --base-url, or OPENAI_BASE_URL",
            )


_DECIDING = ("name", "provider", "base_url", "api_key_env")
"""Keys of a guide's section that decide to whom which key goes."""


def _sections(values: Any, prefix: str, owner: str | None = None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The guides' sections in a config by dotted key. ``owner``: the name of the scorer that a section belongs to, as
    in ``judge:GUIDE`` and ``reward:judge:GUIDE``, which names the guide."""
    if isinstance(values, list):
        values = {str(n): value for n, value in enumerate(values)}
    if not isinstance(values, Mapping):
        return
    name = values.get("name")
    if "base_url" in values:
        yield prefix.rstrip("."), {**values, "name": name or (owner or "").rpartition("judge:")[2]}
    for key, value in values.items():
        yield from _sections(value, f"{prefix}{key}.", name if isinstance(name, str) else owner)
