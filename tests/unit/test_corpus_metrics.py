"""BLEU, chrF and CIDEr as metrics and rewards: skipping, signatures, refusals."""

from __future__ import annotations

import pytest

from conftest import toy_examples, write_rows
from rlgf_cli import registry
from rlgf_cli.artifacts.rundir import file_sha256
from rlgf_cli.config.common import PartConfig
from rlgf_cli.errors import UserError
from rlgf_cli.protocols import Example
from rlgf_cli.scorers.figures import compute_figures, make_metrics
from rlgf_cli.scorers.weighted_sum import make_reward

EXAMPLES = [
    Example("a", "p", ("the cat sat on the mat", "a cat was there")),
    Example("blank", "p", ("", " ")),
    Example("b", "p", ("the dog ran to the river", " ")),
    Example("bare", "p"),
]
TEXTS = ["the cat sat on the mat", "x", "", "y"]
NAMES = ["bleu", "chrf", "cider"]


def one(name: str, params: dict | None = None, examples=EXAMPLES, texts=TEXTS):
    (metric,) = make_metrics([PartConfig(name=name, params=params or {})])
    return compute_figures(metric, examples, texts)


@pytest.mark.parametrize("name", NAMES)
def test_examples_without_references_are_skipped_and_blank_references_dropped(name):
    figures, counts = one(name)
    assert counts == {f"{name}.blank_references": 3}
    for figure in figures.values():
        assert [row is None for row in figure.rows] == [False, True, False, True]
    short = [Example(e.id, "p", tuple(r for r in e.references if r.strip())) for e in (EXAMPLES[0], EXAMPLES[2])]
    alone, _ = one(name, examples=short, texts=[TEXTS[0], TEXTS[2]])
    for key, figure in figures.items():
        assert [row for row in figure.rows if row is not None] == alone[key].rows


@pytest.mark.parametrize("name", NAMES)
def test_none_at_all_is_refused_before_the_run(name):
    (metric,) = make_metrics([PartConfig(name=name)])
    for example in EXAMPLES[1::2]:
        with pytest.raises(UserError, match="needs references"):
            metric.check_set([example])


def test_perfect_and_empty_texts():
    assert one("bleu")[0]["bleu.sentence"].values == [pytest.approx(100), None, 0.0, None]
    assert one("chrf")[0]["chrf.sentence"].values == [pytest.approx(100), None, 0.0, None]
    first, *others = one("cider")[0]["cider"].values
    assert 5 < first < 10 and others == [None, 0.0, None]  # equal to one of its two references
    bleu = one("bleu")[0]["bleu"]
    assert bleu.rows[2] == [0, 6, 0, 0, 0, 0, 0, 0, 0, 0]  # its reference's length counts


def test_a_set_of_one_has_no_rare_words(tmp_path):
    (metric,) = make_metrics([PartConfig(name="cider")])
    with pytest.raises(UserError, match="two examples at least"):
        metric.check_set(EXAMPLES[:2])
    training = write_rows(tmp_path / "train.jsonl", toy_examples(9))
    (fixed,) = make_metrics([PartConfig(name="cider", params={"references": str(training)})])
    fixed.check_set(EXAMPLES[:2])


class TestSignatures:
    def test_they_name_library_settings_and_n(self, tmp_path):
        bleu = one("bleu")[0]
        assert bleu["bleu"].signature == bleu["bleu.sentence"].signature
        assert bleu["bleu"].signature.startswith("bleu|sacrebleu=")
        assert "|nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|version:" in bleu["bleu"].signature
        assert bleu["bleu"].signature.endswith("|sentence=effective-order|n=4")
        chrf = one("chrf", {"word_order": 2, "lowercase": True})[0]["chrf"].signature
        assert chrf.startswith("chrf|sacrebleu=") and "|nrefs:var|case:lc|eff:yes|nc:6|nw:2|space:no|version:" in chrf
        training = write_rows(tmp_path / "train.jsonl", toy_examples(9))
        cider = one("cider", {"references": str(training)})[0]["cider"].signature
        assert f"frequencies=sha256:{file_sha256(training)[:12]},documents=9" in cider
        assert "frequencies=references" in one("cider")[0]["cider"].signature
        assert "variant=d" in cider and "treebank(rule=1,nltk=" in cider and "pycocoevalcap=" in cider

    def test_each_setting_is_in_them(self):
        for name, *settings in (
            ("bleu", {}, {"tokenize": "char"}, {"lowercase": True}),
            ("chrf", {}, {"word_order": 1}, {"lowercase": True}, {"whitespace": True}),
        ):
            assert len({one(name, params)[0][name].signature for params in settings}) == len(settings)

    def test_they_do_not_depend_on_the_texts(self):
        for name in NAMES:
            assert one(name)[0][name].signature == one(name, texts=["a", "b", "c", "d"])[0][name].signature

    @pytest.mark.parametrize("name", ["coverage", "length", "reward:coverage", "reward:length", "reward:repetition"])
    def test_numbers_by_our_own_rules_name_the_rule(self, name):
        params = {"max_words": 3} if name == "reward:length" else {}
        figures, _ = one(name, params)
        assert all("rule=1" in figure.signature for figure in figures.values())


class TestRewards:
    def test_bleu_is_a_hundredth_of_sentence_bleu(self):
        examples, texts = [EXAMPLES[0], EXAMPLES[2], EXAMPLES[0]], ["the cat sat", "the dog ran far away", TEXTS[0]]
        (metric,) = make_metrics([PartConfig(name="bleu")])
        sentence = metric.compute(examples, texts).values["sentence"]
        scores = make_reward([PartConfig(name="bleu")]).score(examples, texts)
        assert [s.value for s in scores] == pytest.approx([value / 100 for value in sentence])
        assert all(0 < s.value <= 1 for s in scores) and scores[2].value == 1
        assert scores[0].parts["bleu.brevity_penalty"] < scores[2].parts["bleu.brevity_penalty"] == 1

    @pytest.mark.parametrize("name", ["bleu", "cider", "rouge"])
    def test_an_example_without_written_references_is_refused(self, name, tmp_path):
        training = write_rows(tmp_path / "train.jsonl", toy_examples(9))
        reward = make_reward([PartConfig(name=name, params={"references": str(training)} if name == "cider" else {})])
        with pytest.raises(UserError, match=r"2 of 4 examples have none.*'blank'"):
            reward.check(EXAMPLES)

    def test_their_signatures_say_scale_and_settings(self, tmp_path):
        training = write_rows(tmp_path / "train.jsonl", toy_examples(9))
        bleu = make_reward([PartConfig(name="bleu", params={"lowercase": True})]).signature
        assert ",nrefs:var,case:lc,eff:yes,tok:13a,smooth:exp,version:" in bleu and bleu.endswith(",scale=1]")
        cider = make_reward([PartConfig(name="cider", params={"references": str(training)})]).signature
        assert "documents=9,scale=1" in cider


class TestRefused:
    @pytest.mark.parametrize(
        ("tokenize", "message", "hint"),
        [
            ("13b", "unknown tokenizer '13b'", "13a"),
            ("flores200", "downloads a model", "tokenize: none"),
            ("ja-mecab", "packages that are not installed", "sacrebleu[ja]"),
        ],
    )
    def test_tokenizers(self, tokenize, message, hint):
        for make in (make_metrics, make_reward):
            with pytest.raises(UserError, match=message) as caught:
                make([PartConfig(name="bleu", params={"tokenize": tokenize})])
            assert hint in caught.value.hint

    @pytest.mark.parametrize(
        ("name", "params"),
        [("chrf", {"word_order": -1}), ("cider", {"tokenizer": "spacy"}), ("bleu", {"smooth": "floor"})],
    )
    def test_parameters(self, name, params):
        with pytest.raises(UserError, match=next(iter(params))):
            make_metrics([PartConfig(name=name, params=params)])


@pytest.mark.parametrize("tokenize", ["13a", "intl", "zh", "char", "none"])
def test_tokenizers_that_need_nothing(tokenize):
    assert one("bleu", {"tokenize": tokenize})[0]["bleu.sentence"].values[0] == pytest.approx(100)


def test_aggregates_are_all_in_the_registry():
    for name in registry.entries("aggregates"):
        assert callable(registry.load("aggregates", name))
