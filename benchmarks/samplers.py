"""The engines that sample for a policy, on SmolLM2-135M-Instruct: rlgf's own loop, transformers' generate, and vLLM.

    VLLM_PYTHON=ENV/bin/python make bench-samplers
    PYTHONPATH=src OMP_NUM_THREADS=1 ENV/bin/python benchmarks/samplers.py [--data FILE] [--rounds 3] [-o results.json]

ENV is an environment with vLLM (its build for CPUs where there is no GPU) and what rlgf requires (CONTRIBUTING.md).
Real prompts: one sentence with the words of a CommonGen validation prompt, in the model's chat template.

Arrival: after an optimizer step, of all weights and then of an adapter, vLLM is handed the policy; its greedy texts are
compared with the own loop's, and its log-probabilities of what it samples with the training model's. Where two texts
differ, the training model's two best tokens at that place are shown: rounding can swap them only where they are near.
Speed: new tokens per CPU second, user and system, of one thread, EOS blocked so that all engines write equally many;
each engine is in a process of its own, in turn, and a process's first round is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch

from rlgf_cli.artifacts.jsonl import read_examples
from rlgf_cli.config.common import LengthConfig, LoraConfig, ModelConfig, TextConfig
from rlgf_cli.config.train import SamplerConfig
from rlgf_cli.console import table
from rlgf_cli.models.generate import pad_rows
from rlgf_cli.models.load import add_lora, load
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.prompts import Encoded, encode_prompts
from rlgf_cli.models.samplers.base import Distribution, OwnSampler, SampleRequest
from rlgf_cli.models.samplers.engine import EngineSampler
from rlgf_cli.protocols import Example

REQUEST = "Write one sentence that uses the words: {words}."
TOKENS, GREEDY, SHARE = 24, 50, 0.35
CASES = {"48 prompts": (48, 1), "6 prompts, 8 texts each": (6, 8)}
"""Number of prompts, and of texts for each."""
ENGINES = ("own loop", "transformers", "vLLM")


def policy(lora: bool = False) -> Loaded:
    model = ModelConfig(name="smollm2", device="cpu", dtype="float32")
    loaded = load(model, text=TextConfig(chat=True), for_training=True)
    return add_lora(loaded, LoraConfig(enabled=True, r=16, target_modules="all-linear")) if lora else loaded


def encoded(loaded: Loaded, data: Path, count: int) -> list[Encoded]:
    rows = read_examples(data, limit=count)
    examples = [
        Example(row.id, REQUEST.format(words=", ".join(row.meta["concepts"])), row.references, row.meta) for row in rows
    ]
    return encode_prompts(loaded, examples, LengthConfig(max_new_tokens=TOKENS))[0]


def started(loaded: Loaded, prompts: list[Encoded]) -> EngineSampler:
    longest = max(len(p.ids) for p in prompts) + TOKENS
    return EngineSampler.start(SamplerConfig(engine="vllm", memory_share=SHARE), loaded, longest=longest)


# --- arrival


def logprobs_of(loaded: Loaded, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Log-probabilities [T, V] of every token at each response position: one text at a time, without a cache."""
    ids = torch.tensor([[*prompt, *response[:-1]]])
    return loaded.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float().log_softmax(-1)


def optimizer_step(loaded: Loaded, prompts: list[Encoded], rate: float) -> float:
    """One AdamW step up the likelihood of a reference of each of eight prompts; returns the loss before it."""
    optimizer = torch.optim.AdamW([p for p in loaded.model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    losses = []
    for prompt in prompts[:8]:
        target = loaded.text.encode_response(loaded.tokenizer, prompt.example.references[0])
        losses.append(-logprobs_of(loaded, prompt.ids, target)[range(len(target)), target].mean())
    loss = torch.stack(losses).mean()
    loss.backward()
    optimizer.step()
    loaded.model.zero_grad(set_to_none=True)
    return float(loss.detach())


@torch.no_grad()
def arrival(loaded: Loaded, engine: EngineSampler, prompts: list[Encoded]) -> dict[str, Any]:
    """Greedy texts against the own loop's, and the gap of sampled tokens."""
    began = time.process_time()
    engine.send()
    sent = time.process_time() - began
    ids, limits = [p.ids for p in prompts], [TOKENS] * len(prompts)
    empty: list[list[int]] = [[] for _ in prompts]
    own, theirs = (s.sample(SampleRequest(ids, empty, limits, None)) for s in (OwnSampler(loaded), engine))
    differences = []
    for prompt, a, b in zip(prompts, own, theirs, strict=True):
        at = next((i for i, (x, y) in enumerate(zip(a.ids, b.ids, strict=False)) if x != y), None)
        if at is not None:
            best = logprobs_of(loaded, prompt.ids, a.ids)[at].topk(2)
            differences.append(
                {
                    "prompt": prompt.example.id,
                    "position": at,
                    "own": a.ids[at],
                    "vllm": b.ids[at],
                    "two best": best.indices.tolist(),
                    "nats between them": float(best.values[0] - best.values[1]),
                }
            )
        elif a.ids != b.ids:
            sys.exit(f"{prompt.example.id}: one text is the beginning of the other")
    uniforms = np.random.default_rng(0).random((len(prompts), TOKENS))
    gaps: list[float] = []
    for prompt, row in zip(prompts, engine.sample(SampleRequest(ids, empty, limits, uniforms)), strict=True):
        expected = logprobs_of(loaded, prompt.ids, row.ids)[range(len(row.ids)), row.ids]
        gaps += (torch.tensor(row.logprobs) - expected).abs().tolist()
    return {
        "equal": len(prompts) - len(differences),
        "differences": differences,
        "gap": statistics.fmean(gaps),
        "gap_max": max(gaps),
        "sampled tokens": len(gaps),
        "texts": [loaded.text.decode_response(loaded.tokenizer, row.ids) for row in own],
        "hand-over CPU s": sent,
    }


def arrivals(data: Path) -> dict[str, Any]:
    """Before and after an update, for all weights; after one, for an adapter."""
    found: dict[str, Any] = {}
    for lora in (False, True):
        loaded = policy(lora)
        prompts = encoded(loaded, data, GREEDY)
        with closing(started(loaded, prompts)) as engine:
            name = "LoRA r 16, all linear layers" if lora else "all weights"
            if not lora:
                found["as loaded"] = arrival(loaded, engine, prompts)
            loss = optimizer_step(loaded, prompts, 1e-3 if lora else 1e-4)
            found[f"after a step on {name}"] = {"loss": loss, **arrival(loaded, engine, prompts)}
        del loaded
    return found


# --- speed


@contextmanager
def side(engine: str, loaded: Loaded, prompts: list[Encoded]) -> Iterator[Callable[[list[list[int]], np.ndarray], Any]]:
    """``sample(prompt ids, uniforms)``: the new tokens of each."""
    if engine == "transformers":
        yield lambda ids, _: by_transformers(loaded, ids)
        return
    sampler = started(loaded, prompts) if engine == "vLLM" else OwnSampler(loaded)
    with closing(sampler):

        def sample(ids: list[list[int]], uniforms: np.ndarray) -> list[list[int]]:
            distribution = Distribution(min_new_tokens=TOKENS)
            request = SampleRequest(ids, [[] for _ in ids], [TOKENS] * len(ids), uniforms, distribution)
            return [row.ids for row in sampler.sample(request, batch_size=len(ids))]

        sample.send = sampler.send  # type: ignore[attr-defined]
        yield sample


@torch.no_grad()
def by_transformers(loaded: Loaded, ids: list[list[int]]) -> list[list[int]]:
    rows, mask = pad_rows(ids, loaded.pad_id, left=True)
    out = loaded.model.generate(
        input_ids=rows, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        min_new_tokens=TOKENS, max_new_tokens=TOKENS, pad_token_id=loaded.pad_id,
    )  # fmt: skip
    return out[:, rows.shape[1] :].tolist()


def speeds(engine: str, data: Path, rounds: int) -> dict[str, list[float]]:
    """New tokens per CPU second of each round, by case. vLLM's prefix cache is emptied before each."""
    loaded = policy()
    prompts = encoded(loaded, data, max(count for count, _ in CASES.values()))
    found: dict[str, list[float]] = {}
    with side(engine, loaded, prompts) as sample:
        for case, (count, texts) in CASES.items():
            ids = [p.ids for p in prompts[:count] for _ in range(texts)]
            for number in range(rounds + 1):
                getattr(sample, "send", lambda: None)()
                uniforms = np.random.default_rng(number).random((len(ids), TOKENS))
                began = time.process_time()
                rows = sample(ids, uniforms)
                seconds = time.process_time() - began
                if any(len(row) != TOKENS for row in rows):
                    sys.exit(f"{engine}: {TOKENS} tokens a text were meant, and {sorted({len(r) for r in rows})} came")
                if number:
                    found.setdefault(case, []).append(len(ids) * TOKENS / seconds)
    return found


def in_a_process(*arguments: str) -> Any:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="CommonGen prompts; default: in the folder RLGF_REAL_DATA")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=["arrival", *ENGINES], help="one part, in this process, as JSON")
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    data = given.data or Path(os.environ.get("RLGF_REAL_DATA", "")) / "commongen" / "validation.jsonl.gz"
    if not data.is_file():
        parser.error(f"{data} is no file: give --data or set RLGF_REAL_DATA")
    torch.set_num_threads(1)
    if given.part is not None:
        part = arrivals(data) if given.part == "arrival" else speeds(given.part, data, given.rounds)
        print(json.dumps(part))
        return
    common = ("--data", str(data), "--rounds", str(given.rounds), "--part")
    results: dict[str, Any] = {"arrival": in_a_process(*common, "arrival")}
    results["speed"] = {engine: in_a_process(*common, engine) for engine in ENGINES}
    if given.output is not None:
        given.output.write_text(json.dumps(results, indent=1) + "\n")
    header = ["vLLM", f"greedy texts equal, of {GREEDY}", "nats at the first difference", "gap", "largest", "CPU s"]
    rows = [
        [name, str(r["equal"]), ", ".join(f"{d['nats between them']:.1e}" for d in r["differences"]) or "-",
         f"{r['gap']:.1e}", f"{r['gap_max']:.1e}", f"{r['hand-over CPU s']:.2f}"]
        for name, r in results["arrival"].items()
    ]  # fmt: skip
    print(table(header, rows))
    own = {case: statistics.median(rates) for case, rates in results["speed"]["own loop"].items()}
    rows = [
        [engine, case, f"{statistics.median(rates):.1f}", f"{min(rates):.1f} to {max(rates):.1f}",
         f"{statistics.median(rates) / own[case]:.2f}"]
        for engine, cases in results["speed"].items()
        for case, rates in cases.items()
    ]  # fmt: skip
    print(table(["engine", "case", "tokens per CPU s", "rounds", "of the own loop's"], rows))


if __name__ == "__main__":
    main()
