"""The parts of benchmarks/gpu.sh in Python: data and model, the device's ceilings, a stage's peak memory, the table."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from grpo_workload import REQUEST

from rlgf_cli.console import table

MODELS = {"sft": "smollm2", "guide.jsonl": "smollm2", "ppopp": "smollm2", "grpo_lora": "smollm2", "eval": "smollm2"}
"""The model of each stage; the others' is qwen2."""
VOCABULARY = 151_936


def prepare(out: Path, device: str, layers: int, width: int) -> None:
    """Prompts as requests to a chat model, and a checkpoint with random weights and Qwen2's 1.5B config (28 layers of
    width 1536), which has the tokenizer of smollm2; what the table needs of both models goes into ``facts.json``."""
    import transformers as hf

    from rlgf_cli.models.gguf import plain_checkpoint

    prompts: list[str] = []
    for split in ("train", "test"):
        lines = (out / "grammar" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        rows = [{**row, "prompt": REQUEST.format(words=", ".join(row["meta"]["concepts"]))} for row in rows]
        (out / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        prompts += [row["prompt"] for row in rows[:100]]
    folder, _ = plain_checkpoint("smollm2")
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    config = hf.Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=max(2, width // 128),
        num_key_value_heads=2, intermediate_size=width * 35 // 6, tie_word_embeddings=True,
        max_position_embeddings=32_768, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        qwen2 = hf.Qwen2ForCausalLM(config)
    qwen2.to(torch.bfloat16).save_pretrained(out / "qwen2")
    tokenizer.save_pretrained(out / "qwen2")
    smollm2 = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    facts = {
        "prompt_tokens": statistics.mean(map(len, ids)),
        "models": {name: _sizes(model) for name, model in (("smollm2", smollm2), ("qwen2", qwen2))},
    }
    (out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")


def _sizes(model: Any) -> dict[str, int]:
    """Parameters of the layers and of the (tied) output head."""
    head = model.get_output_embeddings().weight.numel()
    return {"body": sum(p.numel() for p in model.parameters()) - head, "head": head}


def ceilings(out: Path, device: str) -> None:
    """Rates of a large bfloat16 matrix product and of a large copy (bytes read and written), best of five."""
    size = 8192 if device.startswith("cuda") else 1024
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty((1 << 30) if device.startswith("cuda") else (1 << 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "torch": torch.__version__,
        "matmul_flops": 2 * size**3 / _seconds(lambda: torch.mm(a, b), device),
        "copy_bytes": 2 * source.numel() / _seconds(lambda: target.copy_(source), device),
    }
    (out / "ceilings.json").write_text(json.dumps(found, indent=1) + "\n")


def _seconds(work: Callable[[], Any], device: str, repeats: int = 10) -> float:
    def synchronize() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    times = []
    for _ in range(6):
        synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        synchronize()
        times.append((time.perf_counter() - began) / repeats)
    return min(times[1:])


def stage(out: Path, name: str, arguments: Sequence[str]) -> None:
    """Run ``rlgf`` in this process; write its seconds and its peak memory on the GPU and as a process."""
    from rlgf_cli.cli.app import main as rlgf

    began, code = time.perf_counter(), 0
    try:
        rlgf(list(arguments))
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    result = {
        "seconds": time.perf_counter() - began,
        "gpu_peak_mb": torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None,
        "process_peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    (out / f"{name}.stage.json").write_text(json.dumps(result) + "\n")
    sys.exit(code)


def letters(text: str) -> float:
    """A reward in which texts of random tokens differ: the share of the letters a to m."""
    return sum(c in "abcdefghijklm" for c in text.lower()) / max(1, len(text))


def figures(run: Path, sizes: dict[str, int], prompt: float, tops: dict[str, Any]) -> list[str]:
    """Of a training run: tokens per second of rollout and update, and their shares of the ceilings.

    The rollout's least work is to read the weights in bfloat16 once for every token of the longest row. The update's is
    the matrix products of response tokens and of each group's prompt, once: forwards, and backwards to the activations
    and, where all weights learn, to the weights. Attention between tokens is left out.
    """
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()][1:]
    config = json.loads((run / "config.resolved.json").read_text(encoding="utf-8"))["values"]
    group = config["algorithm"].get("group_size") or 1
    per_weight = 4 if config["lora"]["enabled"] else 6
    longest = config["lengths"]["max_new_tokens"]
    batches = -(-config["rollout"]["episodes"] // config["rollout"]["batch_size"])
    written = [row["episodes"] * row["length/mean"] for row in rows]
    rollout, update = ([row[f"time/{part}"] for row in rows] for part in ("rollout", "update"))
    own = [n * row["tokens/policy"] for n, row in zip(written, rows, strict=True)]
    steps = sum(longest * batches * row["tokens/policy"] for row in rows)  # a guide's text is not written by steps
    read = 2 * (sizes["body"] + sizes["head"]) * steps
    products = sum(
        per_weight * (sizes["body"] * (n + prompt * row["episodes"] / group) + sizes["head"] * n)
        for n, row in zip(written, rows, strict=True)
    )
    return [
        f"{sum(own) / sum(rollout):,.0f}",
        f"{read / sum(rollout) / tops['copy_bytes']:.1%}",
        f"{sum(written) / sum(update):,.0f}",
        f"{products / sum(update) / tops['matmul_flops']:.1%}",
    ]


def show(out: Path) -> None:
    """Print the table of all stages that were run."""
    tops = json.loads((out / "ceilings.json").read_text())
    facts = json.loads((out / "facts.json").read_text())
    rows = []
    for path in sorted(out.glob("*.stage.json"), key=lambda found: found.stat().st_mtime):
        name, result = path.name.removesuffix(".stage.json"), json.loads(path.read_text())
        model = MODELS.get(name, "qwen2")
        peak = result["gpu_peak_mb"] or result["process_peak_mb"]
        trained = (out / name / "metrics.jsonl").is_file() and name != "sft"
        more = figures(out / name, facts["models"][model], facts["prompt_tokens"], tops) if trained else [""] * 4
        rows.append([name, model, f"{result['seconds']:.0f}", f"{peak:,.0f}", *more])
    for name, size in facts["models"].items():
        print(f"{name}: {size['body'] / 1e6:,.0f}M parameters in layers, {size['head'] / 1e6:,.0f}M in embeddings")
    print(
        f"{tops['device']}, torch {tops['torch']}: matrix product {tops['matmul_flops'] / 1e12:.2f} TFLOP/s "
        f"(bfloat16), copy {tops['copy_bytes'] / 1e9:.0f} GB/s"
    )
    where = "GPU" if tops["device"] != "cpu" else "process, there is no GPU"
    header = ["stage", "model", "seconds", f"peak MB ({where})", "rollout tokens/s", "of bandwidth"]
    print(table([*header, "update tokens/s", "of matrix product"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("prepare", "ceilings", "stage", "table"):
        own = commands.add_parser(command)
        own.add_argument("out", type=Path)
        if command in ("prepare", "ceilings"):
            own.add_argument("--device", required=True)
        if command == "prepare":
            own.add_argument("--layers", type=int, required=True)
            own.add_argument("--width", type=int, required=True)
        if command == "stage":
            own.add_argument("name")
            own.add_argument("arguments", nargs="+")
    given = parser.parse_args()
    if given.command == "prepare":
        prepare(given.out, given.device, given.layers, given.width)
    elif given.command == "ceilings":
        ceilings(given.out, given.device)
    elif given.command == "stage":
        stage(given.out, given.name, given.arguments)
    else:
        show(given.out)


if __name__ == "__main__":
    main()
