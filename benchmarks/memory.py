"""Peak memory of scoring and update at a large vocabulary: the LM head by chunks against all logits at once.

    python benchmarks/memory.py [--tokens 1024,4096,16384] [--plain 1024] [--vocabulary 151936]

A random Qwen2 of one layer with the vocabulary of a Qwen scores N tokens with their entropies, and differentiates their
sum. Every row is a process of its own on one thread; its memory is the peak of the pass beyond what the process held
before, less that of the same pass without the head (``body``). ``plain`` keeps all logits, as one chunk (``--plain``:
the most tokens that it is run for). The last columns are the largest differences from plain, where both were run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rlgf_cli.console import table

RESPONSE = 64
"""Response tokens of a row; its prompt has one token."""
HEADER = ["tokens", "pass", "mode", "peak MB", "of all logits", "CPU s", "log-probs", "entropies", "gradients"]


def measured(vocabulary: int, tokens: int, mode: str, grad: bool, output: Path) -> None:
    """One pass; writes its figures and results."""
    import time

    import psutil
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    from rlgf_cli.functional import logprobs
    from rlgf_cli.models.actor_critic import ActorCritic
    from rlgf_cli.models.forward import TokenBatch
    from rlgf_cli.models.loaded import Loaded
    from rlgf_cli.models.memory import keep_freed_memory
    from rlgf_cli.models.text import TextFormat

    keep_freed_memory()  # as rlgf train does
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=vocabulary, num_hidden_layers=1, tie_word_embeddings=True, **sizes)
    model = Qwen2ForCausalLM(config)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<e>": 0}, "<e>")), eos_token="<e>"
    )
    tokenizer.pad_token = "<e>"
    actor = ActorCritic(
        Loaded(model, tokenizer, TextFormat(), "random"), ["policy"], mode="shared", with_ref_model=False
    )
    if mode == "plain":
        logprobs.LOGITS_BYTES = 1 << 60

    def run(count: int) -> dict[str, Any]:
        rows = max(1, count // RESPONSE)
        ids = torch.randint(1, vocabulary, (rows, RESPONSE + 1), generator=torch.Generator().manual_seed(1))
        prompts, lengths = ids[:, :1], torch.full((rows,), RESPONSE)
        batch = TokenBatch(prompts, torch.ones_like(prompts), ids[:, 1:], lengths)
        select = torch.full((rows, RESPONSE), mode != "body")
        with torch.set_grad_enabled(grad):
            out = actor.forward_logprobs(
                batch, select, values=["policy"], entropy=True, temperature=1.0, min_new_tokens=0
            )
            if grad:
                assert out.entropies is not None
                (out.logprobs.sum() + 0.1 * out.entropies.sum() + out.values["policy"].sum()).backward()
        gradients = [p.grad.flatten()[::97] for p in model.parameters() if p.grad is not None] if grad else []
        model.zero_grad()
        found = {"logprobs": out.logprobs.detach(), "entropies": out.entropies.detach()}
        return found | ({"gradients": torch.cat(gradients)} if gradients else {})

    run(RESPONSE)
    before, started = psutil.Process().memory_info().rss, time.process_time()
    found = run(tokens)
    seconds, peak = time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    torch.save(found, output.with_suffix(".pt"))
    output.write_text(json.dumps({"bytes": max(0, peak - before), "seconds": seconds}))


def run_alone(vocabulary: int, tokens: int, mode: str, grad: bool, output: Path) -> dict[str, Any]:
    arguments = [str(vocabulary), str(tokens), mode, str(int(grad)), str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, "--alone", *arguments], check=True, env=environment)
    return json.loads(output.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", default="1024,4096,16384")
    parser.add_argument("--plain", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    options = parser.parse_args()
    import torch

    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for grad in (False, True):
            for tokens in map(int, options.tokens.split(",")):
                logits = 4 * tokens * options.vocabulary
                modes = ["chunks", *(["plain"] if tokens <= options.plain else [])]
                paths = {mode: Path(folder, f"{tokens}.{mode}.json") for mode in ["body", *modes]}
                found = {mode: run_alone(options.vocabulary, tokens, mode, grad, path) for mode, path in paths.items()}
                results = {mode: torch.load(paths[mode].with_suffix(".pt")) for mode in modes}
                for mode in modes:
                    own = found[mode]["bytes"] - found["body"]["bytes"]
                    row = [f"{tokens:,}", "update" if grad else "scoring", mode, f"{own / 2**20:,.0f}"]
                    row += [f"{own / logits:.2f}", f"{found[mode]['seconds']:.2f}"]
                    for name in ("logprobs", "entropies", "gradients"):
                        both = mode == "chunks" and "plain" in results and name in results[mode]
                        gap = (results["chunks"][name] - results["plain"][name]).abs().max() if both else None
                        row.append("" if gap is None else f"{float(gap):.1e}")
                    rows.append(row)
                    print(" ".join(row), file=sys.stderr, flush=True)
    print(table(HEADER, rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--alone"]:
        measured(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5] == "1", Path(sys.argv[6]))
    else:
        main()
