"""SPICE (Anderson et al. 2016) by its own program, which pycocoevalcap brings: Java and Stanford's models are needed.

The figure is the mean of the texts' F1 over scene-graph tuples, 0 to 1, English. Multi-reference rule, SPICE's: the
tuples of all references together. The models (CoreNLP 3.6.0, 500 MB) are not in the package and are never fetched
from here. An empty text is a text without tuples; blank references are dropped and counted; an example without
references is skipped.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.protocols import Example, MetricResult
from rlgf_cli.scorers import captions
from rlgf_cli.scorers.base import ReferenceMetric, nonblank_references, refuse_target, signature

_JAR = "spice-1.0.jar"
_MODELS = ("lib/stanford-corenlp-3.6.0.jar", "lib/stanford-corenlp-3.6.0-models.jar")
_SECONDS_TO_START, _SECONDS_PER_TEXT = 600, 10


class SpiceMetric(ReferenceMetric):
    """``spice``: the mean F1 over scene-graph tuples."""

    name = "spice"

    def __init__(self, target: str | None = None) -> None:
        refuse_target(self.name, target)
        folder = captions.folder(self.name) / "spice"
        self._command = [captions.java(self.name), "-Xmx8G", "-jar", str(folder / _JAR)]
        for file in (_JAR, *_MODELS):
            if not (folder / file).is_file():
                raise UserError(
                    "SPICE needs Stanford's CoreNLP 3.6.0 and its models, which pycocoevalcap does not bring",
                    where=str(folder / file),
                    hint="`python -m pycocoevalcap.spice.get_stanford_models` downloads them (500 MB), where you may; "
                    "cider and coverage stand in for SPICE without it",
                )

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        groups, counts = nonblank_references(examples)
        pairs = [
            {"image_id": i, "test": _line(texts[i]), "refs": [_line(reference) for reference in group]}
            for i, group in enumerate(groups)
            if group
        ]
        scores = self._scores(pairs)
        values = [scores.get(i) for i in range(len(texts))]
        settings = f"spice=1.0,corenlp=3.6.0,pycocoevalcap={version('pycocoevalcap')},lang=en,references=union"
        return MetricResult({"score": values}, signature(self.name, settings, examples), counts)

    def _scores(self, pairs: Sequence[dict[str, object]]) -> dict[int, float]:
        """F1 by ``image_id``. No cache of parses: it would lie in the package's folder."""
        with tempfile.TemporaryDirectory() as folder:
            given, made = Path(folder) / "in.json", Path(folder) / "out.json"
            given.write_text(json.dumps(pairs), encoding="utf-8")
            try:
                done = subprocess.run(
                    [*self._command, str(given), "-out", str(made), "-subset", "-silent"],
                    capture_output=True,
                    encoding="utf-8",
                    errors="replace",
                    timeout=_SECONDS_TO_START + _SECONDS_PER_TEXT * len(pairs),
                )
                if done.returncode or not made.is_file():
                    raise RlgfError(
                        f"SPICE failed with code {done.returncode}: {captions.reason(done.stderr)}",
                        hint="its program was made for Java 8 and takes up to 8 GB of memory",
                    )
                scores = {
                    int(one["image_id"]): float(one["scores"]["All"]["f"]) for one in json.loads(made.read_text())
                }
            except (OSError, subprocess.TimeoutExpired) as error:
                raise RlgfError(f"SPICE did not run: {error}") from None
            except (ValueError, KeyError, TypeError) as error:
                raise RlgfError(f"SPICE wrote something else than scores: {type(error).__name__}: {error}") from None
        if set(scores) != {pair["image_id"] for pair in pairs}:
            raise RlgfError(f"SPICE scored {len(scores)} of {len(pairs)} texts")
        return scores


def _line(text: str) -> str:
    return " ".join(text.split())
