"""``rlgf eval`` with figures that are no means of per-text values: what it writes, and metrics of other packages."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from conftest import toy_examples, write_rows
from rlgf_cli import registry
from rlgf_cli.artifacts.jsonl import read_records
from rlgf_cli.artifacts.records import PredictionRecord


@pytest.fixture
def arguments(tmp_path) -> list[object]:
    """Twenty predictions, one of them empty, of the toy task."""
    rows = toy_examples(20)
    data = write_rows(tmp_path / "data.jsonl", rows)
    texts = [{"id": row["id"], "text": "" if i == 3 else rows[i - 1]["references"][0]} for i, row in enumerate(rows)]
    predictions = write_rows(tmp_path / "texts.jsonl", texts)
    return ["eval", "--predictions", predictions, "--data", data, "-o", tmp_path / "out"]


def written(folder: Path) -> tuple[dict, list[PredictionRecord]]:
    return json.loads((folder / "scores.json").read_text()), list(
        read_records(folder / "predictions.jsonl", PredictionRecord)
    )


def test_intervals_and_statistics(arguments, tmp_path, run_cli):
    result = run_cli(*arguments, "--metrics", "bleu,chrf,cider")
    assert result.exit_code == 0, result.stderr
    scores, records = written(tmp_path / "out")
    aggregates = {name: entry["aggregate"] for name, entry in scores["metrics"].items()}
    assert aggregates == {
        "bleu.sentence": "mean",
        "bleu": "bleu",
        "chrf.sentence": "mean",
        "chrf": "chrf",
        "cider": "mean",
    }
    for name, entry in scores["metrics"].items():
        assert entry["low"] < entry["value"] < entry["high"] and entry["n"] == 20, name
        assert name in result.stdout
        if entry["aggregate"] != "mean":
            rows = np.array([record.statistics[name] for record in records])
            aggregate = registry.load("aggregates", entry["aggregate"])
            assert entry["value"] == pytest.approx(float(aggregate(rows.sum(axis=0))))
    assert {len(record.statistics["bleu"]) for record in records} == {10}
    assert {len(record.statistics["chrf"]) for record in records} == {18}
    assert list(records[3].scores.values()) == [0, 0, 0] and scores["counts"]["empty"] == 1


def test_cider_with_frequencies_of_a_file(arguments, tmp_path, run_cli):
    training = write_rows(tmp_path / "train.jsonl", toy_examples(30, seed=1))
    metric = f'metrics=[{{name: cider, params: {{references: "{training}"}}}}]'
    assert run_cli(*arguments, "--set", metric).exit_code == 0
    scores, records = written(tmp_path / "out")
    assert ",documents=30|n=20" in scores["metrics"]["cider"]["signature"]
    fewer = run_cli(*arguments[:-1], tmp_path / "fewer", "--set", metric, "-L", 5)
    assert fewer.exit_code == 0, fewer.stderr
    assert [r.scores["cider"] for r in written(tmp_path / "fewer")[1]] == [r.scores["cider"] for r in records[:5]]
    missing = run_cli(*arguments[:-1], tmp_path / "none", "--set", metric.replace("train.jsonl", "no.jsonl"))
    assert missing.exit_code == 2 and "no such file" in missing.stderr and not (tmp_path / "none").exists()


def test_a_corpus_metric_of_another_package(arguments, tmp_path, run_cli, monkeypatch):
    """A metric with statistics of its own, and the aggregate that it names, by entry points."""
    (tmp_path / "rlgf_test_ratio.py").write_text(
        "from rlgf_cli.protocols import CorpusFigure, Metric, MetricResult\n\n"
        "class Ratio(Metric):\n"
        "    name = 'ratio'\n"
        "    def __init__(self, target=None): ...\n"
        "    def compute(self, examples, texts):\n"
        "        rows = [(len(t), len(e.references[0])) for e, t in zip(examples, texts)]\n"
        "        figure = CorpusFigure(rows, 'ratio')\n"
        "        return MetricResult({}, f'ratio|rule=1|n={len(texts)}', corpus={'score': figure})\n\n"
        "def ratio(sums):\n"
        "    return sums[..., 0] / sums[..., 1]\n\n"
        "def endless(sums):\n"
        "    return sums[..., 0] / (0 * sums[..., 1])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    points = [
        metadata.EntryPoint("ratio", "rlgf_test_ratio:Ratio", "rlgf.metrics"),
        metadata.EntryPoint("ratio", "rlgf_test_ratio:ratio", "rlgf.aggregates"),
    ]
    monkeypatch.setattr(
        registry.metadata, "entry_points", lambda *, group: [point for point in points if point.group == group]
    )
    result = run_cli(*arguments, "--metrics", "ratio", "--json")
    assert result.exit_code == 0, result.stderr
    entry = json.loads(result.stdout)["metrics"]["ratio"]
    _, records = written(tmp_path / "out")
    lengths = np.array([record.statistics["ratio"] for record in records])
    assert entry["value"] == pytest.approx(lengths[:, 0].sum() / lengths[:, 1].sum())
    assert entry["low"] < entry["value"] < entry["high"] and entry["aggregate"] == "ratio"
    points[1] = metadata.EntryPoint("ratio", "rlgf_test_ratio:endless", "rlgf.aggregates")
    failed = run_cli(*arguments[:-1], tmp_path / "endless", "--metrics", "ratio")
    assert failed.exit_code == 1 and "error: the figure ratio is not finite" in failed.stderr, failed.stderr
    assert "Warning" not in failed.stderr and not (tmp_path / "endless" / "scores.json").exists()
