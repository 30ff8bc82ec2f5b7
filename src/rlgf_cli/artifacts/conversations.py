"""Conversations in data files: lists of ``{role, content}`` as prompts, replies and pairs, checked.

The formats are those of TRL and of chat APIs: ``prompt`` as a list, ``messages``, ``completion`` and ``chosen`` and
``rejected`` as lists. Every error says which message of which field is wrong, and what to do; the reader of the file
adds the line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, cast

from rlgf_cli.errors import UserError
from rlgf_cli.protocols.messages import ROLES, Message, Prompt, Role, as_messages

_SHAPE = 'a conversation is a list of {"role": "system" | "user" | "assistant", "content": "..."}'


def is_messages(value: Any) -> bool:
    """Whether a field holds messages: a list whose first item is an object."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def read_messages(value: Any, field: str) -> tuple[Message, ...]:
    """The messages of a field. Raises UserError for roles, contents and system messages that cannot be used."""
    if not isinstance(value, list | tuple):
        _refuse(field, f"it is {type(value).__name__}, not a list of messages", _SHAPE)
    if not value:
        _refuse(field, "it holds no message", "drop the record or fill the field")
    messages = tuple(_message(item, f"message {n}", field) for n, item in enumerate(value, 1))
    systems = [n for n, message in enumerate(messages, 1) if message.role == "system"]
    if len(systems) > 1:
        _refuse(field, f"it has {len(systems)} system messages", "join them into one, the first message")
    if systems and systems != [1]:
        _refuse(field, f"its system message is message {systems[0]}", "a system message is the first one")
    return messages


def read_prompt(value: Any, field: str) -> tuple[Message, ...]:
    """A conversation that waits for the assistant: its last message is the user's."""
    messages = read_messages(value, field)
    if messages[-1].role == "assistant":
        hint = "what the assistant answers stands in references; under the name messages the last turn is taken as one"
        _refuse(field, "it ends with a message of the assistant, so there is nothing left to answer", hint)
    if messages[-1].role == "system":
        _refuse(field, "it has no message of the user", "a prompt ends with a message of the user")
    return messages


def read_reply(value: Any, field: str) -> str:
    """The text of one message of the assistant, alone or in a list; a text is returned as it is."""
    if isinstance(value, Mapping):
        value = [value]
    if not is_messages(value):
        return cast(str, value)  # whatever it is, the field's own type is checked next
    messages = read_messages(value, field)
    if len(messages) > 1:
        _refuse(field, f"it holds {len(messages)} messages; a response is one", "earlier turns belong to the prompt")
    if messages[0].role != "assistant":
        _refuse(field, f"it is a message of the {messages[0].role}", "a response is a message of the assistant")
    return messages[0].content


def split_last(value: Any, field: str) -> tuple[tuple[Message, ...], str | None]:
    """``messages`` as a prompt and the assistant's last turn; None where the conversation waits for an answer."""
    messages = read_messages(value, field)
    if messages[-1].role != "assistant":
        return read_prompt(messages, field), None
    if len(messages) == 1 or messages[-2].role != "user":
        _refuse(
            field,
            "it has no message of the user before its last turn",
            "the last turn answers what the user said before it",
        )
    return messages[:-1], messages[-1].content


def split_pair(
    prompt: Prompt | None, chosen: Any, rejected: Any, names: tuple[str, str] = ("chosen", "rejected")
) -> tuple[Prompt, str, str]:
    """``chosen`` and ``rejected`` as lists of messages: the prompt, and the text of either.

    Each is one message of the assistant, behind ``prompt`` (None: there is no prompt, and an empty one is returned); or
    a whole conversation that ends with one, where both conversations, and ``prompt`` where that is given, agree in what
    is before it.
    """
    first, second = read_messages(chosen, names[0]), read_messages(rejected, names[1])
    for messages, name in ((first, names[0]), (second, names[1])):
        if messages[-1].role != "assistant":
            _refuse(
                name, f"it ends with a message of the {messages[-1].role}", "the compared texts are the assistant's"
            )
    before = first[:-1]
    if second[:-1] != before:
        hint = "two texts are compared that answer the same messages"
        _refuse(names[1], f"it differs from {names[0]!r} before its last message", hint)
    if prompt is not None and before:
        given = as_messages(prompt)
        if before != given and not (isinstance(prompt, str) and before[-1] == given[-1]):
            hint = "leave the prompt out, or the messages before the last one"
            _refuse(names[0], "it begins with messages that are not those of the prompt", hint)
    if not before:
        return prompt or "", first[-1].content, second[-1].content
    return read_prompt(before, names[0]), first[-1].content, second[-1].content


def example_fields(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row with ``prompt`` and ``references``, made of the fields of the formats that TRL and chat APIs have.

    - ``messages`` without a prompt: the assistant's last turn is the reference; without one there is none;
    - ``completion`` as messages beside a prompt, without references: it is the reference;
    - ``chosen`` and ``rejected`` as whole conversations without a prompt: what both begin with is the prompt.

    Raises UserError for messages that cannot be used.
    """
    references, completion = value.get("references"), value.get("completion")
    if "prompt" not in value and is_messages(value.get("messages")):
        prompt, reply = split_last(value["messages"], "messages")
        if reply is not None and references:
            hint = "leave the references out, or the last turn of the messages"
            _refuse("messages", "it ends with an answer of the assistant, and there are references too", hint)
        return {**value, "prompt": prompt, "references": references or [] if reply is None else [reply]}
    if "prompt" in value and not references and is_messages(completion):
        return {**value, "references": [read_reply(completion, "completion")]}
    if "prompt" not in value and is_messages(value.get("chosen")) and is_messages(value.get("rejected")):
        begun, _, _ = split_pair(None, value["chosen"], value["rejected"])
        return {**value, "prompt": begun} if begun else value
    return value


@contextmanager
def located(where: str) -> Iterator[None]:
    """Give the errors of the block their place in the file."""
    try:
        yield
    except UserError as error:
        raise UserError(error.message, where=error.where or where, hint=error.hint) from None


def plain(prompt: Prompt, where: str) -> str:
    """The text of a plain prompt. Raises UserError for a conversation, at a stage that works on single texts."""
    if isinstance(prompt, str):
        return prompt
    raise UserError(
        "the prompt is a conversation, and this command works on single texts",
        where=where,
        hint='give each prompt as one text: {"prompt": "..."}',
    )


def _message(item: Any, place: str, field: str) -> Message:
    if isinstance(item, Message):
        return item
    if not isinstance(item, Mapping):
        _refuse(field, f"{place} is {type(item).__name__}", _SHAPE)
    if "role" not in item or "content" not in item:
        lacking = "role" if "role" not in item else "content"
        hint = "from and value are called role and content here" if "from" in item else _SHAPE
        _refuse(field, f"{place} has no {lacking!r}", hint)
    role, content = item["role"], item["content"]
    if role not in ROLES:
        _refuse(field, f"{place} has the role {role!r}", f"the roles are {', '.join(ROLES)}")
    if item.get("tool_calls"):
        _refuse(field, f"{place} calls a tool", "rlgf has no tools: drop such conversations")
    if not isinstance(content, str):
        hint = "the content of a message is one text; images and lists of parts are not read"
        _refuse(field, f"the content of {place} is {type(content).__name__}", hint)
    if not content.strip():
        _refuse(field, f"{place} ({role}) is empty", "drop the message or the record")
    return Message(cast(Role, role), content)


def _refuse(field: str, what: str, hint: str) -> NoReturn:
    raise UserError(f"the field {field!r}: {what}", hint=hint)
