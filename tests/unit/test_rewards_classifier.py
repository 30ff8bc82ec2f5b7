"""Sequence-classification checkpoints as rewards."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from rlgf_cli.config.common import PartConfig
from rlgf_cli.errors import UserError
from rlgf_cli.protocols import Example
from rlgf_cli.scorers.classifier import ClassifierReward, RewardModelReward
from rlgf_cli.scorers.weighted_sum import make_reward

EXAMPLES = [Example("a", "cat garden"), Example("b", "dog river "), Example("c", "queen house")]
TEXTS = ["the cat sees the garden .", "in the river a dog finds it .", ""]


@pytest.fixture(scope="module")
def reward_model(tiny_classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a single output."""
    import transformers as hf

    folder = tmp_path_factory.mktemp("rm")
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny_classifier)
    config = hf.AutoConfig.from_pretrained(tiny_classifier, num_labels=1)
    torch.manual_seed(3)
    hf.GPT2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def by_hand(folder: Path, text: str) -> torch.Tensor:
    """Logits of one text, without padding."""
    import transformers as hf

    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    model = hf.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = tokenizer(text)["input_ids"] or [tokenizer.pad_token_id]
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def scores(reward, examples=EXAMPLES, texts=TEXTS) -> list[float]:
    return [score.value for score in reward.score(examples, texts)]


class TestClassifier:
    def test_probability_of_the_last_label_of_prompt_and_text(self, tiny_classifier):
        joined = [f"cat garden {TEXTS[0]}", f"dog river {TEXTS[1]}", "queen house"]
        expected = [by_hand(tiny_classifier, text).softmax(-1)[1].item() for text in joined]
        assert scores(ClassifierReward(str(tiny_classifier))) == pytest.approx(expected, abs=1e-6)
        assert len({round(value, 4) for value in expected}) == 3

    def test_text_alone_and_an_empty_one(self, tiny_classifier):
        reward = ClassifierReward(str(tiny_classifier), include_prompt=False)
        expected = [by_hand(tiny_classifier, text).softmax(-1)[1].item() for text in TEXTS]
        assert scores(reward) == pytest.approx(expected, abs=1e-6)

    def test_label_by_name_or_index_and_logits(self, tiny_classifier):
        positive = scores(ClassifierReward(str(tiny_classifier), label="Positive"))
        negative = scores(ClassifierReward(str(tiny_classifier), label=0))
        assert [p + n for p, n in zip(positive, negative, strict=True)] == pytest.approx([1.0] * 3)
        logits = scores(ClassifierReward(str(tiny_classifier), output="logit"))
        assert logits[2] == pytest.approx(by_hand(tiny_classifier, "queen house")[1].item(), abs=1e-6)

    def test_batch_and_order_do_not_matter(self, tiny_classifier):
        one = ClassifierReward(str(tiny_classifier), batch_size=1)
        many = ClassifierReward(str(tiny_classifier), batch_size=8)
        forward = scores(many)
        assert scores(one) == pytest.approx(forward, abs=1e-6)
        assert scores(many, EXAMPLES[::-1], TEXTS[::-1]) == pytest.approx(forward[::-1], abs=1e-6)

    def test_padding_is_not_read(self, tiny_classifier, tmp_path):
        """A model that reads in both directions sees padding unless it is masked."""
        import transformers as hf

        tokenizer = hf.AutoTokenizer.from_pretrained(tiny_classifier)
        torch.manual_seed(4)
        config = hf.BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        hf.BertForSequenceClassification(config).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        one, many = (ClassifierReward(str(tmp_path), batch_size=size, output="logit") for size in (1, 3))
        assert scores(one) == pytest.approx(scores(many), abs=1e-6)

    def test_overlong_input_keeps_the_text_and_is_counted(self, tiny_classifier):
        reward = ClassifierReward(str(tiny_classifier), max_tokens=16)
        far = Example("far", "garden " * 30 + "market " * 30)
        near = Example("near", "market " * 30)  # equal in the 16 tokens that remain
        first, second = scores(reward, [far, near], ["the cat sees the garden .", "the cat sees the garden ."])
        other = scores(reward, [far], ["the queen finds it ."])[0]
        assert first == pytest.approx(second, abs=1e-6) and first != pytest.approx(other, abs=1e-6)
        assert reward.counts["truncated"] == 3

    def test_the_models_positions_are_the_limit(self, tiny_classifier):
        reward = ClassifierReward(str(tiny_classifier))
        assert reward.max_tokens == 64
        scores(reward, [Example("long", "garden " * 500)], ["the cat"])
        assert reward.counts["truncated"] == 1
        with pytest.raises(UserError, match="reads at most 64"):
            ClassifierReward(str(tiny_classifier), max_tokens=65)

    def test_from_config(self, tiny_classifier):
        spec = f"classifier:{tiny_classifier}"
        reward = make_reward([PartConfig(name=spec, params={"label": "negative"})], device="cpu")
        (score,) = reward.score(EXAMPLES[:1], TEXTS[:1])
        assert score.parts == {"classifier": score.value}
        assert "label=negative" in reward.signature and str(tiny_classifier.parent) not in reward.signature
        assert reward.counts == {"classifier.truncated": 0}

    def test_refused(self, tiny_classifier, tiny_gpt2, reward_model, tmp_path):
        with pytest.raises(UserError, match="no label 'positiv'") as caught:
            ClassifierReward(str(tiny_classifier), label="positiv")
        assert "'positive'" in (caught.value.hint or "")
        with pytest.raises(UserError, match="no label 2"):
            ClassifierReward(str(tiny_classifier), label=2)
        with pytest.raises(UserError, match="no head that scores texts"):
            ClassifierReward(str(tiny_gpt2))
        with pytest.raises(UserError, match="no model checkpoint"):
            ClassifierReward(str(tmp_path))
        with pytest.raises(UserError, match="one output") as caught:
            ClassifierReward(str(reward_model))
        assert "rm:" in (caught.value.hint or "")
        with pytest.raises(UserError, match="unknown device"):
            ClassifierReward(str(tiny_classifier), device="gpu0")


class TestRewardModel:
    def test_the_scalar_as_it_is(self, reward_model):
        expected = [
            by_hand(reward_model, text)[0].item() for text in (f"cat garden {TEXTS[0]}", f"dog river {TEXTS[1]}")
        ]
        assert scores(RewardModelReward(str(reward_model)))[:2] == pytest.approx(expected, abs=1e-6)

    def test_a_classifier_is_refused(self, tiny_classifier):
        with pytest.raises(UserError, match="2 labels") as caught:
            RewardModelReward(str(tiny_classifier))
        assert "classifier:" in (caught.value.hint or "")

    def test_a_language_model_is_told_how_it_gets_a_head(self, tiny_gpt2):
        with pytest.raises(UserError, match="no head that scores texts") as caught:
            RewardModelReward(str(tiny_gpt2))
        assert "rlgf train-reward --objective pairwise" in (caught.value.hint or "")

    def test_an_empty_prompt_adds_no_space(self, reward_model):
        expected = by_hand(reward_model, TEXTS[0])[0].item()
        assert scores(RewardModelReward(str(reward_model)), [Example("a", "")], TEXTS[:1]) == pytest.approx([expected])


def test_rlgf_eval_takes_both_as_metrics(tiny_classifier, reward_model, tmp_path, run_cli):
    rows = [
        {"id": example.id, "prompt": example.prompt, "text": text}
        for example, text in zip(EXAMPLES, TEXTS, strict=True)
    ]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = f"reward:classifier:{tiny_classifier},reward:rm:{reward_model}"
    arguments = ["--predictions", tmp_path / "texts.jsonl", "--metrics", names, "--device", "cpu"]
    result = run_cli("eval", *arguments, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["metrics"]
    positive = sum(scores(ClassifierReward(str(tiny_classifier), device="cpu"))) / len(TEXTS)
    scalar = sum(scores(RewardModelReward(str(reward_model), device="cpu"))) / len(TEXTS)
    assert found["reward.classifier"]["value"] == pytest.approx(positive, abs=1e-6)
    assert found["reward.rm"]["value"] == pytest.approx(scalar, abs=1e-6)
    assert found["reward.total"]["value"] == pytest.approx(positive + scalar, abs=1e-6)
    assert positive != pytest.approx(scalar, abs=1e-3)
    for folder in (tiny_classifier, reward_model):
        weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        of_all = hashlib.sha256(weights.encode()).hexdigest()  # of the folder's one weights file
        assert f"model={folder.name},sha256={of_all[:12]}" in found["reward.total"]["signature"]
