"""What ``rlgf eval`` refuses: exit code 2, a message with the place and a hint, and no output folder."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Result
from rlgf_cli import registry

DATA = [{"id": f"e{i}", "prompt": f"prompt {i}", "references": [f"text {i}"]} for i in range(3)]
TEXTS = [{"id": f"e{i}", "text": f"text {i}"} for i in range(3)]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def evaluate(run_cli: Callable[..., Result], tmp_path: Path) -> Callable[..., Result]:
    """Evaluate predictions (bytes, rows, or a path) against data (the same, or None for no data)."""

    def put(name: str, content: Any) -> Path:
        if isinstance(content, Path):
            return content
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else lines(content))
        return path

    def run(texts: Any = TEXTS, data: Any = DATA, *more: object, suffix: str = ".jsonl") -> Result:
        arguments: list[object] = ["eval", "--predictions", put(f"texts{suffix}", texts), "-o", tmp_path / "out"]
        if data is not None:
            arguments += ["--data", put("data.jsonl", data)]
        return run_cli(*arguments, *more)

    return run


def refused(result: Result, tmp_path: Path, *said: str) -> None:
    assert result.exit_code == 2, result.stderr
    assert result.stdout == "" and not (tmp_path / "out").exists()
    error, hint = (line for line in result.stderr.splitlines() if line.startswith(("error: ", "hint: ")))
    assert len(hint) > len("hint: ") + 5 and "Traceback" not in result.stderr
    for part in said:
        assert part in error, error


FIRST = lines(TEXTS[:1])


@pytest.mark.parametrize(
    ("content", "place", "message"),
    [
        (b"", "", "holds no predictions"),
        (b"\n  \n", "", "holds no predictions"),
        (FIRST + b'{"id": "e1", "text": \n', ":2", "this line is not JSON"),
        (FIRST + b'["e1", "text"]\n', ":2", "holds a list, not a JSON object"),
        (FIRST + b'{"id": "e1", "text": "caf\xe9"}\n', ":2", "not UTF-8 text"),
        (FIRST + b'{"id": "e1", "text": "x", "scores": {"rouge": NaN}}\n', ":2", "NaN is not JSON"),
        (FIRST + b'{"id": "e1", "text": "x", "scores": {"rouge": -Infinity}}\n', ":2", "-Infinity is not JSON"),
        (FIRST + b'{"id": "e1", "text": "x", "scores": {"rouge": 1e999}}\n', ":2", "1e999 is too large"),
        (FIRST + b'{"id": "e1", "text": "x", "scores": {"rouge": "high"}}\n', ":2", "the field 'scores.rouge'"),
        (FIRST + b'{"id": "e1", "answer": "x"}\n', ":2", "no field 'prediction', 'completion' or 'text'"),
        (FIRST + b'{"id": "e1", "text": 3}\n', ":2", "is 3, not a text"),
        (FIRST + b'{"id": "e1", "text": null}\n', ":2", "is None, not a text"),
        (FIRST + b'{"id": "e1", "text": "\\ud800"}\n', ":2", "half of a surrogate pair"),
        (FIRST + b'{"id": ["e1"], "text": "x"}\n', ":2", "the field 'id'"),
        (FIRST + b'{"id": "e1", "text": "x", "references": "one"}\n', ":2", "the field 'references'"),
        (FIRST + b'{"id": "e1", "text": "x", "finish_reason": "tired"}\n', ":2", "the field 'finish_reason'"),
        (FIRST + FIRST, "", "for an example that has one already"),
        (FIRST, "", "2 of 3 examples have no prediction"),
        (lines([*TEXTS, {"id": "e9", "text": "x"}]), "", "1 of 4 predictions belong to no example"),
        (lines([{**TEXTS[0], "prompt": "another"}, *TEXTS[1:]]), "", "another prompt: 'e0' on line 1"),
        (lines([{**TEXTS[0], "prefix": "te"}, *TEXTS[1:]]), ":1", "continues a prefix"),
    ],
)
def test_predictions(evaluate, tmp_path, content, place, message):
    refused(evaluate(content), tmp_path, f"texts.jsonl{place}: ", message)


@pytest.mark.parametrize(
    ("content", "place", "message"),
    [
        (b"", "", "holds no records"),
        (lines(DATA[:1]) + b'{"id": "e1", "prompt": "p"\n', ":2", "this line is not JSON"),
        (lines(DATA[:1]) + b'{"id": "e1", "references": ["x"]}\n', ":2", "the field 'prompt' is missing"),
        (lines(DATA[:1]) + b'{"id": "e1", "prompt": "p", "references": "x"}\n', ":2", "the field 'references'"),
        (lines(DATA[:1]) + b'{"id": "e1", "prompt": "p", "references": [1]}\n', ":2", "the field 'references.0'"),
        (lines([*DATA, DATA[0]]), ":4", "the id 'e0' is here twice (first on line 1)"),
        (lines(DATA[:1]) + b'{"id": "e1", "prompt": "\xff"}\n', ":2", "not UTF-8 text"),
    ],
)
def test_data(evaluate, tmp_path, content, place, message):
    refused(evaluate(TEXTS, content), tmp_path, f"data.jsonl{place}: ", message)


def test_files_that_are_no_files(evaluate, tmp_path):
    packed = gzip.compress(lines(TEXTS) * 200)
    for content, message in ((packed[: len(packed) // 2], "not a whole gzip"), (lines(TEXTS), "not a whole gzip")):
        refused(evaluate(content, None, suffix=".jsonl.gz"), tmp_path, "texts.jsonl.gz:", message)
    (tmp_path / "folder").mkdir()
    refused(evaluate(tmp_path / "folder"), tmp_path, "folder: ", "it is a folder")
    refused(evaluate(tmp_path / "none.jsonl"), tmp_path, "none.jsonl: ", "no such file")
    refused(evaluate(TEXTS, tmp_path / "none.jsonl"), tmp_path, "none.jsonl: ", "no such file")
    whole = evaluate(gzip.compress(lines(TEXTS)), DATA, suffix=".jsonl.gz")
    assert whole.exit_code == 0, whole.stderr


def test_predictions_alone_with_an_id_twice(evaluate, tmp_path):
    refused(evaluate([*TEXTS, TEXTS[1]], None), tmp_path, "texts.jsonl:4: ", "'e1' is here twice (first on line 2)")


@pytest.mark.parametrize("metric", ["rouge", "bertscore:none", "judge:openai:m", "reward:rouge"])
def test_no_references_for_a_metric_that_needs_them(evaluate, tmp_path, metric, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-0123456789abcdef")
    said = "bertscore" if metric.startswith("bert") else "needs references"  # which looks at its model first
    refused(evaluate(TEXTS, [{**row, "references": []} for row in DATA], "--metrics", metric), tmp_path, said)


def test_no_concepts_for_coverage(evaluate, tmp_path):
    rows = [{**row, "prompt": "..."} for row in DATA]
    refused(evaluate(TEXTS, rows, "--metrics", "coverage"), tmp_path, "'coverage' needs concepts")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "rouge", "params": {"stemmr": True}}, "unknown parameter 'stemmr'"),
        ({"name": "rouge", "params": {"stemmer": "perhaps"}}, "the parameter 'stemmer'"),
        ({"name": "length", "params": {"max": 3}}, "unknown parameter 'max'"),
        ({"name": "reward:length", "params": {"max_word": 3}}, "unknown parameter 'max_word'"),
        ({"name": "rouge", "parms": {}}, "unknown config key 'metrics.0.parms'"),
        ({"name": "perplexity"}, "'perplexity' needs a checkpoint"),
        ({"name": "perplexity:./none"}, "no such checkpoint folder"),
        ({"name": "judge:gpt-4p"}, "unknown guide 'gpt-4p'"),
    ],
)
def test_parameters_of_metrics(evaluate, tmp_path, spec, message):
    result = evaluate(TEXTS, DATA, "--set", f"metrics={json.dumps([spec])}")
    assert result.exit_code == 2 and message in result.stderr, result.stderr
    assert result.stdout == "" and not (tmp_path / "out").exists()


class TestAMissingPackage:
    CLASS = (
        "from rlgf_cli.protocols import Metric, MetricResult\n"
        "class Odd(Metric):\n"
        "    name = 'odd'\n"
        "    def __init__(self, target=None): {at_init}\n"
        "    def compute(self, examples, texts): {at_compute}\n"
    )

    @pytest.fixture
    def odd(self, tmp_path, monkeypatch) -> Callable[..., None]:
        def make(head: str = "", at_init: str = "pass", at_compute: str = "pass", needs: str = "") -> None:
            code = self.CLASS.format(at_init=at_init, at_compute=at_compute)
            (tmp_path / "odd_metric.py").write_text(f"{head}\n{code}")
            monkeypatch.syspath_prepend(tmp_path)
            monkeypatch.delitem(sys.modules, "odd_metric", raising=False)
            entry = registry.Entry("odd_metric:Odd", "odd")
            monkeypatch.setitem(registry.BUILTIN["metrics"], "odd", entry)
            monkeypatch.setattr(registry.metadata, "requires", lambda name: [needs])

        return make

    @pytest.mark.parametrize("when", ["head", "at_init", "at_compute"])
    def test_is_a_letter_with_the_extra(self, evaluate, odd, tmp_path, when):
        odd(**{when: "import surely_not_there.part"}, needs='surely-not-there>=1.2; extra == "captions"')
        result = evaluate(TEXTS, DATA, "--metrics", "rouge,odd")
        refused(result, tmp_path, "the metric 'odd' needs the package 'surely_not_there'")
        assert "hint: pip install 'rlgf-cli[captions]'" in result.stderr

    def test_that_no_extra_has_is_named_alone(self, evaluate, odd, tmp_path):
        odd("import surely_not_there", needs='surely-not-there; extra == "test"')
        assert "hint: pip install surely_not_there\n" in evaluate(TEXTS, DATA, "--metrics", "odd").stderr

    def test_a_defect_of_our_own_is_none(self, evaluate, odd, tmp_path):
        odd("from rlgf_cli.protocols import Nonsense")
        result = evaluate(TEXTS, DATA, "--metrics", "odd")
        assert result.exit_code == 1 and "does not expect this error" in result.stderr


def test_texts_of_nothing_but_white_space_are_scored_and_counted(evaluate, tmp_path):
    rows = [{**row, "text": white} for row, white in zip(TEXTS, ("", " \t", "\n\n"), strict=True)]
    result = evaluate(rows, DATA, "--metrics", "rouge,length")
    assert result.exit_code == 0, result.stderr
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["counts"]["empty"] == 3
    assert scores["metrics"]["rouge.rougeL"]["value"] == 0.0 == scores["metrics"]["length.words"]["value"]


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')", "'high'", "None"])
@pytest.mark.parametrize("prefix", ["", "reward:"])
def test_a_function_that_gives_no_number_leaves_nothing_half_written(evaluate, tmp_path, value, prefix):
    function = tmp_path / "mine.py"
    function.write_text(f"def f(text): return 1.0 if text != 'text 1' else {value}")
    result = evaluate(TEXTS, DATA, "--metrics", f"rouge,{prefix}{function}:f")
    assert result.exit_code == 1 and "example 'e1'" in result.stderr and result.stdout == ""
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"run.json", "config.resolved.json"}
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "failed"
