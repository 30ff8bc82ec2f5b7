"""The reading of a server's answers: texts, endings, failures by kind, thinking, errors with status 200."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlgf_cli.guides.cleanup import split_thinking
from rlgf_cli.guides.openai.response import Read, read_response
from rlgf_cli.guides.openai.server_errors import error_in, is_filtered
from rlgf_cli.guides.unanswered import REMEDIES
from rlgf_cli.protocols import Completion, Failure


def chat(content: Any = "A text.", reason: Any = "stop", *, usage: Any = None, **message: Any) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": content, **message}}
    return {"model": "m", "choices": [choice], "usage": usage}


def text_of(body: Any, limit: int | None = None) -> tuple[str, str]:
    outcome = read_response(json.dumps(body).encode(), "chat", limit).outcome
    assert isinstance(outcome, Completion), outcome
    assert read_response(body, "chat", limit).outcome == outcome  # bytes and their value read alike
    return outcome.text, outcome.finish_reason


def failure_of(body: Any) -> Failure:
    outcome = read_response(body if isinstance(body, bytes) else json.dumps(body).encode(), "chat").outcome
    assert isinstance(outcome, Failure), outcome
    return outcome


@pytest.mark.parametrize(
    "reason",
    ["stop", "STOP", "eos", "eos_token", "end_turn", "stop_sequence", "FinishReason.STOP", "FINISH_REASON_STOP", None],
)
def test_endings(reason):
    assert text_of(chat(reason=reason)) == ("A text.", "stop")
    assert read_response(chat(reason=reason), "chat").notes == ()


@pytest.mark.parametrize("reason", ["length", "MAX_TOKENS", "max_output_tokens", "model_length"])
def test_cuts(reason):
    assert text_of(chat(reason=reason)) == ("A text.", "length")


@pytest.mark.parametrize("reason", ["weary", "", 7, {"a": 1}, False])
def test_an_unknown_reason_is_an_ending_that_is_noted(reason):
    assert text_of(chat(reason=reason)) == ("A text.", "stop")
    ((kind, message),) = read_response(chat(reason=reason), "chat").notes
    assert kind == "unknown_finish_reason" and repr(str(reason)) in message


@pytest.mark.parametrize("reason", [None, "weary"])
def test_a_text_of_as_many_tokens_as_were_asked_for_was_cut(reason):
    usage = {"prompt_tokens": 3, "completion_tokens": 8}
    assert text_of(chat(reason=reason, usage=usage), limit=8) == ("A text.", "length")
    assert text_of(chat(reason=reason, usage=usage), limit=9) == ("A text.", "stop")
    assert text_of(chat(reason="stop", usage=usage), limit=8) == ("A text.", "stop")


def test_parts_are_joined_and_others_left_out():
    parts = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
        {"type": "text", "text": "One "},
        {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "output_text", "text": "sentence"},
        {"text": {"value": "."}},
        {"type": "image_url"},
    ]
    assert text_of(chat(parts)) == ("One sentence.", "stop")
    assert [kind for kind, _ in read_response(chat(parts), "chat").notes] == ["parts_left_out"] * 2
    assert text_of(chat(["a", "b"])) == ("ab", "stop") and text_of(chat({"type": "text", "text": "c"})) == ("c", "stop")


def test_a_chat_answer_in_the_form_of_a_completion_and_the_reverse():
    assert text_of({"choices": [{"text": "plain", "finish_reason": "stop"}]}) == ("plain", "stop")
    outcome = read_response(chat("said"), "completion").outcome
    assert isinstance(outcome, Completion) and outcome.text == "said"


def test_an_empty_text_that_ended_by_itself_is_a_text():
    assert text_of(chat("")) == ("", "stop")
    outcome = read_response({"choices": [{"text": "", "finish_reason": "length"}]}, "completion").outcome
    assert isinstance(outcome, Completion)  # a base model cannot reason: half a character, for example


FINAL = {
    "null, cut": (chat(None, "length"), "reasoning"),
    "empty, cut": (chat("", "length"), "reasoning"),
    "no parts, cut": (chat([], "length"), "reasoning"),
    "reasoning field": (chat(None, "stop", reasoning_content="hm"), "reasoning"),
    "blank behind reasoning": (chat("\n\n", "length", reasoning="hm"), "reasoning"),
    "reasoning tokens": (
        chat("", "stop", usage={"completion_tokens_details": {"reasoning_tokens": 9}}),
        "reasoning",
    ),
    "thinking part": (chat([{"type": "thinking", "thinking": "hm"}]), "reasoning"),
    "null": (chat(None), "empty"),
    "null, no reason": (chat(None, None), "empty"),
    "number": (chat(7), "empty"),
    "image": (chat([{"type": "image_url"}]), "empty"),
    "no message": ({"choices": [{"finish_reason": "stop"}]}, "empty"),
    "unknown reason, null": (chat(None, "weary"), "empty"),
    "tool": (chat(None, "tool_calls", tool_calls=[{"id": "x"}]), "tool_call"),
    "tool with stop": (chat("", "stop", tool_calls=[{"id": "x"}]), "tool_call"),
    "tool with a text": (chat("I look it up.", "tool_use"), "tool_call"),
    "function": (chat(None, "function_call", function_call={"name": "f"}), "tool_call"),
    "refusal": (chat(None, "stop", refusal="No."), "refusal"),
    "refusal reason": (chat("", "refusal"), "refusal"),
    "refusal part": (chat([{"type": "refusal", "refusal": "No."}]), "refusal"),
    "filtered": (chat("half a te", "content_filter"), "content_filter"),
    "safety": (chat(None, "SAFETY"), "content_filter"),
    "stream": (b'data: {"choices": [{"delta": {"content": "a"}}]}\n\ndata: [DONE]\n\n', "stream"),
    "stream with a comment": (b": PROCESSING\n\ndata: [DONE]\n\n", "stream"),
    "page": (b"<!DOCTYPE html><html>busy</html>", "html"),
}


@pytest.mark.parametrize("case", FINAL)
def test_what_another_purchase_would_not_change_is_final(case):
    body, kind = FINAL[case]
    failure = failure_of(body)
    assert (failure.kind, failure.final) == (kind, True)
    assert REMEDIES.get(kind, "") in failure.message


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b'{"choices": [{"mess', "malformed"),
        (b"", "malformed"),
        (b"[1, 2]", "malformed"),
        (b"null", "malformed"),
        ({"choices": []}, "malformed"),
        ({"choices": [None]}, "malformed"),
        (chat("half a", "error"), "server"),
        (chat("half a", "abort"), "server"),
    ],
)
def test_what_may_change_is_not(body, kind):
    failure = failure_of(body)
    assert (failure.kind, failure.final) == (kind, False)


ERRORS = {
    "status as code": ({"error": {"message": "slow down", "code": 429}}, 429, "rate_limit"),
    "list": ([{"error": {"code": 503, "message": "busy", "status": "UNAVAILABLE"}}], 503, "server"),
    "code in words": ({"error": {"message": "x", "code": "rate_limit_exceeded"}}, 429, "rate_limit"),
    "quota": ({"error": {"message": "x", "code": "insufficient_quota"}}, 429, "rate_limit"),
    "key": ({"error": {"message": "x", "type": "authentication_error"}}, 401, "refused"),
    "model": ({"error": {"message": "x", "code": "model_not_found"}}, 404, "refused"),
    "request": ({"error": {"message": "x", "type": "invalid_request_error"}}, 400, "refused"),
    "anthropic": ({"type": "error", "error": {"type": "overloaded_error", "message": "x"}}, 503, "server"),
    "vllm": ({"object": "error", "message": "x", "type": "NotFoundError", "code": 404}, 404, "refused"),
    "text": ({"error": "model is loading"}, 500, "server"),
    "text and code": ({"error": "no", "code": "400"}, 400, "refused"),
    "in the choice": ({"choices": [{"error": {"code": 502, "message": "x"}, "message": {}}]}, 502, "server"),
    "azure filter": (
        {"error": {"code": "400", "innererror": {"code": "ResponsibleAIPolicyViolation"}, "message": "x"}},
        400,
        "content_filter",
    ),
    "filter": ({"error": {"code": "content_policy_violation", "message": "x"}}, 400, "content_filter"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_with_status_200_is_read_as_its_own_status(case):
    body, status, kind = ERRORS[case]
    found = error_in(json.dumps(body).encode())
    assert found is not None and found == error_in(body) and found.status == status
    failure = failure_of(body)
    assert failure.kind == kind and failure.final == (kind in ("refused", "content_filter"))
    assert found.begun == ("choices" in body)


@pytest.mark.parametrize(
    "body", [chat(), {"choices": []}, {"error": None, **chat()}, {"error": "a note", **chat()}, []]
)
def test_no_error(body):
    assert error_in(body) is None and error_in(json.dumps(body).encode()) is None


@pytest.mark.parametrize(
    ("error", "filtered"),
    [
        ({"code": "content_filter"}, True),
        ({"type": "moderation_error"}, True),
        ({"code": "invalid_prompt", "innererror": {"code": "ResponsibleAIPolicyViolation"}}, True),
        ({"code": 403, "message": "x", "metadata": {"reasons": ["violence"], "flagged_input": "y"}}, True),
        ([{"error": {"code": "content_filter"}}], True),
        ({"code": 403, "metadata": {"reasons": []}}, False),
        ({"code": "model_not_found", "message": "content_filter"}, False),  # the message is anybody's words
        ("content_filter", False),
        (None, False),
    ],
)
def test_filtered_prompts(error, filtered):
    assert is_filtered(error) is filtered


@pytest.mark.parametrize(
    ("text", "thinking", "rest"),
    [
        ("no tags", "", "no tags"),
        ("<think>hm</think>\n\nA cat.", "<think>hm</think>\n\n", "A cat."),
        (" \n<think>\n\n</think>\n\n A cat.", " \n<think>\n\n</think>\n\n", " A cat."),
        ("hm, so</think>A cat.", "hm, so</think>", "A cat."),
        ("<think>cut off in the", "<think>cut off in the", ""),
        ("<think>a</think><think>b</think>c", "<think>a</think><think>b</think>", "c"),
        ("[THINK]a[/THINK]b", "[THINK]a[/THINK]", "b"),
        ("Write <think> and </think>.", "", "Write <think> and </think>."),
        ("", "", ""),
    ],
)
def test_thinking(text, thinking, rest):
    assert split_thinking(text) == (thinking, rest)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = ("choices", "message", "content", "text", "finish_reason", "error", "code", "type", "status", "usage", "model",
         "refusal", "tool_calls", "completion_tokens", "completion_tokens_details", "reasoning_tokens", "innererror",
         "metadata", "object", "reasons")  # fmt: skip
BODIES = st.recursive(
    ANY | st.sampled_from(["stop", "length", "error", "text", "\ud83d", 400, 10**30]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=6),
    max_leaves=20,
)


@given(BODIES, st.sampled_from(["chat", "completion"]), st.none() | st.integers(1, 100))
def test_no_body_raises(body, api, limit):
    read = read_response(body, api, limit)
    assert isinstance(read, Read) and isinstance(read.outcome, Completion | Failure)
    if isinstance(read.outcome, Completion):
        assert isinstance(read.outcome.text, str) and read.outcome.finish_reason in ("stop", "length")
    else:
        read.outcome.message.encode()  # it can be printed
    for _, message in read.notes:
        message.encode()
    assert all(type(count) is int for count in read.outcome.usage.values())


@pytest.mark.parametrize("nested", [b"[" * 900 + b"]" * 900, b'{"error":' * 900 + b"1" + b"}" * 900, b"[" * 10**5])
def test_no_depth_raises(nested):
    assert isinstance(read_response(nested, "chat").outcome, Failure)


@given(st.binary(max_size=60))
def test_no_bytes_raise(content):
    assert isinstance(read_response(content, "chat").outcome, Completion | Failure)


@given(st.text(alphabet="<>/thinka[]THINK \n", max_size=40))
def test_thinking_and_rest_are_the_text(text):
    thinking, rest = split_thinking(text)
    assert thinking + rest == text
