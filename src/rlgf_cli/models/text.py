"""The text format of a checkpoint: texts to tokens and back, segment by segment.

Segments (prompt, roll-in, roll-out) are tokenised one by one and their ids concatenated; joined text is never
tokenised again, so the author of every token stays exact. The format is stored with the checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer
from tokenizers.models import WordPiece

from rlgf_cli.artifacts.jsonl import read_json, write_json
from rlgf_cli.config.common import TextConfig
from rlgf_cli.errors import UserError
from rlgf_cli.models.truncation import cut_places, never_cut, without_oldest_turns
from rlgf_cli.models.turns import TurnEnd, render, turn_end
from rlgf_cli.protocols import Prompt
from rlgf_cli.protocols.messages import as_messages, last_words, with_last_words

FILE = "rlgf_text.json"
Origin = Literal["stored", "given", "default"]
"""Where a format comes from: stored with the checkpoint, the config, or neither."""


@dataclass(frozen=True)
class TextFormat:
    """The prompt template (or the model's chat template, with its variables) and the prefix of every response."""

    template: str = "{prompt}"
    chat: bool = False
    response_prefix: str = ""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def from_config(cls, config: TextConfig | None, base: TextFormat) -> TextFormat:
        """``base`` with the keys that the config sets."""
        given = {k: v for k, v in (config.model_dump() if config else {}).items() if v is not None}
        if given.get("chat"):
            given.setdefault("template", "{prompt}")
        if "template" in given:
            given.setdefault("chat", False)
        if given.get("chat") is False:
            given.setdefault("chat_template_kwargs", {})
        return dataclasses.replace(base, **given)

    @classmethod
    def load(cls, folder: str | Path) -> TextFormat:
        """The format stored with a checkpoint; plain text where none is stored."""
        path = Path(folder) / FILE
        if not path.is_file():
            return cls()
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{k: v for k, v in read_json(path).items() if k in known})

    def save(self, folder: str | Path) -> None:
        write_json(Path(folder) / FILE, {"schema_version": 1, **self.to_json()})

    def to_json(self) -> dict[str, Any]:
        """The format's keys; ``chat_template_kwargs`` only where there are any."""
        data = dataclasses.asdict(self)
        return data if self.chat_template_kwargs else {k: v for k, v in data.items() if k != "chat_template_kwargs"}

    def render_prompt(self, tokenizer: Any, prompt: Prompt) -> str:
        """The text that the model sees before its response. Raises UserError for a conversation in plain text."""
        if self.chat:
            return render(tokenizer, as_messages(prompt), self.chat_template_kwargs)
        if isinstance(prompt, str):
            return self.template.replace("{prompt}", prompt)
        if getattr(tokenizer, "chat_template", None):
            hint = "leave --no-chat, text.template and guide.prompt_template out"
            raise UserError("the prompt is a conversation, and the text format leaves out the chat template", hint=hint)
        raise UserError(
            "the prompt is a conversation, and the tokenizer has no chat template",
            hint='use an instruct model, whose tokenizer has one, or give each prompt as a text: {"prompt": "..."}',
        )

    def encode_prompt(self, tokenizer: Any, prompt: Prompt, encoder_decoder: bool) -> list[int]:
        """Ids of the rendered prompt. A decoder's prompt keeps BOS and loses a trailing EOS; an encoder keeps both."""
        ids = self._prompt_ids(tokenizer, prompt, encoder_decoder)
        if not ids and not encoder_decoder:
            raise UserError(f"the prompt {last_words(prompt)[:40]!r} has no tokens in this tokenizer")
        return ids

    def cut_prompt(self, tokenizer: Any, prompt: Prompt, encoder_decoder: bool, limit: int) -> list[int]:
        """As :meth:`encode_prompt`, with at most ``limit`` ids: the prompt is cut, the template's own text is kept.

        A conversation loses its oldest turns first and never its system message. Then a decoder keeps the end of the
        prompt (of the last message), which is next to the response, an encoder its beginning. The cut is between two
        tokens and never inside a character. Raises UserError where the template, with the system message, does not fit.
        """
        for left in without_oldest_turns(prompt):
            if left != prompt and len(ids_left := self._prompt_ids(tokenizer, left, encoder_decoder)) <= limit:
                return ids_left
        words = last_words(left)

        def ids(place: int) -> list[int]:
            words_left = words[:place] if encoder_decoder else words[place:]
            return self._prompt_ids(tokenizer, with_last_words(left, words_left), encoder_decoder)

        places = cut_places(tokenizer, words, limit, from_start=encoder_decoder)
        # template and prompt may share a token where they meet: the rendered text is counted
        first = bisect_left(places, True, key=lambda place: len(ids(place)) <= limit)
        cut = ids(places[first]) if first < len(places) else []
        if not cut:
            alone = len(self._prompt_ids(tokenizer, with_last_words(left, ""), encoder_decoder))
            raise UserError(
                f"{never_cut(left)} {alone} tokens; there is room for {limit} in a prompt"
                if alone > limit
                else f"there is room for {limit} tokens in a prompt, and no character of {words[:40]!r} fits",
                hint="raise max_prompt_tokens, or set max_new_tokens lower",
            )
        return cut

    def _prompt_ids(self, tokenizer: Any, prompt: Prompt, encoder_decoder: bool) -> list[int]:
        text = self.render_prompt(tokenizer, prompt)
        ids = list(tokenizer(text, add_special_tokens=not self.chat)["input_ids"])
        if not encoder_decoder and not self.chat and ids and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        return ids

    def turn_end(self, tokenizer: Any) -> TurnEnd | None:
        """The end of the assistant's turn in the chat template; None for plain text."""
        return turn_end(tokenizer, self.chat_template_kwargs) if self.chat else None

    def without_ending(self, tokenizer: Any, text: str) -> str:
        """The text without an EOS or end of a turn that it spells out at its very end, and without the space before it.

        A text taken from a rendered conversation has one: with the token after it, the response would end twice.
        """
        end = self.turn_end(tokenizer)
        endings = tuple(filter(None, (tokenizer.eos_token, end.token if end is not None else None)))
        rest = text
        while (bare := rest.rstrip()).endswith(endings):
            rest = bare[: -max(len(ending) for ending in endings if bare.endswith(ending))]
        return text if rest == text else rest.rstrip()

    def encode_response(self, tokenizer: Any, text: str) -> list[int]:
        """Ids of a response from its beginning, without EOS.

        A special token that the text spells out (``</s>``) is text: only an author's own ending is an EOS.
        """
        if not text.startswith(self.response_prefix):
            text = self.response_prefix + text
        return self._plain_ids(tokenizer, text)

    def encode_continuation(self, tokenizer: Any, text: str) -> list[int]:
        """Ids of a segment that follows tokens of the same response.

        SentencePiece tokenizers put a dummy space before every text, and WordPiece tokenizers begin every text with
        a new word; either would split a word here, so the segment is tokenised as a continuation.
        """
        continuing = _without_dummy_prefix(tokenizer) or _inside_word(tokenizer)
        if continuing is None:
            return self._plain_ids(tokenizer, text)
        return self._no_control(tokenizer, continuing.ids(text))

    def decode_response(self, tokenizer: Any, ids: list[int] | tuple[int, ...], *, strip: bool = True) -> str:
        """The text of a response, without special tokens, the response prefix and trailing whitespace.

        ``strip=False`` keeps trailing whitespace: for a partial text that another author continues.
        """
        end = self.turn_end(tokenizer)
        shown = [i for i in ids if end is None or i != end.id]  # the tokenizer may not mark it as special
        text = tokenizer.decode(shown, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        text = text.removeprefix(self.response_prefix)
        return text.rstrip() if strip else text

    def _plain_ids(self, tokenizer: Any, text: str) -> list[int]:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return self._no_control(tokenizer, ids)

    def _no_control(self, tokenizer: Any, ids: Sequence[int]) -> list[int]:
        end = self.turn_end(tokenizer)
        control = _control_ids(tokenizer) | ({end.id} if end is not None else set())
        return [i for i in ids if i not in control]


@lru_cache(maxsize=16)
def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that decoding drops: the tokenizer's special tokens, and added tokens that are marked as special."""
    marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset({*marked, *tokenizer.all_special_ids})


@lru_cache(maxsize=16)
def unseen_ids(tokenizer: Any, rows: int) -> frozenset[int]:
    """The ids below ``rows`` (the model's) that no text shows: special ones, and those without a token."""
    return frozenset(range(rows)) - (set(tokenizer.get_vocab().values()) - special_ids(tokenizer))


def _control_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that no text may be encoded to. Most tokenizers can split a special token's letters; where it is an ordinary
    piece of the vocabulary (T5's ``</s>``), it is dropped."""
    return special_ids(tokenizer) - {tokenizer.unk_token_id}


_WHITESPACE = re.compile(r"[^\S\x1c-\x1f]+")
"""Whitespace as Unicode and the tokenizers define it; Python's ``\\s`` has four more control characters."""


def _normalised(tokenizer: Tokenizer, text: str) -> str:
    return tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer is not None else text


@dataclass(frozen=True)
class _NoDummyPrefix:
    """A SentencePiece-like tokenizer that adds no leading space.

    ``by_words``: the original splits at whitespace and then puts a space before *every* word (T5). This copy keeps
    whitespace, as one space each, in place of those spaces.
    """

    tokenizer: Tokenizer
    by_words: bool

    def ids(self, text: str) -> list[int]:
        if self.by_words:
            # normalised first: a normaliser may turn other characters into spaces
            spaced = _WHITESPACE.sub(" ", _normalised(self.tokenizer, text))
            text = spaced.rstrip(" ") or spaced
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


@lru_cache(maxsize=16)
def _without_dummy_prefix(tokenizer: Any) -> _NoDummyPrefix | None:
    """A copy of a SentencePiece-like tokenizer that adds no leading space; None where there is none to remove."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    state = json.loads(backend.to_str())
    changed = by_words = False
    for part, nested in (("pre_tokenizer", "pretokenizers"), ("normalizer", "normalizers")):
        steps = (state.get(part) or {}).get(nested) or [state.get(part) or {}]
        for step in steps:
            if step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never":
                step["prepend_scheme"] = "never"
                changed = True
            elif step.get("type") == "Prepend":
                step["prepend"] = ""
                changed = True
            elif step.get("type") == "ByteLevel" and step.get("add_prefix_space"):
                step["add_prefix_space"] = False
                changed = True
        if any(step.get("type") == "Metaspace" for step in steps) and len(steps) > 1:
            unsplit = [step for step in steps if step["type"] != "WhitespaceSplit"]
            by_words = by_words or len(unsplit) < len(steps)
            state[part][nested] = unsplit
    if not changed:
        return None
    plain = Tokenizer.from_str(json.dumps(state))
    plain.encode_special_tokens = True
    return _NoDummyPrefix(plain, by_words)


@dataclass(frozen=True)
class _InsideWord:
    """A WordPiece tokenizer for a text that begins inside a word.

    Pieces inside a word begin with a mark (``##es``). The first word of the text is split into such pieces only,
    longest first, as the tokenizer splits words; where the vocabulary does not cover it (punctuation is a word of its
    own), it is tokenised as a new word.
    """

    tokenizer: Tokenizer
    inside: dict[str, int]

    def ids(self, text: str) -> list[int]:
        shown = _normalised(self.tokenizer, text)
        words = self.tokenizer.pre_tokenizer.pre_tokenize_str(shown)
        if words and words[0][1][0] == 0 and (first := self._word_pieces(words[0][0])):
            return [*first, *self._plain(shown[words[0][1][1] :])]
        return self._plain(text)

    def _word_pieces(self, word: str) -> list[int]:
        """Ids of a word's pieces; none where they do not cover the word."""
        longest = max(map(len, self.inside), default=0)
        ids: list[int] = []
        while word:
            known = (n for n in range(min(longest, len(word)), 0, -1) if word[:n] in self.inside)
            if (size := next(known, 0)) == 0:
                return []
            ids.append(self.inside[word[:size]])
            word = word[size:]
        return ids

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


@lru_cache(maxsize=16)
def _inside_word(tokenizer: Any) -> _InsideWord | None:
    """The tokenizer for continuing inside a word; None for any kind other than WordPiece."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.model, WordPiece) or backend.pre_tokenizer is None:
        return None
    mark = backend.model.continuing_subword_prefix
    vocabulary = backend.get_vocab(with_added_tokens=False)
    inside = {
        piece[len(mark) :]: i for piece, i in vocabulary.items() if mark and piece.startswith(mark) and piece != mark
    }
    plain = Tokenizer.from_str(backend.to_str())
    plain.encode_special_tokens = True
    return _InsideWord(plain, inside)
