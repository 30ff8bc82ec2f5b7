"""Speed of a compiled forward pass over a static cache against the decode loop.

    python benchmarks/decode.py [--vocabulary 8192] [--device cpu] [--runs 5]

32 prompts of 32 tokens and 32 greedy tokens each, GPT-2 of 4 layers x 256, random weights. Both sides generate the
same tokens, or the comparison stops. CPU seconds on a CPU, wall seconds elsewhere; the first run of each is not
counted, and the time that compiling took is printed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, StaticCache

from rlgf_cli.console import table
from rlgf_cli.models.generate import sample

ROWS, PROMPT, NEW = 32, 32, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = GPT2Config(vocab_size=options.vocabulary, n_embd=256, n_layer=4, n_head=4, bos_token_id=None)
    config.eos_token_id = 0
    model = GPT2LMHeadModel(config).eval().to(options.device)
    prompts = torch.randint(5, options.vocabulary, (ROWS, PROMPT))
    compiled = torch.compile(model, dynamic=False)

    def as_it_is() -> list[list[int]]:
        found = sample(
            model, prompts.tolist(), max_new_tokens=NEW, uniforms=None, eos_ids={0}, pad_id=0, min_new_tokens=NEW,
            batch_size=ROWS,
        )  # fmt: skip
        return [row.ids for row in found]

    def static() -> list[list[int]]:
        return _static(config, model, compiled, prompts.to(options.device))

    began = time.perf_counter()
    expected, got = as_it_is(), static()
    print(f"compiling and the first runs: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    if expected != got:
        sys.exit("the two sides wrote different tokens")
    seconds = [[_seconds(side, options.device) for side in (as_it_is, static)] for _ in range(options.runs)]
    ratios = [a / b for a, b in seconds]
    rows = [
        [name, *(f"{pair[i]:.2f}" for pair in seconds)] for i, name in enumerate(("as it is", "static and compiled"))
    ]
    print(table(["seconds", *(f"run {n + 1}" for n in range(options.runs))], rows))
    print(f"static and compiled is {statistics.median(ratios):.2f} times as fast (median)")


@torch.no_grad()
def _static(config: Any, model: Any, compiled: Any, prompts: torch.Tensor) -> list[list[int]]:
    """Greedy text by one compiled forward pass a token, over a cache of the final size; EOS (0) is blocked."""
    device = prompts.device
    cache = StaticCache(config=config, max_cache_len=PROMPT + NEW)
    mask = torch.zeros(ROWS, PROMPT + NEW, dtype=torch.long, device=device)
    mask[:, :PROMPT] = 1
    logits = model(
        input_ids=prompts, attention_mask=mask[:, :PROMPT], past_key_values=cache, use_cache=True, logits_to_keep=1
    ).logits
    written = [logits[:, -1, 1:].argmax(-1) + 1]
    for at in range(PROMPT, PROMPT + NEW - 1):
        mask[:, at] = 1
        logits = compiled(
            input_ids=written[-1][:, None],
            attention_mask=mask,
            position_ids=torch.full((ROWS, 1), at, device=device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        written.append(logits[:, -1, 1:].argmax(-1) + 1)
    return torch.stack(written, 1).tolist()


def _seconds(side: Callable[[], Any], device: str) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    began = clock()
    side()
    return clock() - began


if __name__ == "__main__":
    main()
