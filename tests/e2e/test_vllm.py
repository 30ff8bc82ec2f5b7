"""vLLM itself in the training process: the policy's weights arrive, and what it samples is the policy's distribution.

Runs where vLLM is installed; on a CPU, vLLM's build for CPUs in an environment of its own (CONTRIBUTING.md).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf

from conftest import make_tokenizer, toy_examples, write_rows
from families import save_sharpened
from rl import examples, loaded_from, plain_logits, plain_logprobs
from rlgf_cli.config.common import LengthConfig, LoraConfig
from rlgf_cli.config.train import SamplerConfig
from rlgf_cli.models.load import add_lora
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.prompts import encode_prompts
from rlgf_cli.models.samplers.base import Distribution, OwnSampler, SampleRequest
from rlgf_cli.models.samplers.engine import EngineSampler

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed (CONTRIBUTING.md says how it is on a CPU)", allow_module_level=True)
pytestmark = pytest.mark.slow

TIE = 1e-3
"""Nats between two tokens that rounding may put in either order."""


def checkpoint(folder: Path, kind: str) -> Path:
    """A tiny model with attention heads of 32, the least that vLLM takes. ``kind``: tied or untied (Llama), or gpt2."""
    tokenizer = make_tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    vocab = len(tokenizer) + 8
    torch.manual_seed(1)
    model: Any
    if kind == "gpt2":
        model = hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=vocab, n_embd=64, n_layer=2, n_head=2, n_positions=64, **ends)
        )
    else:
        config = hf.LlamaConfig(
            vocab_size=vocab, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=kind == "tied", **ends,
        )  # fmt: skip
        model = hf.LlamaForCausalLM(config)
    return save_sharpened(model, tokenizer, folder)


# --- training


def train(run_cli: Any, folder: Path, output: str, *more: str) -> list[dict[str, Any]]:
    model = folder / "model"
    if not model.exists():
        checkpoint(model, "tied")
        write_rows(folder / "train.jsonl", toy_examples(12))
        (folder / "reward.py").write_text("def vowels(text):\n    return sum(c in 'aeiou' for c in text) / 10\n")
    result = run_cli(
        "train", "--alg", "grpo", "--model", model, "--data", folder / "train.jsonl",
        "--reward", f"{folder / 'reward.py'}:vowels", "--sampler", "vllm", "--set", "sampler.memory_share=0.2",
        "--max-steps", 3, "--episodes", 16, "--batch-size", 16, "--epochs", 1, "--max-new-tokens", 12, "--lr", "1e-2",
        "--set", "optim.schedule=constant", "--device", "cpu", "-o", folder / output, *more,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert "starting vLLM" in result.stderr
    return [json.loads(line) for line in (folder / output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("weights", ["all", "lora"])
def test_the_gap_stays_small_while_the_policy_learns(weights: str, tmp_path: Path, run_cli: Any) -> None:
    more = ("--use-peft", "--lora-r", "8") if weights == "lora" else ()
    rows = train(run_cli, tmp_path, "run", "--set", "sampler.correction=truncate", *more)
    assert len(rows) == 3
    for row in rows:
        assert row["sampler/gap"] < 1e-4 and row["sampler/gap_max"] < 1e-2
        assert row["sampler/weight"] == pytest.approx(1.0, abs=1e-3) and row["sampler/truncated"] == 0
        assert row["time/sync"] > 0 and row["update/grad_norm"] > 0


def test_an_engine_that_keeps_old_weights_is_seen(
    tmp_path: Path, run_cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = EngineSampler.send
    monkeypatch.setattr(EngineSampler, "send", lambda self: None if self.sent else send(self))
    gaps = [row["sampler/gap"] for row in train(run_cli, tmp_path, "run")]
    assert gaps[0] < 1e-4 and min(gaps[1:]) > 1e-2


# --- an engine by itself, after the runs above: one engine at a time fits into memory


@pytest.fixture(scope="module", params=["tied", "untied", "gpt2", "tied+lora", "gpt2+lora"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Loaded, Any]]:
    """A policy, and vLLM for it."""
    kind, _, lora = request.param.partition("+")
    loaded = loaded_from(checkpoint(tmp_path_factory.mktemp("model"), kind))
    if lora:
        loaded = add_lora(loaded, LoraConfig(enabled=True, r=4))
    with closing(EngineSampler.start(SamplerConfig(engine="vllm", memory_share=0.2), loaded, longest=48)) as engine:
        yield loaded, engine


def changed(loaded: Loaded, seed: int) -> None:
    """Another policy: all weights moved, or those of the adapter."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
            elif parameter.requires_grad and parameter.dim() > 1:
                parameter.add_(0.3 * parameter.std() * torch.randn_like(parameter))


def prompts(loaded: Loaded, count: int) -> list[list[int]]:
    return [p.ids for p in encode_prompts(loaded, examples(count), LengthConfig(max_new_tokens=16))[0]]


def test_every_update_arrives(pair: tuple[Loaded, EngineSampler]) -> None:
    """Greedy texts are the own loop's, up to the first token that two candidates tie for."""
    loaded, engine = pair
    ids = prompts(loaded, 24)
    empty: list[list[int]] = [[] for _ in ids]
    seen = set()
    for update in range(3):
        changed(loaded, update)
        engine.send()
        theirs, own = (s.sample(SampleRequest(ids, empty, [16] * 24, None)) for s in (engine, OwnSampler(loaded)))
        for prompt, a, b in zip(ids, theirs, own, strict=True):
            at = next((i for i, (x, y) in enumerate(zip(a.ids, b.ids, strict=False)) if x != y), None)
            if at is None:
                assert (a.ids, a.finished) == (b.ids, b.finished)
            else:
                first, second = plain_logits(loaded, prompt, b.ids)[at].log_softmax(-1).topk(2).values.tolist()
                assert first - second < TIE and {a.ids[at], b.ids[at]} <= set(
                    plain_logits(loaded, prompt, b.ids)[at].topk(2).indices.tolist()
                )
        seen.add(tuple(tuple(row.ids) for row in own))
    assert len(seen) == 3  # the updates changed the texts


def test_log_probabilities_are_those_of_the_training_model(pair: tuple[Loaded, EngineSampler]) -> None:
    """Under the temperature, with prefixes of other lengths, and with EOS forbidden before its time."""
    loaded, engine = pair
    engine.send()
    ids, uniforms = prompts(loaded, 24), np.random.default_rng(0).random((24, 16))
    prefixes = [[40, 41, 42][: i % 4] for i in range(24)]
    limits = [16 - len(prefix) for prefix in prefixes]
    request = SampleRequest(ids, prefixes, limits, uniforms, Distribution(temperature=0.8, min_new_tokens=5))
    rows = engine.sample(request)
    for prompt, prefix, limit, row in zip(ids, prefixes, limits, rows, strict=True):
        whole = [*prefix, *row.ids]
        assert row.finished or len(row.ids) == limit
        assert len(whole) >= 5 and not set(whole[:-1]) & loaded.eos_ids
        expected = plain_logprobs(loaded, prompt, whole, temperature=0.8, min_new_tokens=5)[len(prefix) :]
        assert row.logprobs == pytest.approx(expected.tolist(), abs=1e-3)
    again = engine.sample(request)
    assert [row.ids for row in again] == [row.ids for row in rows]


def test_tokens_are_drawn_from_the_policys_distribution(pair: tuple[Loaded, EngineSampler]) -> None:
    """3,000 first tokens of one prompt, by seed: the .9999 quantile of chi-square for the classes that there are."""
    from scipy.stats import chi2

    loaded, engine = pair
    engine.send()
    prompt, count = prompts(loaded, 1)[0], 3000
    uniforms = np.random.default_rng(1).random((count, 1))
    rows = engine.sample(
        SampleRequest([prompt] * count, [[]] * count, [1] * count, uniforms, Distribution(temperature=1.5))
    )
    shares = (plain_logits(loaded, prompt, [0])[0].double() / 1.5).softmax(-1)
    frequent = (shares > 5 / count).nonzero()[:, 0].tolist()
    found = np.bincount([row.ids[0] for row in rows], minlength=len(shares))
    observed = [*found[frequent], count - found[frequent].sum()]
    expected = [*(count * shares[frequent]).tolist(), count * (1 - float(shares[frequent].sum()))]
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True) if e > 0)
    assert len(frequent) > 3 and statistic < chi2.ppf(0.9999, len(observed) - 1)


def test_control_tokens_are_not_written_where_they_are_banned(pair: tuple[Loaded, EngineSampler]) -> None:
    """At a temperature at which they are not rare."""
    loaded, engine = pair
    engine.send()
    ids, uniforms = prompts(loaded, 200), np.random.default_rng(2).random((200, 16))
    written = {}
    for ban in (False, True):
        rows = engine.sample(
            SampleRequest(ids, [[]] * 200, [16] * 200, uniforms, Distribution(temperature=2.0, ban_control=ban))
        )
        written[ban] = {token for row in rows for token in row.ids}
    assert written[False] & loaded.control_ids and not written[True] & loaded.control_ids
