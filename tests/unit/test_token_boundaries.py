"""Segment by segment: what a continuation's tokens are, and that joined segments read as the joined text."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, T5Tokenizer

from conftest import make_tokenizer, toy_examples
from rlgf_cli.models.text import TextFormat

PLAIN, SPACED = TextFormat(), TextFormat(response_prefix=" ")


def sentencepiece_like(kind: str) -> PreTrainedTokenizerFast:
    """Tokenizers that put a dummy space before every text: T5's and Llama's ways of it."""
    if kind == "t5":
        return trained_t5()
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    if kind == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", left=1, right=0)]
        )
    elif kind == "byte_level":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        step = pre_tokenizers.Metaspace(prepend_scheme=kind)
        tokenizer.pre_tokenizer = (
            pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), step]) if kind == "always" else step
        )
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=kind)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator([r["references"][0] for r in toy_examples(100)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def trained_t5() -> PreTrainedTokenizerFast:
    """The real class, which splits at whitespace and puts a space before every word, with a unigram vocabulary."""
    pieces = Counter(
        f"▁{word}"[start:end]
        for row in toy_examples(100)
        for word in row["references"][0].split()
        for start in range(len(word) + 1)
        for end in range(start + 1, len(word) + 2)
    )
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(piece, math.log(count / pieces.total())) for piece, count in pieces.items()]
    return T5Tokenizer(vocab=vocabulary, extra_ids=2)


def ids_of_pieces(tokenizer: Any, ids: list[int]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids)).replace("Ġ", "▁")


@pytest.mark.parametrize("kind", ["always", "first", "prepend", "byte_level", "t5"])
def test_a_continuation_has_no_dummy_space_and_keeps_its_own(kind: str) -> None:
    """'the cat se' and then 'es the dog': the second segment goes on inside the word. Tokenised as a text of its own it
    would begin with a space that nobody wrote."""
    tokenizer = sentencepiece_like(kind)
    alone = tokenizer("es the dog", add_special_tokens=False)["input_ids"]
    assert ids_of_pieces(tokenizer, alone).startswith("▁")  # the trap is there
    for first, second in [
        ("the cat se", "es the dog"),
        ("the cat", " sees the dog"),
        ("the", " cat sees the dog"),
        ("the cat sees the d", "og"),
        ("the cat sees the dog", ""),
    ]:
        ids = PLAIN.encode_response(tokenizer, first)
        more = PLAIN.encode_continuation(tokenizer, second)
        assert ids_of_pieces(tokenizer, more) == second.replace(" ", "▁")
        assert PLAIN.decode_response(tokenizer, [*ids, *more]).strip() == "the cat sees the dog"


@pytest.mark.parametrize("kind", ["always", "t5"])
def test_whitespace_of_any_kind_is_one_space_where_the_tokenizer_splits_by_words(kind: str) -> None:
    tokenizer = sentencepiece_like(kind)
    whole = tokenizer("the cat sees it", add_special_tokens=False)["input_ids"]
    more = PLAIN.encode_continuation(tokenizer, "\n cat \t sees  it \n")
    assert PLAIN.encode_response(tokenizer, "the") + more == whole


def test_a_byte_level_continuation_is_taken_as_it_is() -> None:
    tokenizer = make_tokenizer()
    first = SPACED.encode_response(tokenizer, "the cat")
    assert tokenizer.decode(first) == " the cat"  # the prefix stands before a response ...
    for text in (" sees it", "s", "", " ", "日本"):
        second = SPACED.encode_continuation(tokenizer, text)
        assert tokenizer.decode(second) == text  # ... and not before its second segment
        assert SPACED.decode_response(tokenizer, first + second, strip=False) == f"the cat{text}"


@pytest.mark.parametrize("spelled", ["<eos>", "a<eos>", "<pad><eos> b"])
def test_a_text_that_spells_a_special_token_is_text(spelled: str) -> None:
    tokenizer = make_tokenizer()
    assert {0, 1} & set(tokenizer(spelled)["input_ids"])  # the trap is there
    for ids in (SPACED.encode_response(tokenizer, spelled), SPACED.encode_continuation(tokenizer, spelled)):
        assert not {0, 1} & set(ids)
        assert tokenizer.decode(ids).removeprefix(" ") == spelled
    for kind in ("first", "t5"):
        plain = sentencepiece_like(kind)
        assert 1 not in PLAIN.encode_continuation(plain, "the cat</s>") + PLAIN.encode_response(plain, "a</s>")
