"""The Batch API of the fake server: files, batches, and their output.

A batch is processed when it has been polled ``polls`` times; each line is then answered as the plan ``line``
says, at half the price. What happens to a batch as a whole is ``end``.
"""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from fake_calls import Call, Plan, Reply, Request

if TYPE_CHECKING:
    from fake_openai import FakeOpenAI

DISCOUNT = 0.5


@dataclass
class Batch:
    """One batch; ``shown`` is the JSON that clients see."""

    shown: dict[str, Any]
    lines: list[tuple[str, Request]]
    calls: list[Call]
    polled: int = 0
    cancelled: bool = False


@dataclass
class _State:
    files: dict[str, tuple[dict[str, Any], bytes]] = field(default_factory=dict)
    batches: dict[str, Batch] = field(default_factory=dict)
    names: Iterator[int] = field(default_factory=lambda: itertools.count(1))


class Batches:
    """The endpoints ``/v1/files`` and ``/v1/batches``.

    ``polls``: how often a batch is asked for before it ends (the last time included). ``line``: the plan of
    the single lines, without which they are answered as the server's own ``plan`` answers; a status other
    than 200 is a line of the error file, ``drop`` a line in neither file. ``end``: how batches end, "completed",
    "failed", or "expired" after ``done`` lines. ``lost``: called with
    ``(method, path)`` of every request to this API after it was carried out; where true, the connection is
    dropped instead of an answer. ``refuse_after``: polls of a batch after which the account is empty. ``log``:
    every such request.
    """

    def __init__(self, server: FakeOpenAI) -> None:
        self.polls = 2
        self.line: Plan | None = None
        self.end = "completed"
        self.done: int | None = None
        self.lost: Callable[[str, str], bool] = lambda method, path: False
        self.refuse_after: int | None = None
        self.log: list[tuple[str, str]] = []
        self._server = server
        self._state = _State()
        self._lock = threading.Lock()

    def answer(self, method: str, path: str, headers: Mapping[str, str], data: bytes) -> Reply:
        parts = urlsplit(path)
        steps = parts.path.removeprefix("/v1/").split("/")
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        with self._lock:
            self.log.append((method, path))
            reply = self._route(method, steps, query, headers, data)
            polled = max((batch.polled for batch in self._state.batches.values()), default=0)
        if self.refuse_after is not None and polled > self.refuse_after:
            return _error(402, "Insufficient Balance")
        return Reply(drop=True) if self.lost(method, path) else reply

    def _route(
        self, method: str, steps: list[str], query: dict[str, str], headers: Mapping[str, str], data: bytes
    ) -> Reply:
        files, batches = self._state.files, self._state.batches
        match method, *steps:
            case "POST", "files":
                return self._upload(headers, data)
            case "GET", "files":
                return _page([shown for shown, _ in files.values()], query)
            case "GET", "files", str(name) if name in files:
                return _ok(files[name][0])
            case "GET", "files", str(name), "content" if name in files:
                return Reply(raw=files[name][1], headers={"Content-Type": "application/octet-stream"})
            case "DELETE", "files", str(name) if name in files:
                del files[name]
                return _ok({"id": name, "object": "file", "deleted": True})
            case "POST", "batches":
                return self._create(json.loads(data))
            case "GET", "batches":
                return _page([batch.shown for batch in batches.values()], query)
            case "GET", "batches", str(name) if name in batches:
                self._poll(batches[name])
                return _ok(batches[name].shown)
            case "POST", "batches", str(name), "cancel" if name in batches:
                return self._cancel(batches[name])
        return _error(404, f"no such thing: {'/'.join(steps)}")

    def _upload(self, headers: Mapping[str, str], data: bytes) -> Reply:
        found = re.search(r'boundary="?([^";]+)', headers.get("content-type", ""))
        if not found:
            return _error(400, "not multipart")
        fields: dict[str, tuple[str, bytes]] = {}
        for part in data.split(b"--" + found[1].encode())[1:-1]:
            head, _, content = part.partition(b"\r\n\r\n")
            name = re.search(r'\bname="([^"]*)"', head.decode())
            filename = re.search(r'filename="([^"]*)"', head.decode())
            if name:
                fields[name[1]] = (filename[1] if filename else "", content.removesuffix(b"\r\n"))
        if "file" not in fields or fields.get("purpose", ("", b""))[1] != b"batch":
            return _error(400, "a file and the purpose batch are wanted")
        return _ok(self._state.files[self._keep(fields["file"][1], fields["file"][0], "batch")][0])

    def _keep(self, content: bytes, filename: str, purpose: str) -> str:
        name = f"file-{next(self._state.names)}"
        shown = {
            "id": name, "object": "file", "bytes": len(content), "created_at": 0, "filename": filename,
            "purpose": purpose, "status": "processed",
        }  # fmt: skip
        self._state.files[name] = (shown, content)
        return name

    def _create(self, asked: dict[str, Any]) -> Reply:
        source, endpoint = asked.get("input_file_id"), asked.get("endpoint")
        if source not in self._state.files:
            return _error(400, f"no such file: {source}")
        if endpoint not in ("/v1/chat/completions", "/v1/completions") or asked.get("completion_window") != "24h":
            return _error(400, "endpoint or completion_window is not known")
        lines, problems = _read(self._state.files[source][1], endpoint)
        name = f"batch_{len(self._state.batches) + 1}"
        shown = {
            "id": name, "object": "batch", "endpoint": endpoint, "errors": None, "input_file_id": source,
            "completion_window": "24h", "status": "validating", "output_file_id": None, "error_file_id": None,
            "created_at": len(self._state.batches), "in_progress_at": None, "expires_at": 86400,
            "finalizing_at": None, "completed_at": None, "failed_at": None, "expired_at": None,
            "cancelling_at": None, "cancelled_at": None,
            "request_counts": {"total": len(lines), "completed": 0, "failed": 0},
            "metadata": asked.get("metadata"),
        }  # fmt: skip
        calls: list[Call] = []
        if problems:
            shown.update(errors={"object": "list", "data": problems})
        else:
            calls = [self._server.ledger.open(request, DISCOUNT) for _, request in lines]
        self._state.batches[name] = Batch(shown, lines, calls)
        return _ok(shown)

    def _poll(self, batch: Batch) -> None:
        """Advance a batch: validating, in_progress, and at the last poll the end."""
        if batch.shown["status"] not in ("validating", "in_progress", "cancelling"):
            return
        batch.polled += 1
        if batch.shown["errors"] or (self.end == "failed" and not batch.cancelled):
            problem = {"code": "planned", "message": "planned to fail", "line": None, "param": None}
            batch.shown.update(status="failed", failed_at=1)
            batch.shown["errors"] = batch.shown["errors"] or {"object": "list", "data": [problem]}
            for call in batch.calls:
                self._server.ledger.close(call, 400, None)
        elif batch.cancelled:
            self._finish(batch, "cancelled", 0)
        elif batch.polled >= self.polls:
            self._finish(batch, self.end, self.done if self.end == "expired" else None)
        else:
            batch.shown.update(status="in_progress", in_progress_at=1)

    def _finish(self, batch: Batch, status: str, done: int | None) -> None:
        """Answer the first ``done`` lines (None: all); the rest goes to the error file."""
        output: list[dict[str, Any]] = []
        errors: list[dict[str, Any]] = []
        completed = failed = 0
        done = len(batch.lines) if done is None else done
        for i, ((custom_id, request), call) in enumerate(zip(batch.lines, batch.calls, strict=True)):
            row: dict[str, Any] = {"id": f"batch_req_{i}", "custom_id": custom_id, "response": None, "error": None}
            if i >= done:
                row["error"] = {"code": f"batch_{status}", "message": f"the batch was {status} before this line"}
                self._server.ledger.close(call, 400, None)
                errors.append(row)
                continue
            reply = (self.line or self._server.plan)(i, request)
            if reply.drop:
                continue
            answer = self._server.body(request, reply)
            row["response"] = {"status_code": reply.status, "request_id": f"req_{i}", "body": answer}
            (output if reply.status == 200 else errors).append(row)
            completed, failed = completed + (reply.status == 200), failed + (reply.status != 200)
            related = answer.get("model") == self._server.reported(request)
            self._server.ledger.close(call, reply.status, answer, related, DISCOUNT)
        output.reverse()  # the order of the lines is not promised
        for key, rows in (("output_file_id", output), ("error_file_id", errors)):
            if rows:
                text = "".join(json.dumps(row) + "\n" for row in rows)
                batch.shown[key] = self._keep(text.encode(), f"{batch.shown['id']}_{key}.jsonl", "batch_output")
        counts = {"total": len(batch.lines), "completed": completed, "failed": failed}
        batch.shown.update({"status": status, f"{status}_at": 1, "request_counts": counts})

    def _cancel(self, batch: Batch) -> Reply:
        if batch.shown["status"] not in ("validating", "in_progress"):
            return _error(409, f"the batch is {batch.shown['status']}")
        batch.cancelled = True
        batch.shown.update(status="cancelling", cancelling_at=1)
        return _ok(batch.shown)


def _read(content: bytes, endpoint: str) -> tuple[list[tuple[str, Request]], list[dict[str, Any]]]:
    """The lines of an input file, and their errors."""
    lines: list[tuple[str, Request]] = []
    problems: list[dict[str, Any]] = []
    seen: set[str] = set()
    for number, text in enumerate(content.decode().splitlines(), start=1):
        code = None
        try:
            row = json.loads(text)
        except ValueError:
            row, code = {}, "invalid_json_line"
        if not code and (row.keys() != {"custom_id", "method", "url", "body"} or row["method"] != "POST"):
            code = "invalid_request"
        elif not code and row["url"] != endpoint:
            code = "mismatched_endpoint"
        elif not code and row["custom_id"] in seen:
            code = "duplicate_custom_id"
        elif not code and lines and row["body"].get("model") != lines[0][1].body.get("model"):
            code = "mismatched_model"
        if code:
            problems.append({"code": code, "message": code, "line": number, "param": None})
            continue
        seen.add(row["custom_id"])
        lines.append((row["custom_id"], Request(row["url"], row["body"], {})))
    if not lines and not problems:
        problems.append({"code": "empty_file", "message": "empty_file", "line": None, "param": None})
    return lines, problems


def _ok(answer: object) -> Reply:
    return Reply(raw=json.dumps(answer).encode())


def _error(status: int, message: str) -> Reply:
    error = {"error": {"message": message, "code": None, "type": "invalid_request_error"}}
    return Reply(status=status, raw=json.dumps(error).encode())


def _page(rows: list[dict[str, Any]], query: dict[str, str]) -> Reply:
    """A page of a list, the newest first."""
    rows = rows[::-1]
    if after := query.get("after"):
        rows = rows[[row["id"] for row in rows].index(after) + 1 :]
    page = rows[: int(query.get("limit", 20))]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return _ok({"object": "list", "data": page, **ends, "has_more": len(rows) > len(page)})
