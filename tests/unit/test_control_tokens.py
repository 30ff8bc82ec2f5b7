"""Tokens that a policy can write and no text shows: counted, and banned where wanted, for sampler and scorer alike."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken

from conftest import make_tokenizer
from rl import (
    PPO,
    actor_critic,
    generator_for,
    guide,
    loaded_from,
    plain_logits,
    prompts_for,
    real_mask,
    step_data,
    token_batch,
    trainer_for,
)
from rlgf_cli.checks import policy_probe
from rlgf_cli.functional.logprobs import chosen_logprobs, process_logits
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.text import special_ids, unseen_ids
from rlgf_cli.training import guide_writer
from rlgf_cli.training.rollout import Sampling

INF = float("inf")
PAD, EOS = 0, 1


@pytest.fixture
def gpt2(tiny_gpt2: Path) -> Loaded:
    return loaded_from(tiny_gpt2)


def test_which_they_are(gpt2: Loaded, tiny_gpt2_pad_eos: Path) -> None:
    """Special tokens, those that only the added tokens' marks tell of included, and rows without a token; no EOS."""
    tokens, rows = len(gpt2.tokenizer), gpt2.model.config.vocab_size
    assert rows == tokens + 8
    assert gpt2.control_ids == {PAD, *range(tokens, rows)}
    assert loaded_from(tiny_gpt2_pad_eos).control_ids == {PAD, *range(tokens, rows)}  # <pad> is special there too
    gpt2.model.generation_config.eos_token_id = [EOS, PAD]
    assert gpt2.control_ids == set(range(tokens, rows))
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<|tool|>", special=True), AddedToken("<think>", special=False)])
    tool, think = tokenizer.convert_tokens_to_ids(["<|tool|>", "<think>"])
    assert tool not in tokenizer.all_special_ids
    assert special_ids(tokenizer) == {PAD, EOS, tool}
    assert unseen_ids(tokenizer, think + 2) == {PAD, EOS, tool, think + 1}
    shown = tokenizer.decode([PAD, tool, think, 40], skip_special_tokens=True)
    assert shown.startswith("<think>") and "tool" not in shown


def test_the_log_counts_them_and_the_ban_keeps_them_from_being_written(gpt2: Loaded) -> None:
    counts = []
    for ban in (False, True):
        trainer = trainer_for(gpt2, "ppo++", guide(), learning_rate=0.0)
        trainer.generator = generator_for(gpt2, guide(), ban_control=ban, temperature=1.5)
        row, episodes = trainer.step()
        own = [token for e in episodes for author, ids in e.segments if author == "policy" for token in ids]
        assert row["tokens/control"] == sum(token in gpt2.control_ids for token in own)
        counts.append(row["tokens/control"])
    assert counts[0] > 2 and counts[1] == 0


@pytest.mark.parametrize(("name", "temperature"), [("tiny_gpt2", 1.0), ("tiny_llama", 0.7), ("tiny_t5", 1.0)])
def test_the_scorer_has_the_samplers_distribution(name: str, temperature: float, request: Any) -> None:
    """Policy, reference and entropy, against plain calls."""
    loaded = loaded_from(request.getfixturevalue(name))
    model, control = actor_critic(loaded), sorted(loaded.control_ids)
    prompts, responses = [p.ids for p in prompts_for(loaded, 2)], [[40, 41, 300, 42, EOS], [299, EOS]]
    batch = token_batch(loaded, prompts, responses)
    options = {"temperature": temperature, "min_new_tokens": 1, "ban_control": True}
    expected, entropies = [], []
    for prompt, response in zip(prompts, responses, strict=True):
        logits = plain_logits(loaded, prompt, response).double() / temperature
        logits[:, control] = -INF
        logits[:1, sorted(loaded.eos_ids)] = -INF
        found = logits.log_softmax(-1)
        expected.append(found[torch.arange(len(response)), torch.tensor(response)])
        entropies.append(-(found.exp() * found.clamp_min(-1e30)).sum(-1))
    mask = real_mask(batch)
    with torch.no_grad():
        scored = model.forward_logprobs(batch, mask, entropy=True, **options)
        assert scored.entropies is not None
        assert scored.logprobs[mask].tolist() == pytest.approx(torch.cat(expected).tolist(), abs=1e-4)
        assert scored.entropies[mask].tolist() == pytest.approx(torch.cat(entropies).tolist(), abs=1e-4)
        reference = model.ref_logprobs(batch, mask, **options)
        assert torch.allclose(reference, scored.logprobs, atol=1e-5)
        free = model.forward_logprobs(batch, mask, temperature=temperature, min_new_tokens=1).logprobs
        assert float((scored.logprobs - free)[mask].min()) > 0  # what the banned ones had is shared out


def test_a_banned_token_has_no_gradient_and_the_others_have_that_of_the_allowed_tokens() -> None:
    start = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, expected = (start.clone().requires_grad_() for _ in range(2))
    early, eos, banned, tokens = torch.tensor([True, False]), torch.tensor([1]), torch.tensor([0, 4]), [2, 1]
    scaled = process_logits(found * 1, 1.0, early, eos, banned)
    assert scaled.isinf().tolist() == [[True, True, False, False, True], [True, False, False, False, True]]
    chosen_logprobs(scaled, torch.tensor(tokens)).sum().backward()
    expected.masked_fill(scaled.isinf(), -INF).log_softmax(-1)[torch.arange(2), tokens].sum().backward()
    torch.testing.assert_close(found.grad, expected.grad)


def test_the_truths_of_step_0_hold_under_the_ban(gpt2: Loaded) -> None:
    generator = generator_for(gpt2, ban_control=True, temperature=1.3)
    model = actor_critic(gpt2)
    episodes = generator.generate(PPO, prompts_for(gpt2, 9), 0, 6.0)
    data = step_data(model, PPO, episodes, generator.sampling)
    found = policy_probe.probe(model, episodes, data, generator.sampling, kl_coef=0.1, seed=0, step=0)
    assert {"policy.ratio", "policy.plain", "policy.sampler"} <= {check.name for check in found}
    assert {check.status for check in found} == {"ok"}
    free = Sampling(**{**generator.sampling.__dict__, "ban_control": False})  # as a scorer that knows no ban has it
    with torch.no_grad():
        other = policy_probe._sampler(model, episodes, free, 0, 0)
    assert other is not None and other.status == "fail"


def test_likelihoods_are_taken_without_the_ban(gpt2: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guide's text may hold an unknown token, which is a special one."""
    monkeypatch.setattr(guide_writer, "completion_ids", lambda *_: [40, PAD, 41, EOS])
    trainer = trainer_for(gpt2, "bc-guide", guide())
    trainer.generator = generator_for(gpt2, guide(), ban_control=True)
    row, episodes = trainer.step()
    assert episodes[0].ids == [40, PAD, 41, EOS] and 0 < row["loss/likelihood"] < 100 and row["tokens/control"] == 0
    assert math.isfinite(row["update/grad_norm"])


def test_generate_and_eval_say_how_many(tiny_gpt2: Path, examples_file: Path, tmp_path: Path, run_cli: Any) -> None:
    sampled = ("--model", tiny_gpt2, "--data", examples_file, "--limit", 8, "--max-new-tokens", 16)
    sampled = (*sampled, "--temperature", "1.5", "--device", "cpu")
    shown = run_cli("generate", *sampled, "-o", tmp_path / "texts.jsonl")
    assert shown.exit_code == 0, shown.stderr
    done = run_cli("eval", *sampled, "--metrics", "length", "-o", tmp_path / "eval")
    assert done.exit_code == 0, done.stderr
    count = json.loads((tmp_path / "eval/scores.json").read_text())["counts"]["control_tokens"]
    assert count > 2 and f"do not show: {count}" in shown.stderr and f"control_tokens {count}" in done.stderr
