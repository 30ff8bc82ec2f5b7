"""A third-party server: ``transformers serve`` with a tiny chat model, on 127.0.0.1.

The model is a Llama of 60 thousand parameters that has learned the toy sentences for a few seconds, so that its
texts end by themselves and continue a prefix. Nothing is downloaded.

``python tests/real_server.py FOLDER`` makes such a model and serves it until Ctrl-C.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import NOUNS, PLACES, VERBS, make_tokenizer, sentence

START_LIMIT_S = 120.0
UVICORN_URL = r"Uvicorn running on (http://[\d.]+:\d+)"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)

# Between this process and the server stands one that waits for the end of its input. That comes also where
# this process is killed and can clean nothing up; then the server is killed.
GUARD = """
import os, subprocess, sys, threading

server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)

def wait_for_the_end():
    while os.read(0, 4096):
        pass
    server.kill()

threading.Thread(target=wait_for_the_end, daemon=True).start()
os._exit(server.wait() & 255)
"""


def make_chat_model(folder: Path) -> Path:
    """A checkpoint folder that ``transformers serve`` can chat with; its generation config samples."""
    import torch
    import transformers as hf

    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    vocab = len(tokenizer) + 8
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    torch.manual_seed(1)
    model: Any = hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=vocab, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=1024, tie_word_embeddings=True, **ends,
        )
    )  # fmt: skip
    _teach(model, tokenizer, 200)
    model.generation_config = hf.GenerationConfig(do_sample=True, **ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _teach(model: Any, tokenizer: Any, steps: int) -> None:
    """``steps`` of next-token training on the toy task: after the bare prompt, and as the answer of a chat."""
    import torch

    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        rows = []
        for _ in range(32):
            noun, verb, where = rng.choice(NOUNS), rng.choice(VERBS), rng.choice(PLACES)
            start = rng.choice(["{}\n", "user: {}\nassistant: "]).format(f"{noun} {verb} {where}")
            rows.append(start + sentence(noun, verb, where, rng) + tokenizer.eos_token)
        batch = tokenizer(rows, return_tensors="pt", padding=True, padding_side="right")
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@dataclass(frozen=True)
class Asked:
    """One line of the server's access log."""

    path: str
    status: int


class RealServer:
    """A running server. ``url`` is the base URL; ``model`` the name that it answers to, a path."""

    def __init__(self, url: str, model: Path | str | None, log: Path) -> None:
        self.url = url
        self.model = str(model) if model else None
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def asked(self) -> list[Asked]:
        """Every POST answered so far, from the server's access log."""
        return [Asked(path, int(status)) for path, status in re.findall(r'"POST (\S+) HTTP/[\d.]+" (\d+)', self.log)]

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        """One request without any client between: ``(status, JSON or text)``."""
        data = json.dumps({"model": self.model, **body}).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with _DIRECT.open(request, timeout=180) as response:
                status, raw = response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                status, raw = error.code, error.read()
        try:
            return status, json.loads(raw)
        except ValueError:
            return status, raw.decode("utf-8", "replace")


_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy, whatever the environment says


@contextlib.contextmanager
def real_server(model: Path | None) -> Iterator[RealServer]:
    """``transformers serve MODEL`` while the block runs; without a model it loads those that are asked for.

    Raises RuntimeError, with the server's log, where it does not start.
    """
    program = Path(sysconfig.get_path("scripts")) / "transformers"
    # Port 0: the system gives a free one, which the log tells. A port looked for beforehand may be gone by then.
    command = [str(program), "serve", "--host", "127.0.0.1", "--port", "0", "--device", "cpu"]
    if model is not None:
        command.append(str(model))
    with started(command, lambda log: first(UVICORN_URL, log)) as (url, log):
        yield RealServer(url + "/v1", model, log)


@contextlib.contextmanager
def started(
    command: list[str],
    url_in: Callable[[str], str | None],
    *,
    environment: Mapping[str, str] | None = None,
    limit_s: float = START_LIMIT_S,
) -> Iterator[tuple[str, Path]]:
    """A server's URL and log file while the block runs. ``url_in``: the URL in a log, None before the server runs.

    Raises RuntimeError, with the server's log, where it does not start.
    """
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "server.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                guarded(command),
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**_environment(Path(scratch)), **(environment or {})},
                start_new_session=True,  # a group of its own, to be killed as one; and Ctrl-C is for the tests
            )
        try:
            yield _wait_for_url(process, log, url_in, limit_s), log
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the server and return when it is gone: the guard does both, and where it does not, the system does."""
    assert process.stdin is not None
    try:
        process.stdin.close()
        process.wait(timeout=10)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def guarded(command: list[str]) -> list[str]:
    """``command``, killed when the standard input of what is started ends."""
    return [sys.executable, "-c", GUARD, *command]


def _environment(scratch: Path) -> dict[str, str]:
    """This process's environment without variables that lead out of this machine, and with an empty model cache."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("OPENAI_", "HF_", "TRANSFORMERS_"))}
    return {
        **ours,
        "HF_HOME": str(scratch / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "OTEL_SDK_DISABLED": "true",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


def first(pattern: str, text: str) -> str | None:
    """The first group of the first match."""
    found = re.search(pattern, text)
    return found[1] if found else None


def _wait_for_url(
    process: subprocess.Popen[bytes], log: Path, url_in: Callable[[str], str | None], limit_s: float
) -> str:
    """The URL from the log, once the server reports that it runs."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        ended = process.poll()
        text = log.read_text(encoding="utf-8", errors="replace")
        if url := url_in(text):
            return url
        if ended is not None:
            raise RuntimeError(f"the server ended with status {ended} before it ran; its log:\n{text}")
        time.sleep(0.05)
    raise RuntimeError(f"the server does not run after {limit_s:g} s; its log:\n{text}")


if __name__ == "__main__":
    folder = make_chat_model(Path(sys.argv[1]))
    with real_server(folder) as running, contextlib.suppress(KeyboardInterrupt):
        print(f"model {running.model}\nurl   {running.url}", flush=True)
        signal.pause()
