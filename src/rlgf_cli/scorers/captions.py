"""Helpers of the image-captioning scorers: the package pycocoevalcap (the extra ``captions``), Java, and tokenisation
by the rules of the Penn Treebank.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from nltk.tokenize import TreebankWordTokenizer

from rlgf_cli.errors import RlgfError, UserError

Tokenizer = Literal["treebank", "ptb"]
Tokenize = Callable[[Sequence[str]], list[str]]
"""Texts to texts of the same words with single spaces between them."""

_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"
_LIMIT = 600
"""Seconds for one run of the Java tokenizer, which does 20,000 words a second."""
_RULE = 1
"""Changes with :func:`treebank`, so that numbers of two rules are not compared."""


def module(scorer: str, name: str) -> Any:
    """A module of pycocoevalcap; UserError where the extra is not installed."""
    try:
        return importlib.import_module(f"pycocoevalcap.{name}")
    except ImportError as error:
        raise UserError(
            f"{scorer!r} needs the package pycocoevalcap, which is not installed ({error})",
            hint="pip install 'rlgf-cli[captions]'",
        ) from None


def folder(scorer: str) -> Path:
    """The folder of pycocoevalcap and its jars."""
    return Path(module(scorer, "cider").__path__[0]).parent


def java(scorer: str) -> str:
    """The path of ``java``; UserError where there is none."""
    path = shutil.which("java")
    if path is None:
        raise UserError(
            f"{scorer!r} needs Java, and there is no `java` on the PATH",
            hint="install a Java runtime (8 or later), or choose a metric without it: rouge, bleu, chrf, cider",
        )
    return path


def reason(stderr: str) -> str:
    """Why a Java program failed: the first line of its traceback, or the last line that it wrote."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    thrown = (line for line in lines if "Exception" in line or "Error" in line)
    return next(thrown, lines[-1] if lines else "it wrote no message")


def tokenizer(scorer: str, kind: Tokenizer) -> tuple[Tokenize, str]:
    """The tokenizer and the text by which signatures name it. Raises UserError where it lacks something."""
    punctuation = frozenset(module(scorer, "tokenizer.ptbtokenizer").PUNCTUATIONS)
    if kind == "ptb":
        command = [java(scorer), "-cp", str(folder(scorer) / _JAR)]
        return (lambda texts: _ptb(command, texts, punctuation)), "ptb(corenlp-3.4.1)"
    remembered = lru_cache(maxsize=50_000)(lambda text: treebank(text, punctuation))
    return (lambda texts: [remembered(text) for text in texts]), f"treebank(rule={_RULE},nltk={version('nltk')})"


def treebank(text: str, punctuation: frozenset[str]) -> str:
    """The text in lower case, split by nltk's Treebank rules, without ``punctuation``.

    nltk takes a period for a word of its own at the end of the text only. A text may have several sentences: here
    the period at the end of any word goes, unless the word has another one (``u.s.``).
    """
    words = []
    for word in TreebankWordTokenizer().tokenize(" ".join(text.split()), convert_parentheses=True):
        word = word.lower()
        if word.endswith(".") and "." not in word[:-1]:
            word = word[:-1]
        if word and word not in punctuation:
            words.append(word)
    return " ".join(words)


def _ptb(command: Sequence[str], texts: Sequence[str], punctuation: frozenset[str]) -> list[str]:
    """Stanford's PTBTokenizer with the options that pycocoevalcap gives it, on all texts in one run.

    The package's own wrapper writes into its folder and takes a crash for an empty answer.
    """
    lines = [" ".join(text.split()) for text in texts]
    options = ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    filled = [line for line in lines if line]  # an empty line would shift those behind it where it is the last
    if not filled:
        return lines
    try:
        done = subprocess.run(
            [*command, *options],
            input="\n".join(filled) + "\n",
            capture_output=True,
            encoding="utf-8",
            timeout=_LIMIT,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RlgfError(f"the Java tokenizer did not run: {error}", hint="leave out tokenizer: ptb") from None
    split_lines = done.stdout.split("\n")[:-1]
    if done.returncode or len(split_lines) != len(filled):
        raise RlgfError(
            f"the Java tokenizer gave {len(split_lines)} lines for {len(filled)} texts and ended with code "
            f"{done.returncode}: {reason(done.stderr)}",
            hint="leave out tokenizer: ptb",
        )
    split = iter(" ".join(word for word in line.split() if word not in punctuation) for line in split_lines)
    return [next(split) if line else "" for line in lines]
