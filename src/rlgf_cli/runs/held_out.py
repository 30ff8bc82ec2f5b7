"""The held-out result of a training run: the policy's own texts on held-out prompts, with their scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev

from rlgf_cli.config.common import DecodingConfig, LengthConfig
from rlgf_cli.errors import RlgfError
from rlgf_cli.models.completions import generate_texts
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.prompts import Encoded
from rlgf_cli.protocols import Example
from rlgf_cli.training.divergence import HeldOutResult
from rlgf_cli.training.loop import HeldOutEvaluator, Scorer
from rlgf_cli.training.parallel.processes import Processes


def make_evaluator(
    loaded: Loaded,
    prompts: Sequence[Encoded],
    scorer: Scorer | None,
    decoding: DecodingConfig,
    lengths: LengthConfig,
    *,
    seed: int,
    processes: Processes,
    watched: Callable[[Sequence[Example], Sequence[str]], Sequence[float | None]] | None = None,
) -> HeldOutEvaluator | None:
    """Samples the policy's texts with a fixed seed and scores them; None without held-out prompts or a reward.

    ``watched`` gives a second number per text (None: it skips one). It sees all texts at once, in one process.
    """
    if not prompts or scorer is None:
        return None
    examples = [p.example for p in prompts]

    def mine() -> dict[str, tuple[float | None, str]]:
        some = processes.own(prompts)
        if not some:
            return {}
        texts = [c.text for c in generate_texts(loaded, some, decoding, lengths, seed=seed)]
        scores = scorer([p.example for p in some], texts)
        return {p.example.id: (s.value if s else None, text) for p, s, text in zip(some, scores, texts, strict=True)}

    def evaluate() -> HeldOutResult:
        parts = processes.gather(processes.raise_together(mine))
        scored = {key: pair for part in parts for key, pair in part.items()}
        texts = [scored[e.id][1] for e in examples]
        scores = {e.id: score for e in examples if (score := scored[e.id][0]) is not None}
        if not scores:
            raise RlgfError(
                f"the reward gave none of the {len(examples)} held-out texts a score",
                hint="a judge whose ratings can be read (rlgf doctor), or its on_unreadable: value; --resume goes on",
            )
        error = stdev(scores.values()) / math.sqrt(len(scores)) if len(scores) > 1 else 0.0
        figures = {"eval/score": fmean(scores.values()), "eval/score_error": error}
        figures["eval/length"] = fmean(len(t.split()) for t in texts)
        if skipped := len(examples) - len(scores):
            figures["eval/skipped"] = float(skipped)
        if watched is None:
            return HeldOutResult(figures, scores)
        values = processes.broadcast(processes.on_main(lambda: watched(examples, texts)))
        assert values is not None
        seen = {e.id: float(value) for e, value in zip(examples, values, strict=True) if value is not None}
        return HeldOutResult(figures, scores, seen)

    return evaluate
