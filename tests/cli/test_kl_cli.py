"""``rlgf eval --metrics kl:START``: against the exact KL of a tiny vocabulary, and what it refuses."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GPT2Config, GPT2LMHeadModel

from conftest import Result, make_tokenizer, toy_examples, write_rows
from families import save_sharpened
from rlgf_cli.artifacts.jsonl import read_records
from rlgf_cli.artifacts.records import EvaluatedRecord

LONGEST, EOS, PROMPT = 3, 1, [2, 3]
SAMPLED = ["--temperature", 1, "--max-new-tokens", 8, "--device", "cpu"]


def tiny_vocabulary(folder: Path, seed: int) -> Path:
    """A GPT-2 of four tokens with random weights: pad, EOS, a, b."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2, "b": 3}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    torch.manual_seed(seed)
    size = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=4, eos_token_id=1, pad_token_id=0, bos_token_id=None, **size))
    return save_sharpened(model, tokenizer, folder)


@torch.no_grad()
def logprobs_of(model: Any, prompt: list[int], ids: list[int]) -> list[float]:
    """The log-probability of each of ``ids`` after ``prompt``, by the model's own forward pass of one text."""
    if model.config.is_encoder_decoder:
        start = model.config.decoder_start_token_id
        logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[start, *ids[:-1]]])).logits[0]
    else:
        logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)[range(len(ids)), ids].tolist()


def texts_of_at_most(longest: int) -> list[list[int]]:
    """Every text of the tiny vocabulary that ends with EOS, or is cut at the limit."""
    others = [0, 2, 3]
    ended = [[*begun, EOS] for n in range(longest) for begun in itertools.product(others, repeat=n)]
    return ended + [list(cut) for cut in itertools.product(others, repeat=longest)]


@pytest.fixture
def evaluate(tmp_path: Path, run_cli: Callable[..., Result]) -> Callable[..., Result]:
    def run(model: Path, metrics: str, *more: object, rows: Any = None, out: str = "out") -> Result:
        data = write_rows(tmp_path / "data.jsonl", toy_examples(12) if rows is None else rows)
        return run_cli(
            "eval", "--model", model, "--data", data, "--metrics", metrics, "-o", tmp_path / out, *SAMPLED, *more
        )

    return run


def scores_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "scores.json").read_text())


def records_of(folder: Path) -> list[EvaluatedRecord]:
    return list(read_records(folder / "predictions.jsonl", EvaluatedRecord))


def test_the_estimate_agrees_with_the_exact_kl(evaluate, tmp_path):
    policy, start = tiny_vocabulary(tmp_path / "policy", 3), tiny_vocabulary(tmp_path / "start", 0)
    of_policy, of_start = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (policy, start))
    exact, reverse, without_eos, whole, tokens = 0.0, 0.0, 0.0, 0.0, 0.0
    for ids in texts_of_at_most(LONGEST):
        p, q = (np.array(logprobs_of(model, PROMPT, ids)) for model in (of_policy, of_start))
        probability = math.exp(p.sum())
        whole += probability
        tokens += probability * len(ids)
        exact += probability * (p - q).sum()
        reverse += math.exp(q.sum()) * (q - p).sum()
        without_eos += probability * sum(r for i, r in zip(ids, p - q, strict=True) if i != EOS)
    assert whole == pytest.approx(1)

    rows = [{"id": str(i), "prompt": "a b"} for i in range(3000)]
    limits = ["--max-new-tokens", LONGEST, "--batch-size", 1000]
    result = evaluate(policy, f"kl:{start}", *limits, rows=rows)
    assert result.exit_code == 0, result.stderr
    scores = scores_of(tmp_path / "out")["metrics"]
    values = np.array([record.scores["kl"] for record in records_of(tmp_path / "out")])
    error = values.std(ddof=1) / math.sqrt(len(values))
    assert scores["kl"]["value"] == pytest.approx(exact, abs=3 * error)
    assert scores["kl"]["low"] < exact < scores["kl"]["high"]
    for wrong in (-exact, reverse, without_eos):  # the test would see these
        assert abs(wrong - exact) > 8 * error, wrong
    assert scores["kl.token"]["value"] == pytest.approx(exact / tokens, abs=3 * error / tokens)
    assert scores["kl.token"]["low"] < scores["kl.token"]["value"] < scores["kl.token"]["high"]


@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
def test_each_text_has_the_nats_of_its_sampled_tokens(architecture, request, evaluate, tmp_path):
    """Their tokens, not those of the decoded text: with random weights few texts are tokenised as they were sampled."""
    policy = request.getfixturevalue(f"tiny_{architecture}")
    kind = AutoModelForSeq2SeqLM if architecture == "t5" else AutoModelForCausalLM
    own, other = kind.from_pretrained(policy).eval(), kind.from_pretrained(policy).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    start = tmp_path / "start"
    other.save_pretrained(start)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(start)
    result = evaluate(policy, f"kl:{start}")
    assert result.exit_code == 0, result.stderr
    records = records_of(tmp_path / "out")
    respelled = 0
    for record in records:
        ids = record.token_ids
        assert (ids[-1] == tokenizer.eos_token_id) == (record.finish_reason == "stop") and 1 <= len(ids) <= 8
        prompt = tokenizer(record.prompt)["input_ids"]
        expected = sum(logprobs_of(own, prompt, ids)) - sum(logprobs_of(other, prompt, ids))
        assert record.scores["kl"] == pytest.approx(expected, rel=1e-3, abs=1e-4)
        assert record.statistics["kl.token"] == [record.scores["kl"], len(ids)]
        respelled += tokenizer(" " + record.prediction, add_special_tokens=False)["input_ids"] != ids
    assert respelled > 0
    assert "estimator=k1" in scores_of(tmp_path / "out")["metrics"]["kl"]["signature"]


def test_a_model_has_no_kl_from_itself(evaluate, any_model, tmp_path):
    result = evaluate(any_model, f"kl:{any_model}")
    assert result.exit_code == 0, result.stderr
    assert all(abs(record.scores["kl"]) < 1e-4 for record in records_of(tmp_path / "out"))
    assert abs(scores_of(tmp_path / "out")["metrics"]["kl.token"]["value"]) < 1e-4


def test_an_adapter_has_the_kl_of_its_merged_weights(evaluate, tiny_gpt2, tmp_path, run_cli, examples_file):
    adapter = tmp_path / "adapter"
    trained = run_cli(
        "sft", "--model", tiny_gpt2, "--data", examples_file, "-o", adapter, "--device", "cpu",
        "--use-peft", "--max-steps", 3, "--learning-rate", 0.01, "--max-new-tokens", 24,
    )  # fmt: skip
    assert trained.exit_code == 0, trained.stderr
    assert run_cli("merge", "--model", adapter, "-o", tmp_path / "merged").exit_code == 0
    assert evaluate(tiny_gpt2, f"kl:{adapter}", out="a").exit_code == 0
    assert evaluate(tiny_gpt2, f"kl:{tmp_path / 'merged'}", out="b").exit_code == 0
    assert evaluate(adapter, f"kl:{tiny_gpt2}", out="c").exit_code == 0
    a, b, c = (scores_of(tmp_path / name)["metrics"]["kl"]["value"] for name in "abc")
    assert a == pytest.approx(b, rel=1e-3) and abs(a) > 0.01 and abs(c) > 0.01


def test_resume_adds_it_to_texts_that_have_their_tokens(evaluate, tiny_gpt2, tiny_llama, tmp_path):
    assert evaluate(tiny_gpt2, "length").exit_code == 0
    before = [record.token_ids for record in records_of(tmp_path / "out")]
    more = evaluate(tiny_gpt2, f"length,kl:{tiny_llama}", "--resume")
    assert more.exit_code == 0 and "12 texts are there already" in more.stderr, more.stderr
    assert [record.token_ids for record in records_of(tmp_path / "out")] == before
    resumed = scores_of(tmp_path / "out")["metrics"]["kl"]
    assert evaluate(tiny_gpt2, f"kl:{tiny_llama}", out="at_once").exit_code == 0
    assert scores_of(tmp_path / "at_once")["metrics"]["kl"] == resumed


def test_resume_refuses_texts_of_which_the_tokens_are_not_known(evaluate, tiny_gpt2, tmp_path):
    """Those of an evaluation that did not store them."""
    assert evaluate(tiny_gpt2, "length").exit_code == 0
    path = tmp_path / "out" / "predictions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    stored = write_rows(path, [{k: v for k, v in row.items() if k != "token_ids"} for row in rows]).read_text()
    result = evaluate(tiny_gpt2, f"kl:{tiny_gpt2}", "--resume")
    assert result.exit_code == 2 and "stored without their tokens" in result.stderr and "--overwrite" in result.stderr
    assert path.read_text() == stored
    assert evaluate(tiny_gpt2, "length", "--resume").exit_code == 0


class TestRefused:
    def refused(self, result: Result, tmp_path: Path, *parts: str) -> None:
        assert result.exit_code == 2, result.stderr
        assert not (tmp_path / "out").exists() and "\nhint: " in result.stderr and "Traceback" not in result.stderr
        for part in parts:
            assert part in result.stderr, result.stderr

    @pytest.mark.parametrize(
        ("flags", "part"),
        [
            (["--temperature", 0], "--temperature 1 (it is 0)"),
            (["--temperature", 0.7], "--temperature 1 (it is 0.7)"),
            (["--top-k", 5], "--top-k 0 (it is 5)"),
            (["--top-p", 0.9], "--top-p 1 (it is 0.9)"),
            (["--num-beams", 2], "--num-beams 1 (it is 2)"),
            (["--min-new-tokens", 2], "--min-new-tokens 0 (it is 2)"),
        ],
    )
    def test_texts_of_another_distribution(self, evaluate, tiny_gpt2, tmp_path, flags, part):
        self.refused(evaluate(tiny_gpt2, f"kl:{tiny_gpt2}", *flags), tmp_path, part)

    def test_no_start(self, evaluate, tiny_gpt2, tmp_path):
        self.refused(evaluate(tiny_gpt2, "kl"), tmp_path, "kl:START")
        self.refused(evaluate(tiny_gpt2, "kl:./nowhere"), tmp_path, "no such checkpoint folder")

    def test_texts_made_elsewhere(self, run_cli, tiny_gpt2, tmp_path):
        texts = write_rows(tmp_path / "texts.jsonl", [{"id": "a", "prompt": "b", "text": "c", "token_ids": [3]}])
        result = run_cli("eval", "--predictions", texts, "--metrics", f"kl:{tiny_gpt2}", "-o", tmp_path / "out")
        self.refused(result, tmp_path, "instead of --predictions")

    def test_a_start_that_does_not_fit(self, evaluate, tiny_gpt2, tiny_t5, tiny_classifier, tmp_path):
        other = tiny_vocabulary(tmp_path / "other", 1)
        self.refused(evaluate(tiny_gpt2, f"kl:{other}"), tmp_path, "another tokenizer", str(other))
        self.refused(evaluate(tiny_gpt2, f"kl:{tiny_t5}"), tmp_path, "encoder-decoder")
        self.refused(evaluate(tiny_gpt2, f"kl:{tiny_classifier}"), tmp_path, "no likelihood")

    @pytest.mark.parametrize(
        ("size", "part"), [({"vocab_size": 335}, "vocabulary"), ({"n_positions": 32}, "32 positions")]
    )
    def test_a_smaller_start(self, evaluate, tiny_gpt2, tmp_path, size, part):
        tokenizer = make_tokenizer()
        whole = {"vocab_size": len(tokenizer) + 8, "n_positions": 64, "n_embd": 8, "n_layer": 1, "n_head": 1}
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
        GPT2LMHeadModel(GPT2Config(**{**whole, **size}, **ends)).save_pretrained(tmp_path / "small")
        tokenizer.save_pretrained(tmp_path / "small")
        self.refused(evaluate(tiny_gpt2, f"kl:{tmp_path / 'small'}"), tmp_path, part)
