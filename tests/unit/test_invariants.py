"""The truths of step 0: they hold on every architecture, and each mistake that would break one stops training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Result, toy_examples, write_rows
from rl import (
    AGGREVATED,
    BC,
    PPO,
    PPO_PP,
    ScriptedGuide,
    actor_critic,
    generator_for,
    loaded_from,
    prompts_for,
    step_data,
)
from rlgf_cli.algorithms.spec import Regime
from rlgf_cli.checks import invariants, policy_probe
from rlgf_cli.checks.invariants import EXACT, INVARIANTS, Gap, quantile_rounding, rounding, sampled
from rlgf_cli.config.common import LoraConfig
from rlgf_cli.functional import masks
from rlgf_cli.functional.logprobs import process_logits
from rlgf_cli.models import actor_critic as actor_critic_module
from rlgf_cli.models import forward, generate
from rlgf_cli.models.actor_critic import ActorCritic
from rlgf_cli.models.forward import TokenBatch
from rlgf_cli.models.load import add_lora, save
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.stages import train as stage
from rlgf_cli.training import advantages as advantages_module

AT_CUT = Regime(roll_in="policy", roll_out="guide", credit="cut")
SCORED = {"policy.deterministic", "policy.ratio", "policy.plain", "policy.reference", "reward.place"}
ALWAYS = {"policy.sampler", "episodes.masks"}


def examined(loaded: Loaded, regime: Regime, *, max_tokens: int | None = 60, **sampling: Any) -> dict[str, Any]:
    guide = ScriptedGuide(lambda request: (f" {request.example.prompt} it .", "stop"))
    generator = generator_for(
        loaded, guide, **{"max_new_tokens": 10, "temperature": 0.8, "min_new_tokens": 2, **sampling}
    )
    model = actor_critic(loaded, [regime.roll_out])
    episodes = generator.generate(regime, prompts_for(loaded, 9), 0, 6.0)
    critics = [regime.roll_out]
    data = step_data(model, regime, episodes, generator.sampling, critics=critics, max_tokens=max_tokens)
    found = policy_probe.probe(model, episodes, data, generator.sampling, kl_coef=0.1, seed=0, step=0)
    assert [check.name for check in found] == [name for name in INVARIANTS if name in {c.name for c in found}]
    return {check.name: check for check in found}


# --- they hold


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("regime", [PPO, PPO_PP, AGGREVATED, AT_CUT], ids=["ppo", "ppo++", "aggrevated", "at the cut"])
def test_all_hold_on_every_architecture(
    any_model: Path, regime: Regime, lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = loaded_from(any_model)
    if lora:
        torch.manual_seed(0)
        have = {name.rpartition(".")[2] for name, _ in loaded.model.named_modules()}
        wanted = [name for name in ("c_attn", "q_proj", "v_proj", "q", "v") if name in have]
        loaded = add_lora(loaded, LoraConfig(enabled=True, r=4, alpha=16, dropout=0.5, target_modules=wanted))
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", [loaded.eos_id, *range(60, 150)])
    found = examined(loaded, regime)
    ends = found["episodes.masks"].numbers
    assert ends["ends"] == ends["learned"]
    assert ends["ends"] > 0 or regime is AT_CUT  # there, an EOS learns only where the cut fell on it
    assert set(found) == SCORED | ALWAYS | ({"lora.reference"} if lora else set())
    assert {check.status for check in found.values()} == {"ok"}
    assert all(check.explanation and not check.remedy for check in found.values())
    assert found["policy.plain"].numbers["tokens"] > 10  # there was something to compare
    assert 0 < found["policy.plain"].numbers["worst"] < 1e-3


@pytest.mark.parametrize("warped", [{"top_k": 20}, {"top_p": 0.8}], ids=["top_k", "top_p"])
def test_the_sampler_is_held_against_what_it_really_draws_from(tiny_gpt2: Path, warped: dict[str, Any]) -> None:
    check = examined(loaded_from(tiny_gpt2), PPO, **warped)["policy.sampler"]
    assert check.status == "ok" and check.numbers["strays"] == 0


@pytest.mark.parametrize("copied", [True, False])
def test_an_adapter_that_goes_on_is_its_own_reference(
    tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: bool
) -> None:
    """Adapter off would be the weights before sft; a second adapter that is not a copy is a reference nobody meant."""
    torch.manual_seed(0)
    loaded = add_lora(loaded_from(tiny_gpt2), LoraConfig(enabled=True, r=4, alpha=16))
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    save(tmp_path, loaded)
    if not copied:
        make = ActorCritic._make_ref_model

        def other(self: ActorCritic) -> None:
            make(self)
            with torch.no_grad():
                for name, parameter in self.policy.named_parameters():
                    if ".ref_model." in name:
                        parameter.zero_()

        monkeypatch.setattr(ActorCritic, "_make_ref_model", other)
    found = examined(loaded_from(tmp_path), PPO)
    broken = [name for name, check in found.items() if check.status == "fail"]
    assert broken == ([] if copied else ["lora.reference", "policy.reference"])
    assert found["lora.reference"].numbers["fresh"] is False
    assert found["lora.reference"].numbers["adapter_off"]["mean"] > 0.01
    assert "frozen copy" in found["lora.reference"].finding


def test_likelihood_has_no_ratio_and_no_reward(tiny_gpt2: Path) -> None:
    assert set(examined(loaded_from(tiny_gpt2), BC)) == {"episodes.masks"}


def test_bfloat16_has_its_own_rounding(tiny_gpt2: Path) -> None:
    found = examined(loaded_from(tiny_gpt2, dtype="bfloat16"), PPO)
    assert {check.status for check in found.values()} == {"ok"}
    assert found["policy.plain"].numbers["worst"] > rounding(torch.float32).mean  # which float32's would not bear
    assert found["policy.deterministic"].numbers["worst"] <= EXACT.worst


# --- each mistake stops training


@pytest.fixture
def train(run_cli: Callable[..., Result], tmp_path: Path) -> Callable[..., Result]:
    rows = toy_examples(40)
    for i, row in enumerate(rows):  # prompts of several lengths, so that there is padding
        row["prompt"] += " river the house" * (i % 3)
    data = write_rows(tmp_path / "train.jsonl", rows)
    (tmp_path / "reward.py").write_text("def size(text):\n    return len(text) % 7 / 7\n")

    def run(model: Path, *flags: object) -> Result:
        return run_cli(
            "train", "--alg", "ppo", "--model", model, "--data", data, "--reward", f"{tmp_path / 'reward.py'}:size",
            "--episodes", 8, "--batch-size", 4, "--epochs", 1, "--max-new-tokens", 8, "--max-steps", 1,
            "--device", "cpu", "--kl-coef", "0.1", *flags, "-o", tmp_path / "run",
        )  # fmt: skip

    return run


def dropout_left_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor_critic_module, "_disable_dropout", lambda model: None)
    score = ActorCritic.forward_logprobs

    def noisy(self: ActorCritic, *args: Any, **kwargs: Any) -> Any:
        self.policy.train()
        return score(self, *args, **kwargs)

    monkeypatch.setattr(ActorCritic, "forward_logprobs", noisy)


def positions_from_the_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "positions_of", lambda mask: torch.arange(mask.shape[1]).expand_as(mask))


def padding_attended_to(monkeypatch: pytest.MonkeyPatch) -> None:
    build = TokenBatch.build.__func__  # type: ignore[attr-defined]

    def unmasked(cls: Any, *args: Any, **kwargs: Any) -> TokenBatch:
        made = build(cls, *args, **kwargs)
        return cls(made.prompt_ids, torch.ones_like(made.prompt_mask), made.response_ids, made.lengths)

    monkeypatch.setattr(TokenBatch, "build", classmethod(unmasked))


def mask_one_short(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = masks.response_mask
    monkeypatch.setattr(masks, "response_mask", lambda lengths, width: whole(lengths - 1, width))


def score_on_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    place = advantages_module.token_rewards

    def first(scores: torch.Tensor, ratio: torch.Tensor, last: torch.Tensor, kl_coef: float) -> torch.Tensor:
        at = torch.zeros_like(last)
        at[:, 0] = True
        return place(scores, ratio, at, kl_coef)

    monkeypatch.setattr(advantages_module, "token_rewards", first)


def adapter_that_is_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(loaded: Loaded, config: LoraConfig) -> Loaded:
        loaded = add_lora(loaded, config)
        with torch.no_grad():
            for name, parameter in loaded.model.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.1)
        return loaded

    monkeypatch.setattr(stage, "add_lora", trained)
    monkeypatch.setattr(actor_critic_module, "_adapter_is_trained", lambda model: False)


def another_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    make = ActorCritic._make_ref_model

    def moved(self: ActorCritic) -> None:
        make(self)
        with torch.no_grad():
            for parameter in self.ref_model.parameters():
                parameter.mul_(1.05)

    monkeypatch.setattr(ActorCritic, "_make_ref_model", moved)


def temperature_forgotten_by_the_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "process_logits", lambda logits, _, *rest: process_logits(logits, 1.0, *rest))


MISTAKES: list[tuple[Callable[[pytest.MonkeyPatch], None], str, str, list[object]]] = [
    (dropout_left_on, "gpt2", "policy.deterministic", []),
    (dropout_left_on, "t5", "policy.deterministic", []),
    (positions_from_the_left, "gpt2", "policy.ratio", []),
    (padding_attended_to, "t5", "policy.plain", []),
    (padding_attended_to, "llama", "policy.plain", []),
    (mask_one_short, "gpt2", "episodes.masks", []),
    (mask_one_short, "gpt2_pad_eos", "episodes.masks", []),
    (score_on_the_first_token, "gpt2", "reward.place", []),
    (adapter_that_is_not_zero, "gpt2", "lora.reference", ["--use-peft"]),
    (another_reference, "gpt2", "policy.reference", []),
    (temperature_forgotten_by_the_sampler, "gpt2", "policy.sampler", ["--temperature", "0.95"]),
    (temperature_forgotten_by_the_sampler, "bart", "policy.sampler", ["--temperature", "0.95"]),
]


@pytest.mark.parametrize(
    ("mistake", "architecture", "truth", "flags"), MISTAKES, ids=[f"{m[0].__name__}-{m[1]}" for m in MISTAKES]
)
def test_a_mistake_stops_training_with_its_letter(
    train: Callable[..., Result], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch,
    mistake: Callable[[pytest.MonkeyPatch], None], architecture: str, truth: str, flags: list[object],
) -> None:  # fmt: skip
    model = request.getfixturevalue(f"tiny_{architecture}")
    fine = train(model, *flags)
    assert fine.exit_code == 0, fine.stderr
    mistake(monkeypatch)
    done = train(model, *flags, "--overwrite")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    assert f"error: {truth} does not hold at step 0: " in done.stderr
    assert INVARIANTS[truth].broken in done.stderr and f"hint: {INVARIANTS[truth].remedy}" in done.stderr


def test_who_knows_better_may_go_on(
    train: Callable[..., Result], tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    another_reference(monkeypatch)
    done = train(tiny_gpt2, "--set", "step0=warn")
    assert done.exit_code == 0, done.stderr
    assert "warning: policy.reference does not hold at step 0" in done.stderr


def test_only_the_first_step_is_examined(
    train: Callable[..., Result], tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an update the KL is no longer 0, and that is meant."""
    steps: list[int] = []
    probe = policy_probe.probe
    monkeypatch.setattr(policy_probe, "probe", lambda *a, **k: [steps.append(k["step"]), probe(*a, **k)][1])
    assert train(tiny_gpt2, "--max-steps", 3, "--save-steps", 2, "--lr", "1e-2").exit_code == 0
    assert steps == [0]


# --- what the figures mean


def test_every_mask_is_looked_at(tiny_gpt2: Path) -> None:
    loaded = loaded_from(tiny_gpt2)
    guide = ScriptedGuide(("the cat sees it .", "stop"))
    generator = generator_for(loaded, guide, max_new_tokens=10)
    episodes = generator.generate(PPO_PP, prompts_for(loaded, 9), 0, 6.0)
    batch = step_data(actor_critic(loaded), PPO_PP, episodes, generator.sampling).batch
    tokens = batch.tokens

    def faults(**changes: Any) -> str:
        check = invariants.masks(episodes, replace(batch, **changes), PPO_PP, loaded.eos_ids)
        assert (check.status == "fail") == bool(changes)
        return check.finding

    assert faults().startswith("9 texts agree with their masks")
    for name, words in {
        "real": "padding counted as real",
        "policy": "given to another author",
        "learned": "not the author's own",
        "last": "the last token is another one",
    }.items():
        mask = getattr(batch, name).clone()
        mask[3, 0] ^= True
        found = faults(**{name: mask})
        assert words in found and "(1 texts)" in found and found.count("texts)") == 1
    ids, prompt = tokens.response_ids.clone(), tokens.prompt_ids.clone()
    ids[2, 0] += 1
    prompt[5, -1] += 1
    assert "other tokens than the episode's (1 texts)" in faults(tokens=replace(tokens, response_ids=ids))
    assert "padding in the prompt" in faults(tokens=replace(tokens, prompt_ids=prompt))


def test_the_ratio_sees_padding_that_differs(tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that all hold a longest prompt would be padded alike, and agree in their mistake."""
    positions_from_the_left(monkeypatch)
    monkeypatch.setattr(policy_probe, "_some", lambda batch: torch.tensor([0, 3, 4, 1, 7, 8]))  # longest: 3, 7
    assert examined(loaded_from(tiny_gpt2), PPO, max_tokens=None)["policy.ratio"].status == "fail"


def test_a_gap_counted_by_hand() -> None:
    a, b = torch.tensor([[1.0, 2.0], [3.0, 9.0]]), torch.tensor([[1.0, 2.5], [4.5, 0.0]])
    gap = Gap.between(a, b, torch.tensor([[True, True], [True, False]]))
    assert (gap.tokens, gap.worst) == (3, 1.5) and gap.mean == pytest.approx(2 / 3)
    assert Gap.of(torch.tensor([])).tokens == 0
    broken = Gap.of(torch.tensor([0.0, float("nan")]))
    assert not broken.within(rounding(torch.bfloat16)) and broken.numbers()["worst"] is None


def test_a_draw_outside_its_tokens_interval() -> None:
    tolerance = quantile_rounding(torch.float32)
    below, upto = torch.tensor([0.0, 0.5, 0.2]).double(), torch.tensor([0.5, 0.9, 0.3]).double()
    inside = sampled(torch.tensor([0.1, 0.7, 0.25]).double(), below, upto, tolerance)
    outside = sampled(torch.tensor([0.1, 0.7, 0.35]).double(), below, upto, tolerance)
    assert inside is not None and inside.status == "ok" and inside.numbers["worst"] == 0
    assert outside is not None and outside.status == "fail" and outside.numbers["strays"] == 1
    assert outside.numbers["worst"] == pytest.approx(0.05)
