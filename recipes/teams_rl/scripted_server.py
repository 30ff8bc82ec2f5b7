"""The scripted guide (scripted.py) behind an OpenAI-compatible endpoint on 127.0.0.1.

    python recipes/teams_rl/scripted_server.py [--port 8711] [--operations FILE]

prints its URL. A prompt that an operation's wording makes is answered with that operation's rewrite; any other prompt
is taken for an instruction and answered. Chat and completion requests are answered alike, and the ``seed`` that rlgf
sends fixes the words.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import scripted

from rlgf_cli.evolve.operations import PLACEHOLDER, Operation, read_operations


def text_for(prompt: str, seed: int, operations: Sequence[Operation]) -> str:
    """What the scripted guide says to a prompt."""
    for operation in operations:
        before, _, after = operation.prompt.partition(PLACEHOLDER)
        if prompt.startswith(before) and prompt.endswith(after) and len(prompt) >= len(before) + len(after):
            return scripted.rewrite(operation.name, prompt[len(before) : len(prompt) - len(after)], seed)
    return scripted.answer(prompt, seed)


def reply(path: str, body: dict[str, Any], say: Callable[[str, int], str]) -> dict[str, Any]:
    """The body of an answer; a token is a word here, and no text is cut."""
    chat = path.endswith("/chat/completions")
    prompt = body["messages"][-1]["content"] if chat else body["prompt"]
    text = say(prompt, body.get("seed") or 0)
    usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(text.split())}
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
    return {
        "id": "scripted",
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": body["model"],
        "choices": [choice | ({"message": {"role": "assistant", "content": text}} if chat else {"text": text})],
        "usage": {**usage, "total_tokens": sum(usage.values())},
    }


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


def serve(port: int, operations: Sequence[Operation]) -> ThreadingHTTPServer:
    """A server that is bound and not yet running: ``serve_forever`` runs it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1  # headers and body leave in one packet

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            data = json.dumps(reply(self.path, body, lambda prompt, seed: text_for(prompt, seed, operations))).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            self.wfile.flush()

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    return _Server(("127.0.0.1", port), Handler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=0, help="0: any that is free; the URL is printed")
    parser.add_argument("--operations", help="the YAML file that rlgf is given; without it the built-in one")
    options = parser.parse_args()
    with serve(options.port, read_operations(options.operations)) as server:
        print(f"http://127.0.0.1:{server.server_address[1]}/v1", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


if __name__ == "__main__":
    main()
