"""``rlgf sweep``: what is refused before anything starts, and what a dry run says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import guide_rows, toy_examples, write_rows
from rlgf_cli.config.loader import resolve
from rlgf_cli.config.recipes import read_layer
from rlgf_cli.config.sweep import SweepConfig
from rlgf_cli.errors import UserError
from rlgf_cli.sweep import work
from rlgf_cli.sweep.plan import make_plan

RECIPE = """\
base:
  - base.yaml
  - model: sft
    data: train.jsonl
grid:
  alg: [ppo, ppo++]
  rollin_prob: [0.5, 0.8]
  seed:
    - 0
    - 1
eval:
  data: train.jsonl
  metrics: coverage
systems:
  SFT: sft
baselines: [PPO, SFT]
"""


@pytest.fixture
def sweep(tmp_path, run_cli, monkeypatch):
    """``sweep(old, new, ..., flags)``: the recipe with some text replaced."""
    write_rows(tmp_path / "train.jsonl", toy_examples(6))
    write_rows(tmp_path / "guide.jsonl", guide_rows(toy_examples(6), 1))
    (tmp_path / "sft").mkdir()
    (tmp_path / "base.yaml").write_text("reward: coverage\nguide: guide.jsonl\nmax_steps: 3\n")
    monkeypatch.chdir(tmp_path)

    def run(*flags: object, replace: dict[str, str] | None = None) -> Any:
        text = RECIPE
        for old, new in (replace or {}).items():
            assert old in text
            text = text.replace(old, new)
        Path("s.yaml").write_text(text)
        done = run_cli("sweep", "s.yaml", "-o", "out", *flags)
        assert not Path("out").exists()
        return done

    return run


@pytest.mark.parametrize(
    ("old", "new", "said", "hint"),
    [
        ("  rollin_prob:", "  rollin_prop:", "s.yaml:7: unknown config key 'rollin_prop' in the grid", "'rollin_prob'"),
        ("[0.5, 0.8]", "[0.5, 1.8]", "s.yaml:7: algorithm.rollin_prob: ", "less than or equal to 1"),
        ("ppo, ppo++", "ppo, ppo+++", "s.yaml:6: unknown algorithm 'ppo+++'", "did you mean 'ppo++'"),
        ("    - 1", "    - one", "s.yaml:10: 'one' is no seed", "whole numbers"),
        ("data: train.jsonl\ngrid", "dta: train.jsonl\ngrid", "s.yaml:4: unknown config key 'dta'", "'data'"),
        ("  - base.yaml", "  - bse.yaml", "bse.yaml: no such config file", ""),
        ("metrics: coverage", "metrcs: coverage", "s.yaml:13: unknown config key 'metrcs'", "did you mean 'metrics'"),
        ("eval:\n", "eval:\n  model: x\n", "s.yaml:12: the sweep gives 'model' to each run itself", "leave it out"),
        ("eval:\n  data: train.jsonl", "eval:\n  data: tst.jsonl", "tst.jsonl: no such file", ""),
        ("SFT: sft", "SFT: sf", "s.yaml:15: systems: there is no sf", "train it first"),
        ("[PPO, SFT]", "[PPO++]", "s.yaml:16: baselines: no system is called 'PPO++'", "ppo++, rollin_prob 0.5; "),
        ("SFT: sft", "PPO: sft", "s.yaml:15: 'PPO' is a system of the grid already", "another name"),
        ("grid:", "jbs: 2\ngrid:", "s.yaml:5: unknown config key 'jbs'", "did you mean 'jobs'"),
        ("ppo, ppo++", "aggrevated", "only has recorded text (in aggrevated, rollin_prob 0.5, seed 0)", "live guide"),
        ("[0.5, 0.8]", "[0.5, [0.8]]", "s.yaml:7: algorithm.rollin_prob: ", "(in ppo++, rollin_prob 0.8, seed 0)"),
    ],
)  # fmt: skip
def test_refused_before_anything_starts(sweep, old, new, said, hint):
    done = sweep(replace={old: new})
    assert done.exit_code == 2, done.stderr
    assert done.stdout == "" and said in done.stderr and hint in done.stderr


def test_one_system_alone(sweep):
    done = sweep(
        replace={"ppo, ppo++": "ppo++", "[0.5, 0.8]": "[0.5]", "systems:\n  SFT: sft\nbaselines: [PPO, SFT]\n": ""}
    )
    assert done.exit_code == 2 and "one system alone" in done.stderr and "s.yaml:5" in done.stderr


def test_a_price_is_needed_for_a_budget(sweep):
    guide = "    guide: {name: 'openai:own-model', base_url: 'http://127.0.0.1:1/v1'}\n"
    done = sweep("--budget-usd", 1, replace={"    data: train.jsonl\ngrid": f"    data: train.jsonl\n{guide}grid"})
    assert done.exit_code == 2 and "a cap in US dollars needs a price" in done.stderr


def test_a_dry_run_prints_every_command_and_writes_nothing(sweep, tmp_path):
    before = sorted(tmp_path.iterdir())
    done = sweep("--dry-run")
    assert done.exit_code == 0, done.stderr
    assert sorted(tmp_path.iterdir()) == sorted({*before, tmp_path / "s.yaml"})
    lines = done.stdout.splitlines()
    assert lines[:3] == [
        "# ppo, seed 0",
        "rlgf train -c out/base.yaml --set algorithm=ppo --set seed=0 --set guide=null -o out/ppo/seed_0",
        "rlgf eval -c out/eval.yaml --model out/ppo/seed_0 -o out/ppo/seed_0/eval",
    ]
    assert "rlgf eval -c out/eval.yaml --model sft -o out/systems/SFT/eval" in lines
    told = json.loads(sweep("--dry-run", "--json").stdout)
    assert (told["runs"], told["systems"], told["combinations_folded"]) == (6, 4, 2)
    assert told["guide_calls_at_most"] == 0  # recorded text is paid already


def test_calls_of_a_live_guide_are_counted(sweep):
    replaced = {
        "ppo, ppo++": "ppo, ppo++, aggrevated",
        "    data: train.jsonl\ngrid": "    data: train.jsonl\n    guide: hf:sft\ngrid",
    }
    told = json.loads(sweep("--dry-run", "--json", replace=replaced).stdout)
    all_, seeds = 3 * 128, 2
    assert told["guide_calls_at_most"] == seeds * (round(all_ * 0.5) + round(all_ * 0.8) + 2 * all_)


def test_print_config(sweep):
    done = sweep("--print-config")
    assert done.exit_code == 0 and "# grid.alg: s.yaml:6" in done.stdout


def test_a_point_is_trained_with_the_config_that_was_checked(sweep, tmp_path):
    """What the command of a point resolves to is what was checked: base.yaml and --set say the same as the grid."""
    from rlgf_cli.config.loader import resolve
    from rlgf_cli.config.recipes import as_yaml
    from rlgf_cli.config.sweep import SweepConfig
    from rlgf_cli.config.train import TrainConfig
    from rlgf_cli.sweep.plan import make_plan

    sweep(
        "--dry-run",
        replace={"rollin_prob: [0.5, 0.8]": "kl: [0.1, {coef: 1e-3, adaptive: true}]", "[PPO, SFT]": "[SFT]"},
    )
    plan = make_plan(resolve(SweepConfig, files=["s.yaml"], flags={"output": "out"}))
    (tmp_path / "base.yaml").write_text(as_yaml(plan.base.values))
    assert len(plan.trainings) == 8
    for (folder, checked), cell in zip(plan.trainings.items(), plan.cells, strict=False):
        words = cell.steps[0].words
        sets = [words[n + 1] for n, word in enumerate(words) if word == "--set"]
        again = resolve(TrainConfig, files=["base.yaml"], sets=sets, flags={"output": str(folder)})
        assert again.config == checked.config


def test_the_message_of_a_failed_run_is_its_first_error_line(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "RLGF", ["bash", "-c"])
    cell = work.Cell("a", 0, "a/seed_0", (), tmp_path / "log")
    for script, letter in (
        ("echo some; echo 'error: it broke' >&2; echo 'hint: mend it' >&2; exit 1", "it broke"),
        ("echo last words; exit 1", "last words"),
        ("kill -9 $$", "killed by SIGKILL; no message"),
    ):
        child = work.Child(cell, work.Step((script,), tmp_path, lambda: False), [], {})
        child.process.wait()
        assert child.error_message() == letter


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"base_url": "https://elsewhere.example.org/v1"}, "guide.base_url names elsewhere.example.org"),
        ({"headers": {"X-Gateway": "planted"}}, "the value of a header is written out"),
    ],
)
def test_a_guide_of_a_recipe_gets_no_key_and_its_headers_no_copy(sweep, monkeypatch, section, said):
    """The runs get keys of the grid by --set, as if the user had given them: they are checked before."""
    assert sweep("--dry-run").exit_code == 0
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted")
    guide = json.dumps({"name": "openai:m", **section})
    Path("s.yaml").write_text(RECIPE.replace("- base.yaml", f"- base.yaml\n  - guide: {guide}"))
    with pytest.raises(UserError, match=said):
        make_plan(resolve(SweepConfig, layers=[read_layer("s.yaml")], flags={"output": "out"}))


@pytest.mark.parametrize(("reward", "paid"), [("judge:gpt-4o-mini", True), ("coverage", False)])
def test_a_judge_in_the_reward_is_billed_to_the_budget(sweep, reward, paid):
    assert sweep("--dry-run").exit_code == 0
    Path("s.yaml").write_text(RECIPE.replace("- base.yaml", f"- base.yaml\n  - reward: '{reward}'"))
    plan = make_plan(resolve(SweepConfig, layers=[read_layer("s.yaml")], flags={"output": "out"}))
    trainings = [cell.steps[0] for cell in plan.cells if len(cell.steps) == 2]
    assert trainings and {step.billed for step in trainings} == {paid}
