"""``rlgf prepare``: from files of every kind and from the hub to checked JSONL splits."""

from __future__ import annotations

import csv
import errno
import gzip
import json
import os
from pathlib import Path

import pytest

from rlgf_cli.artifacts import jsonl

ROWS = [
    {"guid": "a1", "article": "First text.", "highlights": "One.", "label": "x"},
    {"guid": "a2", "article": "Second, text.", "highlights": "Two.", "label": "y"},
    {"guid": "a3", "article": 'Third\n"text".', "highlights": "Three.", "label": "x"},
]
MAP = "prompt=article,references=highlights,id=guid,meta.label=label"
EXPECTED = [
    {"id": r["guid"], "prompt": r["article"], "references": [r["highlights"]], "meta": {"label": r["label"]}}
    for r in ROWS
]


def write(path: Path, rows: list[dict]) -> Path:
    """Rows in the format that the file's name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".jsonl":
        path.write_text(lines, encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def examples(count: int, start: int = 0) -> list[dict]:
    return [{"id": f"e{n}", "prompt": f"prompt {n}", "references": [f"text {n}"]} for n in range(start, start + count)]


@pytest.fixture
def prepare(run_cli, tmp_path, monkeypatch):
    """``rlgf prepare ... -o out --json`` in a folder of its own; gives the printed counts."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object):
        shown = run_cli("prepare", *arguments, "-o", "out", "--json")
        assert shown.exit_code == 0, shown.stderr
        return json.loads(shown.stdout)

    return run


@pytest.fixture
def refused(run_cli, tmp_path, monkeypatch):
    """The error of a ``rlgf prepare`` that must stop with exit code 2 and leave nothing."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        shown = run_cli("prepare", *arguments, "-o", "out")
        assert shown.exit_code == 2, shown
        assert sorted(tmp_path.rglob("*")) == before
        return shown.stderr

    return run


# files of every kind


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json", "x.csv", "x.tsv", "x.parquet"])
def test_every_kind_of_file_gives_the_same_examples(prepare, tmp_path, name):
    write(tmp_path / name, ROWS)
    printed = prepare("--dataset", name, "--map", MAP)
    assert read(tmp_path / "out" / "train.jsonl") == EXPECTED
    assert printed["splits"] == {"train": {"examples": 3, "references": 3, "rows": 3}}


@pytest.mark.parametrize("text", [json.dumps({"version": 1, "data": ROWS}), "\n".join(map(json.dumps, ROWS))])
def test_json_files_may_hold_an_object_around_the_list_or_lines(prepare, tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    prepare("--dataset", "x.json", "--map", MAP)
    assert read(tmp_path / "out" / "train.jsonl") == EXPECTED


def test_files_in_the_projects_own_format_need_no_mapping(prepare, tmp_path):
    rows = [{"id": "1", "prompt": "p", "references": ["a", "b"], "meta": {"k": [1]}}]
    write(tmp_path / "x.jsonl", rows)
    prepare("--dataset", "x.jsonl")
    assert read(tmp_path / "out" / "train.jsonl") == rows


def test_a_folder_of_splits(prepare, tmp_path):
    write(tmp_path / "data" / "test.csv", ROWS[:1])
    write(tmp_path / "data" / "dev.jsonl", ROWS[1:2])
    write(tmp_path / "data" / "train-00000-of-00002.parquet", ROWS[2:])
    write(tmp_path / "data" / "train-00001-of-00002.parquet", [{**ROWS[0], "article": "Other.", "guid": "b"}])
    (tmp_path / "data" / "README.md").write_text("not data")
    printed = prepare("--dataset", "data", "--map", MAP)
    assert {name: counts["examples"] for name, counts in printed["splits"].items()} == {
        "train": 2, "validation": 1, "test": 1,
    }  # fmt: skip
    assert read(tmp_path / "out" / "validation.jsonl") == EXPECTED[1:2]


def test_named_splits(prepare, tmp_path):
    write(tmp_path / "a.jsonl", ROWS[:2])
    write(tmp_path / "b.csv", ROWS[2:])
    prepare("--splits", "train=a.jsonl,test=b.csv", "--map", MAP)
    assert read(tmp_path / "out" / "train.jsonl") == EXPECTED[:2]
    assert read(tmp_path / "out" / "test.jsonl") == EXPECTED[2:]


def test_named_splits_in_a_folder(prepare, tmp_path):
    write(tmp_path / "data" / "a.jsonl", ROWS)
    assert prepare("--dataset", "data", "--splits", "test=a.jsonl", "--map", MAP)["splits"]["test"]["examples"] == 3


# the mapping


def first(tmp_path: Path) -> dict:
    return read(tmp_path / "out" / "train.jsonl")[0]


def test_a_template_over_several_columns(prepare, tmp_path):
    write(tmp_path / "x.jsonl", [{"title": "T", "post": "a, b", "n": 3, "s": "short"}])
    prepare("--dataset", "x.jsonl", "--map", "prompt={title}: {post}, {n}\\nTL;DR,references=s,id=post-{n}")
    assert first(tmp_path) == {"id": "post-3", "prompt": "T: a, b, 3\nTL;DR", "references": ["short"], "meta": {}}


def test_several_columns_and_lists_become_references(prepare, tmp_path):
    write(tmp_path / "x.jsonl", [{"q": "Q", "a": ["1", "2"], "b": "3", "c": None, "d": "1"}])
    prepare("--dataset", "x.jsonl", "--map", "prompt=q,references=a,references=b", "--map", "references=c,references=d")
    assert first(tmp_path)["references"] == ["1", "2", "3"]


def test_nested_columns(prepare, tmp_path):
    write(tmp_path / "x.jsonl", [{"q": {"text": "Q"}, "a": {"b": {"c": ["A"]}}}])
    prepare("--dataset", "x.jsonl", "--map", "prompt=q.text,references=a.b.c,meta.raw=q")
    assert first(tmp_path) == {"id": "train-0", "prompt": "Q", "references": ["A"], "meta": {"raw": {"text": "Q"}}}


def test_the_words_of_a_list_make_a_prompt(prepare, tmp_path):
    write(tmp_path / "x.jsonl", [{"words": ["dog", "run"], "text": "A dog runs."}])
    prepare("--dataset", "x.jsonl", "--map", "prompt=words,references=text,meta.concepts=words")
    assert (first(tmp_path)["prompt"], first(tmp_path)["meta"]) == ("dog run", {"concepts": ["dog", "run"]})


def test_a_recipe_gives_the_mapping_and_flags_win(prepare, tmp_path):
    write(tmp_path / "x.csv", ROWS)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "dataset: x.csv\nmap:\n  prompt: '{article}!'\n  references: highlights\n  id: label\n  meta: {who: guid}\n"
    )
    prepare("--config", recipe, "--map", "id=guid", "--set", "map.prompt=article")
    assert read(tmp_path / "out" / "train.jsonl")[1] == {
        "id": "a2", "prompt": "Second, text.", "references": ["Two."], "meta": {"who": "a2"},
    }  # fmt: skip
    origins = json.loads((tmp_path / "out" / "config.resolved.json").read_text())["origins"]
    assert origins["map.references"] == f"{recipe}:4"
    assert origins["map.id"] == "flag" and origins["map.prompt"] == "--set map.prompt=article"


def test_rows_with_equal_values_become_one_example(prepare, tmp_path):
    rows = [{"g": g, "p": f"p{g}", "r": r} for g, r in [(1, "a"), (2, "b"), (1, "c"), (1, "a")]]
    write(tmp_path / "x.jsonl", rows)
    printed = prepare("--dataset", "x.jsonl", "--map", "prompt=p,references=r", "--group-by", "g")
    assert [(e["prompt"], e["references"]) for e in read(tmp_path / "out" / "train.jsonl")] == [
        ("p1", ["a", "c"]),
        ("p2", ["b"]),
    ]
    assert printed["splits"]["train"] == {"examples": 2, "references": 3, "rows": 4, "duplicates": 1}


def test_a_group_with_two_prompts_is_refused(refused, tmp_path):
    write(
        tmp_path / "x.jsonl", [{"g": 1, "prompt": "p", "references": ["a"]}, {"g": 1, "prompt": "q", "references": "b"}]
    )
    error = refused("--dataset", "x.jsonl", "--group-by", "g")
    assert "x.jsonl:2: its group has another prompt at x.jsonl:1" in error


# splits, sizes, duplicates, leaks


def test_fractions_depend_on_seed_and_prompt_alone(prepare, tmp_path, run_cli):
    write(tmp_path / "x.jsonl", examples(400))
    arguments = ["--split-from", "train", "--fractions", "validation=0.1,test=0.2"]
    counts = {name: c["examples"] for name, c in prepare("--dataset", "x.jsonl", *arguments)["splits"].items()}
    assert sum(counts.values()) == 400
    assert 20 <= counts["validation"] <= 60 and 50 <= counts["test"] <= 110
    before = {e["prompt"]: name for name in counts for e in read(tmp_path / "out" / f"{name}.jsonl")}
    assert len(before) == 400
    # more rows, in another order and with other ids: every prompt stays where it was
    write(tmp_path / "x.jsonl", [{**row, "id": f"new-{row['id']}"} for row in reversed(examples(500))])
    prepare("--dataset", "x.jsonl", *arguments, "--overwrite")
    after = {e["prompt"]: name for name in counts for e in read(tmp_path / "out" / f"{name}.jsonl")}
    assert {prompt: after[prompt] for prompt in before} == before
    prepare("--dataset", "x.jsonl", *arguments, "--overwrite", "--seed", "1")
    other = {e["prompt"]: name for name in counts for e in read(tmp_path / "out" / f"{name}.jsonl")}
    assert other != after


def test_equal_prompts_fall_to_one_split(prepare, tmp_path):
    rows = [{"prompt": f"p{n % 50}", "references": [f"r{n}"]} for n in range(300)]
    write(tmp_path / "x.jsonl", rows)
    printed = prepare("--dataset", "x.jsonl", "--split-from", "train", "--fractions", "test=0.3")
    assert printed["shared_prompts"] == {}
    assert printed["splits"]["test"]["examples"] % 6 == 0


def test_the_same_prompt_in_two_splits_is_counted_and_warned_of(prepare, run_cli, tmp_path):
    write(tmp_path / "d" / "train.jsonl", examples(5))
    write(tmp_path / "d" / "test.jsonl", examples(5, start=3))
    assert prepare("--dataset", "d")["shared_prompts"] == {"train and test": 2}
    shown = run_cli("prepare", "--dataset", "d", "-o", "out", "--overwrite")
    assert "warning: train and test share 2 of their prompts" in shown.stderr


def test_duplicates_are_dropped_and_counted(prepare, tmp_path):
    rows = [{"prompt": "a", "references": ["x"]}, {"prompt": "a", "references": ["y"]}] * 2
    write(tmp_path / "x.jsonl", rows)
    assert prepare("--dataset", "x.jsonl")["splits"]["train"] == {
        "examples": 2, "references": 2, "rows": 4, "duplicates": 2,
    }  # fmt: skip
    assert [e["id"] for e in read(tmp_path / "out" / "train.jsonl")] == ["train-0", "train-1"]


def test_limit_and_sample(prepare, tmp_path):
    write(tmp_path / "x.jsonl", examples(100))

    def ids(*arguments: object) -> list[str]:
        prepare("--dataset", "x.jsonl", "--overwrite", *arguments)
        return [e["id"] for e in read(tmp_path / "out" / "train.jsonl")]

    assert ids("--limit", 3) == ["e0", "e1", "e2"]
    drawn = ids("--sample", 10)
    assert (
        len(drawn) == 10 and drawn == sorted(drawn, key=lambda i: int(i[1:])) and drawn != [f"e{n}" for n in range(10)]
    )
    assert ids("--sample", 10) == drawn
    assert set(ids("--sample", 20)) > set(drawn)
    assert ids("--sample", 10, "--seed", 1) != drawn


# bad input: exit code 2, the place, nothing left


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "p", "references": ["x"]', "not JSON"),
        ('{"prompt": "", "references": ["x"]}', "the prompt is empty"),
        ('{"prompt": " ", "references": ["x"]}', "the prompt is empty"),
        ('{"prompt": null, "references": ["x"]}', "the prompt is empty"),
        ('{"prompt": 5, "references": ["x"]}', "is not a text, but int"),
        ('{"prompt": "p", "references": []}', "no reference that is not empty"),
        ('{"prompt": "p", "references": ["", " "]}', "no reference that is not empty"),
        ('{"prompt": "p", "references": [1]}', "is not a text, but int"),
        ('{"prompt": "p"}', "there is no column 'references'"),
        ('{"prompt": "p", "references": ["x"], "id": "e1"}', "the id 'e1' is here twice (first: x.jsonl:2)"),
        ('{"prompt": "p", "references": ["x"], "id": [1]}', "the id is not a text or a whole number, but list"),
        ("[1]", "a list, not a JSON object"),
        ('{"prompt": "p", "references": ["\\ud800"]}', "surrogate"),
    ],
)
def test_a_bad_row_is_named_or_dropped_and_counted(refused, prepare, tmp_path, line, message):
    good = [json.dumps(row) for row in examples(4)]
    (tmp_path / "x.jsonl").write_text("\n".join([*good[:3], line, good[3]]) + "\n")
    error = refused("--dataset", "x.jsonl")
    assert f"error: x.jsonl:4: {message}" in error or ("x.jsonl:4: " in error and message in error)
    counts = prepare("--dataset", "x.jsonl", "--drop-bad")["splits"]["train"]
    assert counts == {"examples": 4, "references": 4, "rows": 5, "bad": 1}


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        ("prompt,references\na,b\nc\n", "x.csv:3", "1 cells, but the header names 2"),
        ('prompt,references\n"a\nb",c\n"d\ne",f,g\n', "x.csv:4", "3 cells"),
        ('prompt,references\na,"b\n', "x.csv:2", "not CSV"),
        ("prompt,prompt\na,b\n", "x.csv:1", "twice"),
        ("prompt,references\n,b\n", "x.csv:2", "the prompt is empty"),
        ("", "", "holds no examples"),
        ("prompt,references\n", "", "holds no examples"),
    ],
)
def test_bad_csv(refused, tmp_path, text, where, message):
    (tmp_path / "x.csv").write_text(text)
    error = refused("--dataset", "x.csv")
    assert where in error and message in error


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.parquet", b"no parquet", "not a parquet file"),
        ("x.json", b"[1, 2", "x.json:1: not JSON"),
        ("x.json", b'[{"prompt": "p", "references": ["r"]}, 2]', "x.json: record 2: not an object, but int"),
        ("x.csv", b"prompt,references\n\xff,b\n", "not UTF-8"),
        ("x.jsonl", b"", "the split 'train' holds no examples"),
        ("x.jsonl.gz", b"no gzip", "not a whole gzip file"),
        ("x.txt", b"text", "unknown kind: '.txt'"),
    ],
)
def test_files_that_are_not_what_they_should_be(refused, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert message in refused("--dataset", f"./{name}")


def test_when_every_row_is_bad_the_first_reason_is_given(refused, tmp_path):
    write(tmp_path / "x.jsonl", [{"title": "t"}] * 3)
    error = refused("--dataset", "x.jsonl", "--drop-bad")
    assert "x.jsonl:1: there is no column 'prompt'" in error and "--map" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to prepare"),
        (["--dataset", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--dataset", "empty"], "no train, validation or test file"),
        (["--dataset", "twice"], "several files for the split 'train'"),
        (["--dataset", "x.jsonl", "--splits", "train=x.jsonl"], "and this is none"),
        (["--task", "common_gen"], "did you mean 'commongen'?"),
        (["--dataset", "x.jsonl", "--map", "promt=a"], "did you mean 'prompt'?"),
        (["--dataset", "x.jsonl", "--map", "prompt"], "is not KEY=COLUMN"),
        (["--dataset", "x.jsonl", "--map", "meta=a"], "meta.KEY=COLUMN"),
        (["--dataset", "x.jsonl", "--map", "prompt=promt"], "did you mean 'prompt'?"),
        (["--dataset", "x.jsonl", "--splits", "train"], "is not NAME=VALUE"),
        (["--dataset", "x.jsonl", "--revision", "main"], "revision is for datasets of the hub"),
        (["--dataset", "x.jsonl", "--limit", "1", "--sample", "1"], "give one of them"),
        (["--dataset", "x.jsonl", "--limit", "0"], "limit"),
        (["--dataset", "x.jsonl", "--sample", "9"], "has 4 examples: 9 cannot be drawn"),
        (["--dataset", "x.jsonl", "--split-from", "train"], "split_from and fractions go together"),
        (["--dataset", "x.jsonl", "--fractions", "test=0.5"], "split_from and fractions go together"),
        (["--dataset", "x.jsonl", "--split-from", "tain", "--fractions", "test=0.5"], "did you mean 'train'?"),
        (["--dataset", "x.jsonl", "--split-from", "train", "--fractions", "train=0.5"], "there already"),
        (["--dataset", "x.jsonl", "--split-from", "train", "--fractions", "a=0.5,b=0.5"], "leave nothing"),
        (["--dataset", "x.jsonl", "--split-from", "train", "--fractions", "test=0.001"], "no example fell"),
        (["--dataset", "x.jsonl", "--split-from", "train", "--fractions", "../x=0.5"], "cannot name a split"),
        (["x.jsonl"], "a file without a flag"),
        (["--check"], "--check needs files"),
        (["--check", "x.jsonl", "--kind", "exampels"], "did you mean 'examples'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_done_is_said(refused, tmp_path, arguments, message):
    write(tmp_path / "x.jsonl", examples(4))
    (tmp_path / "empty").mkdir()
    write(tmp_path / "twice" / "train.jsonl", examples(1))
    write(tmp_path / "twice" / "train.csv", ROWS)
    assert message in refused(*arguments)


def test_prompts_without_references_can_be_kept(prepare, tmp_path):
    write(tmp_path / "x.jsonl", [{"prompt": "a"}, {"prompt": "b", "references": [""]}])
    prepare("--dataset", "x.jsonl", "--allow-no-references")
    assert [e["references"] for e in read(tmp_path / "out" / "train.jsonl")] == [[], []]


# the run folder


def test_the_folder_is_a_run(prepare, tmp_path, run_cli):
    write(tmp_path / "x.jsonl", examples(4))
    printed = prepare("--dataset", "x.jsonl", "--seed", 5)
    data = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (data["command"], data["status"], data["seed"], data["result"]) == ("prepare", "done", 5, printed)
    assert [parent["path"] for parent in data["parents"]] == ["x.jsonl"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.resolved.json", "run.json", "train.jsonl"]
    shown = run_cli("prepare", "--dataset", "x.jsonl", "-o", "out")
    assert shown.exit_code == 2
    assert "already holds a run" in shown.stderr and "--overwrite" in shown.stderr and "--resume" not in shown.stderr


def test_overwrite_leaves_other_files(prepare, tmp_path):
    write(tmp_path / "d" / "train.jsonl", examples(4))
    write(tmp_path / "d" / "test.jsonl", examples(4, start=9))
    prepare("--dataset", "d")
    (tmp_path / "out" / "notes.md").write_text("mine")
    prepare("--dataset", "d/train.jsonl", "--overwrite")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.resolved.json", "notes.md", "run.json", "train.jsonl",
    ]  # fmt: skip


def test_without_json_the_result_is_the_folder(run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.jsonl", examples(4))
    shown = run_cli("prepare", "--dataset", "x.jsonl", "-o", "out")
    assert shown.stdout == "out\n"
    assert "| train |" in shown.stderr


def test_a_full_disk(run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.jsonl", examples(4))
    synced = []

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(jsonl.os, "fsync", full)
    shown = run_cli("prepare", "--dataset", "x.jsonl", "-o", "out")
    assert (shown.exit_code, shown.stdout) == (2, "")
    assert "out/train.jsonl: no space left on the disk" in shown.stderr
    assert not (tmp_path / "out").exists()


def test_what_is_written_passes_the_check(prepare, run_cli, tmp_path):
    write(tmp_path / "x.csv", ROWS)
    prepare("--dataset", "x.csv", "--map", MAP)
    shown = run_cli("prepare", "--check", "out/train.jsonl")
    assert (shown.exit_code, shown.stdout) == (0, "out/train.jsonl: examples, 3 good, 0 bad\n")


# --check


def test_check_lists_bad_lines_up_to_twenty(run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "good.jsonl", examples(2))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "p"}\n' + "{\n" * 24)
    shown = run_cli("prepare", "--check", "good.jsonl", "bad.jsonl")
    assert shown.exit_code == 2
    assert shown.stdout == "good.jsonl: examples, 2 good, 0 bad\nbad.jsonl: examples, 1 good, 24 bad\n"
    assert [f"bad.jsonl:{n}:" in shown.stderr for n in (2, 21, 22)] == [True, True, False]
    assert "... and 4 more" in shown.stderr and "error: 24 bad lines" in shown.stderr


def test_check_of_a_kind(run_cli, tmp_path):
    path = write(tmp_path / "x.jsonl", examples(2))
    shown = run_cli("prepare", "--check", path, "--kind", "guide")
    assert shown.exit_code == 2 and "the field 'completion' is missing" in shown.stderr


# the tasks, on files of the hub's format


def test_commongen(prepare, tmp_path):
    rows = [
        {"concept_set_idx": 0, "concepts": ["ski", "mountain"], "target": "Skiing down."},
        {"concept_set_idx": 0, "concepts": ["ski", "mountain"], "target": "A man skis."},
        {"concept_set_idx": 1, "concepts": ["dog", "run"], "target": "A dog runs."},
    ]
    write(tmp_path / "d" / "train.parquet", rows)
    write(tmp_path / "d" / "test.jsonl", [{"concept_set_idx": 0, "concepts": ["cat"], "target": ""}])
    prepare("--task", "commongen", "--dataset", "d")
    assert read(tmp_path / "out" / "train.jsonl") == [
        {
            "id": "commongen-train-0", "prompt": "ski mountain", "references": ["Skiing down.", "A man skis."],
            "meta": {"concepts": ["ski", "mountain"]},
        },
        {
            "id": "commongen-train-2", "prompt": "dog run", "references": ["A dog runs."],
            "meta": {"concepts": ["dog", "run"]},
        },
    ]  # fmt: skip
    assert read(tmp_path / "out" / "test.jsonl")[0]["references"] == []


def test_commongen_without_targets_in_training_is_refused(refused, tmp_path):
    write(tmp_path / "train.jsonl", [{"concept_set_idx": 0, "concepts": ["cat"], "target": ""}])
    assert "train.jsonl:1: no reference" in refused("--task", "commongen", "--dataset", "train.jsonl")


def test_imdb(prepare, tmp_path):
    review = " A  fine\tfilm<br /><br />" + " ".join(f"w{n}" for n in range(100))
    short = "Too short to be cut."
    rows = [{"text": review, "label": 1}, {"text": short, "label": 0}, {"text": " ".join(["w"] * 64), "label": 0}]
    write(tmp_path / "train.jsonl", rows)
    counts = prepare("--task", "imdb", "--dataset", "train.jsonl")["splits"]["train"]
    assert counts == {"examples": 1, "references": 1, "rows": 3, "skipped": 2}
    (made,) = read(tmp_path / "out" / "train.jsonl")
    assert made["prompt"] + made["references"][0] == review
    assert len(made["prompt"].split()) == 64 and made["meta"] == {"label": 1}


def test_imdb_with_short_reviews_alone(refused, tmp_path):
    write(tmp_path / "train.jsonl", [{"text": "Short.", "label": 1}])
    error = refused("--task", "imdb", "--dataset", "train.jsonl")
    assert "holds no examples" in error and "reviews that end within 64 words" in error


@pytest.mark.parametrize("column", ["completion", "label"])
@pytest.mark.parametrize("end", ["\n\nTL;DR:", "\nTL;DR: ", ""])
def test_tldr(prepare, tmp_path, column, end):
    post = "SUBREDDIT: r/x\n\nTITLE: TL;DR: why\n\nPOST: Because."
    write(tmp_path / "train.jsonl", [{"prompt": post + end, column: " Why not. "}])
    prepare("--task", "tldr", "--dataset", "train.jsonl")
    assert read(tmp_path / "out" / "train.jsonl") == [
        {"id": "tldr-train-0", "prompt": post, "references": ["Why not."], "meta": {}}
    ]


@pytest.mark.parametrize("task", ["commongen", "imdb", "tldr"])
def test_a_task_takes_files_that_are_prepared_already(prepare, tmp_path, task):
    rows = [{"id": "1", "prompt": "p", "references": ["r"], "meta": {"concepts": ["p"]}}]
    write(tmp_path / "train.jsonl", rows)
    prepare("--task", task, "--dataset", "train.jsonl")
    assert read(tmp_path / "out" / "train.jsonl") == rows


def test_a_task_on_a_file_of_something_else_names_the_column(refused, tmp_path):
    write(tmp_path / "train.jsonl", [{"texts": "a"}])
    assert "train.jsonl:1: there is no column 'text'" in refused("--task", "imdb", "--dataset", "train.jsonl")


@pytest.mark.realdata
@pytest.mark.skipif("RLGF_REAL_DATA" not in os.environ, reason="RLGF_REAL_DATA is not set")
@pytest.mark.parametrize(("task", "train"), [("commongen", 27_000), ("imdb", 8_000)])
def test_tasks_on_real_data(prepare, tmp_path, task, train):
    printed = prepare("--task", task, "--dataset", Path(os.environ["RLGF_REAL_DATA"]) / task)
    assert set(printed["splits"]) == {"train", "validation", "test"}
    assert printed["splits"]["train"]["examples"] >= train


# the hub


@pytest.fixture
def hub(monkeypatch):
    """A hub that holds what the test puts there, or raises it."""
    import datasets

    held: dict[str, object] = {}
    asked: list[tuple] = []

    def load_dataset(name, config=None, *, revision=None):
        asked.append((name, config, revision))
        found = held[name]
        if isinstance(found, Exception):
            raise found
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in found.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    held["asked"] = asked
    return held


def test_a_hub_dataset(prepare, hub, tmp_path):
    hub["org/news"] = {"train": ROWS[:2], "valid": ROWS[2:], "extra": ROWS}
    prepare("--dataset", "org/news", "--subset", "3.0.0", "--revision", "abc", "--map", MAP)
    assert hub["asked"] == [("org/news", "3.0.0", "abc")]
    assert read(tmp_path / "out" / "train.jsonl") == EXPECTED[:2]
    assert read(tmp_path / "out" / "validation.jsonl") == EXPECTED[2:]
    assert not (tmp_path / "out" / "extra.jsonl").exists()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["parents"] == []


def test_splits_of_the_hub_are_named(prepare, hub, tmp_path):
    hub["org/news"] = {"train": ROWS[:2], "extra": ROWS[2:]}
    prepare("--dataset", "org/news", "--splits", "test=extra", "--map", MAP)
    assert read(tmp_path / "out" / "test.jsonl") == EXPECTED[2:]
    assert not (tmp_path / "out" / "train.jsonl").exists()


def test_a_task_knows_its_dataset_and_splits(prepare, hub, tmp_path):
    review = {"text": " ".join(f"w{n}" for n in range(80)), "label": 1}
    hub["stanfordnlp/imdb"] = {"train": [review], "test": [review], "unsupervised": [review]}
    assert set(prepare("--task", "imdb")["splits"]) == {"train", "test"}


def test_a_bad_row_of_the_hub_has_its_place(refused, hub):
    hub["org/news"] = {"train": [*ROWS, {**ROWS[0], "article": ""}]}
    assert "org/news[train]: row 3: the prompt is empty" in refused("--dataset", "org/news", "--map", MAP)


def test_a_split_that_the_hub_does_not_have(refused, hub):
    hub["org/news"] = {"train": ROWS}
    assert "did you mean 'train'?" in refused("--dataset", "org/news", "--splits", "test=trian")


@pytest.mark.parametrize("kind", ["missing", "offline", "script", "subset"])
def test_a_hub_dataset_that_does_not_load(refused, hub, kind):
    from datasets.exceptions import DatasetNotFoundError

    hub["org/news"] = {
        "missing": DatasetNotFoundError("Dataset 'org/news' doesn't exist on the Hub or cannot be accessed."),
        "offline": ConnectionError("Couldn't reach 'org/news' on the Hub (OfflineModeIsEnabled)"),
        "script": RuntimeError("Dataset scripts are no longer supported, but found news.py"),
        "subset": ValueError("Config name is missing.\nPlease pick one among: ['a', 'b']"),
    }[kind]
    error = refused("--dataset", "org/news")
    assert {"missing": "doesn't exist", "offline": "cannot be reached", "script": "--revision", "subset": "--subset"}[
        kind
    ] in error
