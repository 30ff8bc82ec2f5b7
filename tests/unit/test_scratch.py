"""Models from scratch: every architecture and tokenizer, through save and load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from conftest import toy_examples
from rlgf_cli.config.common import ModelConfig
from rlgf_cli.config.scratch import ScratchConfig, is_scratch, read_scratch
from rlgf_cli.errors import UserError
from rlgf_cli.models import scratch
from rlgf_cli.models.load import load, save
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.text import TextFormat

ROWS = toy_examples(60)
PROMPTS = [row["prompt"] for row in ROWS]
RESPONSES = [row["references"][0] for row in ROWS]


def build(text: TextFormat | None = None, seed: int = 0, **keys: object) -> Loaded:
    config = ScratchConfig.model_validate({"hidden": 16, **keys})
    return scratch.build(
        config,
        model=ModelConfig(name="small.yaml", device="cpu"),
        prompts=PROMPTS,
        responses=RESPONSES,
        text=text or TextFormat(),
        seed=seed,
    )


@pytest.mark.parametrize("kind", ["word", "bpe", "unigram"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen3", "t5", "bart"])
def test_survives_save_and_load(tmp_path: Path, architecture: str, kind: str) -> None:
    made = build(architecture=architecture, tokenizer={"kind": kind, "vocab_size": 300})
    save(tmp_path, made)
    again = load(ModelConfig(name=str(tmp_path), device="cpu"))
    assert again.tokenizer.get_vocab() == made.tokenizer.get_vocab()
    for name, weights in made.model.state_dict().items():
        assert torch.equal(weights, again.model.state_dict()[name]), name
    for response in RESPONSES[:5]:
        ids = again.text.encode_response(again.tokenizer, response)
        assert ids == made.text.encode_response(made.tokenizer, response)
        assert again.text.decode_response(again.tokenizer, ids) == response
    assert again.eos_ids == {made.tokenizer.eos_token_id}
    assert again.pad_id != again.eos_id
    prompt = again.text.encode_prompt(again.tokenizer, PROMPTS[0], again.encoder_decoder)
    assert (prompt[-1] == again.eos_id) == again.encoder_decoder
    assert getattr(again.model.config, "forced_eos_token_id", None) is None
    config = again.model.generation_config
    assert (config.decoder_start_token_id is not None) == again.encoder_decoder


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen3", "t5", "bart"])
def test_no_dropout_unless_asked_for(architecture: str) -> None:
    model = build(architecture=architecture, tokenizer={"kind": "word"}).model
    assert all(m.p == 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))
    assert {getattr(m, "dropout", 0) for m in model.modules() if not callable(getattr(m, "dropout", 0))} <= {0}


def test_dropout_is_used() -> None:
    model = build(architecture="gpt2", tokenizer={"kind": "word"}, dropout=0.25).model
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}


def test_the_seed_decides_the_weights() -> None:
    weights = [
        build(seed=seed, architecture="gpt2", tokenizer={"kind": "word"}).model.transformer.wte.weight
        for seed in (0, 0, 1)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_tokenizer_knows_the_rendered_prompt() -> None:
    made = build(TextFormat(template="concepts: {prompt} ="), architecture="gpt2", tokenizer={"kind": "word"})
    ids = made.text.encode_prompt(made.tokenizer, "cat sees garden", False)
    assert made.tokenizer.unk_token_id not in ids
    assert made.tokenizer.decode(ids) == "concepts : cat sees garden ="


@pytest.mark.parametrize(
    ("text", "spaced"),
    [
        ("the cat sits .", "the cat sits ."),
        ("The player stood, looking.", "The player stood , looking ."),
        ("it 's a well-known price : 3.50 ...", "it 's a well-known price : 3.50 ..."),
    ],
)
def test_word_tokens_decode_to_spaced_text(text: str, spaced: str) -> None:
    config = ScratchConfig.model_validate({"architecture": "gpt2", "tokenizer": {"kind": "word"}})
    tokenizer = scratch.build_tokenizer(config, [text])
    once = tokenizer.decode(tokenizer(text)["input_ids"])
    assert once == spaced
    assert tokenizer.decode(tokenizer(once)["input_ids"]) == once


def test_vocab_size_is_a_limit_with_special_tokens_counted() -> None:
    config = ScratchConfig.model_validate({"architecture": "gpt2", "tokenizer": {"kind": "word", "vocab_size": 10}})
    tokenizer = scratch.build_tokenizer(config, RESPONSES)
    assert len(tokenizer) == 10
    assert tokenizer("zebra")["input_ids"] == [tokenizer.unk_token_id]


@pytest.mark.parametrize("architecture", ["gpt2", "bart"])
def test_pad_can_be_eos(tmp_path: Path, architecture: str) -> None:
    save(tmp_path, build(architecture=architecture, tokenizer={"kind": "word"}, pad="eos"))
    again = load(ModelConfig(name=str(tmp_path), device="cpu"))
    assert again.pad_id == again.eos_id == again.model.config.pad_token_id
    assert "<pad>" not in again.tokenizer.get_vocab() or again.tokenizer.pad_token != "<pad>"


@pytest.fixture
def gpt2_files(tmp_path: Path) -> Path:
    """vocab.json and merges.txt alone, as GPT-2 was released."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(RESPONSES, trainer)
    folder = tmp_path / "bpe"
    folder.mkdir()
    backend.model.save(str(folder))
    return folder


@pytest.mark.parametrize("pad", ["distinct", "eos"])
def test_a_byte_level_tokenizer_from_its_two_files(gpt2_files: Path, pad: str) -> None:
    known = json.loads((gpt2_files / "vocab.json").read_text())
    made = build(architecture="gpt2", tokenizer={"path": str(gpt2_files)}, pad=pad)
    assert made.tokenizer.eos_token == "<|endoftext|>"
    assert made.eos_id == known["<|endoftext|>"]
    assert made.pad_id == (made.eos_id if pad == "eos" else len(known))
    assert len(made.tokenizer) == len(known) + (pad == "distinct") == made.model.config.vocab_size
    text = " Ünïcode, too!"
    assert made.tokenizer.decode(made.tokenizer(text)["input_ids"]) == text


def test_a_tokenizer_from_tokenizer_json(tmp_path: Path) -> None:
    first = build(architecture="gpt2", tokenizer={"kind": "unigram"})
    first.tokenizer.save_pretrained(tmp_path)
    second = build(architecture="t5", tokenizer={"path": str(tmp_path)})
    assert second.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    assert second.text.encode_prompt(second.tokenizer, PROMPTS[0], True) == [
        *first.text.encode_prompt(first.tokenizer, PROMPTS[0], False),
        second.eos_id,
    ]


@pytest.mark.parametrize("content", [None, "not json"])
def test_a_path_without_a_tokenizer_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError) as caught:
        build(architecture="gpt2", tokenizer={"path": str(tmp_path)})
    assert str(tmp_path) in str(caught.value.where)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("architecture: gpt2\nlayer: 2\ntokenizer: word\n", 2, "unknown config key 'layer'"),
        ("architecture: gpt3\ntokenizer: word\n", 1, "architecture"),
        ("architecture: gpt2\ntokenizer: {kind: word, path: x}\n", 2, "either kind"),
        ("architecture: gpt2\ntokenizer: {path: x, vocab_size: 99}\n", 2, "vocab_size belongs"),
        ("architecture: gpt2\ntokenizer: {kind: bpe, vocab_size: 100}\n", 2, "at least 260"),
        ("architecture: gpt2\nhidden: 30\nheads: 4\ntokenizer: word\n", None, "multiple of heads"),
        ("architecture: t5\nmax_positions: 64\ntokenizer: word\n", None, "relative positions"),
        ("architecture: t5\npad: eos\ntokenizer: word\n", None, "pad must be distinct"),
        ("architecture: llama\nhidden: 6\nheads: 2\ntokenizer: word\n", None, "must be even"),
        ("architecture: qwen3\ndropout: 0.1\ntokenizer: word\n", None, "has no dropout"),
    ],
)
def test_a_bad_description_is_refused(tmp_path: Path, text: str, line: int | None, words: str) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        read_scratch(path)
    assert caught.value.where == (f"{path}:{line}" if line else None)


def test_the_shorthand_and_the_names(tmp_path: Path) -> None:
    path = tmp_path / "small.yml"
    path.write_text("architecture: gpt2\ntokenizer: word\n")
    config = read_scratch(path)
    assert config.tokenizer.kind == "word"
    assert (config.positions, config.layers) == (512, 2)
    assert is_scratch("a/b.yaml") and is_scratch("b.yml") and not is_scratch("gpt2")


def test_an_encoder_cannot_write_and_chat_needs_a_template() -> None:
    with pytest.raises(UserError, match="writes no text"):
        build(architecture="distilbert", tokenizer={"kind": "word"})
    with pytest.raises(UserError, match="no chat template"):
        build(TextFormat(chat=True), architecture="gpt2", tokenizer={"kind": "word"})
    with pytest.raises(UserError, match="no classifier"):
        scratch.build_classifier(
            ScratchConfig.model_validate({"architecture": "t5", "tokenizer": {"kind": "word"}}),
            name="small.yaml",
            texts=RESPONSES,
            labels=["a", "b"],
            seed=0,
        )
