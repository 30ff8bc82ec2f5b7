"""Reads the answers of an OpenAI-compatible server. Every field that is used is checked; none of them is trusted.

An answer is paid for, whatever it holds. So an answer without a usable text is tried again only where another one may
differ: half a body, no choice, an answer that the server broke off. All others are final.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from rlgf_cli.config.guide import Api
from rlgf_cli.guides.openai.server_errors import error_in
from rlgf_cli.guides.unanswered import no_text
from rlgf_cli.protocols import Completion, Failure

Ending = Literal["stop", "length", "content_filter", "refusal", "tool_call", "server"]
ENDINGS: dict[str, Ending] = {
    **dict.fromkeys(
        ("stop", "eos", "eos_token", "eos_token_id", "end", "end_turn", "end_of_text", "endoftext", "stop_sequence",
         "stop_token", "stop_str", "complete", "completed", "done", "finished"),
        "stop",
    ),
    **dict.fromkeys(
        ("length", "max_tokens", "max_new_tokens", "max_output_tokens", "max_completion_tokens", "max_length",
         "model_length", "context_length", "context_length_exceeded", "model_context_window_exceeded"),
        "length",
    ),
    **dict.fromkeys(
        ("content_filter", "content_filtered", "safety", "recitation", "blocklist", "prohibited_content", "spii",
         "moderation", "sensitive", "guardrail_intervened"),
        "content_filter",
    ),
    **dict.fromkeys(("refusal", "refused"), "refusal"),
    **dict.fromkeys(
        ("tool_calls", "tool_call", "tool_use", "function_call", "malformed_function_call", "unexpected_tool_call"),
        "tool_call",
    ),
    **dict.fromkeys(
        ("error", "abort", "aborted", "cancelled", "canceled", "timeout", "network_error",
         "insufficient_system_resource"),
        "server",
    ),
}  # fmt: skip
"""The meaning of finish reasons, in lower case: of OpenAI, Azure, Anthropic, Google, Mistral, Cohere, DeepSeek, Zhipu,
Bedrock, vLLM, SGLang, TGI, llama.cpp and TensorRT-LLM."""
_NO_COUNT = 10**10
"""Larger numbers are no counts of tokens."""
_LONGEST_TOKEN = 1024
"""Characters: no tokenizer has longer tokens."""
_TEXTS = (None, "text", "output_text")
"""Types of the parts of a content that are text."""
_THOUGHTS = ("thinking", "reasoning", "reasoning_text", "redacted_thinking", "summary_text")


class Read(NamedTuple):
    """The reading of an answer. ``notes``: ``(kind, message)`` of what was odd about it and has been dealt with."""

    outcome: Completion | Failure
    notes: tuple[tuple[str, str], ...] = ()


def read_response(content: bytes | Any, api: Api, limit: int | None = None) -> Read:
    """The completion in a body, given as bytes or as the value of its JSON; a failure where there is no usable text.

    Both have the model that the server reported and the token counts that it gave. ``limit``: the most tokens that were
    asked for; a text of as many was cut, where the server does not say how it ended. Never raises.
    """
    body: Any = content
    if isinstance(content, bytes):
        try:
            body = json.loads(content)
        except (ValueError, RecursionError) as problem:
            return Read(_not_json(content, problem))
    error = error_in(body)
    if not isinstance(body, Mapping):
        return Read(error.failure() if error else Failure("malformed", "the answer is not a JSON object"))
    outcome, notes = Read(error.failure()) if error else _choice(body, api, limit)
    listed, usage = body.get("usage"), _usage(body.get("usage"))
    if (more := usage.get("completion_tokens", 0) - (_count(listed, "completion_tokens") or 0)) > 0:
        why = f"the server counts {more} tokens beside those of the text (reasoning): they are charged as output"
        notes = (*notes, ("unlisted_tokens", why))
    return Read(replace(outcome, model=_plain(body.get("model")), usage=usage), notes)


def _plain(value: Any) -> str:
    """A string without half of a surrogate pair, which JSON can hold and no file can; empty for all else."""
    return value.encode("utf-8", "ignore").decode() if isinstance(value, str) else ""


def _not_json(content: bytes, error: Exception) -> Failure:
    start = content[:200].lstrip().lower()
    if start.startswith((b"data:", b"event:", b"id:", b":")):
        return no_text("stream", "the answer is a stream of events, and none was asked for")
    if start.startswith(b"<"):
        return no_text("html", "the answer is a web page")
    return Failure("malformed", f"the answer is not JSON ({str(error)[:80]})")


def oversized(size: str) -> Failure:
    """The failure of an answer that is larger than any text within the limit can be."""
    return no_text("oversized", f"the answer is too large ({size})")


def _choice(body: Mapping[str, Any], api: Api, limit: int | None) -> Read:
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        return Read(Failure("malformed", "the answer holds no choice"))
    choice = choices[0]
    message = choice.get("message")
    message = message if isinstance(message, Mapping) else {}
    given = (message.get("content"), choice.get("text"))
    content = next((value for value in (given if api == "chat" else given[::-1]) if value is not None), None)
    text, left_out = _text_of(content)
    notes = [
        ("parts_left_out", f"parts of type {type_!r} in the guide's answers are no text, and are left out")
        for type_ in dict.fromkeys(left_out)
    ]
    usage = body.get("usage")
    reason = choice.get("finish_reason")
    ending = ENDINGS.get(_name(reason))
    cut = limit is not None and (_count(usage, "completion_tokens") or 0) >= limit
    if failure := _no_text(choice, message, text, left_out, ending, reason, usage, chat=api == "chat"):
        return Read(failure)
    assert text is not None
    if limit is not None and len(text) > _LONGEST_TOKEN * (limit + 64):
        return Read(oversized(f"{len(text):,} characters for at most {limit} tokens"))
    if reason is not None and ending is None:
        known = "length" if cut else "stop"
        why = f"the guide ends answers with the reason {str(reason)[:40]!r}, which is not known: it is read as {known}"
        notes.append(("unknown_finish_reason", why))
    finish: Literal["stop", "length"] = "length" if ending == "length" or (ending is None and cut) else "stop"
    return Read(Completion(text, finish, model=""), tuple(notes))


def _no_text(
    choice: Mapping[str, Any],
    message: Mapping[str, Any],
    text: str | None,
    left_out: list[str],
    ending: Ending | None,
    reason: Any,
    usage: Any,
    *,
    chat: bool,
) -> Failure | None:
    """The failure of a choice without a usable text; None where it has one. An empty text that ended by itself is
    usable: the model had nothing to say."""
    shown = str(reason)[:40]
    if ending == "content_filter":
        return Failure("content_filter", f"the answer was filtered (finish reason {shown!r})", final=True)
    if ending == "server":
        return Failure("server", f"the server broke the answer off (finish reason {shown!r})")
    if message.get("refusal") or ending == "refusal" or (not text and "refusal" in left_out):
        return no_text("refusal", "the model refused to answer")
    calls = message.get("tool_calls") or message.get("function_call") or choice.get("tool_calls")
    if ending == "tool_call" or (calls and not (text or "").strip()):
        return no_text("tool_call", "the answer is the call of a tool")
    thought = (
        message.get("reasoning_content")
        or message.get("reasoning")
        or any(type_ in _THOUGHTS for type_ in left_out)
        or _reasoning_tokens(usage)
    )
    if thought and not (text or "").strip():
        return no_text("reasoning", f"the answer holds reasoning and no text (finish reason {shown!r})")
    if chat and ending == "length" and not text:
        return no_text("reasoning", "the answer was cut before its text began: reasoning used its tokens up")
    return no_text("empty", f"the answer holds no text (finish reason {shown!r})") if text is None else None


def _text_of(content: Any) -> tuple[str | None, list[str]]:
    """The text of a content, which may be a list of parts, and the types of the parts that are left out."""
    if isinstance(content, str):
        return content, []
    parts = [content] if isinstance(content, Mapping) else content if isinstance(content, list) else []
    texts: list[str] = []
    left_out = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        type_ = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if isinstance(part, Mapping) else None
        text = text.get("value") if isinstance(text, Mapping) else text
        if type_ in _TEXTS and isinstance(text, str):
            texts.append(text)
        else:
            left_out.append(str(type_ or type(part).__name__)[:40])
    return ("".join(texts) if texts else None), left_out


def _name(reason: Any) -> str:
    """A finish reason as the table has it: ``FinishReason.STOP`` and ``stop`` are one."""
    name = reason.strip().lower().replace("-", "_") if isinstance(reason, str) else ""
    return name.rpartition(".")[2].removeprefix("finish_reason_")


def _reasoning_tokens(usage: Any) -> int:
    """The tokens of reasoning in a usage's details; 0 where it says nothing."""
    details = usage.get("completion_tokens_details") if isinstance(usage, Mapping) else None
    return _count(details, "reasoning_tokens") or 0


def _usage(usage: Any) -> dict[str, int]:
    """The tokens as the server bills them: all of ``total_tokens`` that are not of the prompt are output. Some servers
    leave reasoning out of ``completion_tokens``, and only the total, or the details, has it."""
    given = {name: _count(usage, name) for name in ("prompt_tokens", "completion_tokens")}
    counts = {name: count for name, count in given.items() if count is not None}
    total, reasoning = _count(usage, "total_tokens"), _reasoning_tokens(usage)
    prompt, completion = counts.get("prompt_tokens"), counts.get("completion_tokens")
    if total is None:
        if completion is not None and reasoning > completion:
            counts["completion_tokens"] = completion + reasoning
    elif prompt is not None and total >= prompt:
        counts["completion_tokens"] = max(completion or 0, total - prompt)
    elif prompt is None and completion is not None and total >= completion:
        counts["prompt_tokens"] = total - completion
    return counts


def _count(given: Any, name: str) -> int | None:
    """A number of tokens in a usage; None where it is none."""
    count = given.get(name) if isinstance(given, Mapping) else None
    return count if type(count) is int and 0 <= count < _NO_COUNT else None
