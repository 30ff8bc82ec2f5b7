"""BLEURT by the loading path of its checkpoints, on a tiny BERT with random weights; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf

from conftest import write_rows
from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.protocols import Example
from rlgf_cli.scorers.bleurt import BleurtMetric
from rlgf_cli.scorers.figures import compute_figures

WORDS = ["the", "a", "dog", "cat", "sees", "likes", "old", "new", "tree", "house", "."]


@pytest.fixture(scope="module")
def tiny_bleurt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WordPiece, segment ids, one output: as the published checkpoints, with 24 positions."""
    folder = tmp_path_factory.mktemp("bleurt")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = hf.BertTokenizerFast(str(folder / "vocab.txt"))
    torch.manual_seed(3)
    model = hf.BertForSequenceClassification(
        hf.BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=24, num_labels=1,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # sharper than the usual initialisation, so that mistakes show
                parameter.mul_(8.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def alone(folder: Path, reference: str, text: str) -> float:
    """transformers on one pair, cut by hand: while it is too long, the longer side loses its last token."""
    model = hf.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    first, second = (tokenizer(side, add_special_tokens=False)["input_ids"] for side in (reference, text))
    while len(first) + len(second) > 24 - 3:
        (first if len(first) > len(second) else second).pop()
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    ids = torch.tensor([[cls, *first, sep, *second, sep]])
    types = torch.tensor([[0] * (len(first) + 2) + [1] * (len(second) + 1)])
    with torch.no_grad():
        return float(model(input_ids=ids, token_type_ids=types).logits[0, 0])


def test_the_best_reference_by_the_pair_of_reference_and_text(tiny_bleurt: Path) -> None:
    groups = [
        ["the dog sees a cat .", "a cat likes the old tree ."],
        ["the new house ."],
        [],
        [" ", "a dog ."],
        ["the old tree"],
        ["the new house ."],
    ]
    texts = [
        "a dog likes the old house .",
        "the tree",
        "a cat",
        "",
        "a new cat likes a house . " * 3,
        "the dog " * 8 + ".",
    ]
    examples = [Example(str(i), "x", tuple(group)) for i, group in enumerate(groups)]
    metric = BleurtMetric(str(tiny_bleurt), batch_size=2, device="cpu")
    done: list[int] = []
    metric.on_rows = done.append
    found = metric.compute(examples, texts)
    expected = [
        max((alone(tiny_bleurt, r, text) for r in group if r.strip()), default=None)
        for group, text in zip(groups, texts, strict=True)
    ]  # the last pair has 24 tokens: all that the model reads
    assert expected[2] is None and len({*expected}) == 6
    assert found.values["score"] == [None if v is None else pytest.approx(v, abs=1e-5) for v in expected]
    assert found.counts == {"blank_references": 1, "truncated": 1} and sum(done) == 6
    assert alone(tiny_bleurt, groups[1][0], texts[1]) != pytest.approx(alone(tiny_bleurt, texts[1], groups[1][0]))
    weights = found.signature.partition("sha256=")[2][:12]
    assert len(weights) == 12 and "max_tokens=24,input=reference+text,references=max|n=6" in found.signature


def test_what_is_no_number_is_not_hidden_behind_a_better_reference(tiny_bleurt: Path) -> None:
    """``max`` passes over NaN that comes second; a damaged model must not have a score."""
    metric = BleurtMetric(str(tiny_bleurt), device="cpu")
    with torch.no_grad():
        metric.model.get_input_embeddings().weight[metric.tokenizer.convert_tokens_to_ids("tree")] = float("nan")
    for references in (("a dog", "a tree"), ("a tree", "a dog")):
        with pytest.raises(RlgfError, match="gave nan as bleurt of example 'a'"):
            compute_figures(metric, [Example("a", "x", references)], ["the cat"])


def test_through_the_command_line(run_cli, tiny_bleurt: Path, tmp_path: Path) -> None:
    rows = [
        {"id": "a", "prompt": "x", "prediction": "the dog .", "references": ["a dog ."]},
        {"id": "b", "prompt": "x", "prediction": "the dog .", "references": []},
    ]
    given = write_rows(tmp_path / "p.jsonl", rows)
    shown = run_cli("eval", "--predictions", given, "--metrics", f"bleurt:{tiny_bleurt}", "-o", tmp_path / "eval")
    assert shown.exit_code == 0, shown.stderr
    figure = json.loads((tmp_path / "eval/scores.json").read_text())["metrics"]["bleurt"]
    assert figure["value"] == pytest.approx(alone(tiny_bleurt, "a dog .", "the dog ."), abs=1e-5)
    assert (figure["n"], figure["n_skipped"]) == (1, 1)
    assert "bleurt:PATH" in run_cli("ls", "metrics").stdout


def test_what_is_no_bleurt_is_refused_with_what_to_get(
    run_cli, tiny_bleurt: Path, tiny_classifier: Path, tiny_gpt2: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.json").write_text(json.dumps({"model_type": "bleurt", "num_labels": 1}))
    given = write_rows(tmp_path / "p.jsonl", [{"id": "a", "prompt": "x", "prediction": "y", "references": ["z"]}])
    for metric, words in (
        ("bleurt", "needs a checkpoint"),
        (f"bleurt:{own}", "does not work with transformers 5"),
        (f"bleurt:{tiny_gpt2}", "no head that scores texts"),
        (f"bleurt:{tiny_classifier}", "has 2 labels; BLEURT has one output"),
    ):
        shown = run_cli("eval", "--predictions", given, "--metrics", metric, "-o", tmp_path / "eval")
        assert shown.exit_code == 2 and words in shown.stderr and "Elron/bleurt-base-512" in shown.stderr, shown.stderr
        assert "Traceback" not in shown.stderr and not (tmp_path / "eval").exists()
    for name, words in ((tmp_path / "none", "no such checkpoint folder"), ("nobody/bleurt", "no text classifier can")):
        shown = run_cli("eval", "--predictions", given, "--metrics", f"bleurt:{name}", "-o", tmp_path / "eval")
        assert shown.exit_code == 2 and words in shown.stderr and "Traceback" not in shown.stderr, shown.stderr
    with pytest.raises(UserError, match="max_tokens is 99; the model reads at most 24"):
        BleurtMetric(str(tiny_bleurt), max_tokens=99, device="cpu")
