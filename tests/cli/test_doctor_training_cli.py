"""`rlgf doctor` on the model, data and reward of a training: the invariants of step 0, each with its remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Result, toy_examples, write_rows
from rlgf_cli.checks import reward_probe
from rlgf_cli.checks.invariants import INVARIANTS
from rlgf_cli.functional.logprobs import process_logits
from rlgf_cli.models import generate

Doctor = Callable[..., Result]
POLICY = [name for name in INVARIANTS if name != "lora.reference"]
REWARD = ["reward.scores", "reward.text", "reward.spread", "reward.repeatable", "reward.time"]
REWARDS = """
import math, random

def letters(text):
    return sum(c in "abcdefghijklm" for c in text.lower()) / max(1, len(text))

def of_the_prompt(text, prompt):
    return len(prompt)

def always(text):
    return 0.5

def rare(text):
    return float(text.endswith("."))

def chance(text):
    return random.random()

def no_number(text):
    return math.nan if not text else 1.0
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = toy_examples(8)
    for i, row in enumerate(rows):
        row["prompt"] += " river the house" * (i % 3)
    (tmp_path / "reward.py").write_text(REWARDS)
    return write_rows(tmp_path / "train.jsonl", rows)


@pytest.fixture
def doctor(run_cli: Callable[..., Result], data: Path, tmp_path: Path) -> Doctor:
    def run(model: Path, *flags: object, reward: str = "letters") -> Result:
        given = ["--reward", f"{tmp_path / 'reward.py'}:{reward}"] if reward else []
        return run_cli(
            "doctor", "--model", model, "--data", data, *given, "--max-new-tokens", 10, "--device", "cpu", *flags
        )

    return run


def checks(done: Result) -> dict[str, dict[str, Any]]:
    report = json.loads(done.stdout)
    assert report["ok"] == (done.exit_code == 0)
    for check in report["checks"]:
        assert bool(check["remedy"]) == (check["status"] != "ok") and check["explanation"]
    return {check["name"]: check for check in report["checks"]}


# --- all is well


def test_every_architecture_is_well_and_nothing_is_written(doctor: Doctor, any_model: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = doctor(any_model, "--json")
    assert done.exit_code == 0, done.stderr
    found = checks(done)
    assert list(found) == ["data.prompts", "text.template", "text.ending", *POLICY, "policy.endings", *REWARD]
    assert {name for name, check in found.items() if check["status"] == "fail"} == set()
    assert found["episodes.masks"]["finding"].startswith("8 texts agree with their masks")
    assert [p for p in sorted(tmp_path.rglob("*")) if "__pycache__" not in str(p)] == before


def test_people_read_it(doctor: Doctor, tiny_gpt2: Path, data: Path) -> None:
    done = doctor(tiny_gpt2)
    lines = done.stdout.splitlines()
    assert lines[0] == f"{tiny_gpt2} on 8 prompts of {data}"
    at = next(i for i, line in enumerate(lines) if line.startswith("ok    policy.plain: one text at a time: "))
    assert lines[at + 1] == f"      {INVARIANTS['policy.plain'].broken}"


def test_a_training_recipe_is_taken_as_it_is(doctor: Doctor, tiny_gpt2: Path, tmp_path: Path) -> None:
    """Keys that only training reads are no mistake here; those that decide what is examined are used."""
    recipe = tmp_path / "train.yaml"
    recipe.write_text(
        f"reward: {tmp_path / 'reward.py'}:letters\noutput: runs/x\nmax_steps: 7\noptim: {{learning_rate: 1e-4}}\n"
        "lora: {enabled: true, dropout: 0.5}\nlengths: {min_new_tokens: 3}\nrollout: {temperature: 0.7, episodes: 64}\n"
    )
    done = doctor(tiny_gpt2, "-c", recipe, "-L", 5, "--json", reward="")
    assert done.exit_code == 0, done.stderr
    found = checks(done)
    assert set(found) == {"data.prompts", "text.template", "text.ending", *INVARIANTS, "policy.endings", *REWARD}
    assert "5 texts" in found["episodes.masks"]["finding"] and "64 texts of a step" in found["reward.time"]["finding"]
    assert "adapter off" in found["lora.reference"]["finding"]
    assert doctor(tiny_gpt2, "-c", recipe, "--set", "lengths.max_new_tokns=3").exit_code == 2


@pytest.mark.parametrize("name", ["ppo++", "aggrevated", "guide_mc", "d2lols", "grpo++", "bc-guide"])
def test_the_algorithms_regimes_with_the_guides_texts(
    doctor: Doctor, tiny_gpt2: Path, tiny_llama: Path, name: str
) -> None:
    """The guide is asked for the probe alone: at most twice a prompt, however many regimes there are."""
    extra = {
        "d2lols": ["--set", "algorithm.switch_step=3"],
        "grpo++": ["--set", "algorithm.group_size=4"],
        "guide_mc": ["--set", "algorithm.advantage=guide_mc"],
    }
    alg = "aggrevated" if name == "guide_mc" else name
    done = doctor(tiny_gpt2, "--alg", alg, "--guide", f"hf:{tiny_llama}", *extra.get(name, []), "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)["checks"]
    masks = [check["finding"] for check in report if check["name"] == "episodes.masks"]
    assert len(masks) == (2 if name == "d2lols" else 1)
    assert all(("32 texts" if name == "grpo++" else "8 texts") in finding for finding in masks)
    assert ("reward.place" in {check["name"] for check in report}) == (name != "bc-guide")
    asked = next(check for check in report if check["name"] == "guide.answers")["numbers"]["asked"]
    assert asked <= 16


def test_an_algorithm_without_its_guide_is_refused_as_training_would(doctor: Doctor, tiny_gpt2: Path) -> None:
    done = doctor(tiny_gpt2, "--alg", "ppo++")
    assert done.exit_code == 2 and "needs a guide" in done.stderr


# --- what breaks


def test_a_sampler_of_another_distribution(doctor: Doctor, tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At temperature 1 the mistake does not show, and must not."""
    monkeypatch.setattr(generate, "process_logits", lambda logits, _, *rest: process_logits(logits, 1.0, *rest))
    assert doctor(tiny_gpt2).exit_code == 0
    done = doctor(tiny_gpt2, "--temperature", "0.5")
    assert done.exit_code == 1
    assert (
        "checks failed: policy.sampler" in done.stderr and f"hint: {INVARIANTS['policy.sampler'].remedy}" in done.stderr
    )
    assert "fail  policy.sampler: " in done.stdout


def test_prompts_that_are_too_long(doctor: Doctor, tiny_gpt2: Path) -> None:
    limit = ["--set", "lengths.max_prompt_tokens=6"]
    done = doctor(tiny_gpt2, *limit, "--json")
    assert done.exit_code == 1
    refused = checks(done)
    assert refused["data.prompts"]["status"] == "fail" and 0 < refused["data.prompts"]["numbers"]["over"] < 8
    assert refused["policy.plain"]["status"] == "ok"  # those that fit are looked at all the same
    skipped = checks(doctor(tiny_gpt2, *limit, "--on-overlong", "skip", "--json"))
    assert skipped["data.prompts"]["status"] == "warn"
    nothing = doctor(tiny_gpt2, "--max-new-tokens", 64, "--json")
    assert nothing.exit_code == 1 and list(checks(nothing)) == ["data.prompts", "text.template", "text.ending"]


def test_texts_that_do_not_end(doctor: Doctor, tiny_gpt2: Path) -> None:
    cut = checks(doctor(tiny_gpt2, "--json"))["policy.endings"]
    assert cut["status"] == "warn" and cut["numbers"]["truncated"] > 0.5
    meant = checks(doctor(tiny_gpt2, "--set", "lengths.min_new_tokens=10", "--json"))["policy.endings"]
    assert meant["status"] == "ok" and meant["numbers"]["mean_length"] == 10


@pytest.mark.parametrize(
    ("reward", "status"),
    [
        ("letters", {}),
        ("of_the_prompt", {"reward.text": "fail"}),
        ("always", {"reward.text": "fail", "reward.spread": "warn"}),
        ("rare", {"reward.spread": "warn"}),
        ("chance", {"reward.repeatable": "warn"}),
    ],
)
def test_rewards(doctor: Doctor, tiny_gpt2: Path, reward: str, status: dict[str, str]) -> None:
    done = doctor(tiny_gpt2, "--json", reward=reward)
    found = checks(done)
    assert {name: found[name]["status"] for name in REWARD} == dict.fromkeys(REWARD, "ok") | status
    assert done.exit_code == ("fail" in status.values())
    assert found["reward.place"]["status"] == "ok"


def test_a_reward_that_gives_no_number_for_an_empty_text(doctor: Doctor, tiny_gpt2: Path) -> None:
    done = doctor(tiny_gpt2, "--json", reward="no_number")
    found = checks(done)
    assert done.exit_code == 1 and not {*REWARD[1:]} & set(found)
    assert found["reward.scores"]["status"] == "fail" and "nan" in found["reward.scores"]["finding"]
    assert found["policy.plain"]["status"] == found["reward.place"]["status"] == "ok"


def test_a_slow_reward_is_worth_a_warning(doctor: Doctor, tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_probe, "_SLOW", 0.0)
    found = checks(doctor(tiny_gpt2, "--json"))["reward.time"]
    assert found["status"] == "warn" and found["numbers"]["seconds_per_step"] == pytest.approx(
        128 * found["numbers"]["seconds_per_text"]
    )
