"""``rlgf train`` from the command line on tiny models: every algorithm, every kind of model, and what a run leaves."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from conftest import Result, guide_rows, toy_examples, write_rows
from rlgf_cli.runs import memory
from rlgf_cli.runs.metric_names import known

LIVE = ["aggrevated", "lols", "d2lols", "dagger"]
RECORDED = ["ppo++", "grpo++", "rloo++", "bc-guide"]
ALONE = ["ppo", "grpo", "rloo"]
BESIDE = ["luffy", "mix", "chord", "chord-phi", "hpt", "on-failure", "pope"]
"""The policy writes alone; the guide's texts are besides, or where it failed."""
PREFIXED = ["uft", "prefix-rft"]
GROUPED = ["grpo", "rloo", "grpo++", "rloo++", *BESIDE, *PREFIXED]

Train = Callable[..., Path]


@pytest.fixture
def data(examples_file: Path, tmp_path: Path) -> Path:
    write_rows(tmp_path / "guide.jsonl", guide_rows(toy_examples(40), 2))
    # random text covers no concept; how its letters are spread differs from text to text
    (tmp_path / "reward.py").write_text(
        "def letters(text):\n    return sum(c in 'abcdefghijklm' for c in text.lower()) / max(1, len(text))\n"
    )
    return examples_file


@pytest.fixture
def train(run_cli: Callable[..., Result], data: Path, tmp_path: Path, tiny_gpt2: Path) -> Train:
    """``train("ppo", "--lr", 1e-3, model=...)`` -> the run's folder. ``guide``: "hf", "recorded" or None."""

    def run(name: str, *more: object, model: Path = tiny_gpt2, guide: str | None = None, folder: str = "run") -> Path:
        guides = {"hf": f"hf:{model}", "recorded": str(tmp_path / "guide.jsonl")}
        extra = ["--guide", guides[guide]] if guide else []
        extra += ["--group-size", "4"] if name in GROUPED else []
        extra += ["--restarted", "2"] if name in ("on-failure", "pope") else []
        extra += ["--failed-at", "9"] if name in ("hpt", "on-failure", "pope") else []  # all texts have failed
        extra += ["--switch-step", "1"] if name == "d2lols" else []
        reward = f"coverage,{tmp_path / 'reward.py'}:letters"
        result = run_cli(
            "train", "--alg", name, "--model", model, "--data", data, "--reward", reward,
            "--episodes", 8, "--batch-size", 4, "--epochs", 2, "--max-new-tokens", 10, "--max-steps", 2,
            "--lr", "1e-3", "--device", "cpu", "--set", "rollout.save_every=1", *extra, *more, "-o", tmp_path / folder,
        )  # fmt: skip
        assert result.exit_code == 0, result.stderr
        assert result.stdout.splitlines()[-1] == str(tmp_path / folder)
        return tmp_path / folder

    return run


def rows_of(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for name, value in row.items():
            assert known(name), name
            assert isinstance(value, str) or math.isfinite(value), name
    return rows


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*model.safetensors")))


def moved(run: Path, start: Path) -> bool:
    before, after = weights_of(start), weights_of(run)
    assert before.keys() == after.keys()
    return any(not torch.equal(before[name], after[name]) for name in before)


# --- every algorithm


@pytest.mark.parametrize(
    ("name", "guide"),
    [(n, None) for n in ALONE]
    + [(n, "recorded") for n in [*RECORDED, *BESIDE, *PREFIXED]]
    + [(n, "hf") for n in [*RECORDED, *LIVE]],
)
def test_every_algorithm_runs_and_moves_the_policy(train: Train, tiny_gpt2: Path, name: str, guide: str | None) -> None:
    run = train(name, guide=guide)
    rows = rows_of(run)
    assert [row["step"] for row in rows] == [1, 2]
    assert moved(run, tiny_gpt2)
    assert all(row["tokens/learned"] > 0 for row in rows) or name == "hpt"  # where all fail, the guide's text alone
    assert all(("loss/guide_nll" in row) == (name in [*BESIDE[:5], *PREFIXED]) for row in rows)
    regimes = {
        "policy": [*ALONE, *BESIDE],
        "guide>policy": [*RECORDED[:3], *PREFIXED],
        "guide": ["bc-guide"],
        "policy>guide": [*LIVE],
    }
    if name == "d2lols":
        assert [row["regime"] for row in rows] == ["policy>guide", "guide>policy"]
    elif name == "lols":
        assert {row["regime"] for row in rows} <= {"policy>guide", "guide>policy"}
    else:
        assert {row["regime"] for row in rows} == {next(r for r, names in regimes.items() if name in names)}
    assert all(("guide/requests" in row) == (guide is not None) for row in rows)
    learns_by_likelihood = name in ("bc-guide", "dagger")
    assert all(("loss/likelihood" in row) == learns_by_likelihood for row in rows)
    assert all(("kl/coef" in row) != learns_by_likelihood for row in rows)
    assert all(("loss/value_policy" in row or "loss/value_guide" in row) for row in rows) == (
        name in ("ppo", "ppo++", "aggrevated", "lols", "d2lols")
    )


@pytest.mark.parametrize("name", ["ppo++", "aggrevated", "grpo"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "t5", "bart", "gpt2_pad_eos"])
def test_other_architectures(train: Train, request: pytest.FixtureRequest, architecture: str, name: str) -> None:
    model = request.getfixturevalue(f"tiny_{architecture}")
    run = train(name, model=model, guide=None if name == "grpo" else "hf")
    rows = rows_of(run)
    assert rows[0]["kl/episode"] == pytest.approx(0, abs=1e-4)  # nothing was learned yet
    assert moved(run, model)
    auto: Any = AutoModelForSeq2SeqLM if architecture in ("t5", "bart") else AutoModelForCausalLM
    loaded = auto.from_pretrained(run)
    ids = AutoTokenizer.from_pretrained(run)("cat sees garden", return_tensors="pt").input_ids
    assert loaded.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[0] == 1


# --- what a run leaves


def test_what_a_run_leaves(train: Train, tiny_gpt2: Path, data: Path, tmp_path: Path) -> None:
    run = train("ppo++", "--eval-data", data, "--set", "eval.every=1", "--set", "eval.limit=5", guide="recorded")
    assert {p.name for p in run.iterdir()} == {
        "run.json", "config.resolved.json", "metrics.jsonl", "rollouts", "checkpoints", "best", "README.md",
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "rlgf_text.json",
    }  # fmt: skip
    manifest = json.loads((run / "run.json").read_text())
    assert [manifest[key] for key in ("command", "status", "seed", "device")] == ["train", "done", 0, "cpu"]
    assert {p["path"] for p in manifest["parents"]} == {str(tiny_gpt2), str(data), str(tmp_path / "guide.jsonl")}
    assert set(manifest["wrote"]) == {p.name for p in run.iterdir()} - {"run.json"}
    result, rows = manifest["result"], rows_of(run)
    assert (result["algorithm"], result["steps"], result["episodes"]) == ("ppo++", 2, 16)
    assert result["eval/score"] == rows[-1]["eval/score"] and result["score/mean"] == rows[-1]["score/mean"]
    config = json.loads((run / "config.resolved.json").read_text())
    assert config["values"]["algorithm"]["name"] == "ppo++" and config["origins"]["algorithm.name"] == "flag"
    assert config["origins"]["ppo.gamma"] == "default" and config["origins"]["eval.every"].startswith("--set")
    card = (run / "README.md").read_text()
    assert "## Guide" in card and "guide.jsonl" in card and str(tmp_path) not in card
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_2"]
    for folder in (run, run / "best", run / "checkpoints" / "step_2"):
        assert GenerationConfig.from_pretrained(folder).max_new_tokens == 10
    kept = weights_of(run / "checkpoints" / "step_2")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in weights_of(run).items())
    for row in rows:
        assert row["score/mean"] == pytest.approx(row["score/part/coverage"] + row["score/part/letters"], abs=1e-6)


def test_the_memory_is_estimated_before_and_compared_after(
    train: Train, run_cli: Callable[..., Result], tiny_gpt2: Path, data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    command = ("train", "--alg", "ppo", "--model", tiny_gpt2, "--data", data, "--reward", "coverage", "--device", "cpu")
    sizes = ("--episodes", 8, "--batch-size", 4, "--max-new-tokens", 10, "-o", tmp_path / "no")
    (line,) = [line for line in run_cli(*command, *sizes, "--dry-run").stdout.splitlines() if line.startswith("memory")]
    assert re.match(r"memory gb per device: total [\d.]+, weights [\d.]+, gradients [\d.]+, adamw [\d.]+, ", line)
    told = json.loads(run_cli(*command, *sizes, "--dry-run", "--json").stdout)["memory_gb_per_device"]
    assert sum(told.values()) - told["total"] == pytest.approx(told["total"], rel=0.02)

    growing = itertools.count(10**9, 10**6)  # other tests of this process held more than this run will
    monkeypatch.setattr(memory, "_peak_resident", lambda: next(growing))
    monkeypatch.setattr(memory, "_resident", lambda: 10**9)
    run = train("ppo")
    recorded = json.loads((run / "run.json").read_text())["memory"]
    assert recorded["estimated_bytes"] == sum(recorded["parts"].values())
    assert recorded["estimated_bytes"] / 1e9 == pytest.approx(told["total"], rel=0.02)
    assert recorded["peak_bytes"] == 10**6
    assert recorded["ratio"] == pytest.approx(10**6 / recorded["estimated_bytes"], abs=1e-3)


def test_rollouts_hold_segments_with_their_authors(train: Train) -> None:
    run = train("ppo++", "--rollin-prob", "1", guide="recorded")
    assert sorted(p.name for p in (run / "rollouts").iterdir()) == ["step_1.jsonl", "step_2.jsonl"]
    tokenizer: Any = AutoTokenizer.from_pretrained(run)
    for line in (run / "rollouts" / "step_1.jsonl").read_text().splitlines():
        episode = json.loads(line)
        assert [segment["author"] for segment in episode["segments"]] == ["guide", "policy"]
        assert len(episode["segments"][0]["ids"]) == episode["cut"]
        ids = [i for segment in episode["segments"] for i in segment["ids"]]
        assert tokenizer.decode(ids, skip_special_tokens=True).removeprefix(" ").rstrip() == episode["text"]
        assert episode["score"] == pytest.approx(sum(episode["parts"].values()))


def test_the_product_is_the_start_of_another_run(train: Train) -> None:
    first = train("ppo", folder="first")
    second = train("ppo", model=first, folder="second")
    assert rows_of(second)[0]["kl/episode"] == pytest.approx(0, abs=1e-4)  # the reference is where this run starts
    assert (
        json.loads((second / "run.json").read_text())["parents"][0]["run_id"]
        == (json.loads((first / "run.json").read_text())["run_id"])
    )


# --- kinds of training


def test_lora_leaves_an_adapter_and_a_second_run_goes_on_with_it(train: Train, tiny_gpt2: Path) -> None:
    lora = ["--use-peft", "--lora-r", "4"]
    first = train("ppo", *lora, folder="first")
    assert (first / "adapter_config.json").is_file() and not (first / "model.safetensors").exists()
    again = train("ppo", *lora, folder="again")
    assert not moved(again, first)  # a fresh adapter is random, and seeded
    second = train("aggrevated", model=first, guide="hf", folder="second")
    assert rows_of(second)[0]["kl/episode"] == pytest.approx(0, abs=1e-4)
    assert moved(second, first)
    assert not (second / "reference").exists()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_gpt2), second)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ppo", ["--gradient-checkpointing"]),
        ("aggrevated", ["--gradient-checkpointing", "--use-peft"]),
        ("d2lols", ["--set", "ppo.critic=separate"]),
        ("ppo", ["--set", "ppo.critic=separate", "--use-peft"]),
        ("aggrevated", ["--credit", "cut"]),
        ("aggrevated", ["--cut", "inner"]),
        ("ppo++", ["--restart", "backward", "--restart-steps", "1", "--gate"]),
        ("grpo++", ["--restart", "backward", "--restart-steps", "3", "--gate"]),
        ("lols", ["--restart", "uncertain", "--gate", "--p-ppo-pp", "1"]),
        ("ppo", ["--set", "ppo.entropy_coef=0.01", "--set", "ppo.value_clip_range=null", "--set", "kl.adaptive=true"]),
    ],
)
def test_ways_to_train(train: Train, name: str, options: list[str]) -> None:
    run = train(name, *options, guide=None if name == "ppo" else "hf")
    assert len(rows_of(run)) == 2
    row = rows_of(run)[-1]
    assert row["ppo/ratio"] == pytest.approx(1, abs=0.2)


def test_gradient_checkpointing_changes_no_figure(train: Train, tiny_llama: Path) -> None:
    one = rows_of(train("ppo", model=tiny_llama, folder="one"))
    two = rows_of(train("ppo", "--gradient-checkpointing", model=tiny_llama, folder="two"))
    for a, b in zip(one, two, strict=True):
        same = {k: v for k, v in a.items() if not k.startswith("time/") and k != "regime"}
        assert {k: b[k] for k in same} == pytest.approx(same, abs=1e-3)


def test_bfloat16_computes_in_it_and_keeps_float32_weights(train: Train, tiny_gpt2: Path) -> None:
    run = train("aggrevated", "--dtype", "bfloat16", "--lr", "1e-6", guide="hf")
    rows = rows_of(run)
    assert rows[0]["kl/episode"] == pytest.approx(0, abs=0.05)
    assert rows[0]["ppo/ratio"] == pytest.approx(1, abs=0.03)
    assert moved(run, tiny_gpt2)
    assert {t.dtype for t in weights_of(run).values()} == {torch.float32}


def test_reference_nll_is_trained_on(train: Train) -> None:
    with_it = train("ppo", "--set", "aux.reference_nll=1.0", "--max-steps", "6", "--lr", "1e-2")
    rows = rows_of(with_it)
    assert rows[-1]["loss/reference_nll"] < 0.8 * rows[0]["loss/reference_nll"]
    assert "loss/reference_nll" not in rows_of(train("ppo", folder="without"))[0]


def test_a_warming_critic_freezes_the_policy(train: Train, tiny_gpt2: Path) -> None:
    run = train("ppo", "--set", "ppo.critic_warmup_steps=2")
    assert [row["update/policy_frozen"] for row in rows_of(run)] == [1, 1]
    assert "loss/policy" not in rows_of(run)[0] and rows_of(run)[0]["loss/value_policy"] > 0
    assert not moved(run, tiny_gpt2)
    assert moved(train("ppo", "--set", "ppo.critic_warmup_steps=1", folder="shorter"), tiny_gpt2)


@pytest.mark.parametrize("name", ["ppo", "aggrevated"])
def test_accumulation_changes_no_figure(train: Train, name: str) -> None:
    guide = None if name == "ppo" else "hf"
    # one step: afterwards Adam makes rounding errors of gradients as large as the gradients
    short = ["--max-steps", "1", "--epochs", "1", "--batch-size", "8"]
    whole, parts = (
        rows_of(train(name, *short, "--gradient-accumulation-steps", n, guide=guide, folder=f"in_{n}"))[0]
        for n in (1, 4)
    )
    figures = {k: v for k, v in whole.items() if not k.startswith("time/") and k != "regime"}
    assert {k: parts[k] for k in figures} == pytest.approx(figures, abs=1e-5)


def test_the_seed_decides_everything(train: Train) -> None:
    def figures(folder: str, seed: int) -> list[dict[str, Any]]:
        rows = rows_of(train("lols", "--seed", seed, guide="hf", folder=folder))
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]

    assert figures("a", 3) == figures("b", 3) != figures("c", 4)


def test_a_constant_learning_rate_warms_up(train: Train) -> None:
    run = train("ppo", "--set", "optim.schedule=constant", "--set", "optim.warmup_steps=4", "--max-steps", "6")
    assert [row["lr"] for row in rows_of(run)] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])


def test_a_mixture_of_ones_own_runs(train: Train, tmp_path: Path) -> None:
    recipe = tmp_path / "mixture.yaml"
    recipe.write_text(
        "algorithm:\n  name: half-and-half\n  regimes:\n    - {roll_in: none}\n"
        "    - {roll_in: none, roll_out: guide, estimator: likelihood}\n"
        "  schedule: {kind: mixture, weights: [0.5, 0.5]}\n"
    )
    run = train("half-and-half", "-c", recipe, "--max-steps", "6", guide="recorded")
    assert {row["regime"] for row in rows_of(run)} == {"policy", "guide"}
    assert json.loads((run / "run.json").read_text())["result"]["algorithm"] == "half-and-half"
