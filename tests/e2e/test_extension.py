"""The package in examples/extension, from outside as an installed one: its entry points, through the command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tomllib

from conftest import write_rows

PACKAGE = Path(__file__).parents[2] / "examples" / "extension"
SOURCE = Path(__file__).parents[2] / "src"
ROWS = [
    {"section": "news", "body": "a cat runs home", "headline": "the cat runs"},
    {"section": "news", "body": "who saw the dog", "headline": "where is the dog?"},
    {"section": "advert", "body": "buy this", "headline": "cheap"},
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as an installer leaves it: the modules, and the metadata with its entry points."""
    folder = tmp_path_factory.mktemp("site")
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    shutil.copytree(PACKAGE / "rlgf_example", folder / "rlgf_example", ignore=shutil.ignore_patterns("__pycache__"))
    metadata = folder / "rlgf_example-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    groups = [
        "\n".join([f"[{group}]", *(f"{name} = {target}" for name, target in points.items())])
        for group, points in project["entry-points"].items()
    ]
    (metadata / "entry_points.txt").write_text("\n\n".join(groups) + "\n")
    return folder


@pytest.fixture(scope="module")
def rlgf(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """``rlgf("ls", "rewards")`` in a process of its own; what it wrote to stdout."""
    folder = tmp_path_factory.mktemp("work")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (SOURCE, site))),
        "HF_HUB_OFFLINE": "1",
        "RLGF_CACHE": str(folder / "cache"),
    }

    def run(*arguments: object) -> str:
        command = [sys.executable, "-m", "rlgf_cli", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def data(rlgf: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = write_rows(folder / "rows.jsonl", ROWS)
    result = json.loads(rlgf("prepare", "--task", "headlines", "--dataset", rows, "-o", folder / "out", "--json"))
    assert result["splits"]["train"] == {"examples": 2, "references": 2, "rows": 3, "skipped": 1}
    return folder / "out" / "train.jsonl"


@pytest.mark.parametrize(
    ("kind", "name"),
    [("rewards", "alliteration"), ("metrics", "questions"), ("guides", "echo"), ("tasks", "headlines")],
)
def test_its_names_are_listed(rlgf, kind, name):
    assert json.loads(rlgf("ls", kind, "--json"))[name] == "from rlgf-example"


def test_its_metric_and_its_reward_evaluate(rlgf, data, tmp_path):
    texts = [{"id": f"headlines-train-{i}", "text": text} for i, text in ((0, "tiny toys to go"), (1, "who?"))]
    answers = write_rows(tmp_path / "answers.jsonl", texts)
    metrics = '[questions, {name: "reward:alliteration:t", params: {cap: 0.5}}]'
    arguments = (
        "--predictions",
        answers,
        "--data",
        data,
        "--set",
        f"metrics={metrics}",
        "-o",
        tmp_path / "out",
        "--json",
    )
    scores = json.loads(rlgf("eval", *arguments))["metrics"]
    assert (scores["questions"]["value"], scores["questions"]["n"], scores["questions"]["n_skipped"]) == (1.0, 1, 1)
    assert scores["reward.alliteration"]["value"] == 0.25 and scores["reward.alliteration.words"]["value"] == 2.5
    assert "alliteration,rule=1,letter=t,cap=0.5" in scores["reward.total"]["signature"]


def test_its_guide_and_its_reward_train(rlgf, data, tmp_path, tiny_gpt2):
    rlgf(
        "train", "--alg", "ppo++", "--model", tiny_gpt2, "--data", data, "--reward", "alliteration:t",
        "--guide", "echo:nothing", "--rollin-prob", 1.0, "--episodes", 4, "--set", "ppo.minibatch_size=4",
        "--max-new-tokens", 6, "--max-steps", 1, "--device", "cpu", "-o", tmp_path / "run",
    )  # fmt: skip
    (row,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert "score/part/alliteration" in row and row["guide/requests"] > 0
