"""METEOR, SPICE and CIDEr's tokenizer: programs in other languages, and what happens where they are not or fail."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import toy_examples, write_rows
from rlgf_cli.config.common import PartConfig
from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.protocols import Example
from rlgf_cli.scorers import captions, meteor
from rlgf_cli.scorers.figures import make_metrics
from rlgf_cli.scorers.meteor import MeteorMetric
from rlgf_cli.scorers.spice import SpiceMetric
from rlgf_cli.scorers.weighted_sum import make_reward

EXAMPLES = [Example("a", "p", ("a cat ||| sits", "cats")), Example("bare", "p"), Example("b", "p", ("a dog", " "))]
TEXTS = ["a  cat\nsits", "anything", ""]

METEOR = """
for line in sys.stdin:
    command, *parts = line.rstrip("\\n").split(" ||| ")
    if command == "SCORE":  # counts: the words of the text, and the references
        print(len(parts[-1].split()), len(parts) - 1, flush=True)
    else:
        for part in [*parts, "0 0"]:
            print(int(part.split()[0]) / 4 + int(part.split()[1]) / 100, flush=True)
"""
SPICE = """
pairs = json.load(open(sys.argv[4]))
scores = [{"image_id": p["image_id"], "scores": {"All": {"f": len(p["test"].split()) / 8}}} for p in pairs]
json.dump(scores, open(sys.argv[sys.argv.index("-out") + 1], "w"))
"""


@pytest.fixture
def java(tmp_path, monkeypatch) -> Callable[[str], None]:
    """Puts a program of the given Python text on the PATH as ``java``, and nothing else."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def install(text: str) -> None:
        (folder / "java").write_text(f"#!{sys.executable}\nimport json, os, sys, time\n{text}")
        (folder / "java").chmod(0o755)

    return install


@pytest.fixture
def models(tmp_path, monkeypatch) -> Path:
    """A folder of pycocoevalcap with everything that SPICE looks for."""
    for name in ("spice-1.0.jar", "lib/stanford-corenlp-3.6.0.jar", "lib/stanford-corenlp-3.6.0-models.jar"):
        path = tmp_path / "package" / "spice" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(captions, "folder", lambda scorer: tmp_path / "package")
    return tmp_path / "package" / "spice"


class TestMeteor:
    def test_its_protocol(self, java):
        java(METEOR)
        found = MeteorMetric().compute(EXAMPLES, TEXTS)
        assert found.values["score"] == [pytest.approx(3 / 4 + 0.02), None, pytest.approx(0.01)]
        assert found.whole == {"corpus": 0.0} and found.counts == {"blank_references": 1}
        assert found.signature.startswith("meteor|meteor=1.5,") and "references=max" in found.signature

    @pytest.mark.parametrize(
        ("program", "reason"),
        [
            ("sys.exit('Error: Could not find or load main class')", "Could not find or load main class"),
            ("input(); print('3 3', flush=True); input(); sys.exit('java.lang.OutOfMemoryError')", "OutOfMemory"),
            (METEOR.replace("print(int", "print('x', int"), "could not convert"),
        ],
    )
    def test_a_program_that_fails_is_no_score(self, java, program, reason):
        java(program)
        with pytest.raises(RlgfError, match=reason) as caught:
            MeteorMetric().compute(EXAMPLES, TEXTS)
        assert caught.value.exit_code == 1

    def test_a_program_that_hangs_is_killed(self, java, tmp_path, monkeypatch):
        java(f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)")
        monkeypatch.setattr(meteor, "_LIMIT", 1.0)
        with pytest.raises(RlgfError, match="no answer"):
            MeteorMetric().compute(EXAMPLES, TEXTS)
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)


class TestSpice:
    def test_what_it_is_given_and_what_it_gives(self, java, models):
        java(SPICE)
        found = SpiceMetric().compute(EXAMPLES, TEXTS)
        assert found.values["score"] == [3 / 8, None, 0.0]
        assert found.signature.startswith("spice|spice=1.0,") and found.signature.endswith("n=3")

    @pytest.mark.parametrize(
        ("program", "reason"),
        [
            ("sys.exit('Exception in thread \"main\" java.lang.NoClassDefFoundError: x\\n\\tat y')", "NoClassDefFound"),
            ("", "failed with code 0"),
            (f"{SPICE}\nsys.exit(3)", "failed with code 3"),
            (SPICE.replace("for p in pairs", "for p in pairs[1:]"), "scored 1 of 2"),
            (SPICE.replace('"All"', '"Some"'), "something else than scores: KeyError"),
        ],
    )
    def test_a_program_that_fails_is_no_score(self, java, models, program, reason):
        java(program)
        with pytest.raises(RlgfError, match=reason):
            SpiceMetric().compute(EXAMPLES, TEXTS)

    @pytest.mark.parametrize("name", ["spice-1.0.jar", "lib/stanford-corenlp-3.6.0-models.jar"])
    def test_without_its_models_it_does_not_begin(self, java, models, name):
        java("sys.exit('it began')")
        (models / name).unlink()
        with pytest.raises(UserError, match="CoreNLP") as caught:
            SpiceMetric()
        assert caught.value.where == str(models / name) and "get_stanford_models" in caught.value.hint


class TestJavaWords:
    @pytest.mark.parametrize(
        ("program", "reason"),
        [
            ("sys.exit('Error: Unable to access jarfile')", "0 lines for 2 texts.*Unable to access"),
            ("print('one line')", "1 lines for 2 texts"),
        ],
    )
    def test_a_crash_is_no_empty_text(self, java, program, reason):
        java(program)
        tokenize, _ = captions.tokenizer("cider", "ptb")
        with pytest.raises(RlgfError, match=reason):
            tokenize(["one", "", "two"])

    def test_blank_texts_ask_nothing(self, java):
        java("sys.exit(1)")
        assert captions.tokenizer("cider", "ptb")[0](["", " \n"]) == ["", ""]


def test_treebank_words():
    tokenize, named = captions.tokenizer("cider", "treebank")
    assert tokenize(["The cat sat. It's FUN, isn't it?", "U.S. dogs (two)...", " "]) == [
        "the cat sat it 's fun is n't it",
        "u.s. dogs -lrb- two -rrb-",
        "",
    ]
    assert named.startswith("treebank(rule=1,nltk=")


class TestMissing:
    @pytest.fixture
    def without_the_extra(self, monkeypatch):
        for name in [name for name in sys.modules if name.partition(".")[0] == "pycocoevalcap"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "pycocoevalcap", None)  # how Python marks what cannot be imported

    @pytest.mark.parametrize("name", ["cider", "meteor", "spice"])
    def test_the_extra(self, name, without_the_extra, tmp_path, run_cli):
        data = write_rows(tmp_path / "data.jsonl", toy_examples(3))
        texts = write_rows(tmp_path / "texts.jsonl", [{"id": f"toy-0-{i}", "text": "x"} for i in range(3)])
        arguments = ["eval", "--predictions", texts, "--data", data, "--metrics", name, "-o", tmp_path / "out"]
        result = run_cli(*arguments)
        assert result.exit_code == 2 and "pip install 'rlgf-cli[captions]'" in result.stderr
        assert name in result.stderr and not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "part", ["meteor", "spice", {"name": "cider", "params": {"tokenizer": "ptb"}}], ids=["meteor", "spice", "ptb"]
    )
    def test_java(self, part, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(UserError, match="needs Java"):
            make_metrics([PartConfig(name=part) if isinstance(part, str) else PartConfig(**part)])

    def test_frequencies_of_a_reward(self):
        with pytest.raises(UserError, match="needs a file") as caught:
            make_reward([PartConfig(name="cider")]).check([])
        assert "references: train.jsonl" in caught.value.hint

    @pytest.mark.parametrize(("count", "message"), [(1, "two examples at least"), (0, "holds no records")])
    def test_documents(self, count, message, tmp_path):
        path = write_rows(tmp_path / "train.jsonl", toy_examples(count))
        with pytest.raises(UserError, match=message) as caught:
            make_reward([PartConfig(name="cider", params={"references": str(path)})])
        assert caught.value.where == str(path)
