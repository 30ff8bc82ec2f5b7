"""The policy alone on held-out prompts, while it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from rlgf_cli.config.common import DecodingConfig, LengthConfig
from rlgf_cli.models.completions import generate_texts
from rlgf_cli.models.load import Loaded
from rlgf_cli.models.prompts import Encoded
from rlgf_cli.training.distributed import Group
from rlgf_cli.training.loop import Evaluate, Scorer


def evaluator(
    loaded: Loaded,
    prompts: Sequence[Encoded],
    scorer: Scorer | None,
    decoding: DecodingConfig,
    lengths: LengthConfig,
    *,
    seed: int,
    group: Group,
) -> Evaluate | None:
    """What scores the policy's own texts, sampled with a fixed seed; None where there is nothing to score."""
    if not prompts or scorer is None:
        return None

    def mine() -> list[tuple[float, int]]:
        some = group.share(prompts)
        if not some:
            return []
        texts = [c.text for c in generate_texts(loaded, some, decoding, lengths, seed=seed)]
        scores = scorer([p.example for p in some], texts)
        return [(s.value, len(t.split())) for s, t in zip(scores, texts, strict=True)]

    def evaluate() -> dict[str, float]:
        found = [pair for part in group.gather(group.agree(mine)) for pair in part]
        return {"eval/score": fmean(score for score, _ in found), "eval/length": fmean(n for _, n in found)}

    return evaluate
