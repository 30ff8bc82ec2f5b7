"""Kinds of failures that are made on purpose: from a prompt and a good text, a bad text of a named kind.

Every kind is one function ``(Case, Generator) -> str | None``; None: it does not apply (one sentence cannot be
shuffled). A kind draws all of its randomness from the generator, so that an example's failures depend on the seed and
the example alone. ``severity`` in (0, 1] is the share of the text that is damaged. Where possible, a kind keeps the
good text's length: a reward model should learn what is wrong, not how long the text is.

After Solway, "Reinforcement Learning without Human Feedback for Last Mile Fine-Tuning of Large Language Models" (arXiv
2408.16753), which names random tokens, coherent but irrelevant text, shuffled text and repetition. The other kinds and
all the details are ours. Kinds whose last word is any word take the good text's end mark half of the time, so that a
missing full stop does not identify them.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rlgf_cli.failures.sentences import sentences, words
from rlgf_cli.protocols import Example

_TRIES = 8
_NUMBER = re.compile(r"(?<!\w)\d+(?:[.,:]\d+)*(?!\w)")
_NAME = re.compile(r"#\w+#|\b[^\W\d_a-z][^\W_]*\b")
"""Candidates for names: a tag such as #Person1#, or a word that begins with a capital."""
_LOWER = re.compile(r"\b[a-z][^\W_]*\b")
_PRONOUNS = {"i"}
_MARKS = ".!?,;:…\"'”’"


class Corpus:
    """The texts of the other examples: their references, and the words, numbers and names in them."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples
        self._texts = [(e.id, reference) for e in examples for reference in e.references]
        self._texts.sort(key=lambda pair: len(words(pair[1])))  # stable: equal lengths keep the order of the data
        self._lengths = [len(words(text)) for _, text in self._texts]

    @cached_property
    def vocabulary(self) -> list[str]:
        return sorted({word for _, text in self._texts for word in words(text)})

    @cached_property
    def numbers(self) -> list[str]:
        return sorted({match for _, text in self._texts for match in _NUMBER.findall(text)})

    @cached_property
    def names(self) -> list[str]:
        return sorted({match for _, text in self._texts for match in self.names_in(text)})

    @cached_property
    def _common(self) -> set[str]:
        """Words that also occur in lower case: a capital does not make them a name."""
        texts = [text for _, text in self._texts] + [e.prompt for e in self._examples]
        return {word for text in texts for word in _LOWER.findall(text)} | _PRONOUNS

    def names_in(self, text: str) -> list[str]:
        return [text[begin:end] for begin, end in self.name_spans(text)]

    def name_spans(self, text: str) -> list[tuple[int, int]]:
        """The positions of the names in a text."""
        return [m.span() for m in _NAME.finditer(text) if m.group().lower() not in self._common]

    def other(self, example: Example, length: int, rng: np.random.Generator) -> str | None:
        """Another example's reference of about ``length`` words; None where there is no other example."""
        around = bisect_left(self._lengths, length)
        for reach in (20, 200, len(self._texts)):
            low, high = max(0, around - reach), min(len(self._texts), around + reach)
            for _ in range(_TRIES):
                id_, text = self._texts[int(rng.integers(low, high))]
                if id_ != example.id and text not in example.references:
                    return text
        return None


@dataclass(frozen=True)
class Case:
    """An example, the good text to damage, the other examples, and the severity in (0, 1]."""

    example: Example
    good: str
    corpus: Corpus
    severity: float = 1.0

    @cached_property
    def words(self) -> list[str]:
        return words(self.good)


def random_words(case: Case, rng: np.random.Generator) -> str | None:
    """Words of the references in any order, as many as the good text has; severity: the share that is replaced."""
    if len(case.corpus.vocabulary) < 2:
        return None
    result = list(case.words)
    for i in _some(len(result), case.severity, rng):
        result[i] = case.corpus.vocabulary[int(rng.integers(len(case.corpus.vocabulary)))]
    return _ended(result, case, rng)


def irrelevant(case: Case, rng: np.random.Generator) -> str | None:
    """Another example's reference, of about the same length: fluent, and about something else."""
    return case.corpus.other(case.example, len(case.words), rng)


def shuffled_words(case: Case, rng: np.random.Generator) -> str | None:
    """The same words in another order; severity: the share of them that moves."""
    result = list(case.words)
    moved = _some(len(result), case.severity, rng, least=2)
    if len(moved) < 2:
        return None
    values = [result[i] for i in moved]
    for i, k in zip(moved, rng.permutation(len(moved)), strict=True):
        result[i] = values[int(k)]
    return _ended(result, case, rng)


def shuffled_sentences(case: Case, rng: np.random.Generator) -> str | None:
    """The same sentences in another order; needs two."""
    parts = [part.strip() for part in sentences(case.good)]
    if len(set(parts)) < 2:
        return None
    order = rng.permutation(len(parts))
    if [parts[int(i)] for i in order] == parts:
        order = np.roll(order, 1)
    return " ".join(parts[int(i)] for i in order)


def repetition(case: Case, rng: np.random.Generator) -> str | None:
    """The text up to some word, then its last 1 to 8 words over and over, to the good text's length or, half of the
    time, up to twice that at full severity."""
    count = len(case.words)
    if count < 4:
        return None
    size = int(rng.integers(1, min(8, count // 2) + 1))
    start = int(rng.integers(0, max(1, count - 4 * size)))
    head, unit = case.words[:start], case.words[start : start + size]
    times = max(4, -(-(count - start) // size))
    if rng.random() < 0.5:
        times += int(rng.integers(0, 1 + round(case.severity * count / size)))
    return _ended(head + unit * times, case, rng)


def cut_off(case: Case, rng: np.random.Generator) -> str | None:
    """The text up to a word in its middle, without an ending; severity: how much may be missing."""
    count = len(case.words)
    if count < 4:
        return None
    most = max(1, round(0.8 * case.severity * count))
    length = count - int(rng.integers(1, min(most, count - 2) + 1))
    return " ".join(case.words[:length]).rstrip(_MARKS)


def run_on(case: Case, rng: np.random.Generator) -> str | None:
    """The good text, then words of another example's reference; severity: the share of them."""
    other = case.corpus.other(case.example, len(case.words), rng)
    if other is None:
        return None
    more = words(other)
    return " ".join([*case.words, *more[: max(1, round(case.severity * len(more)))]])


def copied_input(case: Case, rng: np.random.Generator) -> str | None:
    """A run of words of the prompt, about as many as the good text has."""
    given, count = words(case.example.prompt), len(case.words)
    if len(given) < 4:
        return None
    starts = [0]
    for sentence in sentences(case.example.prompt):
        starts.append(starts[-1] + len(words(sentence)))
    fitting = [start for start in starts[:-1] if start + min(count, len(given)) <= len(given)] or [0]
    start = fitting[int(rng.integers(len(fitting)))]
    return _ended(given[start : start + count], case, rng)


def swapped_facts(case: Case, rng: np.random.Generator) -> str | None:
    """Numbers and names replaced by others of the same type, from the prompt where it has one; severity: the share."""
    spans = sorted(
        [(m.span(), "number") for m in _NUMBER.finditer(case.good)]
        + [(span, "name") for span in case.corpus.name_spans(case.good)]
    )
    spans = [s for i, s in enumerate(spans) if i == 0 or s[0][0] >= spans[i - 1][0][1]]
    text, swapped = case.good, False
    for i in reversed(_some(len(spans), case.severity, rng)):
        (begin, end), kind = spans[i]
        new = _another(case, case.good[begin:end], kind, rng)
        if new is not None:
            text, swapped = text[:begin] + new + text[end:], True
    return text if swapped else None


def _another(case: Case, old: str, kind: str, rng: np.random.Generator) -> str | None:
    """Another number or name: of the prompt, else of the references; a tag for a tag."""
    given = _NUMBER.findall(case.example.prompt) if kind == "number" else case.corpus.names_in(case.example.prompt)
    tag = old.startswith("#")
    near = sorted({new for new in given if new != old and new.startswith("#") == tag})
    if near:
        return near[int(rng.integers(len(near)))]
    pool = case.corpus.numbers if kind == "number" else case.corpus.names
    for _ in range(_TRIES if pool else 0):
        new = pool[int(rng.integers(len(pool)))]
        if new != old and new.startswith("#") == tag:
            return new
    return None


def _ended(text_words: list[str], case: Case, rng: np.random.Generator) -> str:
    """The words as a text, half of the time with the good text's ending in place of their own."""
    text = " ".join(text_words)
    if rng.random() < 0.5:
        return text
    return text.rstrip(_MARKS) + case.good[len(case.good.rstrip(_MARKS)) :]


def _some(count: int, share: float, rng: np.random.Generator, *, least: int = 1) -> list[int]:
    """Indices of a share of ``count`` items, at least ``least`` where there are so many, in ascending order."""
    size = min(count, max(least, round(share * count)))
    return sorted(int(i) for i in rng.choice(count, size=size, replace=False))
