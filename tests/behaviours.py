"""Behaviours of providers' servers: the calls that each may cost, the texts that are kept, and how the command ends.

They are data for provider_behaviours.py, which runs them. A plan answers the requests; :func:`at` lets one behaviour
happen to the requests from one number on. The prompts are ``prompt 0``, ``prompt 1`` and so on, one request each, one
after the other.
"""

from __future__ import annotations

import gzip
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fake_openai import Plan, Reply, Request
from judging import rating

Command = Literal["collect-guide", "train", "judge", "evolve"]
SPENT = {"message": "You exceeded your current quota", "type": "insufficient_quota", "code": "insufficient_quota"}
FILTERED = {"message": "The prompt was filtered", "code": "content_filter"}
USAGE = {"prompt_tokens": 10, "completion_tokens": 5}


@dataclass(frozen=True)
class Behaviour:
    """``calls``: requests that reached the server; ``paid``: those that were charged; ``texts`` (of judges: ratings)
    that were stored; None where the number depends on the time. ``exit``: the exit code; ``says``: a part of what the
    user reads; ``unsaid``: what must not be there. ``late``: answers come after the client gave up: they are
    bought again."""

    name: str
    plan: Plan
    calls: int | None
    paid: int | None
    texts: int | None
    exit: int
    says: str = ""
    command: Command = "collect-guide"
    flags: Sequence[object] = ()
    prompts: int = 4
    signal_at: int | None = None
    unsaid: str = ""
    late: bool = False


def always(reply: Reply) -> Plan:
    return lambda n, request: reply


def at(number: int, reply: Reply, *, once: bool = False, answers: Plan | None = None) -> Plan:
    """``reply`` to the requests from this number on, or to that one alone."""

    def plan(n: int, request: Request) -> Reply:
        happens = n == number if once else n >= number
        return reply if happens else (answers or (lambda n, request: Reply()))(n, request)

    return plan


def one_prompt(reply: Reply) -> Plan:
    """``reply`` to every request for the second prompt."""
    return lambda n, request: reply if request.prompt == "prompt 1" else Reply()


def error(status: int, message: str, **more: Any) -> Reply:
    return Reply(status=status, error={"message": message, **more})


def choice(**more: Any) -> Reply:
    return Reply(body={"choices": [{"index": 0, "finish_reason": "stop", **more}]})


def one_slot(seconds: float) -> Plan:
    """A server that answers one request at a time."""
    slot = threading.Lock()

    def plan(n: int, request: Request) -> Reply:
        with slot:
            time.sleep(seconds)
        return Reply()

    return plan


def wants_completion_tokens(n: int, request: Request) -> Reply:
    if "max_tokens" in request.body:
        return error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
    return Reply()


def ending(reason: str | None, says: str = "") -> Behaviour:
    return Behaviour(f"finish reason `{json.dumps(reason)}`", always(Reply(finish_reason=reason)), 4, 4, 4, 0, says)


def without_text(name: str, reply: Reply, kind: str, says: str = "") -> Behaviour:
    return Behaviour(name, always(reply), 4, 4, 0, 1, f"4 of 4 texts are still missing ({kind}: 4){says}")


def spent(name: str, reply: Reply, says: str) -> list[Behaviour]:
    """What no request could survive: before any answer, and after three."""
    return [
        Behaviour(f"{name}, at once", always(reply), 1, 0, 0, 2, says),
        Behaviour(f"{name}, after 3 answers", at(3, reply), 4, 3, 3, 3, says),
    ]


PRICED = ("--set", "guide.usd_per_million_input=1", "--set", "guide.usd_per_million_output=1")
SHORT = ("--set", "guide.outage_limit_s=2")

BEHAVIOURS: list[Behaviour] = [
    # endings
    *(ending(reason) for reason in ("stop", "eos", "eos_token", "end_turn", "STOP", "stop_sequence", None, "length")),
    ending("weary", "ends answers with the reason 'weary'"),
    # contents
    Behaviour(
        "content as a list of parts",
        always(Reply(message={"content": [{"type": "text", "text": "A cat."}]})),
        4,
        4,
        4,
        0,
    ),
    Behaviour(
        "a text behind `<think>...</think>`",
        always(Reply(text="<think>hm</think>A cat.")),
        4,
        4,
        4,
        0,
        "thinking removed: 4",
    ),
    Behaviour("`reasoning_content` beside the text", always(Reply(message={"reasoning_content": "hm"})), 4, 4, 4, 0),
    Behaviour("a completion's form in a chat", always(choice(text="A cat.")), 4, 4, 4, 0),
    Behaviour("an empty text that ended by itself", always(Reply(text="")), 4, 4, 4, 0),
    Behaviour(
        "half of a surrogate pair at the end",
        always(Reply(text="cat \ud83d")),
        4,
        4,
        4,
        0,
        "half characters removed: 4",
    ),
    # no text
    without_text(
        "null and `length`: reasoning used the limit up",
        Reply(finish_reason="length", message={"content": None}),
        "reasoning",
    ),
    without_text("empty and `length`", Reply(text="", finish_reason="length"), "reasoning"),
    without_text("`<think>` that never ends", Reply(text="<think>I wonder", finish_reason="length"), "reasoning"),
    without_text(
        "a tool call", Reply(finish_reason="tool_calls", message={"content": None, "tool_calls": [{}]}), "tool_call"
    ),
    without_text("`refusal` in the message", Reply(message={"content": None, "refusal": "No."}), "refusal"),
    without_text("null and `stop`", Reply(message={"content": None}), "empty"),
    without_text("a stream of events", Reply(raw=b'data: {"choices": []}\n\n'), "stream"),
    without_text("a web page with status 200", Reply(raw=b"<html>welcome</html>"), "html"),
    without_text("finish reason `content_filter`", Reply(finish_reason="content_filter"), "content_filter"),
    without_text("20 MB for 64 tokens", Reply(text="x" * 20_000_000), "oversized"),
    Behaviour(
        "no text in any of the first 10 answers",
        always(Reply(message={"content": None})),
        10,
        10,
        0,
        3,
        "the first 10 answers of openai:m hold no usable text",
        prompts=30,
    ),
    # errors inside of a 200
    *spent(
        'status 200 with `{"error": insufficient_quota}`',
        Reply(raw=json.dumps({"error": SPENT}).encode()),
        SPENT["message"],
    ),
    Behaviour(
        "status 200 with a JSON list of errors, once",
        at(1, Reply(raw=json.dumps([{"error": {"code": 503, "message": "busy"}}]).encode()), once=True),
        5,
        4,
        4,
        0,
    ),
    Behaviour(
        "status 200 with an error 429, once",
        at(1, Reply(raw=json.dumps({"error": {"code": 429, "message": "slow down"}}).encode()), once=True),
        5,
        4,
        4,
        0,
        "slow down",
    ),
    # filters
    Behaviour(
        "400 `content_filter` for one prompt",
        one_prompt(Reply(status=400, error=FILTERED)),
        4,
        3,
        3,
        1,
        "(content_filter: 1)",
    ),
    Behaviour(
        "403 moderation for one prompt",
        one_prompt(error(403, "Your input was flagged", metadata={"reasons": ["violence"]}, code=403)),
        4,
        3,
        3,
        1,
        "(content_filter: 1)",
    ),
    # what no request could survive
    *spent("401", error(401, "key revoked"), "key revoked"),
    *spent("402", error(402, "Insufficient Balance"), "Insufficient Balance"),
    *spent("403", error(403, "account suspended"), "account suspended"),
    *spent(
        "429 with `insufficient_quota` as code",
        error(429, SPENT["message"], code="insufficient_quota"),
        SPENT["message"],
    ),
    *spent(
        "429 with `insufficient_quota` as type",
        error(429, SPENT["message"], type="insufficient_quota"),
        SPENT["message"],
    ),
    Behaviour("404, unknown model", always(error(404, "model m does not exist")), 1, 0, 0, 2, "model m does not exist"),
    Behaviour(
        "400 for every request",
        always(error(400, "top_p is not supported")),
        10,
        0,
        0,
        2,
        "top_p is not supported",
        prompts=30,
    ),
    Behaviour("400 for one prompt", one_prompt(error(400, "too long")), 4, 3, 3, 1, "(refused: 1)"),
    Behaviour(
        "another model's name in the answers",
        always(Reply(body={"model": "else"})),
        3,
        3,
        0,
        2,
        "the answer is by 'else'",
    ),
    Behaviour("the model's name with a date", always(Reply(body={"model": "m-2024-08-06"})), 4, 4, 4, 0),
    Behaviour("no model's name", always(Reply(body={"model": None})), 4, 4, 4, 0, "model not reported: 4"),
    Behaviour(
        "a redirect to another host",
        always(Reply(status=302, headers={"Location": "http://127.0.0.1:9/"})),
        10,
        0,
        0,
        2,
        "302",
        prompts=12,
    ),
    # limits and outages
    Behaviour(
        "429 with `Retry-After: 1`, once", at(1, Reply(status=429, headers={"Retry-After": "1"}), once=True), 5, 4, 4, 0
    ),
    Behaviour("429 without a time, once", at(1, error(429, "slow down"), once=True), 5, 4, 4, 0, "slow down"),
    Behaviour(
        "429 with `Retry-After: 9999`",
        at(1, Reply(status=429, headers={"Retry-After": "9999"})),
        2,
        1,
        1,
        3,
        "asks to wait for",
    ),
    Behaviour("429 without end", at(1, error(429, "slow down")), None, 1, 1, 3, "nothing but status 429", flags=SHORT),
    Behaviour("500 once", at(1, error(500, "oops"), once=True), 5, 4, 4, 0),
    Behaviour("500 for one prompt each time", one_prompt(error(500, "oops")), 9, 3, 3, 1, "(server: 1)"),
    Behaviour(
        "503 without end",
        at(1, error(503, "overloaded")),
        None,
        1,
        1,
        3,
        "has been down",
        flags=(*SHORT, "--concurrency", 4),
        prompts=12,
    ),
    Behaviour(
        "nothing listens at the port",
        always(Reply()),
        0,
        0,
        0,
        2,
        "no answer from",
        flags=("--base-url", "http://127.0.0.1:9/v1"),
    ),
    Behaviour("no answer in time, once", at(1, Reply(delay_s=3.0), once=True), 5, 5, 4, 0, flags=("--timeout", 1)),
    Behaviour("the connection breaks, once", at(1, Reply(drop=True), once=True), 5, 5, 4, 0),
    Behaviour("half a body, once", at(1, Reply(raw=b'{"choices": [{"mess', claimed_length=500), once=True), 5, 5, 4, 0),
    Behaviour("no JSON, once", at(1, Reply(raw=b'{"choices": [{"mess'), once=True), 5, 5, 4, 0),
    Behaviour("no choices, once", at(1, Reply(body={"choices": []}), once=True), 5, 5, 4, 0),
    Behaviour(
        "one slot, 16 requests at once",
        one_slot(0.1),
        None,
        None,
        60,
        0,
        "requests at once: at most",
        flags=("--concurrency", 16, "--timeout", 1),
        prompts=60,
        late=True,
    ),
    # parameters
    Behaviour("`max_tokens` is refused for `max_completion_tokens`", wants_completion_tokens, 5, 4, 4, 0),
    Behaviour(
        "a compressed answer, though none was accepted",
        lambda n, request: Reply(
            raw=gzip.compress(
                json.dumps(
                    {
                        "model": "m",
                        "choices": [{"finish_reason": "stop", "message": {"content": "A cat."}}],
                        "usage": USAGE,
                    }
                ).encode()
            ),
            headers={"Content-Encoding": "gzip"},
        ),
        4,
        4,
        4,
        0,
    ),
    # money
    Behaviour("no usage", always(Reply(body={"usage": None})), 4, 4, 4, 0, flags=PRICED),
    Behaviour(
        "reasoning only in `total_tokens`",
        always(Reply(body={"usage": {**USAGE, "total_tokens": 5000}})),
        4,
        4,
        4,
        0,
        "4985 tokens beside",
        flags=PRICED,
    ),
    Behaviour(
        "reasoning only in the details",
        always(Reply(body={"usage": {**USAGE, "completion_tokens_details": {"reasoning_tokens": 4985}}})),
        4,
        4,
        4,
        0,
        "4985 tokens beside",
        flags=PRICED,
    ),
    Behaviour(
        "10,000 tokens for 64, cap 2.5 answers",
        always(Reply(body={"usage": {"prompt_tokens": 10, "completion_tokens": 10_000}})),
        2,
        2,
        2,
        3,
        "leaves no room",
        flags=(*PRICED, "--max-cost-usd", 0.025, "--concurrency", 16),
        prompts=60,
    ),
    Behaviour("a cap without a price", always(Reply()), 0, 0, 0, 2, "needs a price", flags=("--max-cost-usd", 1)),
    # secrets and the terminal
    Behaviour(
        "the key in an error's text",
        always(error(401, "wrong key sk-planted-0123456789")),
        1,
        0,
        0,
        2,
        "***",
        unsaid="sk-planted",
    ),
    Behaviour(
        "terminal escapes in an error's text",
        always(error(401, "\x1b[31mred\x1b]0;title\x07")),
        1,
        0,
        0,
        2,
        "red",
        unsaid="\x1b[",
    ),
    # signals
    Behaviour("SIGTERM to the command", always(Reply()), 2, 2, 2, 3, "SIGTERM", signal_at=1),
    # the other commands
    *(
        Behaviour(f"train: {name}, after 11 answers", at(11, reply), None, 11, 11, 3, says, "train")
        for name, reply, says in (
            ("429 `insufficient_quota`", error(429, SPENT["message"], code="insufficient_quota"), SPENT["message"]),
            ("402", error(402, "Insufficient Balance"), "Insufficient Balance"),
            ("403", error(403, "account suspended"), "account suspended"),
        )
    ),
    Behaviour("train: SIGTERM", always(Reply()), None, None, None, 3, "SIGTERM", "train", signal_at=11),
    Behaviour(
        "train: no answer holds a text",
        always(Reply(message={"content": None})),
        6,
        6,
        0,
        1,
        "failed 6 of 6 requests",
        "train",
    ),
    Behaviour("judge: `**Rating: 7**`", always(Reply(text="Good.\n**Rating: 7**")), 4, 4, 4, 0, command="judge"),
    Behaviour("judge: `_7_`", always(Reply(text="Rating: _7_")), 4, 4, 4, 0, command="judge"),
    Behaviour(
        "judge: a refusal of one text",
        lambda n, request: (
            Reply(message={"content": None, "refusal": "No."})
            if "text 1" in request.prompt
            else Reply(text="Rating: 7")
        ),
        4,
        4,
        3,
        0,
        "refus",
        "judge",
    ),
    Behaviour(
        "judge: quota spent after 2 answers",
        at(2, error(429, SPENT["message"], code="insufficient_quota"), answers=rating(lambda text: 7)),
        3,
        2,
        0,
        3,
        SPENT["message"],
        "judge",
    ),
    Behaviour(
        "evolve: quota spent after 5 answers",
        at(5, error(429, SPENT["message"], code="insufficient_quota")),
        6,
        5,
        0,
        3,
        SPENT["message"],
        "evolve",
    ),
]
