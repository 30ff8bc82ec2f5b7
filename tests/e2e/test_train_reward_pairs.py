"""``rlgf train-reward --objective pairwise``: the loss, the tokens, what is learned, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from conftest import write_rows
from reward_tasks import FAST, describe, large_classifier, negatives, pairs, reviews, train_json
from rlgf_cli.config.loader import resolve
from rlgf_cli.config.scratch import read_scratch
from rlgf_cli.config.train_reward import TrainRewardConfig
from rlgf_cli.models import classification, scratch
from rlgf_cli.protocols import Example
from rlgf_cli.scorers.classifier import RewardModelReward
from rlgf_cli.stages import train_reward
from rlgf_cli.supervised import pairwise


def bert(folder: Path) -> Path:
    """An encoder whose tokenizer has no EOS: WordPiece with [CLS] and [SEP], random weights, no head."""
    words = sorted({word for row in pairs(60) for word in f"{row['chosen']} {row['rejected']} film".split()})
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"0123456789", *words]))
    tokenizer = hf.BertTokenizerFast(str(folder / "vocab.txt"))
    assert tokenizer.eos_token is None and len(tokenizer(words[0])["input_ids"]) == 3
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}"  # not trained with
    torch.manual_seed(0)
    hf.BertModel(
        hf.BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=32, pad_token_id=0,
        )
    ).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", ["gpt2", "distilbert", "bert"])
def test_a_reward_model_learns_and_scores_as_its_reward(run_cli: Any, tmp_path: Path, architecture: str) -> None:
    """Each kind of the held-out file is one pair, so that its mean score is that of one text. One prompt is longer
    than the model reads: what was trained on and what the reward reads are cut alike."""
    model = bert(tmp_path / "bert") if architecture == "bert" else describe(tmp_path, architecture)
    data = write_rows(tmp_path / "train.jsonl", pairs(200))
    held_out = [{**row, "kind": f"k{i}"} for i, row in enumerate(pairs(20, seed=1))]
    held_out[3]["prompt"] = "film " * 40
    held_out[4]["prompt"] += "\n"
    val = write_rows(tmp_path / "val.jsonl", held_out)
    arguments = ("--objective", "pairwise", "--model", model, "--data", data, "--eval-data", val, *FAST)
    shown = run_cli("train-reward", *arguments, "-o", tmp_path / "rm", "--json")
    assert shown.exit_code == 0, shown.stderr
    result = json.loads(shown.stdout)
    assert result["eval_accuracy"] > 0.9 and result["eval_auc"] > 0.9
    assert (result["examples"], result["eval_examples"], result["truncated"]) == (200, 20, 2)
    assert f"rm:{tmp_path / 'rm'}" in shown.stderr and "held-out records whose prompt" in shown.stderr
    evaluation = json.loads((tmp_path / "rm/evaluation.json").read_text())
    reward = RewardModelReward(str(tmp_path / "rm"), device="cpu")
    examples = [Example(str(i), row["prompt"]) for i, row in enumerate(held_out)]
    rejected = [score.value for score in reward.score(examples, [row["rejected"] for row in held_out])]
    trained = [evaluation["kinds"][f"k{i}"]["mean_score"] for i in range(20)]
    assert trained == pytest.approx(rejected, abs=1e-5)
    chosen = [score.value for score in reward.score(examples, [row["chosen"] for row in held_out])]
    assert evaluation["chosen"]["mean_score"] == pytest.approx(sum(chosen) / 20, abs=1e-5)
    assert reward.counts["truncated"] == 2


@pytest.mark.parametrize("architecture", ["gpt2", "distilbert"])
def test_the_first_loss_is_that_of_the_pairs_one_by_one(tmp_path: Path, architecture: str) -> None:
    """Padding, a wrong sign or a wrong half would show. The weights are larger than fresh ones, so that they do."""
    rows = pairs(30)
    data = write_rows(tmp_path / "train.jsonl", rows)
    held_out = write_rows(tmp_path / "val.jsonl", pairs(4, seed=1))
    texts = [text for row in rows for text in (row["prompt"], row["chosen"], row["rejected"])]
    model, tokenizer = large_classifier(tmp_path, architecture, texts, ["reward"])
    classification.set_labels(model.config, ["reward"])
    train_reward._save(tmp_path / "start", model, tokenizer)
    flags = {"model": str(tmp_path / "start"), "data": str(data), "eval_data": str(held_out), "max_steps": 1}
    flags |= {"output": str(tmp_path / "rm"), "batch_size": 30, "logging_steps": 1, "model.device": "cpu"}
    flags |= {"objective": "pairwise", "center_rewards_coefficient": 0.5}
    train_reward.run(resolve(TrainRewardConfig, flags=flags))

    def score(row: dict[str, Any], key: str) -> torch.Tensor:
        ids = tokenizer(f"{row['prompt']} {row[key]}", return_tensors="pt")["input_ids"]
        return model(input_ids=ids).logits[0, 0]

    with torch.no_grad():
        both = [(score(row, "chosen"), score(row, "rejected")) for row in rows]
        expected = sum(-torch.nn.functional.logsigmoid(c - r) + 0.5 * (c + r) ** 2 for c, r in both) / 30
    first = json.loads((tmp_path / "rm/metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(float(expected), rel=1e-4)
    assert first["accuracy"] == pytest.approx(sum(float(c > r) for c, r in both) / 30)


def test_dropout_is_the_models_own_and_its_tokens_the_tokenizers(tmp_path: Path) -> None:
    """Special tokens that differ would be aligned by the trainer too, with a warning to the user."""
    described = read_scratch(describe(tmp_path, "distilbert", dropout=0.25))
    model, tokenizer = scratch.build_classifier(described, name="x", texts=["a b"], labels=["reward"], seed=0)
    flags = {"model": "x", "data": "x", "output": "x", "objective": "pairwise", "model.device": "cpu"}
    config = resolve(TrainRewardConfig, flags=flags).config
    rows = [([1], [2])] * 4
    trainer = pairwise.make_trainer(config, model, tokenizer, tmp_path, rows, rows, torch.device("cpu"))
    dropouts = {module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)}
    assert dropouts == {0.25}
    assert model.config.eos_token_id == tokenizer.eos_token_id is not None


def test_rows_of_make_negatives_are_pairs(run_cli: Any, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl", negatives(60))
    arguments = ("--objective", "pairwise", "--model", describe(tmp_path), "--data", data, *FAST)
    shown, result, evaluation = train_json(run_cli, tmp_path / "rm", *arguments)
    assert (result["examples"], result["eval_examples"], result["passed_over"]) == (108, 12, 60)
    assert {name: kind["n"] for name, kind in evaluation["kinds"].items()} == {"rude": 6, "turned": 6}
    assert evaluation["chosen"]["n"] == 6 and evaluation["accuracy"] == result["eval_accuracy"] > 0.9
    assert "passed over because they are good texts alone: 60" in shown.stderr
    assert (tmp_path / "rm/plots/scores.png").stat().st_size > 1000
    assert hf.AutoConfig.from_pretrained(tmp_path / "rm").num_labels == 1


def test_pairs_without_a_prompt_under_other_names(run_cli: Any, tmp_path: Path) -> None:
    """A length that tells chosen from rejected texts gives a warning."""
    rows = [
        {"a": {"b": f"good film {i}"}, "c": [f"a bad film and more of it {i}"], "meta": {"k": 7}} for i in range(30)
    ]
    val = write_rows(tmp_path / "val.jsonl", rows[20:])
    rows[20:] = []
    rows.insert(0, {"a": {"b": "one film"}, "c": ["one  film"], "meta": {"k": 8}})
    data = write_rows(tmp_path / "train.jsonl", rows)
    names = ("--chosen-key", "a.b", "--rejected-key", "c.0", "--kind-key", "meta.k")
    arguments = ("--objective", "pairwise", *names, "--model", describe(tmp_path), "--data", data, *FAST)
    shown = run_cli("train-reward", *arguments, "--max-steps", 2, "--eval-data", val, "-o", tmp_path / "rm")
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout == f"{tmp_path / 'rm'}\n"
    assert (
        "words alone tells good texts from bad ones (all AUC 0.00" in shown.stderr and "kind 7 AUC 0.00" in shown.stderr
    )
    assert "include_prompt: false" in shown.stderr and "the same tokens to this model" in shown.stderr
    assert json.loads((tmp_path / "rm/run.json").read_text())["result"]["same_tokens"] == 1
    evaluation = json.loads((tmp_path / "rm/evaluation.json").read_text())
    assert evaluation["length_matched_auc"] is None and evaluation["length_matched_pairs"] == 0


def test_a_language_model_gets_a_head(run_cli: Any, tmp_path: Path, tiny_gpt2: Path, tiny_classifier: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl", pairs(20))
    for model in (tiny_gpt2, tiny_classifier):
        arguments = ("--objective", "pairwise", "--model", model, "--data", data, "--max-steps", 2, "--device", "cpu")
        shown = run_cli("train-reward", *arguments, "-o", tmp_path / model.name)
        assert shown.exit_code == 0, shown.stderr
        RewardModelReward(str(tmp_path / model.name), device="cpu")
        assert "newly initialized" not in shown.stderr


ONE, OTHER = pairs(2)
GOOD_ROW, BAD_ROW = negatives(1)[:2]
CASES = [
    ([], (), "the file holds no records"),
    ([ONE], (), "one pair is not enough"),
    ([ONE, OTHER], (), "those with the same prompt (or text) stay together"),
    ([GOOD_ROW, GOOD_ROW], (), "the file holds no pairs: all 2 rows are good"),
    (
        [GOOD_ROW, {k: v for k, v in BAD_ROW.items() if k != "reference"}],
        (),
        "jsonl:2: the field 'reference' is missing",
    ),
    ([BAD_ROW, {**BAD_ROW, "reference": None}], (), "jsonl:2: 'reference' is None, not a text"),
    ([BAD_ROW, {**BAD_ROW, "reference": " "}], (), "jsonl:2: the field 'reference' is empty"),
    ([BAD_ROW, {**BAD_ROW, "text": BAD_ROW["reference"]}], (), "jsonl:2: 'reference' and 'text' are the same text"),
    ([ONE, {**ONE, "chosen": " "}], (), "jsonl:2: the field 'chosen' is empty"),
    ([ONE, {**ONE, "chosen": ONE["rejected"]}], (), "jsonl:2: 'chosen' and 'rejected' are the same text"),
    ([ONE, {"chosen": "x"}], (), "jsonl:2: the field 'rejected' is missing"),
    ([ONE, {**ONE, "prompt": 5}], (), "jsonl:2: 'prompt' is 5, not a text"),
    (reviews(8), (), "jsonl:1: the label 0 is neither good nor bad, and there is no 'chosen'"),
    (pairs(8), ("--prompt-key", "question"), "jsonl:1: the field 'question' is missing"),
    (pairs(8), ("--prompt-key", "question"), "--chosen-key, --rejected-key ... name other fields"),
    (pairs(8), ("--kind-key", "sort"), "jsonl:1: the field 'sort' is missing"),
    (pairs(8), ("--set", "group_key=id"), "jsonl:1: the field 'id' is missing"),
    (pairs(8), ("--text-key", "prompt"), "text_key is not read with objective pairwise"),
    (pairs(8), ("--eval-data", "val.jsonl"), "val.jsonl: the file holds no pairs"),
]


@pytest.mark.parametrize(("rows", "arguments", "words"), CASES)
def test_bad_input(
    train_reward: Any, tmp_path: Path, rows: list[Any], arguments: tuple[object, ...], words: str
) -> None:
    shown = train_reward(rows, [GOOD_ROW], "--objective", "pairwise", "-o", "rm", *arguments)
    assert shown.exit_code == 2 and words in shown.stderr, shown.stderr
    assert "hint: " in shown.stderr or not rows or "not a text" in words
    assert not (tmp_path / "rm").exists()
