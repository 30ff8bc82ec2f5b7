"""The policy alone on held-out prompts, while it is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev

from rlgf_cli.config.common import DecodingConfig, LengthConfig
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
    """What scores the policy's own texts, sampled with a fixed seed; None where there is nothing to score.

    ``watched`` gives a second number per text (None: it skips one). It sees all texts at once, in one process.
    """
    if not prompts or scorer is None:
        return None
    examples = [p.example for p in prompts]

    def mine() -> dict[str, tuple[float, str]]:
        some = processes.share(prompts)
        if not some:
            return {}
        texts = [c.text for c in generate_texts(loaded, some, decoding, lengths, seed=seed)]
        scores = scorer([p.example for p in some], texts)
        return {p.example.id: (s.value, text) for p, s, text in zip(some, scores, texts, strict=True)}

    def evaluate() -> HeldOutResult:
        found = {key: pair for part in processes.gather(processes.raise_together(mine)) for key, pair in part.items()}
        texts = [found[e.id][1] for e in examples]
        scores = {e.id: found[e.id][0] for e in examples}
        error = stdev(scores.values()) / math.sqrt(len(scores)) if len(scores) > 1 else 0.0
        figures = {"eval/score": fmean(scores.values()), "eval/score_error": error}
        figures["eval/length"] = fmean(len(t.split()) for t in texts)
        if watched is None:
            return HeldOutResult(figures, scores)
        values = processes.broadcast(processes.on_main(lambda: watched(examples, texts)))
        assert values is not None
        seen = {e.id: float(value) for e, value in zip(examples, values, strict=True) if value is not None}
        return HeldOutResult(figures, scores, seen)

    return evaluate
