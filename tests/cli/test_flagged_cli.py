"""``flagged:PATH``: the share of texts that a trained reward model calls bad, at its own threshold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from conftest import write_rows
from reward_tasks import FAST, describe, negatives, pairs, reviews
from rlgf_cli.errors import UserError
from rlgf_cli.protocols import Example
from rlgf_cli.scorers.classifier import ClassifierReward, RewardModelReward
from rlgf_cli.scorers.flagged import FlaggedMetric


def train(run_cli: Any, out: Path, held_out: list[dict[str, Any]], *arguments: object) -> dict[str, Any]:
    """A reward model from 60 prompts' texts (or pairs), judged on ``held_out``; its evaluation.json."""
    folder = out.parent
    rows = pairs(120) if "chosen" in held_out[0] else negatives(60)
    data = write_rows(folder / "train.jsonl", rows)
    val = write_rows(folder / "val.jsonl", held_out)
    given = ("--model", describe(folder), "--data", data, "--eval-data", val, *arguments)
    shown = run_cli("train-reward", *given, *FAST, "-o", out)
    assert shown.exit_code == 0, shown.stderr
    return json.loads((out / "evaluation.json").read_text())


def evaluate(run_cli: Any, folder: Path, model: Path, rows: list[dict[str, Any]], key: str) -> tuple[dict, list]:
    """scores.json's metrics and the predictions of ``rlgf eval`` on one text per row."""
    texts = [
        {"id": str(i), "prompt": row["prompt"], "prediction": row[key], "references": ["x"]}
        for i, row in enumerate(rows)
    ]
    given = write_rows(folder / f"{key}.jsonl", texts)
    shown = run_cli("eval", "--predictions", given, "--metrics", f"flagged:{model}", "-o", folder / f"eval_{key}")
    assert shown.exit_code == 0, shown.stderr
    found = [json.loads(line) for line in (folder / f"eval_{key}/predictions.jsonl").read_text().splitlines()]
    return json.loads((folder / f"eval_{key}/scores.json").read_text())["metrics"], found


def spoiled(rows: list[dict[str, Any]], every: int) -> list[dict[str, Any]]:
    """Every n-th pair the wrong way round, so that no threshold is without error."""
    return [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if i % every == 0 else row
        for i, row in enumerate(rows)
    ]


def test_a_pairwise_model_flags_as_its_evaluation_says(run_cli: Any, tmp_path: Path) -> None:
    """Scored again as texts of a system, the held-out texts give the rates of evaluation.json, overall and per kind."""
    rows = spoiled(pairs(40, seed=1), every=5)
    known = train(run_cli, tmp_path / "rm", rows, "--objective", "pairwise", "--max-tokens", 3)
    assert 0 < known["good_flagged"] < 0.5 < known["bad_flagged"] < 1
    assert known["reads"] == {"prompt": True, "max_tokens": 3, "chat": False}
    metrics, found = evaluate(run_cli, tmp_path, tmp_path / "rm", rows, "rejected")
    assert metrics["flagged"]["value"] == pytest.approx(known["bad_flagged"])
    assert known["flagged"] == known["bad_flagged"] and known["chosen"]["flagged"] == known["good_flagged"]
    for kind in ("rude", "cold"):
        flags = [text["scores"]["flagged"] for text, row in zip(found, rows, strict=True) if row["kind"] == kind]
        assert sum(flags) / len(flags) == pytest.approx(known["kinds"][kind]["flagged"])
    metrics, _ = evaluate(run_cli, tmp_path, tmp_path / "rm", rows, "chosen")
    assert metrics["flagged"]["value"] == pytest.approx(known["good_flagged"])
    reward = RewardModelReward(str(tmp_path / "rm"), max_tokens=3, device="cpu")
    scores = reward.score([Example("a", row["prompt"]) for row in rows], [row["rejected"] for row in rows])
    assert sum(s.value < known["threshold"] for s in scores) / 40 == pytest.approx(known["bad_flagged"])
    signature = metrics["flagged"]["signature"]
    assert f"threshold={known['threshold']!r}" in signature and f"good={known['good_flagged']:.4g}" in signature
    result = json.loads((tmp_path / "rm/run.json").read_text())["result"]
    assert result["eval_good_flagged"] == known["good_flagged"]


def test_a_classifier_without_prompts(run_cli: Any, tmp_path: Path) -> None:
    """The texts are read as in training: a prompt full of bad words changes nothing."""
    known = train(run_cli, tmp_path / "clf", negatives(20, seed=1), "--text-key", "text")
    assert known["reads"]["prompt"] is False and 0 < known["threshold"] < 1
    metric = FlaggedMetric(str(tmp_path / "clf"), device="cpu")
    texts = ["a good film", "a bad film", "the great plot", ""]
    examples = [Example(str(i), "awful poor bad awful") for i in range(4)]
    found = metric.compute(examples, texts)
    reward = ClassifierReward(str(tmp_path / "clf"), include_prompt=False, device="cpu")
    expected = [float(s.value < known["threshold"]) for s in reward.score(examples, texts)]
    assert found.values == {"score": expected} and expected[:3] == [0.0, 1.0, 0.0]


def test_a_classifier_of_kinds_says_what_the_texts_are_taken_for(run_cli: Any, tmp_path: Path) -> None:
    rows = negatives(30, seed=1)
    rows = [{**row, "label": "bad" if i % 7 else "good"} for i, row in enumerate(rows)]  # it is not what is learned
    known = train(run_cli, tmp_path / "kinds", rows, "--text-key", "prompt,text", "--label-key", "kind")
    assert known["good"] == "reference"  # neither the last of the alphabet nor of the file
    assert set(known["taken_for"]) == {"reference", "rude", "turned"}
    metrics, found = evaluate(run_cli, tmp_path, tmp_path / "kinds", rows, "text")
    assert set(metrics) == {"flagged.any", "flagged.rude", "flagged.turned"}
    for kind, shares in known["taken_for"].items():
        texts = [text["scores"] for text, row in zip(found, rows, strict=True) if row["kind"] == kind]
        for label, share in shares.items():
            assert sum(s[f"flagged.{label}"] for s in texts) / len(texts) == pytest.approx(share), (kind, label)
        assert sum(s["flagged.any"] for s in texts) / len(texts) == pytest.approx(known["kinds"][kind]["flagged"])
    assert metrics["flagged.any"]["value"] == pytest.approx(known["flagged"])
    parts = metrics["flagged.rude"]["value"] + metrics["flagged.turned"]["value"]
    assert metrics["flagged.any"]["value"] == pytest.approx(parts)


def test_the_good_label_can_be_named(run_cli: Any, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl", reviews(40, names=("yes", "no")))
    arguments = ("train-reward", "--model", describe(tmp_path), "--data", data, "--max-steps", 1, "--device", "cpu")
    shown = run_cli(*arguments, "--good-label", "no", "-o", tmp_path / "clf", "--json")
    assert shown.exit_code == 0, shown.stderr
    assert json.loads(shown.stdout)["labels"] == ["yes", "no"]
    refused = run_cli(*arguments, "--good-label", "nope", "-o", tmp_path / "other")
    assert refused.exit_code == 2 and "no example has the good label 'nope'" in refused.stderr
    assert not (tmp_path / "other").exists()


def test_a_model_that_gives_no_number_is_an_error(run_cli: Any, tmp_path: Path, tiny_classifier: Path) -> None:
    """NaN lies below no threshold: such a model would call every text good."""
    model = Path(shutil.copytree(tiny_classifier, tmp_path / "rm"))
    weights = load_file(model / "model.safetensors")
    save_file({**weights, "score.weight": weights["score.weight"] * float("nan")}, model / "model.safetensors")
    known = {"objective": "classification", "reads": {"prompt": True, "max_tokens": None}}
    (model / "evaluation.json").write_text(json.dumps({**known, "threshold": 0.5, "good_flagged": 0.1}))
    given = write_rows(tmp_path / "p.jsonl", [{"id": "a", "prompt": "x", "prediction": "y"}])
    shown = run_cli("eval", "--predictions", given, "--metrics", f"flagged:{model}", "-o", tmp_path / "eval")
    assert shown.exit_code == 1 and "nan" in shown.stderr and "'a'" in shown.stderr, shown.stderr
    assert not (tmp_path / "eval/scores.json").exists()


@pytest.mark.parametrize("label", ["any", "score"])
def test_a_label_that_would_hide_another_figure_is_refused(tmp_path: Path, tiny_classifier: Path, label: str) -> None:
    """flagged.any is the rate of all labels; the key ``score`` has no name of its own, and would be ``flagged``."""
    model = Path(shutil.copytree(tiny_classifier, tmp_path / "rm"))
    weights, config = load_file(model / "model.safetensors"), json.loads((model / "config.json").read_text())
    three = {"score.weight": weights["score.weight"][[0, 1, 1]]}
    save_file({**weights, **three}, model / "model.safetensors", metadata={"format": "pt"})
    labels = {"id2label": {"0": label, "1": "cut", "2": "good"}, "label2id": {label: 0, "cut": 1, "good": 2}}
    (model / "config.json").write_text(json.dumps({**config, **labels}))
    known = {"objective": "classification", "reads": {"prompt": True, "max_tokens": None}}
    (model / "evaluation.json").write_text(json.dumps({**known, "threshold": 0.5, "good_flagged": 0.1}))
    with pytest.raises(UserError, match=f"a label of this classifier is '{label}'") as error:
        FlaggedMetric(str(model), device="cpu")
    assert error.value.hint == f"train it with another name: --set 'label_names={{{label}: ...}}'"


def test_what_has_no_threshold_is_refused(run_cli: Any, tmp_path: Path, tiny_classifier: Path) -> None:
    given = write_rows(tmp_path / "p.jsonl", [{"id": "a", "prompt": "x", "prediction": "y", "references": []}])

    def refused(metric: object) -> str:
        shown = run_cli("eval", "--predictions", given, "--metrics", metric, "-o", tmp_path / "eval")
        assert shown.exit_code == 2 and "Traceback" not in shown.stderr and not (tmp_path / "eval").exists()
        return shown.stderr

    assert "write flagged:PATH" in refused("flagged")
    assert "there is no evaluation.json beside this model" in refused(f"flagged:{tiny_classifier}")
    known = train(run_cli, tmp_path / "rm", pairs(8, seed=1), "--objective", "pairwise")
    report = tmp_path / "rm/evaluation.json"
    report.write_text(json.dumps({key: value for key, value in known.items() if key != "threshold"}))
    assert "threshold: field required" in refused(f"flagged:{tmp_path / 'rm'}")
    report.write_text(json.dumps({**known, "threshold": None, "good_flagged": None}))
    assert "this model has no threshold" in refused(f"flagged:{tmp_path / 'rm'}")
    for torn in ('{"objective": "pair', "[]"):
        report.write_text(torn)
        said = refused(f"flagged:{tmp_path / 'rm'}")
        assert "evaluation.json" in said and "hint: train the reward model again" in said and ": :" not in said
