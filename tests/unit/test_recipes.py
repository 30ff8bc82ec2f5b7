"""The recipes: every YAML resolves, every script speaks the command line that there is, the paper's figures stand."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from rlgf_cli.cli import commands
from rlgf_cli.config.loader import resolve
from rlgf_cli.config.scratch import ScratchConfig, read_scratch
from rlgf_cli.config.sweep import SweepConfig
from rlgf_cli.sweep.plan import make_plan

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
YAMLS = sorted(RECIPES.rglob("*.yaml"))
SCRIPTS = sorted(RECIPES.glob("*/**/*.sh"))
SOURCED = sorted(RECIPES.glob("*.sh"))
"""Parts that the scripts share."""
TASKS = ["imdb", "commongen", "tldr"]
ALGORITHMS = ["ppo", "ppo++", "aggrevated", "lols", "d2lols"]
SCRATCH = {"model", "guide_model", "classifier", "judge"}
"""Files that describe a model from scratch."""
OVERLAYS = {"guide": "sft", "clone": "sft", "live": "train", "fewshot": "train", "encoder": "train_reward"}
"""Files that are laid over a stage's own, with ``-c STAGE.yaml -c OVERLAY.yaml``."""
STAGES = {
    "prepare": "prepare:PrepareConfig",
    "sft": "sft:SftConfig",
    "train_reward": "train_reward:TrainRewardConfig",
    "collect_guide": "collect_guide:CollectGuideConfig",
    "train": "train:TrainConfig",
    "eval": "eval:EvalConfig",
    "sweep": "sweep:SweepConfig",
    "generate": "generate:GenerateConfig",
    "make_negatives": "make_negatives:MakeNegativesConfig",
    "evolve_train": "evolve_train:EvolveTrainConfig",
    "evolve_generate": "evolve_generate:EvolveGenerateConfig",
}
GIVEN: dict[str, dict[str, Any]] = {
    "prepare": {"output": "out"},
    "sft": {"output": "out", "data": "train.jsonl"},
    "train_reward": {"output": "out", "data": "train.jsonl"},
    "collect_guide": {"output": "out.jsonl", "data": "train.jsonl", "guide.name": "hf:guide"},
    "train": {"output": "out", "data": "train.jsonl", "model.name": "sft", "guide.name": "hf:guide"},
    "eval": {"output": "out", "data": "test.jsonl", "model.name": "sft"},
    "sweep": {"output": "out"},
    "generate": {"model.name": "sft", "data": "train.jsonl", "output": "texts.jsonl"},
    "make_negatives": {"output": "negatives.jsonl", "data": "train.jsonl"},
    "evolve_train": {"output": "out", "data": "seeds.jsonl", "guide.name": "gpt-4o-mini"},
    "evolve_generate": {"output": "out", "data": "seeds.jsonl", "guide.name": "gpt-4o-mini"},
}
"""What the scripts give with flags."""


def config(stage: str, *files: Path, **flags: Any) -> Any:
    """The checked config of a stage from recipe files and what the scripts give with flags."""
    module, _, name = STAGES[stage].partition(":")
    kind = getattr(importlib.import_module(f"rlgf_cli.config.{module}"), name)
    return resolve(kind, files=files, flags={**GIVEN[stage], **flags}).config


def files_of(path: Path) -> tuple[str, list[Path]]:
    """The stage that a recipe's file belongs to, and the files that it is used with."""
    if path.parent.name == "alg":
        return "train", [path.parent.parent / "train.yaml", path]
    if (stage := OVERLAYS.get(path.stem)) is not None:
        return stage, [path.with_name(f"{stage}.yaml"), path]
    return ("sweep" if path.stem == "baselines" else path.stem), [path]


def test_the_recipes_are_found():
    assert {path.parent.name for path in SCRIPTS} >= {"sentences", "synthetic", "small", *TASKS}
    assert len(YAMLS) > 40


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: str(path.relative_to(RECIPES)))
def test_every_yaml_resolves(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    if path.stem in SCRATCH:
        assert isinstance(read_scratch(path), ScratchConfig)
        return
    stage, files = files_of(path)
    # an algorithm's file says which; a reward and a scratch model that a script names are given here
    needed = {"train": {"reward": "rouge"}, "train_reward": {"model.name": "model"}}.get(stage, {})
    has_reward = stage == "train" and "\nreward" in files[0].read_text(encoding="utf-8")
    config(stage, *files, **({} if has_reward else needed))


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: str(path.relative_to(RECIPES)))
def test_every_file_that_a_yaml_names_is_there(path):
    for name in re.findall(r"recipes/[\w./+-]+\.(?:yaml|py)", path.read_text(encoding="utf-8")):
        assert (ROOT / name).is_file(), name


def test_models_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("RLGF_TLDR_MODEL", "other/model")
    assert config("sft", RECIPES / "tldr/sft.yaml").model.name == "other/model"
    monkeypatch.delenv("RLGF_TLDR_MODEL")
    assert config("sft", RECIPES / "tldr/sft.yaml").model.name == "EleutherAI/gpt-j-6b"


def test_the_synthetic_sweep_has_the_points_that_it_promises(tmp_path, monkeypatch):
    for name in ("sft", "guide", "data"):
        (tmp_path / name).mkdir()
    for name in ("train", "test"):
        (tmp_path / "data" / f"{name}.jsonl").write_text('{"prompt": "a"}\n')
    monkeypatch.setenv("RLGF_SYNTHETIC", str(tmp_path))
    monkeypatch.chdir(ROOT)
    plan = make_plan(resolve(SweepConfig, files=[RECIPES / "synthetic/sweep.yaml"], flags={"output": "out"}))
    assert len(plan.trainings) == 15 and plan.expansion.folded == 3 and plan.baselines == ["ppo", "SFT"]
    assert plan.systems == [
        "ppo", "ppo++, rollin_prob 0.5", "ppo++, rollin_prob 0.8", "aggrevated, rollin_prob 0.5",
        "aggrevated, rollin_prob 0.8", "SFT", "guide",
    ]  # fmt: skip
    for training in plan.trainings.values():
        assert training.config.max_steps == 100 and training.config.kl.coef == 0.0


# --- the scripts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [*SCRIPTS, *SOURCED], ids=lambda path: str(path.relative_to(RECIPES)))
def test_scripts_are_bash(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def variables(text: str) -> dict[str, str]:
    """Everything that a script's variables and arrays are set to, all values of one name behind each other."""
    found: dict[str, str] = {}
    for name, _, value in re.findall(r"\b(\w+)=(['\"])(.*?)\2", text):
        found[name] = f"{found.get(name, '')} {value}"
    for name, value in re.findall(r"\b(\w+)=\(([^)]*)\)", text):
        found[name] = f"{found.get(name, '')} {value}"
    for name, value in re.findall(r"\b(\w+)=([\w./-]+)(?=\s|$)", text):
        found[name] = value
    return found


def rlgf_commands(script: Path) -> Iterator[tuple[str, list[str]]]:
    """Each ``rlgf COMMAND`` of a script and its sourced parts with its words, the script's own variables filled in."""
    sourced = re.compile(r"^source .*?(\w+\.sh)\"?$", flags=re.MULTILINE)
    whole = script.read_text(encoding="utf-8")
    while sourced.search(whole):
        whole = sourced.sub(lambda match: (RECIPES / match[1]).read_text(encoding="utf-8"), whole)
    text = re.sub(r"^\s*#.*$", "", whole, flags=re.MULTILINE).replace("\\\n", " ")
    known = variables(text)
    for head, rest in re.findall(r"(?:^|[\"\s;])rlgf ([a-z][a-z-]+)(?=\s)([^\n]*)", text):
        line = re.split(r"\s2?>", rest)[0]
        for _ in range(3):  # variables in variables
            line = re.sub(
                r"\$\{?(\w+)(?:\[@\])?\}?", lambda m: known.get(m[1], m[0].replace("$", "@")).strip(), line
            ).replace('"', " ")
        words = [head, *shlex.split(line.replace(";", " "))]
        command = commands.called(words) or head
        yield command, words[len(command.split()) :]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(RECIPES)))
def test_scripts_use_flags_that_exist(script):
    seen = list(rlgf_commands(script))
    assert seen
    for command, words in seen:
        assert command in commands.COMMANDS, command
        known = {name for parameter in commands.load(command).params for name in parameter.opts}
        for word in words:
            if re.match(r"--?[a-z]", word):
                assert word in known, f"rlgf {command} {word}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(RECIPES)))
def test_scripts_name_files_that_exist(script):
    for _, words in rlgf_commands(script):
        for flag, name in pairwise(words):
            if flag == "-c":
                wanted = [name.replace("@algorithm", a) for a in ALGORITHMS] if "@algorithm" in name else [name]
                for path in wanted:
                    assert (ROOT / path).is_file(), f"{script}: {path}"


def test_the_scripts_words_are_understood():
    seen = [command for command, _ in rlgf_commands(RECIPES / "imdb/run.sh")]
    expected = ["prepare", "sft", "train-reward", "collect-guide", "eval", "train", "eval", "compare"]
    assert seen == expected
    words = dict(rlgf_commands(RECIPES / "imdb/small/run.sh"))["train"]
    assert {"--alg", "--guide", "--eval-data", "--episodes", "--max-steps"} <= set(words)  # of $common and $roll


def test_a_script_whose_stage_fails_shows_the_error_and_begins_no_other_stage(tmp_path):
    stub = tmp_path / "bin" / "rlgf"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/calls\necho "error: $1 says no" >&2\nexit 2\n')
    stub.chmod(0o755)
    path = f"{stub.parent}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = ["bash", str(RECIPES / "sentences" / "run.sh"), str(tmp_path / "out")]
    done = subprocess.run(script, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode != 0
    assert "error: collect-guide says no" in done.stderr and f"{tmp_path}/out/log" in done.stderr
    assert set((tmp_path / "calls").read_text().split()) <= {"collect-guide", "train"}  # the first two, side by side


# --- the paper's settings ------------------------------------------------------------------------------------------

BY_TASK: dict[str, tuple[Any, Any, Any]] = {
    "max_steps": (50, 500, 1000),
    "rollout.episodes": (112, 128, 128),
    "ppo.minibatch_size": (28, 32, 32),
    "ppo.epochs": (5, 4, 4),
    "ppo.gamma": (0.99, 0.99, 1.0),
    "ppo.gae_lambda": (0.95, 0.95, 0.95),
    "ppo.value_coef": (0.5, 30.0, 0.1),
    "optim.learning_rate": (1e-05, 5e-06, 5e-06),
    "optim.schedule": ("linear", "linear", "constant"),
    "kl.coef": (0.001, 0.0, 0.002),
    "lengths.max_prompt_tokens": (64, 15, 500),
    "lengths.max_new_tokens": (48, 20, 50),
    "lengths.min_new_tokens": (48, 5, 0),
    "rollout.top_k": (50, 0, 0),
}
"""arXiv 2306.11816 and the configs released with it: settings of all algorithms of a task, in the order of TASKS."""
PAPER: dict[str, dict[str, Any]] = {
    task: {key: values[i] for key, values in BY_TASK.items()} for i, task in enumerate(TASKS)
}
PAPER["tldr"] |= {"model.load_in_4bit": True, "lora.enabled": True, "lora.r": 8, "lora.alpha": 64, "lora.dropout": 0.1}

SHARED = {
    "kl.adaptive": False, "kl.where": "reward", "ppo.critic": "separate", "ppo.clip_range": 0.2,
    "ppo.value_clip_range": 0.2, "optim.max_grad_norm": 1.0, "rollout.temperature": 1.0, "rollout.top_p": 1.0,
    "aux.reference_nll": 0.1,
}  # fmt: skip

ROLLIN = {"imdb": {"ppo++": 0.6}, "commongen": {}, "tldr": {"aggrevated": 1.0}}
"""Where rollin_prob is not 0.8."""
SWITCH = {"imdb": 20, "commongen": 100, "tldr": 200}
GUIDE_TOP_K = {"imdb": 50, "commongen": 0, "tldr": 0}
EVALUATION = {
    "imdb": {"temperature": 1.0, "top_k": 50, "num_beams": 1},
    "commongen": {"temperature": 0.0, "top_k": 0, "num_beams": 5},
    "tldr": {"temperature": 0.0, "top_k": 0, "num_beams": 1},
}


def value(checked: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        checked = getattr(checked, part)
    return checked


def training(task: str, algorithm: str) -> Any:
    folder = RECIPES / task
    reward = {"reward": "classifier:x"} if task == "imdb" else {}
    return config("train", folder / "train.yaml", folder / f"alg/{algorithm}.yaml", **reward)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("task", TASKS)
def test_training_has_the_papers_settings(task, algorithm):
    checked = training(task, algorithm)
    for key, expected in {**PAPER[task], **SHARED}.items():
        assert value(checked, key) == expected, key
    assert checked.algorithm.name == algorithm
    if algorithm != "ppo":
        assert checked.algorithm.rollin_prob == ROLLIN[task].get(algorithm, 0.8)
    assert getattr(checked.algorithm, "p_ppo_pp", None) == (0.8 if algorithm == "lols" else None)
    assert getattr(checked.algorithm, "switch_step", None) == (SWITCH[task] if algorithm == "d2lols" else None)


@pytest.mark.parametrize("algorithm", ["aggrevated", "lols", "d2lols", "collect-guide"])
@pytest.mark.parametrize("task", TASKS)
def test_guides_sample_as_in_the_paper(task, algorithm):
    collects = algorithm == "collect-guide"
    collected = config("collect_guide", RECIPES / task / "collect_guide.yaml")
    guide = collected.guide if collects else training(task, algorithm).guide
    sampling = (guide.sampling.temperature, guide.sampling.top_p, guide.sampling.top_k)
    assert sampling == (1.0, 0.92, GUIDE_TOP_K[task])
    assert guide.max_prompt_tokens == PAPER[task]["lengths.max_prompt_tokens"]
    assert collected.max_new_tokens == PAPER[task]["lengths.max_new_tokens"]


@pytest.mark.parametrize("task", TASKS)
def test_evaluation_decodes_as_in_the_paper(task):
    checked = config("eval", RECIPES / task / "eval.yaml")
    for key, expected in EVALUATION[task].items():
        assert getattr(checked.decoding, key) == expected, key
    for key in ("max_prompt_tokens", "max_new_tokens", "min_new_tokens"):
        assert getattr(checked.lengths, key) == PAPER[task][f"lengths.{key}"], key


def test_prompt_formats():
    formats = {task: config("sft", RECIPES / task / "sft.yaml").text for task in TASKS}
    assert formats["commongen"].template == "generate a sentence with: {prompt}."
    assert formats["tldr"].template == "{prompt}\nTL;DR:"
    assert formats["imdb"] is None or formats["imdb"].template is None  # the review's beginning as it is
    lora = config("sft", RECIPES / "tldr/sft.yaml").lora
    assert (lora.enabled, lora.r, lora.alpha, lora.dropout) == (True, 8, 64, 0.1)
