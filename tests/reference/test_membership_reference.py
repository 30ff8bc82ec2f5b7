"""The membership metric against transformers' own forward pass, one text at a time, and scikit-learn's AUC."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from conftest import toy_examples, write_rows
from rlgf_cli.config.common import LengthConfig, ModelConfig
from rlgf_cli.models.likelihood import token_logprobs
from rlgf_cli.models.load import load
from rlgf_cli.models.prompts import encode_prompts, encode_target
from rlgf_cli.protocols import Example
from rlgf_cli.scorers.figures import compute_figures
from rlgf_cli.scorers.membership import MembershipMetric, min_k


@torch.no_grad()
def own_logprobs(model: Any, tokenizer: Any, prompt: str, text: str, limit: int) -> np.ndarray:
    """Of the response's tokens, EOS included, or cut at ``limit``: no padding, no batch, no code of ours."""
    before = tokenizer(prompt, return_tensors="pt")["input_ids"]
    ids = [*tokenizer(" " + text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id][:limit]
    response = torch.tensor([ids])
    if model.config.is_encoder_decoder:
        start = torch.tensor([[model.config.decoder_start_token_id]])
        logits = model(input_ids=before, decoder_input_ids=torch.cat([start, response[:, :-1]], 1)).logits
    else:
        logits = model(input_ids=torch.cat([before, response], 1)).logits[:, before.shape[1] - 1 : -1]
    return logits.log_softmax(-1).gather(-1, response[..., None])[0, :, 0].double().numpy()


def examples(seed: int) -> list[Example]:
    """Two references each, of lengths that differ; some are longer than 20 tokens."""
    rows = toy_examples(12, seed)
    return [
        Example(row["id"], row["prompt"], (row["references"][0] * (1 + i % 3), rows[i - 1]["references"][0]))
        for i, row in enumerate(rows)
    ]


def as_file(path: Path, some: list[Example]) -> Path:
    return write_rows(path, [{"id": e.id, "prompt": e.prompt, "references": list(e.references)} for e in some])


@pytest.mark.parametrize("references", ["all", "first"])
def test_the_figures_of_plain_forward_passes(any_model: Path, tmp_path: Path, references: Any) -> None:
    members, others = examples(1), examples(2)
    kind = AutoModelForSeq2SeqLM if AutoConfig.from_pretrained(any_model).is_encoder_decoder else AutoModelForCausalLM
    model, tokenizer = kind.from_pretrained(any_model).eval(), AutoTokenizer.from_pretrained(any_model)

    loss, min_k, cut = [], [], []
    for example in members + others:
        texts = example.references if references == "all" else example.references[:1]
        found = [own_logprobs(model, tokenizer, example.prompt, text, 20) for text in texts]
        loss.append(np.mean([values.mean() for values in found]))
        min_k.append(np.mean([np.mean(sorted(values)[: max(1, len(values) * 30 // 100)]) for values in found]))
        lengths = [len(tokenizer(" " + text, add_special_tokens=False)["input_ids"]) for text in texts]
        cut.append(any(length >= 20 for length in lengths))

    figures, counts = measured(any_model, tmp_path, members, others, references=references, k=30, batch_size=5)
    truth = [1] * len(members) + [0] * len(others)
    for key, scores in (("loss", loss), ("min_k", min_k)):
        area = figures[f"membership.{key}"].whole
        assert area.value == pytest.approx(roc_auc_score(truth, scores), abs=1e-12) and 0 < area.value < 1
        false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
        assert figures[f"membership.{key}_tpr"].whole.value == pytest.approx(true[false <= 0.01].max())
    assert 0 < sum(cut) < len(cut)
    assert counts["membership.members_cut"] == sum(cut[:12]) and counts["membership.non_members_cut"] == sum(cut[12:])


def measured(folder: Path, tmp_path: Path, members: list[Example], others: list[Example], **params: Any) -> Any:
    metric = MembershipMetric(str(as_file(tmp_path / "members.jsonl", members)), **params)
    metric.take_model(load(ModelConfig(name=str(folder), device="cpu")), LengthConfig(max_new_tokens=20))
    metric.check_set(others)
    return compute_figures(metric, others, [""] * len(others))


def test_the_log_probabilities_of_plain_forward_passes(any_model: Path) -> None:
    """What figures do not show: an AUC forgives scores that are all wrong in the same way."""
    loaded = load(ModelConfig(name=str(any_model), device="cpu"))
    encoded, _ = encode_prompts(loaded, examples(1), LengthConfig(max_new_tokens=20))
    rows = [(e.ids, encode_target(loaded, e.example.references[0], 20)[0]) for e in encoded]
    found = token_logprobs(loaded, rows, batch_size=5)
    for item, values in zip(encoded, found, strict=True):
        expected = own_logprobs(loaded.model, loaded.tokenizer, item.example.prompt, item.example.references[0], 20)
        assert values == pytest.approx(expected, abs=1e-4)


def test_members_and_others_change_sides(tiny_gpt2: Path, tmp_path: Path) -> None:
    there, _ = measured(tiny_gpt2, tmp_path, examples(1), examples(2))
    back, _ = measured(tiny_gpt2, tmp_path, examples(2), examples(1))
    for key in ("loss", "min_k"):
        name = f"membership.{key}"
        assert there[name].whole.value == pytest.approx(1 - back[name].whole.value)
        low, high = there[name].whole.bounds(0.9)
        assert back[name].whole.bounds(0.9) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(("more", "eos"), [(-1, False), (0, False), (1, True)])
def test_a_text_that_leaves_no_room_for_eos_is_cut(tiny_gpt2: Path, more: int, eos: bool) -> None:
    loaded = load(ModelConfig(name=str(tiny_gpt2), device="cpu"))
    plain = loaded.text.encode_response(loaded.tokenizer, "the cat sees the garden .")
    ids, cut = encode_target(loaded, "the cat sees the garden .", len(plain) + more)
    assert ids == ([*plain, loaded.eos_id] if eos else plain[: len(plain) + more]) and cut is not eos


@pytest.mark.parametrize(
    ("tokens", "k", "taken"), [(1, 20, 1), (9, 20, 1), (10, 20, 2), (14, 20, 2), (15, 20, 3), (500, 64.6, 323)]
)
def test_min_k_takes_the_whole_tokens_of_k_percent(tokens: int, k: float, taken: int) -> None:
    """At least one; 64.6 * 500 / 100 is 322.99999999999994 in floating point, and 323 tokens."""
    logprobs = -np.arange(tokens, dtype=float)
    assert min_k(logprobs, k) == np.mean(np.sort(logprobs)[:taken])
