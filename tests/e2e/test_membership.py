"""``rlgf sft``, then ``rlgf eval --metrics membership``: what a model learned by heart, and what it never saw."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from conftest import NOUNS, PLACES, VERBS, write_rows

WORDS = [*NOUNS, *VERBS, *PLACES]


def random_texts(count: int, seed: int) -> list[dict]:
    """Nothing can be learned from these but each text itself: words at random, for prompts of words at random."""
    rng = random.Random(seed)
    return [
        {
            "id": f"{seed}-{i}",
            "prompt": " ".join(rng.choices(WORDS, k=3)),
            "references": [" ".join(rng.choices(WORDS, k=8))],
        }
        for i in range(count)
    ]


@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
def test_a_model_is_caught_on_what_it_learned_by_heart_and_on_nothing_else(architecture, tmp_path: Path, run_cli):
    train, held_out, unseen = (
        write_rows(tmp_path / f"{name}.jsonl", random_texts(40, seed))
        for seed, name in enumerate(["train", "held_out", "unseen"])
    )
    (tmp_path / "small.yaml").write_text(f"architecture: {architecture}\nhidden: 48\ntokenizer: word\n")
    run = tmp_path / "run"
    trained = run_cli(
        "sft", "--model", tmp_path / "small.yaml", "--data", train, "-o", run, "--device", "cpu",
        "--epochs", 50, "--batch-size", 20, "--learning-rate", 0.005,
    )  # fmt: skip
    assert trained.exit_code == 0, trained.stderr

    def measured(members: Path) -> dict:
        out = tmp_path / members.stem
        done = run_cli("eval", "--model", run, "--data", held_out, "--metrics", f"membership:{members}", "-o", out)
        assert done.exit_code == 0, done.stderr
        return json.loads((out / "scores.json").read_text())["metrics"]

    by_heart, never_seen = measured(train), measured(unseen)
    for score in ("membership.loss", "membership.min_k"):
        assert by_heart[score]["value"] > 0.98 and by_heart[score]["low"] > 0.85
        assert by_heart[f"{score}_tpr"]["value"] > 0.8
        assert never_seen[score]["low"] < 0.5 < never_seen[score]["high"]
        assert never_seen[f"{score}_tpr"]["value"] < 0.2
