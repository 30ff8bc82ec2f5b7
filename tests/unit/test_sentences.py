"""The demonstration's data and figures (recipes/sentences)."""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

FOLDER = Path(__file__).parents[2] / "recipes" / "sentences"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"sentences_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


data = load("data")
META = {"concepts": ["dog", "carry", "bread"]}


@pytest.mark.parametrize(
    ("text", "listed", "repeated", "natural"),
    [
        ("The dog carries the bread home.", 0, 0, 1),
        ("A dog carries bread.", 0, 0, 1),  # next to each other, and a sentence
        ("The dog carries it home.", 0, 0, 0),
        ("Dog, carry and bread are words.", 1, 0, 0),
        ("bread dog carry", 1, 0, 0),
        ("The dog carries a dog and bread.", 0, 1, 0),
        ("A dog is carried by dogs with bread.", 0, 1, 0),  # any of its forms
        ("dog dog carry", 0, 1, 0),
        ("dog dog carry bread", 1, 1, 0),
        ("dog carry dog bread", 1, 1, 0),
        ("", 0, 0, 0),
    ],
)
def test_what_is_natural(text: str, listed: int, repeated: int, natural: int) -> None:
    assert data.listed(text, META) == listed
    assert data.repeated(text, META) == repeated
    assert data.plain(text, META) == float(not (listed or repeated))
    assert data.natural(text, META) == natural


@given(st.permutations(META["concepts"]), st.lists(st.sampled_from(["a", "The", "quickly", "and"]), max_size=3))
def test_a_list_is_seen_in_any_order_and_in_any_company(words: list[str], around: list[str]) -> None:
    text = " ".join([*around, *words, *around])
    assert data.listed(text, META) == 1.0 and data.natural(text, META) == 0.0
    apart = " thing ".join(words)
    assert data.listed(apart, META) == 0.0 and data.natural(apart, META) == 1.0


def test_no_word_of_a_held_out_request_is_trained_on(tmp_path: Path) -> None:
    data.main(tmp_path)
    words = {}
    for name, count in data.ROWS.items():
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert len(rows) == count == len({frozenset(row["meta"]["concepts"]) for row in rows})
        assert all(row["prompt"] == data.PROMPT.format(words=", ".join(row["meta"]["concepts"])) for row in rows)
        words[name] = {word for row in rows for word in row["meta"]["concepts"]}
    assert not words["train"] & words["valid"] and not words["train"] & words["test"]
    assert not words["valid"] & words["test"]
    before = (tmp_path / "test.jsonl").read_bytes()
    random.seed(1)
    data.main(tmp_path)
    assert (tmp_path / "test.jsonl").read_bytes() == before


def test_texts_of_the_guide_become_references(tmp_path: Path) -> None:
    rows = [{"id": name, "prompt": f"prompt {name}"} for name in "ab"]
    data.write(tmp_path / "data.jsonl", rows)
    data.write(tmp_path / "guide.jsonl", [{"prompt": "prompt a", "completion": text} for text in ("one", "two")])
    data.with_references(tmp_path / "data.jsonl", tmp_path / "guide.jsonl", tmp_path / "out.jsonl")
    assert [row["references"] for row in data.read(tmp_path / "out.jsonl")] == [["one", "two"], []]


def test_commongens_sets_are_split_and_references_are_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    commongen = load("commongen")
    monkeypatch.setattr(commongen, "TRAIN", 3)

    def pack(name: str, rows: list[dict]) -> None:
        with gzip.open(tmp_path / name, "wt", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)

    sets = [{"id": f"t{i}", "references": [f"ref {i}"], "meta": {"concepts": [f"a{i}", "b"]}} for i in range(6)]
    pack("test.jsonl.gz", sets)
    pack("validation.jsonl.gz", [{**row, "id": f"v{row['id']}"} for row in sets[:2]])
    pack(commongen.GUIDE, [{"id": f"t{i}", "prompt": "a b", "completion": f"text {i}"} for i in range(5)])
    commongen.main(tmp_path, tmp_path / "out")
    files = {path.stem: data.read(path) for path in (tmp_path / "out").rglob("*.jsonl")}
    train, test = files["train"], files["test"]
    assert len(train) == 3 and len(test) == 2 and not {r["id"] for r in train} & {r["id"] for r in test}
    assert all(row["references"] == [] for row in train)  # what people wrote for a test set is never trained on
    assert all(row["references"] == [f"ref {row['id'][1:]}"] for row in test)
    for requests, guide in ((train, files["guide"]), (test, files["guide_test"])):
        assert [(row["id"], row["prompt"]) for row in guide] == [(row["id"], row["prompt"]) for row in requests]
        assert all(row["completion"] == f"text {row['id'][1:]}" for row in guide)
