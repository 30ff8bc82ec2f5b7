"""Creates the guide that a config names.

The part of the name before the colon is the kind: ``hf:PATH``, ``openai:MODEL``, or a kind that another package
registers under the entry-point group ``rlgf.guides`` (a subclass of
``protocols.Guide``); or a provider of an endpoint, ``deepseek:MODEL``. A name without one is a recorded file or an
alias.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rlgf_cli import registry
from rlgf_cli.algorithms.spec import AlgorithmSpec
from rlgf_cli.config.guide import GuideConfig
from rlgf_cli.errors import UserError, did_you_mean
from rlgf_cli.guides.openai import presets
from rlgf_cli.guides.openai.endpoint import endpoint_of, is_endpoint
from rlgf_cli.guides.recorded import RecordedGuide
from rlgf_cli.protocols import Guide, GuideAbilities

RECORDED = "recorded"
_RECORDED_SUFFIXES = (".jsonl", ".jsonl.gz")


def kind_of(name: str) -> str:
    """``recorded`` or the name of a registered kind. Raises UserError for a name that means nothing."""
    if name.endswith(_RECORDED_SUFFIXES) or Path(name).is_file():
        if not Path(name).is_file():
            raise UserError("no such guide file", where=name, hint="rlgf collect-guide makes one")
        return RECORDED
    kind, colon, rest = name.partition(":")
    kinds = registry.entries("guides")
    providers = presets.providers()
    if colon and (kind in kinds or kind in providers):
        if not rest:
            hint = kinds[kind].summary if kind in kinds else f"{kind}:MODEL"
            raise UserError(f"the guide {name!r} names nothing behind the colon", hint=hint)
        return kind if kind in kinds else "openai"
    if presets.find(name) is not None:
        return "openai"
    if Path(name).is_dir():
        raise UserError("this guide is a folder", where=name, hint=f"a local checkpoint is named hf:{name}")
    if colon:
        hint = did_you_mean(kind, [*kinds, *providers])
    elif "/" in name:
        hint = f"a recorded guide ends in .jsonl; a checkpoint is hf:{name}, a model of an API openai:{name}"
    else:
        hint = did_you_mean(name, presets.known()) + "; other models are named openai:MODEL"
    raise UserError(f"unknown guide {name!r}", hint=hint)


def describe(config: GuideConfig) -> GuideAbilities:
    """The guide's abilities; no model is loaded, no server called. Raises UserError."""
    kind = kind_of(config.name)
    if kind != RECORDED:
        return _live_kind(kind).describe(config)
    if config.examples:
        raise UserError(
            "guide.examples is for guides that write; the texts of a file are there already",
            where=config.name,
            hint="leave it out, or name the guide that shall write: hf:PATH, openai:MODEL or an alias",
        )
    return RecordedGuide.abilities


def refuses_temperature(section: Mapping[str, Any]) -> bool:
    """Whether the guide of a section is a model behind an endpoint that refuses every temperature but its own."""
    named = {key: section[key] for key in ("name", "provider", "base_url") if section.get(key) is not None}
    try:
        return is_endpoint(str(section["name"])) and "temperature" in endpoint_of(GuideConfig(**named)).refuses
    except (ValidationError, UserError):
        return False  # the section as a whole is checked where it is used


def check_guide(config: GuideConfig, spec: AlgorithmSpec) -> None:
    """Refuse a guide that lacks an ability that the algorithm needs; no model is loaded, no server called."""
    abilities = describe(config)
    if spec.needs_live_guide and not (abilities.live and abilities.continues):
        why = "only has recorded text" if not abilities.live else "cannot go on from a partial text"
        raise UserError(
            f"{spec.name} has the guide finish what the policy began, and this guide {why}",
            where=config.name,
            hint="use a live guide (hf:PATH, openai:MODEL), or ppo++, grpo++, rloo++ or bc-guide with recorded text",
        )


def make_guide(config: GuideConfig, *, seed: int) -> Guide:
    """The guide itself: the file read, the model loaded, or the client made."""
    kind = kind_of(config.name)
    if kind != RECORDED:
        return _live_kind(kind)(config, seed=seed)
    describe(config)
    return RecordedGuide(config.name)


def make_live_guide(config: GuideConfig, *, seed: int) -> Guide:
    """As :func:`make_guide`, for a guide that must write new text; a recorded one is refused."""
    refuse_recorded(config)
    return _live_kind(kind_of(config.name))(config, seed=seed)


def make_offline_guide(config: GuideConfig, *, seed: int) -> Guide:
    """A live guide that sends no request, for estimates and checks; it needs no API key."""
    return make_live_guide(config.model_copy(update={"mode": "replay"}), seed=seed)


@contextmanager
def closing_all(guides: Sequence[Guide | None]) -> Iterator[None]:
    """Close the guides when the block ends, also by an error."""
    with ExitStack() as stack:
        for guide in guides:
            if guide is not None:
                stack.callback(guide.close)
        yield


def refuse_recorded(config: GuideConfig) -> None:
    """Raise UserError for a guide that only has recorded texts; no model is loaded, no server called."""
    if not describe(config).live:
        raise UserError(
            "this guide is recorded; it has no new text to give",
            where=config.name,
            hint="name a live guide: hf:PATH, openai:MODEL or an alias",
        )


def _live_kind(kind: str) -> type[Any]:
    loaded = registry.load("guides", kind)
    if not (isinstance(loaded, type) and issubclass(loaded, Guide)):
        raise UserError(
            f"the guide kind {kind!r} is not a subclass of rlgf_cli.protocols.Guide",
            where=registry.entries("guides")[kind].target,
            hint="tell the author of the package",
        )
    return loaded
