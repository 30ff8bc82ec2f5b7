"""BERTScore equals bert-score's own call on a small local encoder, and adds only what is stated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import bert_score
import pytest
import torch

from rlgf_cli.config.common import PartConfig
from rlgf_cli.errors import UserError
from rlgf_cli.metrics.bertscore import BertScoreMetric
from rlgf_cli.metrics.make import compute_figures, make_metrics
from rlgf_cli.protocols import Example

EXAMPLES = [
    Example("a", "p", ("the cat sees the garden .", "a cat in the garden")),
    Example("b", "p", ("in the river a dog finds it .",)),
    Example("c", "p", ("the queen calls the market .", "the queen", "market calls")),
    Example("d", "p", ("the dog", "a dog")),
]
TEXTS = ["the cat finds a garden", "a dog in the river", "the market calls the queen .", "dog dog dog dog dog dog"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 3 layers with random weights and a word-level vocabulary."""
    import transformers as hf

    folder = tmp_path_factory.mktemp("encoder")
    words = sorted({word for e in EXAMPLES for text in e.references for word in text.split()} | {"sees", "far"})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    hf.BertTokenizer(str(folder / "vocab.txt"), model_max_length=24).save_pretrained(folder)
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=24, pad_token_id=0,
    )  # fmt: skip
    model = hf.BertModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5.0)  # far from uniform attention, so that layers differ
    model.save_pretrained(folder)
    return folder


def library(encoder: Path, **settings) -> list[list[float]]:
    """Precision, recall and F1 by the library itself."""
    found = bert_score.score(
        TEXTS, [list(e.references) for e in EXAMPLES], model_type=str(encoder), device="cpu", nthreads=0, **settings
    )
    return [column.tolist() for column in found]


@pytest.mark.parametrize(("layers", "idf"), [(3, False), (1, False), (3, True)])
def test_equals_the_library(encoder, layers, idf):
    metric = BertScoreMetric(str(encoder), num_layers=layers, idf=idf, device="cpu", batch_size=2)
    found = metric.compute(EXAMPLES, TEXTS).values
    expected = library(encoder, num_layers=layers, idf=idf)
    for key, column in zip(("precision", "recall", "f1"), expected, strict=True):
        assert found[key] == pytest.approx(column, abs=1e-6)
    assert metric.compute(EXAMPLES, TEXTS).values["f1"] == found["f1"]  # a second set starts afresh


def test_layers_and_idf_matter_here(encoder):
    f1 = [library(encoder, num_layers=n, idf=i)[2] for n, i in ((3, False), (1, False), (3, True))]
    assert all(a != pytest.approx(b, abs=1e-4) for a, b in ((f1[0], f1[1]), (f1[0], f1[2])))


def test_empty_texts_score_zero_and_change_nothing_else(encoder):
    metric = BertScoreMetric(str(encoder), num_layers=2, device="cpu")
    full = metric.compute(EXAMPLES, TEXTS)
    found = metric.compute(EXAMPLES, [TEXTS[0], "", TEXTS[2], " \n"])
    assert found.values["f1"] == pytest.approx([full.values["f1"][0], 0.0, full.values["f1"][2], 0.0], abs=1e-6)
    assert found.values["precision"][1] == found.values["recall"][3] == 0.0
    assert found.counts == {"empty_texts": 2} and full.counts == {}
    assert found.signature == full.signature and "empty=0" in found.signature
    assert metric.compute(EXAMPLES, [""] * 4).values["f1"] == [0.0] * 4


def test_examples_without_a_reference_are_skipped(encoder):
    metric = BertScoreMetric(str(encoder), num_layers=2, device="cpu")
    examples = [Example("bare", "p"), Example("blank", "p", (" ",)), EXAMPLES[2]]
    found = metric.compute(examples, ["the cat", "", TEXTS[2]])
    assert found.values["f1"][:2] == [None, None]
    blank = Example("c", "p", ("", *EXAMPLES[2].references))
    assert metric.compute([blank], [TEXTS[2]]).values["f1"] == pytest.approx(found.values["f1"][2:], abs=1e-6)


def test_long_texts_are_cut_at_the_models_positions(encoder, tmp_path):
    """A tokenizer that states no limit says 1e30, at which the library's own call overflows."""
    limitless = shutil.copytree(encoder, tmp_path / "limitless")
    settings = json.loads((limitless / "tokenizer_config.json").read_text())
    (limitless / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": int(1e30)}))
    long, exact = ["the cat " * 100], ["the cat " * 11]  # 22 words, [CLS] and [SEP]
    for folder in (encoder, limitless):
        metric = BertScoreMetric(str(folder), num_layers=2, device="cpu")
        (value,) = metric.compute(EXAMPLES[:1], long).values["f1"]
        assert value == pytest.approx(metric.compute(EXAMPLES[:1], exact).values["f1"][0], abs=1e-6)


def test_the_signature_names_weights_not_places(encoder):
    signature = BertScoreMetric(str(encoder), num_layers=2, device="cpu").compute(EXAMPLES, TEXTS).signature
    assert "layers=2" in signature and "idf=no" in signature and "rescale=no" in signature
    assert "sha256=" in signature and str(encoder.parent) not in signature


def test_from_config(encoder):
    spec = PartConfig(name=f"bertscore:{encoder}", params={"num_layers": 2})
    (metric,) = make_metrics([spec], device="cpu")
    figures, _ = compute_figures(metric, EXAMPLES, TEXTS)
    assert list(figures) == ["bertscore.precision", "bertscore.recall", "bertscore.f1"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "which layer"),
        ({"num_layers": 4}, "num_layers should be between 0 and 3"),
        ({"num_layers": 2, "rescale": True}, "needs the language"),
        ({"num_layers": 2, "rescale": True, "lang": "en"}, "no baseline"),
    ],
)
def test_refused(encoder, settings, message):
    with pytest.raises(UserError, match=message):
        BertScoreMetric(str(encoder), device="cpu", **settings)


def test_models_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot load its model 'roberta-large'"):
        BertScoreMetric(device="cpu")  # offline
    with pytest.raises(UserError, match="no model checkpoint"):
        BertScoreMetric(str(tmp_path), num_layers=1)


def test_a_path_that_bert_score_would_misread(encoder, tmp_path):
    (tmp_path / "t5-like").symlink_to(encoder)
    with pytest.raises(UserError, match="what its name says"):
        BertScoreMetric(str(tmp_path / "t5-like"), num_layers=2)


def test_rlgf_eval(encoder, tmp_path, run_cli):
    rows = [
        {"id": e.id, "prompt": e.prompt, "references": e.references, "text": t}
        for e, t in zip(EXAMPLES, ["", *TEXTS[1:]], strict=True)
    ]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = f'metrics=[{{name: "bertscore:{encoder}", params: {{num_layers: 3}}}}]'
    arguments = ["--predictions", tmp_path / "texts.jsonl", "--set", metrics, "-o", tmp_path / "out"]
    result = run_cli("eval", *arguments, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.stderr
    scores = json.loads(result.stdout)
    expected = [0.0, *library(encoder, num_layers=3)[2][1:]]
    assert scores["metrics"]["bertscore.f1"]["value"] == pytest.approx(sum(expected) / 4, abs=1e-6)
    assert scores["counts"]["bertscore.empty_texts"] == 1
