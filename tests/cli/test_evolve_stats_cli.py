"""``rlgf evolve stats`` as a user runs it."""

from __future__ import annotations

import json

import pytest

from conftest import write_rows
from evolved_sets import write_set


@pytest.fixture
def two(tmp_path):
    """Two sets of the same seeds: the second repeats itself and asks for two queries a step."""
    return (
        write_set(tmp_path / "first", seeds=24, steps=3),
        write_set(tmp_path / "second", seeds=24, steps=3, kind="x", queries=2),
    )


def test_one_set_in_tables(two, run_cli):
    done = run_cli("evolve", "stats", two[0])
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"{two[0]}: 72 texts from 24 seeds"
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("|")]
    assert ["kept_share", "0.7500"] in cells and ["queries_per_kept", "1.3333"] in cells
    assert ["cost_usd", "0.0720"] in cells
    header = next(row for row in cells if row[:2] == ["step", "texts"])
    by_step = {row[0]: dict(zip(header, row, strict=True)) for row in cells if len(row) == len(header)}
    assert [by_step[k]["words"] for k in "0123"] == ["3.0000", "6.0000", "9.0000", "12.0000"]
    assert by_step["4"]["kept_share"] == "0.0000" and by_step["0"]["novelty"] == "-"
    assert ["1", "100%", "0%"] in cells and ["2", "0%", "100%"] in cells
    assert "96 rewrites, 96 queries: kept 72, refusal 24" in lines


def test_a_folder_with_figures_and_plots(two, tmp_path, run_cli):
    out = tmp_path / "stats"
    done = run_cli("evolve", "stats", two[0], "-o", out)
    assert done.exit_code == 0 and done.stdout.splitlines()[-1] == str(out), done.stderr
    stats = json.loads((out / "stats.json").read_text())
    assert stats["comparison"] is None and stats["sets"][0]["rewrites"]["kept"] == 72
    assert stats["space"].startswith("ngrams=1-2") and stats["cosine"] == 0.3
    names = ["growth", "kept", "operations-by-step", "operations-over-time", "spent"]
    assert sorted(path.name for path in (out / "plots").iterdir()) == sorted(
        f"{name}.{kind}" for name in names for kind in ("png", "svg")
    )
    described = (out / "plots" / "growth.svg").read_text()
    assert "words: 3 at first, unknown at last" in described
    manifest = json.loads((out / "run.json").read_text())
    assert manifest["status"] == "done" and len(manifest["parents"]) == 2
    again = run_cli("evolve", "stats", two[0], "-o", out)
    assert again.exit_code == 2 and "already holds a run" in again.stderr and "--resume" not in again.stderr
    assert run_cli("evolve", "stats", two[0], "-o", out, "--overwrite").exit_code == 0


def test_two_sets_of_the_same_seeds_are_paired(two, run_cli):
    done = run_cli("evolve", "stats", *two, "--draws", 40, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)["comparison"]
    assert (found["paired"], found["of_seeds"], found["seeds"], found["texts"]) == (True, [24, 24], 12, 36)
    queries = found["figures"]["queries_per_kept"]
    assert queries["difference"] == queries["low"] == queries["high"] == pytest.approx(-4 / 3)
    vendi = found["figures"]["vendi"]
    assert vendi["low"] < vendi["difference"] < vendi["high"] and 1 < vendi["first"] < 36
    assert found["figures"]["words"]["difference"] == pytest.approx(0, abs=0.2)
    assert json.loads(run_cli("evolve", "stats", *two, "--draws", 40, "--json").stdout)["comparison"] == found
    other = json.loads(run_cli("evolve", "stats", *two, "--draws", 40, "--json", "--seed", 1).stdout)["comparison"]
    assert other["figures"]["vendi"]["low"] != vendi["low"]


def test_a_set_against_itself_has_no_difference(two, run_cli):
    done = run_cli("evolve", "stats", two[0], two[0], "--draws", 20)
    assert done.exit_code == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| vendi")]
    assert rows[-1].endswith("+0.0000 to +0.0000 |") or "-0.0000" in rows[-1]
    assert "36 texts from 12 seeds in each of 20 draws (the same in both, of 24)" in done.stdout


def test_a_set_against_its_seeds_and_against_other_texts(two, tmp_path, run_cli):
    seeds = write_rows(tmp_path / "seeds.jsonl", [{"id": f"s{i}", "prompt": f"Describe the s{i}."} for i in range(24)])
    found = json.loads(run_cli("evolve", "stats", two[0], seeds, "--draws", 20, "--json").stdout)
    assert found["comparison"]["paired"] and found["comparison"]["texts"] == 12
    assert "queries_per_kept" not in found["comparison"]["figures"]
    assert found["sets"][1]["by_step"] is None and "no chains" in found["sets"][1]["notes"][0]
    others = write_rows(tmp_path / "o.jsonl", [{"prompt": f"Say what {i} and {i * i} are."} for i in range(8)])
    done = run_cli("evolve", "stats", two[0], others, "--draws", 20)
    assert "(of 24 and of 8)" in done.stdout and "warning: 8 seeds are few" in done.stderr


def test_a_missing_steps_file_leaves_columns_out_and_says_so(two, tmp_path, run_cli):
    (two[0] / "steps.jsonl").unlink()
    out = tmp_path / "stats"
    done = run_cli("evolve", "stats", two[0], "-o", out)
    assert done.exit_code == 0 and "no steps.jsonl beside it" in done.stdout
    assert "queries" not in done.stdout.replace("queries and cost are left out", "")
    assert sorted(path.name for path in (out / "plots").iterdir()) == ["growth.png", "growth.svg"]


def test_files_that_do_not_belong_together_have_a_note(two, run_cli):
    path = two[0] / "instructions.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))
    done = run_cli("evolve", "stats", two[0])
    assert done.exit_code == 0, done.stderr
    assert "70 instructions, 72 kept in steps.jsonl: the run that writes them has not ended" in done.stdout


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the file holds no records"),
        ([{"question": "a"}], "the field 'prompt' is missing"),
        ([{"prompt": "Name a bird."}], "diversity needs several texts; there is 1 text"),
    ],
)
def test_what_cannot_be_measured_writes_nothing(rows, message, tmp_path, run_cli):
    path = write_rows(tmp_path / "bad.jsonl", rows)
    done = run_cli("evolve", "stats", path, "-o", tmp_path / "out")
    assert done.exit_code == 2 and message in done.stderr and str(path) in done.stderr
    assert done.stdout == "" and not (tmp_path / "out").exists()


def test_one_seed_cannot_be_compared(tmp_path, two, run_cli):
    alone = write_set(tmp_path / "alone", seeds=1, steps=3)
    done = run_cli("evolve", "stats", two[0], alone)
    assert done.exit_code == 2 and "all texts come from one seed" in done.stderr
    assert "hint: measure the sets one by one" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((), "rlgf evolve stats SET [SET2]"), (("a", "b", "c"), "sets"), (("missing.jsonl",), "no such file")],
)
def test_arguments_that_are_wrong(arguments, message, run_cli):
    done = run_cli("evolve", "stats", *arguments)
    assert done.exit_code == 2 and message in done.stderr, done.stderr


def test_an_output_that_holds_the_set_is_refused(two, run_cli):
    done = run_cli("evolve", "stats", two[0], "-o", two[0], "--overwrite")
    assert done.exit_code == 2 and (two[0] / "instructions.jsonl").is_file(), done.stderr


def test_with_an_encoder(two, tiny_gpt2_pad_eos, run_cli):
    done = run_cli("evolve", "stats", two[0], "--encoder", tiny_gpt2_pad_eos, "--device", "cpu", "--json")
    assert done.exit_code == 0, done.stderr
    stats = json.loads(done.stdout)
    assert stats["space"].startswith("encoder=") and stats["cosine"] == 0.5
    assert 1 <= stats["sets"][0]["figures"]["vendi"] < 72
