"""JSONL in and out: errors name the line, writers leave whole lines or nothing."""

from __future__ import annotations

import errno
import gzip
import json
import os

import pytest

from rlgf_cli.artifacts import jsonl
from rlgf_cli.artifacts.check import check
from rlgf_cli.artifacts.jsonl import (
    Appender,
    atomic_text,
    read_examples,
    read_json,
    read_objects,
    read_records,
    write_json,
    write_jsonl,
)
from rlgf_cli.artifacts.records import ExampleRecord, GuideRecord, LabelledRecord
from rlgf_cli.errors import RlgfError, UserError

GOOD = '{"prompt": "a", "references": ["b"]}\n'


@pytest.fixture
def file(tmp_path):
    def write(content: str | bytes, name: str = "x.jsonl"):
        path = tmp_path / name
        data = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write


def fail_writes(monkeypatch, kind: int = errno.ENOSPC):
    """The disk is full from here on: flushed data does not reach it."""

    def full(descriptor: int) -> None:
        raise OSError(kind, os.strerror(kind))

    monkeypatch.setattr(jsonl.os, "fsync", full)


# reading


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_objects_have_their_line_numbers_and_blank_lines_are_passed_over(file, name):
    path = file('{"a": 1}\n\n  \n{"a": 2}', name)
    assert list(read_objects(path)) == [(1, {"a": 1}), (4, {"a": 2})]


@pytest.mark.parametrize("start", [b"\xef\xbb\xbf", b""])
def test_a_byte_order_mark_and_windows_line_ends_are_no_matter(file, start):
    assert list(read_objects(file(start + b'{"a": 1}\r\n{"a": 2}\r\n'))) == [(1, {"a": 1}), (2, {"a": 2})]


def test_a_line_separator_of_unicode_ends_no_line(file):
    path = file(json.dumps({"a": "x\u2028y\x85z"}, ensure_ascii=False) + "\n")
    assert list(read_objects(path)) == [(1, {"a": "x\u2028y\x85z"})]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1', "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b"[1, 2]", "a list, not a JSON object"),
        (b'"text"', "a str, not a JSON object"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": "\\ud83d"}', "surrogate"),
        (b'{"a": "caf\xe9"}', "not UTF-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_line_is_named(file, name, line, message):
    good = b'{"a": 1}\n'
    path = file(good * 3 + line + b"\n" + good * 3, name)
    with pytest.raises(UserError) as caught:
        list(read_objects(path))
    assert caught.value.where == f"{path}:4"
    assert message in caught.value.message


def test_a_whole_surrogate_pair_is_a_character(file):
    assert next(read_objects(file(b'{"a": "\\ud83d\\ude00"}\n'))) == (1, {"a": "\U0001f600"})


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_no_file(tmp_path, kind):
    path = tmp_path if kind == "folder" else tmp_path / "x.jsonl"
    with pytest.raises(UserError) as caught:
        list(read_objects(path))
    assert caught.value.where == str(path)


@pytest.mark.parametrize("damage", ["no gzip", "cut", "flipped"])
def test_a_damaged_gzip_file(tmp_path, damage):
    path = tmp_path / "x.jsonl.gz"
    data = gzip.compress(b"".join(json.dumps({"a": os.urandom(9).hex()}).encode() + b"\n" for _ in range(99)))
    broken = {"no gzip": b'{"a": 1}\n', "cut": data[: len(data) // 2], "flipped": data[:40] + b"\xff" * 40}[damage]
    path.write_bytes(broken)
    with pytest.raises(UserError) as caught:
        list(read_objects(path))
    assert "not a whole gzip file" in caught.value.message
    assert str(path) in (caught.value.where or "")


@pytest.mark.parametrize("tail", [b'{"a": 3', b'{"a": "caf\xc3', b"\x00\x00", b"3"])
def test_a_torn_last_line_is_dropped_where_rlgf_appends(file, tail):
    path = file(b'{"a": 1}\n{"a": 2}\n' + tail)
    assert [value for _, value in read_objects(path, torn_tail=True)] == [{"a": 1}, {"a": 2}]
    with pytest.raises(UserError):
        list(read_objects(path))


def test_a_bad_line_that_ends_is_not_torn(file):
    with pytest.raises(UserError):
        list(read_objects(file(b'{"a": 1}\n{"a": 2\n'), torn_tail=True))
    with pytest.raises(UserError):
        list(read_objects(file(b'{"a": 1\n{"a": 2}\n'), torn_tail=True))


# records


@pytest.mark.parametrize(
    ("line", "field", "message"),
    [
        ('{"references": []}', "prompt", "is missing"),
        ('{"prompt": ""}', "prompt", "is empty"),
        ('{"prompt": " \\n "}', "prompt", "is empty"),
        ('{"prompt": 3}', "prompt", "string"),
        ('{"prompt": "a", "references": "b"}', "references", "list"),
        ('{"prompt": "a", "references": ["b", ""]}', "references.1", "is empty"),
        ('{"prompt": "a", "meta": 1}', "meta", ""),
        ('{"prompt": "a", "id": 1.5}', "id", ""),
    ],
)
def test_a_bad_record_names_the_field_and_the_line(file, line, field, message):
    path = file(GOOD + line + "\n")
    with pytest.raises(UserError) as caught:
        read_examples(path)
    assert caught.value.where == f"{path}:2"
    assert f"{field!r}" in caught.value.message and message in caught.value.message


def test_a_missing_field_shows_what_the_file_has(file):
    with pytest.raises(UserError) as caught:
        read_examples(file('{"article": "a", "summary": "b"}\n'))
    assert "article, summary" in caught.value.hint and "--map" in caught.value.hint


def test_examples_have_ids(file):
    path = file('{"prompt": "a"}\n\n{"prompt": "b", "id": "x"}\n{"prompt": "c", "id": 7}\n')
    assert [example.id for example in read_examples(path)] == ["line-1", "x", "7"]


def test_an_id_twice_is_refused_with_both_lines(file):
    path = file('{"prompt": "a", "id": "x"}\n{"prompt": "b"}\n{"prompt": "c", "id": "x"}\n')
    with pytest.raises(UserError) as caught:
        read_examples(path)
    assert caught.value.where == f"{path}:3" and "line 1" in caught.value.message


def test_limit_stops_before_later_lines_are_read(file):
    assert len(read_examples(file(GOOD * 2 + "broken\n"), limit=2)) == 2


def test_references_can_be_required(file):
    path = file(GOOD + '{"prompt": "a"}\n')
    assert len(read_examples(path)) == 2
    with pytest.raises(UserError) as caught:
        read_examples(path, need_references=True)
    assert caught.value.where == f"{path}:2"


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(file, content):
    with pytest.raises(UserError, match="holds no records"):
        read_examples(file(content))


def test_keys_of_ones_own_are_ignored(file):
    path = file('{"text": "a", "label": 1, "source": "web"}\n{"text": "b", "label": "pos"}\n')
    assert [record.label for record in read_records(path, LabelledRecord)] == [1, "pos"]


# writing


def test_what_is_written_is_read_again(tmp_path):
    records = [ExampleRecord(id="1", prompt="é\n\u2028", references=["b"], meta={"n": [1, None]})]
    path = tmp_path / "deep" / "x.jsonl"
    assert write_jsonl(path, records) == 1
    assert list(read_records(path, ExampleRecord)) == records
    assert path.read_bytes().count(b"\n") == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_json_is_not_written(tmp_path, value):
    path = tmp_path / "x.jsonl"
    with pytest.raises(ValueError, match="JSON"):
        write_jsonl(path, [{"a": 1}, {"a": value}])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("before", [None, "old\n"])
def test_a_full_disk_leaves_the_old_file_or_none(tmp_path, monkeypatch, before):
    path = tmp_path / "x.jsonl"
    if before:
        path.write_text(before)
    fail_writes(monkeypatch)
    for write in (lambda: write_jsonl(path, [{"a": 1}]), lambda: write_json(path, {"a": 1})):
        with pytest.raises(OSError, match="No space") as caught:
            write()
        assert caught.value.filename == str(path)
    assert [child.name for child in tmp_path.iterdir()] == (["x.jsonl"] if before else [])
    assert not before or path.read_text() == before


def test_an_error_inside_the_block_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), atomic_text(tmp_path / "x") as stream:
        stream.write("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_read_json_names_the_line(file):
    with pytest.raises(RlgfError) as caught:
        read_json(file('{\n"a": 1,\n}', "x.json"))
    assert caught.value.where.endswith("x.json:3")


# appending


def lines_of(path):
    return [value for _, value in read_objects(path)]


def test_lines_are_on_disk_at_once(tmp_path):
    path = tmp_path / "deep" / "x.jsonl"
    with Appender(path) as appender:
        appender.write({"a": "é"})
        assert lines_of(path) == [{"a": "é"}]
        appender.write(GuideRecord(prompt="p", completion="c"))
    assert lines_of(path)[1]["completion"] == "c"


@pytest.mark.parametrize("tail", ['{"a": 3', '{"a": "' + "x" * 200_000, '"a"', "3", "\x00"])
def test_a_torn_tail_is_cut_off(file, tail):
    path = file('{"a": 1}\n{"a": 2}\n' + tail)
    with Appender(path) as appender:
        appender.write({"a": 4})
    assert lines_of(path) == [{"a": 1}, {"a": 2}, {"a": 4}]


def test_a_file_that_is_one_torn_line_becomes_empty(file):
    path = file('{"a": 1')
    Appender(path).close()
    assert path.read_bytes() == b""


def test_a_whole_last_line_without_its_end_is_kept_as_readers_keep_it(file):
    path = file('{"a": 1}\n{"a": 2}')
    assert [value for _, value in read_objects(path, torn_tail=True)] == [{"a": 1}, {"a": 2}]
    with Appender(path) as appender:
        appender.write({"a": 3})
    assert lines_of(path) == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_appending_to_whole_lines_changes_nothing_before(file):
    path = file('{"a": 1}\n')
    with Appender(path) as appender:
        appender.write({"a": 2})
    assert path.read_bytes() == b'{"a": 1}\n{"a": 2}\n'


def test_a_line_that_does_not_fit_is_taken_back(tmp_path):
    """A disk that takes part of a line and then no more."""

    class Filling:
        def __init__(self, stream):
            self.stream, self.left = stream, 25

        def write(self, data):
            if not self.left:
                raise OSError(errno.ENOSPC, "No space left on device")
            part = bytes(data[: self.left])
            self.left -= len(part)
            return self.stream.write(part)

        def __getattr__(self, name):
            return getattr(self.stream, name)

    path = tmp_path / "x.jsonl"
    with pytest.raises(OSError, match="No space") as caught, Appender(path) as appender:
        appender._stream = Filling(appender._stream)
        appender.write({"a": "fits"})
        appender.write({"a": "does not fit on this disk"})
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    assert path.read_bytes() == b'{"a": "fits"}\n'


# checking


def test_check_lists_every_bad_line(file):
    path = file(GOOD + "{\n" + GOOD + '{"prompt": ""}\n' + '{"prompt": "a", "id": "x"}\n' * 2)
    found = check(path)
    assert (found.kind, found.records) == ("examples", 3)
    assert [error.where for error in found.errors] == [f"{path}:{n}" for n in (2, 4, 6)]


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (GOOD, "examples"),
        ('{"prompt": "a", "completion": "b"}\n', "guide"),
        ('{"prediction": "a"}\n', "predictions"),
        ('{"text": "a", "label": 1}\n', "labelled"),
        ('{"prompt": "p", "text": "a", "label": 1}\n', "examples"),
    ],
)
def test_check_sees_the_kind_in_the_first_line(file, line, kind):
    assert check(file(line)).kind == kind
    assert check(file(line)).errors == []


@pytest.mark.parametrize("content", ["", "\n"])
def test_check_refuses_an_empty_file(file, content):
    assert [error.message for error in check(file(content)).errors] == ["the file holds no records"]


def test_check_of_a_missing_file(tmp_path):
    assert [error.message for error in check(tmp_path / "x").errors] == ["no such file"]
