"""The turns that a guide's config puts around a prompt: a system message, and examples as earlier turns."""

from __future__ import annotations

from rlgf_cli.config.guide import GuideConfig
from rlgf_cli.errors import UserError
from rlgf_cli.guides.cleanup import fill
from rlgf_cli.protocols import Message, Prompt
from rlgf_cli.protocols.messages import with_system

_KEYS = ("system", "examples")


def adds_turns(config: GuideConfig) -> bool:
    """Whether ``guide.system`` or ``guide.examples`` is given, so that a plain prompt becomes a conversation."""
    return any(getattr(config, key) not in (None, []) for key in _KEYS)


def with_turns(config: GuideConfig, prompt: Prompt) -> Prompt:
    """The conversation that the guide is given: ``guide.system`` with the prompt's own system message, the examples,
    then the prompt's turns. A prompt stays as it is where neither key is given."""
    if not adds_turns(config):
        return prompt
    messages = with_system(config.system, prompt)
    own = 1 if messages[0].role == "system" else 0
    return (*messages[:own], *_shown(config), *messages[own:])


def _shown(config: GuideConfig) -> tuple[Message, ...]:
    """The examples as turns of the user, in the template of the guide's prompts, and of the assistant."""
    template = config.prompt_template or "{prompt}"
    pairs = (
        (Message("user", fill(template, example.prompt)), Message("assistant", example.completion))
        for example in config.examples
    )
    return tuple(message for pair in pairs for message in pair)


def refuse_turns(config: GuideConfig, why: str, hint: str) -> None:
    """Raise UserError where the config adds turns to a guide that has none; ``why`` it has none."""
    for key in _KEYS:
        if getattr(config, key) not in (None, []):
            raise UserError(f"guide.{key} makes turns of a conversation, and {why}", hint=hint)
