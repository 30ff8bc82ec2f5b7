"""METEOR 1.5 (Denkowski and Lavie 2014) by its own program, which pycocoevalcap brings: Java is needed.

Figures: ``meteor``, the mean of the texts' scores, and ``meteor.corpus``, the program's score of the set as one, which
is what caption leaderboards print (a figure of the set: no interval). 0 to 1, English. The program splits words,
lower-cases, and matches stems, WordNet synonyms and paraphrases. Multi-reference rule: the best reference. An empty
text scores 0; blank references are dropped and counted; an example without references is skipped.
"""

from __future__ import annotations

import subprocess
import tempfile
import threading
from collections.abc import Sequence
from importlib.metadata import version
from typing import IO

from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.protocols import Example, MetricResult
from rlgf_cli.scorers import captions
from rlgf_cli.scorers.base import ReferenceMetric, nonblank_references, refuse_target, signature

_JAR = "meteor-1.5.jar"
_LIMIT = 300.0
"""Seconds for one answer; the first has to wait for the paraphrases, half a minute on a busy machine."""
_SEPARATOR = "|||"


class MeteorMetric(ReferenceMetric):
    """``meteor`` and ``meteor.corpus``."""

    name = "meteor"

    def __init__(self, target: str | None = None) -> None:
        refuse_target(self.name, target)
        self._folder = captions.folder(self.name) / "meteor"
        self._command = [captions.java(self.name), "-Xmx2G", "-jar", _JAR]
        if not (self._folder / _JAR).is_file():
            raise UserError(
                "METEOR's program is not in the package pycocoevalcap",
                where=str(self._folder / _JAR),
                hint="install the package again: pip install --force-reinstall pycocoevalcap",
            )

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        groups, counts = nonblank_references(examples)
        scored = [(group, text) for group, text in zip(groups, texts, strict=True) if group]
        scores, corpus = self._scores([group for group, _ in scored], [text for _, text in scored])
        each = iter(scores)
        values = [next(each) if group else None for group in groups]
        settings = f"meteor=1.5,pycocoevalcap={version('pycocoevalcap')},lang=en,norm=yes,references=max"
        return MetricResult(
            {"score": values}, signature(self.name, settings, examples), counts, whole={"corpus": corpus}
        )

    def _scores(self, references: Sequence[Sequence[str]], texts: Sequence[str]) -> tuple[list[float], float]:
        """Each text's score, and that of the whole set. The program is ended also where an error is raised."""
        with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
            try:
                process = subprocess.Popen(
                    [*self._command, "-", "-", "-stdio", "-l", "en", "-norm"],
                    cwd=self._folder,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    encoding="utf-8",
                )
            except OSError as error:
                raise RlgfError(f"METEOR did not start: {error}") from None
            assert process.stdin is not None and process.stdout is not None
            try:
                return _converse(process, process.stdin, process.stdout, references, texts)
            except (OSError, ValueError) as error:  # a pipe that broke, or an answer that is no number
                errors.seek(0)
                raise RlgfError(
                    f"METEOR ended before it had scored {len(texts)} texts ({error}): {captions.reason(errors.read())}",
                    hint="see whether `java` runs here and has 2 GB of memory",
                ) from None
            finally:
                process.kill()
                process.wait()
                process.stdout.close()


def _converse(
    process: subprocess.Popen[str],
    questions: IO[str],
    answers: IO[str],
    references: Sequence[Sequence[str]],
    texts: Sequence[str],
) -> tuple[list[float], float]:
    """The program's protocol: a line ``SCORE ||| references ||| text`` is answered by counts, a line of all counts
    by one score each and then their common score.
    """

    def ask(line: str) -> None:
        questions.write(line + "\n")
        questions.flush()

    def answer() -> str:
        watch = threading.Timer(_LIMIT, process.kill)  # a killed program's answer is empty
        watch.start()
        try:
            line = answers.readline()
        finally:
            watch.cancel()
        if not line.strip():
            raise ValueError("no answer")
        return line.strip()

    counts = []
    for group, text in zip(references, texts, strict=True):
        ask(f" {_SEPARATOR} ".join(["SCORE", *map(_line, group), _line(text)]))
        counts.append(answer())
    ask(f" {_SEPARATOR} ".join(["EVAL", *counts]))
    return [float(answer()) for _ in counts], float(answer())


def _line(text: str) -> str:
    """A text without the line breaks and separators of the protocol."""
    return " ".join(text.replace(_SEPARATOR, " ").split())
