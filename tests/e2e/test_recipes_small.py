"""The small recipes from beginning to end on real data, a few steps each, and the paper's settings on tiny models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = os.environ.get("RLGF_REAL_DATA")
real_data = pytest.mark.skipif(not DATA, reason="RLGF_REAL_DATA is not set: no real data here")


def run_recipe(name: str, out: Path) -> subprocess.CompletedProcess[str]:
    """``recipes/NAME/small/run.sh OUT`` with RLGF_QUICK, with this Python's ``rlgf``."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "RLGF_QUICK": "1", "OMP_NUM_THREADS": "1"}
    script = ROOT / "recipes" / name / "small" / "run.sh"
    return subprocess.run(["bash", script, out, "3"], env=environment, capture_output=True, text=True)


def json_of(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


SYSTEMS = {
    "imdb": {
        "SFT": "sft",
        "guide": "guide",
        "PPO": "ppo",
        "PPO++": "ppopp",
        "D2LOLS": "d2lols",
        "PPO++ API": "ppopp-api",
    },
    "commongen": {"SFT": "sft", "guide": "guide", "PPO": "ppo", "PPO++": "ppopp"},
    "tldr": {"SFT": "sft", "guide": "guide", "PPO": "ppo", "PPO++": "ppopp"},
}
FIGURES = {
    "imdb": ["reward.classifier", "reward.classifier#2", "rouge.rougeL"],
    "commongen": ["reward.total", "reward.coverage", "reward.rouge"],
    "tldr": ["rouge.rouge1", "rouge.rougeL", "length.words"],
}


@pytest.mark.realdata
@real_data
@pytest.mark.parametrize(
    "name", [pytest.param("imdb", marks=pytest.mark.slow), "commongen", pytest.param("tldr", marks=pytest.mark.slow)]
)
def test_small_recipe(name, tmp_path):
    """Every stage of the chain runs, each trained policy differs from its start, and the table has all systems."""
    out = tmp_path / name
    done = run_recipe(name, out)
    logs = "".join(path.read_text(encoding="utf-8")[-500:] for path in sorted((out / "log").glob("*")))
    assert done.returncode == 0, done.stderr + logs
    for folder in SYSTEMS[name].values():
        assert json_of(out / folder / "run.json")["status"] == "done"
        scores = json_of(out / folder / "eval" / "scores.json")
        assert all(entry["n"] == 8 for entry in scores["metrics"].values())
    start = (out / "sft" / "model.safetensors").read_bytes()
    for folder in list(SYSTEMS[name].values())[1:]:
        rows = [json.loads(line) for line in (out / folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        # after so few steps all texts may score 0, and then there is nothing to learn
        learned = folder == "guide" or rows[0]["score/std"] > 0
        assert ((out / folder / "model.safetensors").read_bytes() != start) == learned, folder
    table = json_of(out / "table.json")
    assert set(FIGURES[name]) <= set(table["figures"])
    for figure in FIGURES[name]:
        assert [row["system"] for row in table["figures"][figure]["rows"]] == list(SYSTEMS[name])
        assert figure in done.stdout
    guided = [json.loads(line) for line in (out / "ppopp" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert any(row["regime"].startswith("guide") for row in guided)


@pytest.mark.slow
@pytest.mark.realdata
@real_data
@pytest.mark.parametrize("task", ["dialogsum", "scitldr"])
def test_the_small_last_mile_recipe(task, tmp_path):
    """From real data to the table of raw, mended and trained texts; a second call finds all of it done."""
    out = tmp_path / task
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "RLGF_QUICK": "1", "OMP_NUM_THREADS": "1"}
    command = ["bash", ROOT / "recipes" / "lastmile" / "small.sh", task, out, "3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    logs = "".join(log.read_text(encoding="utf-8")[-500:] for log in sorted((out / "log").glob("*")))
    assert done.returncode == 0, done.stderr + logs
    table = json_of(out / "table.json")
    assert list(table["systems"]) == ["SFT", "SFT mended", "guide", "PPO", "PPO++"]
    assert {"failures.any", "flagged", "rouge_adjusted.rougeL", "reward.rm"} <= set(table["figures"])
    kinds = {json.loads(line)["kind"] for line in (out / "negatives.jsonl").read_text(encoding="utf-8").splitlines()}
    assert {"reference", "on_policy", "cut_off"} <= kinds
    assert "on_policy" in json_of(out / "rm" / "evaluation.json")["kinds"]
    assert (out / "report.html").stat().st_size > 10_000
    weights = (out / "ppo" / "model.safetensors").stat().st_mtime_ns
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 0
    assert (out / "ppo" / "model.safetensors").stat().st_mtime_ns == weights


@pytest.mark.slow
@pytest.mark.realdata
@real_data
def test_the_small_teams_rl_recipe(tmp_path):
    """From real seeds to a set, a model and its privacy check; a second call finds all of it done."""
    out = tmp_path / "teams"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "RLGF_QUICK": "1", "RLGF_CACHE_DIR": str(tmp_path / "cache")}
    command = ["bash", ROOT / "recipes" / "teams_rl" / "small.sh", out, "3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    logs = "".join(log.read_text(encoding="utf-8")[-500:] for log in sorted((out / "log").glob("*")))
    assert done.returncode == 0, done.stderr + logs
    halves = [
        {json.loads(line)["seed_id"] for line in (out / "halves" / f"{name}.jsonl").read_text("utf-8").splitlines()}
        for name in "ab"
    ]
    assert halves[0] and halves[1] and halves[0].isdisjoint(halves[1])
    rows = (out / "set_random" / "steps.jsonl").read_text("utf-8").splitlines()
    assert len(rows) == 12 * 6  # every chain's every step, kept or not
    figures = json_of(out / "sft" / "eval" / "scores.json")["metrics"]
    assert {"rouge.rougeL", "membership.loss", "membership.min_k"} <= set(figures)
    written = {
        name: (out / name).stat().st_mtime_ns for name in ("policy/policy.safetensors", "set_policy/steps.jsonl")
    }
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 0
    assert written == {name: (out / name).stat().st_mtime_ns for name in written}


@pytest.mark.parametrize("algorithm", ["ppo", "ppo++", "aggrevated"])
def test_the_papers_commongen_settings_on_a_tiny_model(
    run_cli, tmp_path, monkeypatch, tiny_t5, examples_file, algorithm
):
    """The recipe's own files on a tiny T5: separate critics, a reference's likelihood, a least length, five beams."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("RLGF_COMMONGEN_MODEL", str(tiny_t5))
    recipe = Path("recipes/commongen")

    def step(*arguments: object) -> None:
        done = run_cli(*arguments)
        assert done.exit_code == 0, done.stderr

    sft, guide, trained = tmp_path / "sft", tmp_path / "guide.jsonl", tmp_path / "trained"
    room = ["--set", "lengths.max_prompt_tokens=40"]  # the template alone has 19 tokens of the tiny tokenizer
    step("sft", "-c", recipe / "sft.yaml", "--data", examples_file, "--max-steps", 1, *room, "-o", sft)
    collect = ["--guide", f"hf:{sft}", "--data", examples_file, "--set", "guide.max_prompt_tokens=40", "-o", guide]
    step("collect-guide", "-c", recipe / "collect_guide.yaml", *collect)
    given = {"ppo": [], "ppo++": ["--guide", guide], "aggrevated": ["--guide", f"hf:{sft}"]}[algorithm]
    files = ["-c", recipe / "train.yaml", "-c", recipe / "alg" / f"{algorithm}.yaml"]
    short = ["--max-steps", 1, "--episodes", 8, "--batch-size", 4, *room]
    short += ["--set", "guide.max_prompt_tokens=40"] if given else []
    step("train", *files, *given, "--model", sft, "--data", examples_file, *short, "-o", trained)
    (row,) = [json.loads(line) for line in (trained / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert row["loss/reference_nll"] > 0 and row["kl/coef"] == 0
    assert {"score/part/coverage", "score/part/rouge"} <= set(row)
    step("eval", "-c", recipe / "eval.yaml", "--model", trained, "--data", examples_file, "--limit", 4, *room)
    assert json_of(trained / "eval" / "scores.json")["decoding"]["num_beams"] == 5


POST = (
    "SUBREDDIT: r/relationships\n\nTITLE: My roommate [24 M] keeps the cat in my room\n\n"
    "POST: He says that the cat likes it there. I am allergic and sneeze all night.\n\nTL;DR:"
)


def test_tldr_in_the_format_of_the_hub(run_cli, tmp_path, monkeypatch):
    """A local file like those of the hub's dataset goes through the recipe's ``prepare`` and ``sft``'s template."""
    monkeypatch.chdir(ROOT)
    rows = [{"prompt": POST.replace("24", str(20 + i)), "completion": f" The cat of {i} must go."} for i in range(5)]
    source = tmp_path / "hub"
    source.mkdir()
    for split in ("train", "validation", "test"):
        (source / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = tmp_path / "data"
    done = run_cli("prepare", "-c", "recipes/tldr/prepare.yaml", "--dataset", source, "-o", data)
    assert done.exit_code == 0, done.stderr
    made = [json.loads(line) for line in (data / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(made) == 5
    assert made[0]["prompt"].endswith("sneeze all night.")  # the recipe's template adds the TL;DR:
    assert made[0]["references"] == ["The cat of 0 must go."]

    from rlgf_cli.config.loader import resolve
    from rlgf_cli.config.sft import SftConfig
    from rlgf_cli.models.text import TextFormat

    flags = {"data": str(data / "train.jsonl"), "output": "out"}
    text = resolve(SftConfig, files=["recipes/tldr/sft.yaml"], flags=flags).config.text
    rendered = TextFormat.from_config(text, TextFormat()).render_prompt(None, made[0]["prompt"])
    assert rendered == rows[0]["prompt"].replace("\n\nTL;DR:", "\nTL;DR:")
