"""Messages: a prompt as a conversation, and its forms as text, as JSON and as the name that it is matched by."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

Role = Literal["system", "user", "assistant"]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


Prompt = str | tuple[Message, ...]
"""A prompt as the data gives it: a text, or a conversation that ends with a message of the user."""


def as_messages(prompt: Prompt) -> tuple[Message, ...]:
    """The prompt as a conversation: a text is the one message of the user."""
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt


def to_json(prompt: Prompt) -> str | list[dict[str, Any]]:
    """The prompt as it stands in a JSONL file."""
    return prompt if isinstance(prompt, str) else [asdict(message) for message in prompt]


def prompt_key(prompt: Prompt) -> str:
    """A text that is equal for equal prompts alone: a plain prompt itself, or a conversation's JSON behind a NUL."""
    if isinstance(prompt, str):
        return prompt
    return "\0" + json.dumps([[message.role, message.content] for message in prompt], ensure_ascii=False)


def transcript(prompt: Prompt) -> str:
    """The prompt as one text to read: a conversation with the role before each message."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"[{message.role}]\n{message.content}" for message in prompt)


def last_words(prompt: Prompt) -> str:
    """A plain prompt, or the last message of a conversation."""
    return prompt if isinstance(prompt, str) else prompt[-1].content


def with_last_words(prompt: Prompt, words: str) -> Prompt:
    """The prompt with ``words`` in the place of its text, or of its last message's."""
    return words if isinstance(prompt, str) else (*prompt[:-1], replace(prompt[-1], content=words))


def with_system(instruction: str | None, prompt: Prompt) -> tuple[Message, ...]:
    """The prompt as a conversation, with an instruction before its own system message: one system message of both."""
    messages = as_messages(prompt)
    if instruction is None:
        return messages
    if messages[0].role != "system":
        return (Message("system", instruction), *messages)
    return (Message("system", f"{instruction}\n\n{messages[0].content}"), *messages[1:])
