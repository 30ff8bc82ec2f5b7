"""The figures of a set of texts: its diversity, and the length and complexity of its texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlgf_cli.evolve.diversity import leaders, spread, vendi_score
from rlgf_cli.failures.sentences import sentences
from rlgf_cli.scorers.coverage import words
from rlgf_cli.scorers.distinct import ORDERS, set_distinct
from rlgf_cli.scorers.repetition import ngrams
from rlgf_cli.scorers.self_bleu import counted, self_bleu

DIVERSITY: Mapping[str, str] = {
    **{f"distinct_{n}": f"distinct {n}-grams by {n}-grams of the set" for n in ORDERS},
    "self_bleu": "mean BLEU of a text with all others as references, 0 to 100; less is more diverse",
    "spread": "mean distance (1 - cosine) of two texts",
    "vendi": "Vendi score: effective number of different texts",
    "clusters": "clusters: texts that are no nearer to each other than the given cosine",
}
"""Figures of a set; they depend on the number of its texts."""
COMPLEXITY: Mapping[str, str] = {
    "words": "words per text",
    "sentences": "sentences and lines per text",
    "conjunctions": "conjunctions and relative words per text (English): a trace of clauses",
    "type_token_ratio": "different words by words of a text; longer texts have less",
}
"""Means over texts."""
_CONJUNCTIONS = frozenset(
    [
        *("and", "or", "but", "nor", "yet", "so", "because", "since", "although", "though", "unless", "until", "while"),
        *("whereas", "whether", "if", "when", "whenever", "where", "wherever", "after", "before", "once", "than", "as"),
        *("that", "which", "who", "whom", "whose"),
    ]
)


@dataclass(frozen=True)
class TextMeasures:
    """The per-text statistics of the figures, computed once. ``vectors`` [n, d]; ``grams[i]``: text i's n-grams by n;
    ``bleu[i]``: its n-grams as BLEU counts them; ``complexity`` [n, 4], in the order of :data:`COMPLEXITY`.
    """

    vectors: np.ndarray
    grams: Sequence[Mapping[int, list[tuple[str, ...]]]]
    bleu: Sequence[tuple[Counter[tuple[str, ...]], int]]
    complexity: np.ndarray


def measure_texts(texts: Sequence[str], vectors: np.ndarray) -> TextMeasures:
    """Texts that have a word each, with their unit vectors [n, d]."""
    tokens_of = [words(text) for text in texts]
    return TextMeasures(
        vectors,
        [{n: ngrams(tokens, n) for n in ORDERS} for tokens in tokens_of],
        counted(texts),
        np.array([complexity(text) for text in texts], dtype=float),
    )


def figures(of: TextMeasures, which: np.ndarray, cosine: float) -> dict[str, float]:
    """All figures of the texts ``which`` [m], m >= 2, clusters at ``cosine``. A figure that no text is long enough for
    is left out.
    """
    vectors = of.vectors[which]
    shares = {f"distinct_{n}": set_distinct([of.grams[i][n] for i in which]) for n in ORDERS}
    return {
        **{name: share for name, share in shares.items() if share is not None},
        "self_bleu": float(np.mean(self_bleu([of.bleu[i] for i in which]))),
        "spread": spread(vectors),
        "vendi": vendi_score(vectors),
        "clusters": float(leaders(vectors, cosine)),
        **dict(zip(COMPLEXITY, of.complexity[which].mean(axis=0).tolist(), strict=True)),
    }


def complexity(text: str) -> tuple[float, float, float, float]:
    """Words, sentences, conjunctions and the type-token ratio of a text that has a word."""
    tokens = words(text)
    count = sum(bool(words(sentence)) for sentence in sentences(text))
    conjunctions = sum(word in _CONJUNCTIONS for word in tokens)
    return len(tokens), count, conjunctions, len(set(tokens)) / len(tokens)
