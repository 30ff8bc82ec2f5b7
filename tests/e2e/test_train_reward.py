"""``rlgf train-reward``: classifiers that learn, load anywhere, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from conftest import write_rows
from reward_tasks import FAST, describe, large_classifier, negatives, pairs, review, reviews, train_json
from rlgf_cli.config.loader import resolve
from rlgf_cli.config.train_reward import TrainRewardConfig
from rlgf_cli.protocols import Example
from rlgf_cli.scorers.classifier import ClassifierReward
from rlgf_cli.stages import train_reward
from rlgf_cli.supervised import callback, reward_data
from rlgf_cli.supervised.reward_text import RewardText


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen3", "distilbert"])
def test_a_classifier_from_scratch(run_cli: Any, tmp_path: Path, architecture: str) -> None:
    data = write_rows(tmp_path / "train.jsonl", reviews(200, names=("negative", "positive")))
    held_out = write_rows(tmp_path / "val.jsonl", reviews(41, seed=1, names=("negative", "positive")))
    model = describe(tmp_path, architecture)
    arguments = ("--objective", "classification", "--model", model, "--data", data, "--eval-data", held_out)
    shown = run_cli("train-reward", *arguments, *FAST, "-o", tmp_path / "clf", "--json")
    assert shown.exit_code == 0, shown.stderr
    result = json.loads(shown.stdout)
    assert result["eval_accuracy"] > 0.9
    assert result["eval_majority"] == pytest.approx(21 / 41)
    assert (result["examples"], result["eval_examples"], result["labels"]) == (200, 41, ["negative", "positive"])
    folder = tmp_path / "clf"
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    assert classifier.config.id2label == {0: "negative", 1: "positive"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rng = random.Random(9)
    texts, labels = zip(*((review(rng, i % 2), i % 2) for i in range(20)), strict=True)
    with torch.no_grad():
        said = [int(classifier(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]
    assert sum(a == b for a, b in zip(said, labels, strict=True)) >= 18
    reward = ClassifierReward(str(folder), include_prompt=False, device="cpu")
    high, low = reward.score([Example("a", "x"), Example("b", "x")], ["a good film", "a bad film"])
    assert high.value > 0.5 > low.value
    assert json.loads((folder / "run.json").read_text())["status"] == "done"


@pytest.mark.parametrize("architecture", ["gpt2", "distilbert"])
def test_the_first_loss_is_that_of_the_texts_one_by_one(tmp_path: Path, architecture: str) -> None:
    """Padding and labels out of order would show. The weights are larger than fresh ones, so that they do."""
    data = write_rows(tmp_path / "train.jsonl", reviews(30))
    held_out = write_rows(tmp_path / "val.jsonl", reviews(4, seed=1))
    texts = [row["text"] for row in reviews(30)]
    model, tokenizer = large_classifier(tmp_path, architecture, texts, ["0", "1"])
    train_reward._save(tmp_path / "start", model, tokenizer)
    flags = {"model": str(tmp_path / "start"), "data": str(data), "eval_data": str(held_out), "max_steps": 1}
    flags |= {"output": str(tmp_path / "clf"), "batch_size": 30, "logging_steps": 1, "model.device": "cpu"}
    train_reward.run(resolve(TrainRewardConfig, flags=flags))
    with torch.no_grad():
        losses = []
        for row in reviews(30):
            logits = model(input_ids=tokenizer(row["text"], return_tensors="pt")["input_ids"]).logits
            losses.append(-float(logits.log_softmax(-1)[0, row["label"]]))
    first = json.loads((tmp_path / "clf/metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(sum(losses) / 30, rel=1e-5)


def test_prompt_and_reference_files_with_a_split(run_cli: Any, tmp_path: Path) -> None:
    """The key paths of prompt/references files, integer labels with names, a held-out share of every class."""
    rows = []
    for i, row in enumerate(reviews(103)):
        words = row["text"].split()
        rows.append({"id": str(i), "prompt": " ".join(words[:2]), "references": [" ".join(words[2:]), "other"],
                     "meta": {"label": row["label"]}})  # fmt: skip
    data = write_rows(tmp_path / "train.jsonl", rows)
    shown = run_cli(
        "train-reward", "--model", describe(tmp_path), "--data", data, *FAST, "--eval-fraction", 0.2,
        "--text-key", "prompt,references.0", "--label-key", "meta.label",
        "--set", "label_names={'1': positive, '0': negative}", "--set", "group_key=id",
        "-o", tmp_path / "clf", "--json",
    )  # fmt: skip
    assert shown.exit_code == 0, shown.stderr
    result = json.loads(shown.stdout)
    assert result["labels"] == ["negative", "positive"]
    assert (result["examples"], result["eval_examples"]) == (83, 20)
    assert result["eval_accuracy"] > 0.9
    trained = resolve(TrainRewardConfig, flags={"output": "x", "model": "x", "data": str(data), "limit": 50,
                                                "text_key": "prompt", "label_key": "meta.label"}).config  # fmt: skip
    data = reward_data.read(trained)
    assert len(data.train) + len(data.held_out) == 50
    assert not {sample.where for sample in data.train} & {sample.where for sample in data.held_out}


def test_texts_are_joined_and_cut_as_the_reward_does(tmp_path: Path) -> None:
    rows = [
        {"prompt": "one", "references": ["two"], "y": "b"},
        {"prompt": "one ", "references": ["two"], "y": "a"},
        {"prompt": "one", "references": [" two"], "y": 10},
        {"prompt": "", "references": ["two"], "y": 9},
        {"prompt": "", "references": ["two"], "y": "²"},  # a digit, and no number
    ]
    data = write_rows(tmp_path / "x.jsonl", rows)
    flags = {"output": "x", "model": "x", "data": "x", "text_key": "prompt,references.0", "label_key": "y"}
    config = resolve(TrainRewardConfig, flags=flags).config
    samples, _ = reward_data.read_labelled(str(data), config)
    assert [s.texts for s in samples] == [("one two",), ("one two",), ("one two",), ("two",), ("two",)]
    assert [s.words for s in samples] == [(1,)] * 5
    assert reward_data._labels(samples, config) == ["9", "10", "a", "b", "²"]

    class Letters:
        def __init__(self, side: str) -> None:
            self.truncation_side = side

        def __call__(self, text: str, truncation: bool = False, max_length: int = 0) -> dict[str, list[int]]:
            ids = [ord(c) for c in text]
            if truncation:
                ids = ids[:max_length] if self.truncation_side == "right" else ids[-max_length:]
            return {"input_ids": ids}

    def first(side: str) -> str:
        encoded, cut = RewardText(False, {}, True).encode(Letters(side), samples, 5)
        assert cut == 3
        return "".join(map(chr, encoded[0][0]))

    assert (first("left"), first("right")) == ("e two", "one t")


def test_rows_of_make_negatives(run_cli: Any, tmp_path: Path) -> None:
    """Every prompt on one side, figures for every kind, and plots."""
    data = write_rows(tmp_path / "train.jsonl", negatives(60))
    arguments = ("--text-key", "prompt,text", "--model", describe(tmp_path), "--data", data, *FAST)
    shown, result, evaluation = train_json(run_cli, tmp_path / "clf", *arguments)
    assert (result["examples"], result["eval_examples"], result["labels"]) == (162, 18, ["bad", "good"])
    assert {name: kind["n"] for name, kind in evaluation["kinds"].items()} == {"reference": 6, "rude": 6, "turned": 6}
    assert evaluation["kinds"]["rude"] == result["kinds"]["rude"]
    assert evaluation["kinds"]["rude"]["auc"] > 0.9 and evaluation["kinds"]["reference"]["auc"] is None
    assert evaluation["auc"] == result["eval_auc"] and evaluation["length_auc"] == 0.5
    assert "words alone" not in shown.stderr and "| rude" in shown.stderr
    for name in ("confusion", "calibration", "scores"):
        assert (tmp_path / f"clf/plots/{name}.png").read_bytes().startswith(b"\x89PNG")
    reward = ClassifierReward(str(tmp_path / "clf"), device="cpu")
    good, bad = reward.score([Example("a", "film 1")] * 2, ["a great plot", "a poor plot"])
    assert good.value > 0.5 > bad.value


def test_a_checkpoint_gets_a_head(run_cli: Any, tmp_path: Path, tiny_gpt2: Path, tiny_classifier: Path) -> None:
    """A language model, and a classifier with another number of labels."""
    rows = [{"text": f"the {noun} likes {i}", "label": noun} for noun in ("cat", "dog", "bird") for i in range(8)]
    data = write_rows(tmp_path / "train.jsonl", rows)
    for model in (tiny_gpt2, tiny_classifier):
        arguments = ("--model", model, "--data", data, "--max-steps", 2, "--device", "cpu")
        shown = run_cli("train-reward", *arguments, "-o", tmp_path / model.name, "--json")
        assert shown.exit_code == 0, shown.stderr
        assert json.loads(shown.stdout)["labels"] == ["bird", "cat", "dog"]
        assert "newly initialized" not in shown.stderr
        classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / model.name)
        assert classifier.config.num_labels == 3 and classifier.config.pad_token_id is not None


@pytest.mark.parametrize("objective", ["classification", "pairwise"])
def test_a_killed_run_resumes_to_the_same_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str) -> None:
    rows = reviews(60) if objective == "classification" else pairs(60)
    data = write_rows(tmp_path / "train.jsonl", rows)
    model = describe(tmp_path, dropout=0.1)

    def configure(output: str) -> Any:
        flags = {"model": model, "data": str(data), "max_steps": 7, "save_steps": 3, "model.device": "cpu"}
        flags |= {"output": str(tmp_path / output), "optim.learning_rate": 1e-2, "objective": objective}
        return resolve(TrainRewardConfig, flags=flags)

    whole = train_reward.run(configure("whole"))
    plain = callback.ProgressCallback.on_step_end

    class Killed(BaseException):
        pass

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == 5:
            raise Killed
        plain(self, args, state, control, **given)

    with monkeypatch.context() as patch:
        patch.setattr(callback.ProgressCallback, "on_step_end", on_step_end)
        with pytest.raises(Killed):
            train_reward.run(configure("killed"))
    resumed = train_reward.run(configure("killed"), existing="resume")
    assert resumed.summary == whole.summary
    for name in ("evaluation.json", "metrics.jsonl"):
        assert (whole.folder / name).read_bytes() == (resumed.folder / name).read_bytes()
    first, second = (
        AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
        for folder in (whole.folder, resumed.folder)
    )
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


ONE = {"text": "a good film", "label": 1}
CASES = [
    ([ONE, {**ONE, "label": 1}], (), "all 2 examples have the label '1'"),
    ([ONE], (), "one example is not enough"),
    ([ONE, {"text": "a bad film"}], (), "train.jsonl:2: the field 'label' is missing"),
    ([ONE, {"text": " ", "label": 0}], (), "train.jsonl:2: the field 'text' is empty"),
    ([ONE, {"text": 5, "label": 0}], (), "train.jsonl:2: 'text' is 5, not a text"),
    ([ONE, {"text": "x", "label": 0.5}], (), "train.jsonl:2: the field 'label"),
    ([ONE, {"text": "x", "label": 0}], (), "no class has a second example"),
    ([], (), "the file holds no records"),
    (reviews(8), ("--text-key", "prompt"), "train.jsonl:1: the field 'prompt' is missing"),
    (reviews(8), ("--label-key", "meta.label"), "train.jsonl:1: the field 'meta.label' is missing"),
    (reviews(8), ("--set", "label_names={'7': x}"), "to a label that no example has"),
    (reviews(8), ("--max-tokens", 99), "the model reads at most 32"),
    (reviews(8), ("--eval-data", "none.jsonl"), "no such file"),
    (reviews(8), ("--eval-data", "val.jsonl"), "val.jsonl:2: the label '2' is not in the training data"),
    (reviews(8), ("--load-in-4bit",), "No such option"),
    (pairs(8), (), "--objective pairwise reads pairs"),
    (reviews(8), ("--chosen-key", "a"), "chosen_key is not read with objective classification"),
    ([{**row, "prompt": "x"} for row in reviews(8)], (), "those with the same prompt (or text) stay together"),
]


@pytest.mark.parametrize(("rows", "arguments", "words"), CASES)
def test_bad_input(
    train_reward: Any, tmp_path: Path, rows: list[Any], arguments: tuple[object, ...], words: str
) -> None:
    shown = train_reward(rows, [ONE, {**ONE, "label": 2}], *arguments, "-o", "clf")
    assert shown.exit_code == 2 and words in shown.stderr, shown.stderr
    assert "Traceback" not in shown.stderr
    assert not (tmp_path / "clf").exists()


def test_models_that_cannot_classify(run_cli: Any, tmp_path: Path, tiny_t5: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl", reviews(8))
    (tmp_path / "empty").mkdir()
    for model, words in (
        (tiny_t5, "not an encoder-decoder"),
        (describe(tmp_path, "bart"), "no classifier"),
        (tmp_path / "empty", "no model checkpoint"),
        ("nobody/nothing", "no classifier can be made"),
    ):
        shown = run_cli("train-reward", "--model", model, "--data", data, "-o", tmp_path / "clf")
        assert shown.exit_code == 2 and words in shown.stderr, shown.stderr
        assert not (tmp_path / "clf").exists()
