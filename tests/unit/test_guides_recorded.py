"""The recorded guide: which text belongs to which prompt."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.guides.recorded import RecordedGuide
from rlgf_cli.protocols import Example, Guide, GuideRequest


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps({"model": "m", **row}) + "\n" for row in rows))
    return path


def texts(guide: RecordedGuide, id_: str, prompt: str) -> list[str]:
    return [completion.text for completion in guide.samples(Example(id_, prompt))]


def test_the_id_where_its_prompt_matches_else_the_prompt(tmp_path: Path) -> None:
    guide = RecordedGuide(
        write(
            tmp_path / "g.jsonl",
            {"id": "a", "prompt": "P", "completion": "a's own"},
            {"id": "b", "prompt": "P", "completion": "b's own"},
            {"id": "c", "prompt": "Q", "completion": "of another prompt"},
            {"prompt": "R", "completion": "without id"},
        )
    )
    assert isinstance(guide, Guide)
    assert texts(guide, "a", "P") == ["a's own"]
    assert texts(guide, "b", "P") == ["b's own"]
    assert texts(guide, "new", "P") == ["a's own", "b's own"]
    assert texts(guide, "new", "R") == ["without id"]
    assert guide.counts == {}
    assert guide.unmatched([Example("a", "P")]) == 3
    assert guide.unmatched([Example("a", "P"), Example("new", "P"), Example("new too", "P")]) == 2
    # an id that stands for another prompt is not used, whatever it holds; its prompt may still be found
    assert texts(guide, "c", "S") == []
    assert texts(guide, "a", "Q") == ["of another prompt"]
    assert texts(guide, "a", "Q") == ["of another prompt"]
    assert guide.counts == {"id_mismatch": 2}


def test_empty_texts_are_counted_and_never_handed_out(tmp_path: Path) -> None:
    guide = RecordedGuide(
        write(
            tmp_path / "g.jsonl",
            {"id": "a", "prompt": "P", "completion": "", "sample_index": 0},
            {"id": "a", "prompt": "P", "completion": "text", "sample_index": 1},
            {"id": "b", "prompt": "Q", "completion": " \n"},
        )
    )
    assert guide.counts == {"empty": 2}
    assert texts(guide, "a", "P") == ["text"]
    assert guide.coverage([Example("a", "P"), Example("b", "Q"), Example("c", "R")]) == (1, ["b", "c"])
    with pytest.raises(RlgfError, match="no text for the prompt 'b'"):
        guide.complete([GuideRequest(Example("b", "Q"))])


def test_samples_come_by_index_and_wrap_around(tmp_path: Path) -> None:
    path = write(
        tmp_path / "g.jsonl",
        {"id": "a", "prompt": "P", "completion": "two", "sample_index": 2, "finish_reason": "length"},
        {"id": "a", "prompt": "P", "completion": "zero", "sample_index": 0},
        {"id": "a", "prompt": "P", "completion": "one", "sample_index": 1, "cost_usd": 0.5},
    )
    guide = RecordedGuide(path)
    example = Example("a", "P")
    drawn = guide.complete([GuideRequest(example, sample_index=i) for i in (0, 1, 2, 3, 7)])
    assert [completion.text for completion in drawn] == ["zero", "one", "two", "zero", "one"]
    assert [completion.finish_reason for completion in drawn[:3]] == ["stop", "stop", "length"]
    assert {completion.nano_usd for completion in drawn} == {0}


def test_continuations_are_no_whole_texts(tmp_path: Path) -> None:
    path = write(
        tmp_path / "g.jsonl",
        {"id": "a", "prompt": "P", "prefix": "The dog", "completion": " runs"},
        {"id": "a", "prompt": "P", "completion": "The cat"},
    )
    guide = RecordedGuide(path)
    assert texts(guide, "a", "P") == ["The cat"]
    assert guide.counts == {"with_prefix": 1}
    assert guide.abilities.continues is False and guide.abilities.live is False
    with pytest.raises(UserError, match="prefix"):
        guide.complete([GuideRequest(Example("a", "P"), prefix="The")])


def test_gzip_a_torn_last_line_and_bad_files(tmp_path: Path) -> None:
    row = json.dumps({"prompt": "P", "completion": "naïve", "model": "m"}, ensure_ascii=False)
    packed = tmp_path / "g.jsonl.gz"
    packed.write_bytes(gzip.compress((row + "\n").encode()))
    assert texts(RecordedGuide(packed), "x", "P") == ["naïve"]

    torn = tmp_path / "torn.jsonl"
    half = row.encode()[: row.encode().index("ï".encode()) + 1]  # ends inside a character
    torn.write_bytes((row + "\n").encode() + half)
    assert texts(RecordedGuide(torn), "x", "P") == ["naïve"]

    broken = tmp_path / "broken.jsonl"
    broken.write_bytes(half + b"\n" + (row + "\n").encode())
    with pytest.raises(UserError) as caught:
        RecordedGuide(broken)
    assert caught.value.where == f"{broken}:1"

    with pytest.raises(UserError, match="'completion' is missing") as caught:
        RecordedGuide(write(tmp_path / "field.jsonl", {"prompt": "P"}))
    assert caught.value.where == f"{tmp_path / 'field.jsonl'}:1"

    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no records"):
        RecordedGuide(tmp_path / "empty.jsonl")
