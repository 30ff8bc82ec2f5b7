"""Pushing to the hub, against a server on this machine that speaks the endpoints in question, and the model card."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlgf_cli.errors import UserError
from rlgf_cli.models import hub
from rlgf_cli.models.card import write_card


class FakeHub(ThreadingHTTPServer):
    """Keeps what it was asked and the files of every commit; ``refuse``: the status of every answer."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.refuse: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer({"id": "user/model", "sha": "0" * 40, "siblings": [], "tags": [], "private": False})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self._answer({"url": f"{self.server.url}/user/model", "id": "user/model"})
        elif "/preupload/" in path:
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            self._answer({"files": [{**f, "shouldIgnore": False} for f in files]})
        elif "/commit/" in path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            url = f"{self.server.url}/user/model/commit/{'0' * 40}"
            self._answer({"success": True, "commitOid": "0" * 40, "commitUrl": url})
        else:
            self._answer({})

    def _answer(self, value: dict[str, Any]) -> None:
        self.server.asked.append((self.command, self.path.partition("?")[0]))
        self.server.tokens.add(self.headers.get("Authorization"))
        data = json.dumps({"error": "You may not."} if self.server.refuse else value).encode()
        self.send_response(self.server.refuse or 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def fake_hub() -> Iterator[FakeHub]:
    with FakeHub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's folder."""
    files = ["config.json", "model.safetensors", "README.md", "run.json", "metrics.jsonl", "checkpoints/checkpoint-1/x"]
    for name in [*files, "rollouts/step_1.jsonl", "eval/scores.json", ".README.md.1.tmp", "critics/value.safetensors"]:
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}")
    return tmp_path / "run"


def push(folder: Path, url: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``hub.push`` in a process of its own: huggingface_hub reads its settings when it is imported."""
    code = (
        "import sys; from rlgf_cli.errors import RlgfError; from rlgf_cli.models import hub\n"
        "try: hub.check('user/model'); print(hub.push(sys.argv[1], 'user/model'))\n"
        "except RlgfError as e: print(e, e.hint, sep='\\n'); sys.exit(e.exit_code)"
    )
    settings = {"HF_ENDPOINT": url, "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0", **environment}
    return subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **settings},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_push_creates_the_repository_and_uploads_the_model(folder: Path, fake_hub: FakeHub) -> None:
    done = push(folder, fake_hub.url)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith("/user/model")
    assert [(c["organization"], c["name"]) for c in fake_hub.created] == [("user", "model")]
    uploaded = {name: data.decode() for name, data in fake_hub.files.items()}
    names = ["README.md", "config.json", "critics/value.safetensors", "metrics.jsonl", "model.safetensors", "run.json"]
    assert uploaded == {name: f"content of {name}" for name in names}
    assert fake_hub.tokens == {"Bearer hf_secret"}
    assert "hf_secret" not in done.stdout + done.stderr


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_refusal_is_told_and_the_folder_stays(folder: Path, fake_hub: FakeHub, status: int) -> None:
    fake_hub.refuse = status
    done = push(folder, fake_hub.url)
    assert done.returncode == 1
    assert "the model was not pushed to user/model" in done.stdout
    assert f"hf upload user/model {folder}" in done.stdout
    assert "Traceback" not in done.stderr
    assert (folder / "model.safetensors").exists()


def test_no_server_and_no_token(folder: Path, tmp_path: Path) -> None:
    done = push(folder, "http://127.0.0.1:9")
    assert done.returncode == 1 and "was not pushed" in done.stdout
    done = push(folder, "http://127.0.0.1:9", HF_TOKEN="", HF_HOME=str(tmp_path / "empty"))
    assert done.returncode == 2 and "needs a token" in done.stdout and "HF_TOKEN" in done.stdout


def test_checks_that_ask_no_network() -> None:
    with pytest.raises(UserError, match="no repository name"):
        hub.check("a//b")
    with pytest.raises(UserError, match="offline"):
        hub.check("user/model")


def test_the_card_says_what_was_run(tmp_path: Path) -> None:
    path = write_card(
        tmp_path,
        title="commongen-ppo",
        command="train",
        base_model="google/t5-v1_1-base",
        data=["/home/someone/secret/train.jsonl"],
        metrics={"score_mean": 0.123456, "steps": 500, "missing": None},
        guide={"guide": "gpt-3.5", "calls": 1200, "cost_usd": 1.25},
    )
    text = path.read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front == {"library_name": "transformers", "tags": ["rlgf", "train"], "base_model": "google/t5-v1_1-base"}
    assert "# commongen-ppo" in text and "`rlgf train`" in text
    assert "- `train.jsonl`" in text and "someone" not in text
    assert "| score mean | 0.1235 |" in text and "| steps | 500 |" in text and "missing" not in text
    assert "| cost usd | 1.25 |" in text and "provider's terms" in text
    assert "## Licence" in text


def test_a_card_without_guide_or_data_and_with_a_local_base(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    text = write_card(tmp_path, title="x", command="merge", base_model=str(base), data=[], metrics={}).read_text()
    assert "base_model" not in yaml.safe_load(text.split("---")[1])
    assert "from `base`" in text and str(tmp_path) not in text
    assert "## Guide" not in text and "provider's terms" not in text and "## Data" not in text
