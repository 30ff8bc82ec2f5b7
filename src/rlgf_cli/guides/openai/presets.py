"""Aliases: short names for guides with their model, context length and price."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

from pydantic import Field, model_validator

from rlgf_cli.config.guide import Api
from rlgf_cli.config.loader import resolve
from rlgf_cli.section import Strict


class Alias(Strict):
    """A model behind an OpenAI-compatible endpoint. Prices: US dollars per million tokens, null: unknown.

    ``batch_price`` is the share of the price that a batch costs; ``licence`` a note on the terms of its texts.
    """

    name: str = Field(min_length=1)
    model: str = Field(min_length=1)
    api: Api = "chat"
    base_url: str | None = None
    context_length: int | None = Field(None, ge=1)
    usd_per_million_input: float | None = Field(None, ge=0)
    usd_per_million_output: float | None = Field(None, ge=0)
    batch_price: float = Field(0.5, gt=0, le=1)
    noted: datetime.date | None = None
    licence: str | None = None


class AliasFile(Strict):
    """``aliases.yaml``."""

    aliases: list[Alias] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check(self) -> AliasFile:
        names = [alias.name for alias in self.aliases]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the alias {twice[0]!r} is here twice")
        return self


def user_file() -> Path:
    """The file of the user's own aliases."""
    folder = os.environ.get("RLGF_CONFIG_DIR")
    return (Path(folder) if folder else Path.home() / ".config" / "rlgf") / "aliases.yaml"


def known() -> dict[str, Alias]:
    """All aliases by name: those that come with rlgf, and the user's, which win."""
    files = [Path(__file__).with_name("aliases.yaml"), *([own] if (own := user_file()).is_file() else [])]
    return {alias.name: alias for file in files for alias in resolve(AliasFile, files=[file]).config.aliases}


def find(name: str) -> Alias | None:
    """The alias of that name, or the one for the model of that name."""
    aliases = known()
    if name in aliases:
        return aliases[name]
    return next((alias for alias in aliases.values() if alias.model == name), None)
