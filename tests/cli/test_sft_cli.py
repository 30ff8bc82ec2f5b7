"""``rlgf sft`` and bad input: exit code 2, one clear message, nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import toy_examples, write_rows

SCRATCH = "architecture: gpt2\nhidden: 16\nmax_positions: 96\ntokenizer: word\n"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, with good data and a small model's description."""
    write_rows(tmp_path / "train.jsonl", toy_examples(10))
    (tmp_path / "small.yaml").write_text(SCRATCH)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(run_cli: Any, work: Path, *arguments: object) -> str:
    """Run it, check that it is refused and that nothing appeared; returns what was said."""
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*")}
    shown = run_cli("sft", *arguments)
    assert shown.exit_code == 2, shown.stderr
    assert shown.stdout == ""
    assert "Traceback" not in shown.stderr
    assert [line for line in shown.stderr.splitlines() if line.startswith("error: ")]
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*")} == before
    return shown.stderr


GOOD = ("--model", "small.yaml", "--data", "train.jsonl", "--max-steps", 1)

BAD_LINES = [
    ('{"id": "a", "prompt": "x"', "train.jsonl:2", "not JSON"),
    ('{"id": "a", "references": ["y"]}', "train.jsonl:2", "'prompt' is missing"),
    ('{"id": "a", "prompt": " ", "references": ["y"]}', "train.jsonl:2", "'prompt' is empty"),
    ('{"id": "a", "prompt": "x"}', "train.jsonl:2", "no references"),
    ('{"id": "a", "prompt": "x", "references": [""]}', "train.jsonl:2", "is empty"),
    ('["x"]', "train.jsonl:2", "not a JSON object"),
]


@pytest.mark.parametrize(("line", "where", "words"), BAD_LINES)
def test_a_bad_line(run_cli: Any, work: Path, line: str, where: str, words: str) -> None:
    first = json.dumps(toy_examples(1)[0])
    (work / "train.jsonl").write_text(f"{first}\n{line}\n")
    said = refused(run_cli, work, *GOOD, "-o", "run")
    assert where in said and words in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "small.yaml", "--data", "none.jsonl"), "none.jsonl: no such file"),
        (("--model", "small.yaml"), "'data' is needed"),
        (("--data", "train.jsonl"), "'model' is needed"),
        (("--model", "none.yaml", "--data", "train.jsonl"), "none.yaml: no such config file"),
        (("--model", "./none", "--data", "train.jsonl"), "no such checkpoint folder"),
        (("--model", "nobody/nothing", "--data", "train.jsonl"), "neither a folder nor a model"),
        ((*GOOD, "--set", "batchsize=3"), "did you mean 'batch_size'"),
        ((*GOOD, "--set", "optim.lr=3"), "unknown config key 'optim.lr'"),
        ((*GOOD, "--batch-size", 0), "batch_size"),
        ((*GOOD, "--references", "some"), "references"),
        ((*GOOD, "--template", "no prompt"), "must hold {prompt}"),
        ((*GOOD, "--chat"), "no chat template"),
        ((*GOOD, "--use-peft"), "LoRA needs trained weights"),
        ((*GOOD, "--max-new-tokens", 200), "96 positions"),
        ((*GOOD, "--max-prompt-tokens", 2), "has 3 tokens; there is room for 2"),
        ((*GOOD, "--max-prompt-tokens", 2, "--on-overlong", "skip"), "no prompt is short enough"),
        ((*GOOD, "--report-to", "wandb"), "wandb is not installed"),
        ((*GOOD, "--push-to-hub", "user/model"), "offline"),
        ((*GOOD, "--push-to-hub", "a b"), "no repository name"),
        ((*GOOD, "--device", "gpu"), "unknown device"),
        ((*GOOD, "--load-in-4bit"), "4-bit weights cannot be trained"),
        ((*GOOD, "--resume", "--overwrite"), "exclude each other"),
        ((*GOOD, "--eval-data", "none.jsonl"), "none.jsonl: no such file"),
        ((*GOOD, "--guide", "none.jsonl"), "none.jsonl: no such guide file"),
        ((*GOOD, "--guide", "hf:gpt2"), "this guide is a live one"),
        ((*GOOD, "--guide", "train.jsonl"), "train.jsonl:1: the field 'completion' is missing"),
    ],
)
def test_a_bad_setting(run_cli: Any, work: Path, arguments: tuple[object, ...], words: str) -> None:
    assert words in refused(run_cli, work, *arguments, "-o", "run")


def test_a_description_that_writes_no_text_or_is_wrong(run_cli: Any, work: Path) -> None:
    (work / "small.yaml").write_text(SCRATCH.replace("gpt2", "distilbert"))
    assert "writes no text" in refused(run_cli, work, *GOOD, "-o", "run")
    (work / "small.yaml").write_text(SCRATCH + "layer: 3\n")
    assert "small.yaml:5: unknown config key 'layer'" in refused(run_cli, work, *GOOD, "-o", "run")


def test_empty_data_and_a_folder_that_is_no_checkpoint(run_cli: Any, work: Path) -> None:
    (work / "folder").mkdir()
    said = refused(run_cli, work, "--model", "folder", "--data", "train.jsonl", "-o", "run")
    assert "folder: this folder is no model checkpoint" in said
    (work / "train.jsonl").write_text("")
    assert "the file holds no records" in refused(run_cli, work, *GOOD, "-o", "run")


def test_used_outputs(run_cli: Any, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (work / "file").write_text("x")
    assert "the output is a file" in refused(run_cli, work, *GOOD, "-o", "file")
    (work / "full").mkdir()
    (work / "full/thing").write_text("x")
    assert "is not empty and holds no run" in refused(run_cli, work, *GOOD, "-o", "full")

    shown = run_cli("sft", *GOOD, "-o", "run")
    assert (shown.exit_code, shown.stdout) == (0, "run\n")
    said = refused(run_cli, work, *GOOD, "-o", "run")
    assert "already holds a run" in said and "--resume" in said and "--overwrite" in said
    (work / "run/eval").mkdir()
    (work / "run/eval/scores.json").write_text("{}")
    again = run_cli("sft", *GOOD, "--seed", 1, "-o", "run", "--overwrite", "--json")
    assert again.exit_code == 0 and json.loads(again.stdout)["steps"] == 1
    assert (work / "run/eval/scores.json").exists()
    assert json.loads((work / "run/run.json").read_text())["seed"] == 1


def test_a_used_output_is_refused_before_the_model_is_loaded(
    run_cli: Any, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_cli("sft", *GOOD, "-o", "run")
    from rlgf_cli.stages import sft

    monkeypatch.setattr(sft, "_starting_model", lambda *_: pytest.fail("the model was loaded"))
    assert "already holds a run" in refused(run_cli, work, *GOOD, "-o", "run")


def test_resuming_with_other_settings_or_data(run_cli: Any, work: Path) -> None:
    manifest = work / "run/run.json"
    assert run_cli("sft", *GOOD, "-o", "run").exit_code == 0
    manifest.write_text(manifest.read_text().replace('"status": "done"', '"status": "failed"'))
    said = refused(run_cli, work, *GOOD, "--learning-rate", "1e-3", "-o", "run", "--resume")
    assert "optim.learning_rate is 0.001; the run began with 1e-05" in said
    write_rows(work / "train.jsonl", toy_examples(10, seed=5))
    assert "train.jsonl: this file changed" in refused(run_cli, work, *GOOD, "-o", "run", "--resume")


def test_print_config_shows_values_and_origins_and_stops(run_cli: Any, work: Path) -> None:
    (work / "recipe.yaml").write_text("epochs: 3\noptim:\n  learning_rate: 1e-3\n")
    shown = run_cli("sft", *GOOD, "-c", "recipe.yaml", "--epochs", 2, "-o", "run", "--print-config")
    assert shown.exit_code == 0
    assert "epochs: 2.0" in shown.stdout and "learning_rate: 0.001" in shown.stdout
    assert "# optim.learning_rate: recipe.yaml:3" in shown.stdout and "# epochs: flag" in shown.stdout
    assert not (work / "run").exists()


def test_skipped_and_truncated_are_counted(run_cli: Any, work: Path) -> None:
    rows = [*toy_examples(5), {"id": "long", "prompt": "cat " * 20, "references": ["the cat sees the garden ."]}]
    write_rows(work / "train.jsonl", rows)
    arguments = (*GOOD, "--max-prompt-tokens", 4, "--max-new-tokens", 4)
    shown = run_cli("sft", *arguments, "--on-overlong", "skip", "-o", "a", "--json")
    result = json.loads(shown.stdout)
    assert (result["examples"], result["pairs"], result["skipped"], result["truncated"]) == (6, 5, 1, 0)
    assert result["truncated_responses"] == 5
    limited = run_cli("sft", *arguments, "-L", 3, "-o", "c", "--json")
    assert json.loads(limited.stdout)["examples"] == 3
    assert "prompts too long and left out: 1" in shown.stderr
    shown = run_cli("sft", *arguments, "--on-overlong", "truncate", "-o", "b", "--json")
    result = json.loads(shown.stdout)
    assert (result["pairs"], result["skipped"], result["truncated"]) == (6, 0, 1)


def test_an_output_that_holds_an_input(run_cli: Any, work: Path) -> None:
    """--overwrite would remove what is being read."""
    assert run_cli("sft", *GOOD, "-o", "run").exit_code == 0
    write_rows(work / "run/data/train.jsonl", toy_examples(10))
    for model, data in (("run", "train.jsonl"), ("small.yaml", "run/data/train.jsonl")):
        said = refused(run_cli, work, "--model", model, "--data", data, "-o", "run", "--overwrite")
        assert "this input lies in the output" in said
