"""The workload that both sides of the speed benchmark run: sizes, model, prompts, reward, and how CPU time is read.

Needs torch and transformers alone, so that it runs in the peer's environment as well.

    python benchmarks/speed_workload.py CASE.json FOLDER     write checkpoint and data
    python benchmarks/speed_workload.py --rate               the rate of a 1024-cubed matrix product, FLOP/s
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MINIBATCH, EPOCHS, ROLLOUT_BATCH = 16, 4, 32
PAD, EOS = 0, 1


@dataclass(frozen=True)
class Case:
    """Sizes of a run; the defaults are workload W1. ``iterations`` are measured after an unmeasured one."""

    algorithm: str = "ppo"
    critic: str = "shared"
    family: str = "gpt2"
    layers: int = 4
    width: int = 256
    heads: int = 4
    vocabulary: int = 8192
    dtype: str = "float32"
    episodes: int = 64
    prompt: int = 32
    response: int = 32
    iterations: int = 2

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def build(case: Case, folder: Path) -> None:
    """A random checkpoint, a guide's checkpoint of the same size, 512 prompts and a recorded text for each."""
    import torch
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": PAD, "<eos>": EOS, **{f"w{i}": i for i in range(2, case.vocabulary)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    ends = {"eos_token_id": EOS, "pad_token_id": PAD}
    config: Any
    for name, seed in (("policy", 0), ("guide", 1)):
        torch.manual_seed(seed)
        if case.family == "t5":
            config = hf.T5Config(
                vocab_size=case.vocabulary, d_model=case.width, d_kv=case.width // case.heads, d_ff=4 * case.width,
                num_layers=case.layers, num_heads=case.heads, decoder_start_token_id=PAD, **ends,
            )  # fmt: skip
            model = hf.T5ForConditionalGeneration(config)
        else:
            config = hf.GPT2Config(
                vocab_size=case.vocabulary, n_embd=case.width, n_layer=case.layers, n_head=case.heads,
                n_positions=max(64, case.prompt + case.response), bos_token_id=None, **ends,
            )  # fmt: skip
            model = hf.GPT2LMHeadModel(config)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    generator = torch.Generator().manual_seed(2)
    draw = torch.randint(2, case.vocabulary, (512, case.prompt + case.response), generator=generator).tolist()
    text = [[f"w{i}" for i in row] for row in draw]
    rows = [{"id": str(n), "prompt": " ".join(words[: case.prompt])} for n, words in enumerate(text)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [
        {**row, "completion": " ".join(words[case.prompt :]), "finish_reason": "length"}
        for row, words in zip(rows, text, strict=True)
    ]
    (folder / "guide.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))


def coverage(prompt: str, text: str) -> float:
    """The reward of both sides: the share of the prompt's first eight words that the text holds."""
    keywords = prompt.split()[:8]
    written = set(text.split())
    return sum(word in written for word in keywords) / len(keywords)


class Clock:
    """CPU seconds (user and system) of this process per iteration, and how often its optimizer stepped."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)
        self.steps = 0
        self.seconds: list[float] = []
        self.parts: list[dict[str, float]] = []
        self._now: dict[str, float] = {}
        plain = torch.optim.AdamW.step

        def counted(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            self.steps += 1
            return plain(optimizer, *args, **kwargs)

        torch.optim.AdamW.step = counted  # type: ignore[method-assign]

    def part(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, its seconds counted as a part of the iteration."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._now[name] = self._now.get(name, 0.0) + time.process_time() - began

        return timed

    def lap(self, seconds: float) -> None:
        """Record the end of an iteration."""
        self.seconds.append(seconds)
        self.parts.append(self._now)
        self._now = {}

    def report(self, **work: Any) -> None:
        """Print the result as the last line; the first iteration is left out of the times."""
        measured = self.parts[1:]
        names = sorted({name for part in measured for name in part})
        result = {
            "seconds": self.seconds[1:],
            "parts": {n: sum(p.get(n, 0.0) for p in measured) / len(measured) for n in names},
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "optimizer_steps": self.steps / len(self.seconds),
            **work,
        }
        print(json.dumps(result))


def step_laps(clock: Clock) -> Any:
    """A callback for a Trainer of transformers or TRL: every optimizer step is a lap of the clock."""
    from transformers import TrainerCallback

    class Laps(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            now = time.process_time()
            clock.lap(now - self.began)
            self.began = now

    return Laps()


def rate(repeats: int = 40) -> float:
    """FLOP/s of a 1024-cubed float32 matrix product on one thread, by CPU time."""
    import torch

    torch.set_num_threads(1)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    for _ in range(5):
        a @ b
    began = time.process_time()
    for _ in range(repeats):
        a @ b
    return repeats * 2 * 1024**3 / (time.process_time() - began)


def read_case() -> tuple[Case, Path]:
    """The arguments of a side's program: the case as JSON, and the folder with its checkpoint and data."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    return Case(**json.loads(sys.argv[1])), Path(sys.argv[2])


if __name__ == "__main__":
    if sys.argv[1] == "--rate":
        print(rate())
    else:
        build(*read_case())
