"""Any text, any cut, any family of tokenizers: authors and lengths agree, and joined segments read as the joined text.

What the tokenizer itself loses on a text is the tokenizer's, and counted; nothing may be lost at the boundary.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_token_boundaries import sentencepiece_like, trained_t5
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from conftest import make_tokenizer, toy_examples
from rlgf_cli.config.scratch import ScratchConfig
from rlgf_cli.functional import masks
from rlgf_cli.models import token_boundaries
from rlgf_cli.models.scratch import build_tokenizer
from rlgf_cli.models.text import TextFormat
from rlgf_cli.models.token_boundaries import (
    BoundaryAudit,
    append_text,
    cut_in_text,
    cut_in_tokens,
    is_boundary,
    tokenizer_loss,
)
from rlgf_cli.protocols import Example
from rlgf_cli.training.episodes import Episode

PLAIN, SPACED = TextFormat(), TextFormat(response_prefix=" ")
SPECIAL = ["<pad>", "</s>", "<unk>"]
NAMES = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


def sentences() -> list[str]:
    return [row["references"][0] for row in toy_examples(200)]


def trained(backend: Tokenizer, trainer: Any) -> PreTrainedTokenizerFast:
    backend.train_from_iterator(sentences(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **NAMES)


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT's: lower case without accents, Chinese characters and punctuation apart, ``##`` inside words."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return trained(backend, trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False))


def llama_like() -> PreTrainedTokenizerFast:
    """A dummy space in front by the normaliser, and bytes for what is not in the vocabulary."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", left=1, right=0)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    backend.decoder = decoders.Sequence(steps)
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = trained(backend, trainers.BpeTrainer(vocab_size=360, special_tokens=special, show_progress=False))
    return tokenizer


def characters() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return trained(backend, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))


def sentencepiece_unigram() -> PreTrainedTokenizerFast:
    """As transformers converts a SentencePiece model: normalised, stripped at its end, runs of spaces made one."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    return trained(backend, trainer)


def t5_with_normaliser() -> PreTrainedTokenizerFast:
    tokenizer = trained_t5()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace("\u200b", " ")]
    )
    return tokenizer


def scratch(kind: str) -> Any:
    size = None if kind == "word" else 300
    return build_tokenizer(
        ScratchConfig(architecture="gpt2", tokenizer={"kind": kind, "vocab_size": size}), sentences()
    )


MAKERS = {
    "byte_bpe": (make_tokenizer, SPACED),
    "scratch_bpe": (lambda: scratch("bpe"), PLAIN),
    "byte_bpe_prefix_space": (lambda: sentencepiece_like("byte_level"), PLAIN),
    "unigram": (lambda: scratch("unigram"), PLAIN),
    "sentencepiece": (sentencepiece_unigram, PLAIN),
    "metaspace_first": (lambda: sentencepiece_like("first"), PLAIN),
    "metaspace_words": (lambda: sentencepiece_like("always"), PLAIN),
    "t5": (trained_t5, PLAIN),
    "t5_normalised": (t5_with_normaliser, PLAIN),
    "llama": (llama_like, PLAIN),
    "wordpiece": (word_piece, PLAIN),
    "characters": (characters, PLAIN),
    "byt5": (ByT5Tokenizer, PLAIN),
    "words": (lambda: scratch("word"), PLAIN),
}


@cache
def family(name: str) -> tuple[TextFormat, Any]:
    make, text = MAKERS[name]
    return text, make()


UNBROKEN = [name for name in MAKERS if name != "words"]
"""Those that can go on inside a word; a vocabulary of whole words cannot, and is cut between its tokens alone."""
LOSSLESS = ["scratch_bpe", "byt5"]

PIECES = [
    "the cat sees", "river", " it .", "e", "s", " ", "   ", "\t", "\r\n", "\n\n", "\xa0", "\u3000", "\u2028", "\x1c",
    "\x85", "👩\u200d👩\u200d👧", "🇩🇪", "👍🏽", "😀", "\u200d", "\ufe0f", "é", "e\u0301", "\u0301", "क्षि", "日本", "語",
    "가", "\u1100\u1161", "שלום", "مرحبا", "\u200f", "\u202e", "\u200b", "\ufeff", "\x00", "\x07", "\ufffd", "ﬁ", "İ",
    "ß", "A", ",", "...", "don't", "##es", "▁", "Ġ", "</s>", "<unk>", "<0x0A>", "</", "s>",
]  # fmt: skip
any_text = st.lists(
    st.one_of(st.sampled_from(PIECES), st.text(st.characters(exclude_categories=["Cs"]), max_size=3)), max_size=7
).map("".join)
known_text = st.lists(
    st.sampled_from(["the", "cat", "sees", "river", "a", "dog", "finds", "house", "it"]), min_size=1
).map(" ".join)


def episode_of(boundary: token_boundaries.TokenBoundary, roll_in: Any = "guide", roll_out: Any = "policy") -> Episode:
    segments = [(author, ids) for author, ids in ((roll_in, boundary.first), (roll_out, boundary.second)) if ids]
    return Episode(0, Example("x", "x"), [1], 0, roll_out, segments=segments, cut=len(boundary.first))


def read(name: str, ids: list[int]) -> str:
    text, tokenizer = family(name)
    shown = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return shown.removeprefix(text.response_prefix)


def at_the_boundary(prefix: str, continuation: str) -> tuple[str, str]:
    """Whitespace at a cut belongs to what follows: many tokenizers have none at the end of a text."""
    kept = prefix.rstrip()
    return kept, prefix[len(kept) :] + continuation


def cut_somewhere(name: str, whole: str, place: float) -> tuple[TextFormat, Any, str, str]:
    """Format and tokenizer of a family, and a text's two parts."""
    at = round(place * len(whole))
    return *family(name), *at_the_boundary(whole[:at], whole[at:])


def assert_nothing_lost(name: str, boundary: token_boundaries.TokenBoundary, episode: Episode) -> None:
    """The boundary is decoded as the episode is, and any loss is the tokenizer's."""
    assert boundary.decoded == read(name, episode.ids)
    assert boundary.loss != "boundary", boundary
    if name in LOSSLESS:
        assert (boundary.loss, boundary.decoded) == ("none", boundary.text)


@pytest.mark.parametrize("name", list(MAKERS))
@given(whole=any_text, place=st.floats(0, 1), whole_words=st.booleans())
def test_any_text_cut_between_any_two_tokens(name: str, whole: str, place: float, whole_words: bool) -> None:
    text, tokenizer = family(name)
    ids = text.encode_response(tokenizer, whole)
    n = round(place * len(ids))
    boundary = cut_in_tokens(text, tokenizer, whole, n, whole_words=whole_words)
    episode = episode_of(boundary)
    # the first author's tokens are the text's own, up to the cut or the next boundary behind it
    assert boundary.first == ids[: len(boundary.first)] and (boundary.drawn, boundary.moved >= 0) == (n, True)
    between = range(n, len(boundary.first))
    assert not any(is_boundary(text, tokenizer, ids, k, whole_words=whole_words) for k in between)
    assert episode.ids == boundary.first + boundary.second
    assert episode.authors == [masks.GUIDE] * len(boundary.first) + [masks.POLICY] * len(boundary.second)
    assert episode.length == len(episode.authors)
    assert_nothing_lost(name, boundary, episode)


@pytest.mark.parametrize("name", UNBROKEN)
@given(whole=any_text, place=st.floats(0, 1))
def test_any_text_cut_between_any_two_characters(name: str, whole: str, place: float) -> None:
    text, tokenizer, prefix, continuation = cut_somewhere(name, whole, place)
    boundary = cut_in_text(text, tokenizer, prefix, continuation)
    episode = episode_of(boundary, "policy", "guide")
    assert boundary.text == whole and boundary.moved == 0
    assert boundary.first == text.encode_response(tokenizer, prefix)
    assert episode.authors == [masks.POLICY] * len(boundary.first) + [masks.GUIDE] * len(boundary.second)
    assert (boundary.loss == "none") == (boundary.decoded == whole)
    assert_nothing_lost(name, boundary, episode)


@pytest.mark.parametrize("name", UNBROKEN)
@given(whole=known_text, place=st.floats(0, 1))
def test_a_text_that_the_tokenizer_knows_is_kept_to_the_letter(name: str, whole: str, place: float) -> None:
    """Nothing can be the tokenizer's loss here, so nothing is left to the audit's judgement."""
    text, tokenizer, prefix, continuation = cut_somewhere(name, whole, place)
    for boundary in (
        cut_in_text(text, tokenizer, prefix, continuation),
        append_text(text, tokenizer, text.encode_response(tokenizer, prefix), continuation),
    ):
        ids = [*boundary.first, *boundary.second]
        # byte-level BPE with add_prefix_space shows its dummy space, which every text of it begins with
        dummy = " " if name == "byte_bpe_prefix_space" else ""
        assert read(name, ids) == dummy + whole
        assert not {tokenizer.unk_token_id, tokenizer.eos_token_id} & set(ids)


@pytest.mark.parametrize("name", list(MAKERS))
@given(whole=any_text)
def test_a_boundary_is_where_the_text_stays_as_it_is(name: str, whole: str) -> None:
    """Whatever follows: the text up to a boundary is a beginning of the whole, without half a character at its end."""
    text, tokenizer = family(name)
    ids = text.encode_response(tokenizer, whole)
    shown = read(name, ids)
    for n in range(len(ids) + 1):
        before = read(name, ids[:n])
        for whole_words in (False, True):
            if is_boundary(text, tokenizer, ids, n, whole_words=whole_words):
                assert shown.startswith(before)
                if name in LOSSLESS:
                    assert before.encode() == b"".join(map(bytes_of(name), ids[:n]))


def bytes_of(name: str) -> Any:
    """A token's bytes, for the families that lose none."""
    _, tokenizer = family(name)
    if name == "byt5":
        return lambda i: tokenizer.convert_ids_to_tokens(i).encode("latin-1")
    letters = {letter: code for code, letter in enumerate(byte_letters())}
    return lambda i: bytes(letters[letter] for letter in tokenizer.convert_ids_to_tokens(i))


def byte_letters() -> list[str]:
    """GPT-2's letter for every byte: its own where it can be printed, else one from 256 on."""
    own = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(code if code in own else next(others)) for code in range(256)]


@given(texts=st.lists(st.tuples(any_text, st.integers(0, 12)), min_size=1, max_size=8))
def test_the_audit_counts_every_seam_once(texts: list[tuple[str, int]]) -> None:
    text, tokenizer = family("wordpiece")
    audit, expected = BoundaryAudit(), {"none": 0, "tokenizer": 0, "boundary": 0}
    found = [cut_in_tokens(text, tokenizer, whole, n, whole_words=True) for whole, n in texts]
    for boundary in found:
        audit.add(boundary)
        expected[boundary.loss] += 1
    report = audit.to_json()
    assert (report["exact"], report["lost_by_tokenizer"], report["lost_at_seam"]) == tuple(expected.values())
    assert report["seams"] == len(texts)
    assert report["stable"] == sum(not boundary.moved for boundary in found) / len(found)
    moved = [boundary.moved for boundary in found if boundary.moved]
    assert (report["moved"], report["moved_tokens_max"]) == (len(moved), max(moved, default=0))
    assert report["moved_tokens_mean"] == pytest.approx(sum(moved) / len(moved) if moved else 0)
    assert report["tokens_first"] + report["tokens_second"] == sum(len(s.first) + len(s.second) for s in found)
    assert set(audit.examples) == {boundary.loss for boundary in found} - {"none"}


def test_an_audit_of_nothing() -> None:
    report = BoundaryAudit().to_json()
    assert report["seams"] == 0 and report["stable"] is None


# --- the tokens of a continuation


@pytest.mark.parametrize(
    ("first", "second", "pieces"),
    [
        ("the cat se", "es it", ["##es", "it"]),
        ("the", "es. it", ["##es", ".", "it"]),  # what follows the word is whole
        ("the", "ES it", ["##es", "it"]),
        ("the cat", " sees it", ["sees", "it"]),
        ("the cat", "\x07 sees", ["sees"]),  # the normaliser leaves control characters out
        ("the cat", ".", ["."]),  # punctuation is a word of its own
        ("the cat", ". it", [".", "it"]),
        ("the cat", "日 it", ["<unk>", "it"]),
        ("the cat", "", []),
        ("the cat", " ", []),
    ],
)
def test_word_piece_goes_on_inside_a_word(first: str, second: str, pieces: list[str]) -> None:
    text, tokenizer = family("wordpiece")
    assert {"##e", "##s"} <= set(tokenizer.get_vocab())
    found = tokenizer.convert_ids_to_tokens(text.encode_continuation(tokenizer, second))
    merged = "".join(found).replace("##", "").replace("<unk>", "")
    assert merged == "".join(pieces).replace("##", "").replace("<unk>", "")
    assert [p.startswith("##") for p in found][:1] == [p.startswith("##") for p in pieces][:1]
    assert sum(not p.startswith("##") for p in found) == sum(not p.startswith("##") for p in pieces)


def test_words_are_split_where_the_tokenizer_splits_them() -> None:
    """T5's whitespace: what its normaliser makes a space of is one, Python's control characters are none."""
    text, tokenizer = family("t5_normalised")
    whole = text.encode_response(tokenizer, "the cat sees")
    assert (
        text.encode_response(tokenizer, "the") + text.encode_continuation(tokenizer, " \u200bcat\u200b sees") == whole
    )
    inside = tokenizer.convert_ids_to_tokens(text.encode_continuation(tokenizer, "e\x1cs"))
    assert inside == ["e", "<unk>", "s"]


# --- the audit is not blind


@pytest.mark.parametrize(
    "name", ["byte_bpe_prefix_space", "unigram", "sentencepiece", "metaspace_words", "t5", "llama", "wordpiece"]
)
def test_a_seam_that_splits_a_word_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, tokenizer = family(name)
    cuts = [("the cat se", "es the river"), ("the r", "iver 日本"), ("日本 the r", "iver")]
    assert [cut_in_text(text, tokenizer, *cut).loss == "boundary" for cut in cuts] == [False] * 3
    monkeypatch.setattr(TextFormat, "encode_continuation", TextFormat.encode_response)
    assert [cut_in_text(text, tokenizer, *cut).loss for cut in cuts] == ["boundary"] * 3
    first = text.encode_response(tokenizer, "the cat se")
    assert append_text(text, tokenizer, first, "es it").loss == "boundary"


@pytest.mark.parametrize("name", UNBROKEN)
def test_a_seam_that_joins_two_words_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, tokenizer = family(name)
    whole = TextFormat.encode_continuation
    assert cut_in_text(text, tokenizer, "the cat", " sees it").loss != "boundary"
    monkeypatch.setattr(TextFormat, "encode_continuation", lambda self, t, s: whole(self, t, s.lstrip()))
    assert cut_in_text(text, tokenizer, "the cat", " sees it").loss == "boundary"
    assert cut_in_text(text, tokenizer, "日本 the cat", " sees 日本").loss == "boundary"


def test_a_space_that_the_first_text_loses_at_its_end_is_seen() -> None:
    """T5 has none at the end of a text: tokenised as 'the cat', the two words would be one."""
    boundary = cut_in_text(*family("t5"), "the cat ", "sees it")
    assert (boundary.decoded, boundary.loss) == ("the catsees it", "boundary")


def test_a_vocabulary_of_words_cannot_go_on_inside_one() -> None:
    assert cut_in_text(*family("words"), "the c", "at sees").loss == "boundary"
    assert cut_in_text(*family("words"), "the", " cat").loss == "none"


def test_half_a_character_of_a_decoder_that_hides_it_is_no_boundary() -> None:
    text, tokenizer = family("byt5")
    ids = text.encode_response(tokenizer, "a日本 b")
    places = [n for n in range(len(ids) + 1) if is_boundary(text, tokenizer, ids, n, whole_words=False)]
    assert places == [0, 1, 4, 7, 8, 9]
    # 本 goes on with the word: its first byte alone shows nothing, and is not taken for an end
    words = [n for n in range(len(ids) + 1) if is_boundary(text, tokenizer, ids, n, whole_words=True)]
    assert words == [0, 7, 8]
    assert is_boundary(text, tokenizer, [*ids, tokenizer.eos_token_id], 9, whole_words=True)


@pytest.mark.parametrize(
    ("name", "whole", "why"),
    [
        ("t5", "the cat", "nothing"),
        ("t5", "the  cat\n", "whitespace"),
        ("t5", "the 日本", "unknown characters"),
        ("wordpiece", "The cät", "normalisation"),
        ("byte_bpe", " the", "whitespace"),
        ("scratch_bpe", " the\n日本 \u200d", "nothing"),
    ],
)
def test_why_a_tokenizer_loses_a_text(name: str, whole: str, why: str) -> None:
    assert tokenizer_loss(*family(name), whole) == why


def test_tokens_are_the_same_where_every_token_is() -> None:
    one, other = family("byte_bpe")[1], family("t5")[1]
    assert token_boundaries.same_tokens(one, make_tokenizer()) and not token_boundaries.same_tokens(one, other)
    assert not token_boundaries.same_tokens(None, one)
