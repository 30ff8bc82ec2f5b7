"""Perplexity against transformers' own loss, one text at a time: no padding, no positions of ours."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from conftest import toy_examples
from rlgf_cli.errors import UserError
from rlgf_cli.protocols import Example
from rlgf_cli.registry import load
from rlgf_cli.scorers.figures import compute_figures
from rlgf_cli.scorers.perplexity import PerplexityMetric
from rlgf_cli.stats.bootstrap import interval

EXAMPLES = [Example(row["id"], row["prompt"]) for row in toy_examples(9)]
TEXTS = [row["references"][0] * (1 + i % 3) for i, row in enumerate(toy_examples(9))]


@cache
def transformers_own(folder: Path) -> tuple[Any, Any]:
    kind = AutoModelForSeq2SeqLM if AutoConfig.from_pretrained(folder).is_encoder_decoder else AutoModelForCausalLM
    return kind.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def own_loss(folder: Path, prompt: str | None, text: str) -> tuple[float, int]:
    """``(sum of nats, tokens)`` by the model's own loss; a prompt of None is an EOS in its place."""
    model, tokenizer = transformers_own(folder)
    ids = tokenizer(" " + text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    start = torch.tensor([[tokenizer.eos_token_id]])
    before = start if prompt is None else tokenizer(prompt, return_tensors="pt")["input_ids"]
    if model.config.is_encoder_decoder:
        loss = model(input_ids=before, labels=ids).loss
    else:
        whole = torch.cat([before, ids], 1)
        labels = whole.clone()
        labels[:, : before.shape[1]] = -100
        loss = model(input_ids=whole, labels=labels).loss
    return float(loss) * ids.shape[1], ids.shape[1]


def measured(folder: Path, texts=TEXTS, examples=EXAMPLES, **params):
    metric = PerplexityMetric(str(folder), device="cpu", **params)
    return compute_figures(metric, examples, texts)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_equal_to_the_models_own_loss_whatever_the_batch(any_model, batch_size):
    figures, counts = measured(any_model, batch_size=batch_size)
    expected = [own_loss(any_model, e.prompt, text) for e, text in zip(EXAMPLES, TEXTS, strict=True)]
    assert [row[1] for row in figures["perplexity"].rows] == [n for _, n in expected]
    assert [row[0] for row in figures["perplexity"].rows] == pytest.approx([s for s, _ in expected], rel=1e-4)
    assert figures["perplexity.nll"].values == pytest.approx([s / n for s, n in expected], rel=1e-4)
    found = interval(np.array(figures["perplexity"].rows), load("aggregates", "exp_mean"))
    total = math.exp(sum(s for s, _ in expected) / sum(n for _, n in expected))
    assert found.value == pytest.approx(total, rel=1e-4) and found.low < total < found.high
    assert not any(counts.values())


def test_without_the_prompt(tiny_gpt2):
    figures, _ = measured(tiny_gpt2, condition="none")
    expected = [own_loss(tiny_gpt2, None, text)[0] for text in TEXTS]
    assert [row[0] for row in figures["perplexity"].rows] == pytest.approx(expected, rel=1e-4)
    assert figures["perplexity"].signature != measured(tiny_gpt2)[0]["perplexity"].signature


def test_texts_without_tokens_are_skipped_and_counted(tiny_gpt2):
    figures, counts = measured(tiny_gpt2, ["", " \n", *TEXTS[2:]])
    assert figures["perplexity"].rows[:2] == [None, None] == figures["perplexity.nll"].values[:2]
    assert counts["perplexity.without_tokens"] == 2
    alone, _ = measured(tiny_gpt2, TEXTS[2:], EXAMPLES[2:])
    assert figures["perplexity.nll"].values[2:] == pytest.approx(alone["perplexity.nll"].values, rel=1e-5)


def test_what_is_longer_than_the_positions_is_cut_and_counted(tiny_gpt2):
    """64 positions: a long text keeps its beginning behind the whole prompt, a long prompt its end, half at least."""
    examples = [Example("text", "cat"), Example("prompt", "garden " * 100), Example("both", "river " * 100)]
    figures, counts = measured(tiny_gpt2, ["the cat " * 100, "the cat", "the dog " * 100], examples)
    tokens = [row[1] for row in figures["perplexity"].rows]
    assert (counts["perplexity.texts_cut"], counts["perplexity.prompts_cut"]) == (2, 2)
    assert 60 < tokens[0] <= 64 and tokens[2] == 64 - 32 + 1
    whole, _ = own_loss_of_ids(tiny_gpt2, "cat", "the cat " * 100, int(tokens[0]))
    assert figures["perplexity"].rows[0][0] == pytest.approx(whole, rel=1e-4)


@torch.no_grad()
def own_loss_of_ids(folder: Path, prompt: str, text: str, keep: int) -> tuple[float, int]:
    model, tokenizer = transformers_own(folder)
    ids = tokenizer(" " + text.strip(), add_special_tokens=False)["input_ids"][:keep]
    before = tokenizer(prompt)["input_ids"]
    whole = torch.tensor([[*before, *ids]])[:, :64]  # what it has positions for
    logprobs = model(input_ids=whole).logits.log_softmax(-1)[0]
    told = [float(logprobs[len(before) - 1 + t, token]) for t, token in enumerate(ids)]
    return -sum(told), len(ids)


def test_it_tells_how_far_it_is(tiny_gpt2):
    metric = PerplexityMetric(str(tiny_gpt2), device="cpu", batch_size=4)
    told: list[int] = []
    metric.on_rows = told.append
    metric.compute(EXAMPLES, ["", *TEXTS[1:]])
    assert told == [1, 4, 4]


@pytest.mark.parametrize(
    ("spec", "params", "message"),
    [
        (None, {}, "needs a checkpoint"),
        ("t5", {"condition": "none"}, "no probability without a prompt"),
        ("gpt2", {"template": "no place"}, r"must hold \{prompt\}"),
    ],
)
def test_refused(tiny_t5, tiny_gpt2, spec, params, message):
    path = {"t5": str(tiny_t5), "gpt2": str(tiny_gpt2), None: None}[spec]
    with pytest.raises(UserError, match=message):
        PerplexityMetric(path, device="cpu", **params)
