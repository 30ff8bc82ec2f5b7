"""``rlgf cache``: what is there, taking it elsewhere, and throwing it away."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from conftest import Result
from rlgf_cli.ledger.store import Store, StoredText

DAY = 86400
Run = Callable[..., Result]


def fill(count: int = 6) -> dict[bytes, StoredText]:
    """Half of the texts of one guide, half of another; the n-th is n days old."""
    now = int(time.time())
    texts = {
        bytes([n]) * 32: StoredText(
            guide="gpt-x" if n % 2 else "openai:m",
            request=json.dumps({"prompt": f"prompt {n} 🐈", "max_tokens": 5, "sample_index": 0}, ensure_ascii=False),
            text=f"text\n{n} é",
            finish_reason="stop" if n % 3 else "length",
            model="m-1",
            prompt_bytes=10 + n,
            prompt_tokens=3 if n else None,
            completion_tokens=4,
            nano_usd=1_500_000 if n % 2 else None,
            seconds=0.25,
            created=now - n * DAY - 60,
        )
        for n in range(count)
    }
    with closing(Store.default()) as store:
        store.put(texts.items())
    return texts


def kept() -> dict[bytes, StoredText]:
    with closing(Store.default()) as store:
        return dict(store.each())


def test_stats(run_cli: Run, guide_cache: Path) -> None:
    fill()
    done = run_cli("cache", "stats", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["path"] == str(guide_cache / "guide.sqlite") and found["bytes"] > 0
    assert [guide["guide"] for guide in found["guides"]] == ["gpt-x", "openai:m"]
    first = found["guides"][0]
    assert (first["texts"], first["prompt_tokens"], first["completion_tokens"]) == (3, 9, 12)
    assert first["cost_usd"] == 0.0045 and found["guides"][1]["cost_usd"] is None
    assert first["first"] == time.strftime("%Y-%m-%d", time.gmtime(time.time() - 5 * DAY - 60))
    assert first["last"] == time.strftime("%Y-%m-%d", time.gmtime(time.time() - DAY - 60))
    shown = run_cli("cache", "stats").stdout
    row = next(line for line in shown.splitlines() if "gpt-x" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")][1:5] == ["3", "9", "12", "0.0045"]
    assert " - " in next(line for line in shown.splitlines() if "openai:m" in line)  # no price is not zero


@pytest.mark.parametrize("verb", ["stats", "export", "prune"])
def test_no_cache_is_said_and_none_is_made(run_cli: Run, guide_cache: Path, tmp_path: Path, verb: str) -> None:
    more = [tmp_path / "out.jsonl"] if verb == "export" else ["--older-than", 1] if verb == "prune" else []
    done = run_cli("cache", verb, *more)
    assert done.exit_code == 2 and "there is no guide cache yet" in done.stderr and "RLGF_CACHE_DIR" in done.stderr
    assert list(guide_cache.iterdir()) == [] and list(tmp_path.iterdir()) == []


def test_export_and_import_on_another_machine(run_cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, out = fill(), tmp_path / "texts.jsonl"
    done = run_cli("cache", "export", out)
    assert done.exit_code == 0 and done.stdout.strip() == "exported: 6", done.stderr
    assert len(out.read_text().splitlines()) == 6
    assert run_cli("cache", "export", tmp_path / "one.jsonl", "--guide", "gpt-x").stdout.strip() == "exported: 3"
    before = out.read_bytes()
    done = run_cli("cache", "export", out)
    assert done.exit_code == 2 and "already exists" in done.stderr and out.read_bytes() == before
    monkeypatch.setenv("RLGF_CACHE_DIR", str(tmp_path / "other"))
    assert run_cli("cache", "import", tmp_path / "one.jsonl").stdout.strip() == "texts: 3, new: 3"
    assert run_cli("cache", "import", out).stdout.strip() == "texts: 6, new: 3"
    assert run_cli("cache", "import", out, "--json").stdout.split() == ["{", '"texts":', "6,", '"new":', "0", "}"]
    assert kept() == texts  # to the last byte of the request, which is what the key was made of


def test_an_import_replaces_nothing(run_cli: Run, tmp_path: Path) -> None:
    texts, out = fill(), tmp_path / "texts.jsonl"
    run_cli("cache", "export", out)
    out.write_text(out.read_text().replace("text\\n", "forged "))
    assert run_cli("cache", "import", out).stdout.strip() == "texts: 6, new: 0"
    assert kept() == texts


DAMAGE: list[tuple[str, dict[str, Any] | str]] = [
    ("torn", '{"schema_version": 1, "key": "00'),
    ("no JSON", "hello"),
    ("short key", {"key": "00ff"}),
    ("upper case", {"key": "AB" * 32}),
    ("another version", {"schema_version": 99}),
    ("finish", {"finish_reason": "tool_calls"}),
    ("no text", {"text": None}),
    ("negative", {"prompt_bytes": -1}),
    ("too many tokens", {"prompt_tokens": 10**30}),
    ("too dear", {"nano_usd": -(10**25)}),
    ("no such day", {"created": 10**17}),
    ("half a character", {"request": {"prompt": "\ud83d"}}),
    ("half a letter", {"text": "\ud83d"}),
]


@pytest.mark.parametrize(("what", "damage"), DAMAGE, ids=[what for what, _ in DAMAGE])
def test_a_damaged_line_is_named_and_nothing_is_taken_in(
    run_cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, damage: dict[str, Any] | str
) -> None:
    fill()
    out = tmp_path / "texts.jsonl"
    run_cli("cache", "export", out)
    rows = out.read_text().splitlines()
    rows[3] = damage if isinstance(damage, str) else json.dumps({**json.loads(rows[3]), **damage})
    out.write_text("\n".join(rows) + "\n")
    monkeypatch.setenv("RLGF_CACHE_DIR", str(tmp_path / "other"))
    done = run_cli("cache", "import", out)
    assert done.exit_code == 2 and f"{out}:4" in done.stderr, done.stderr
    assert not (tmp_path / "other").exists()


def test_importing_what_is_not_there(run_cli: Run, tmp_path: Path) -> None:
    done = run_cli("cache", "import", tmp_path / "none.jsonl")
    assert done.exit_code == 2 and "no such file" in done.stderr


@pytest.mark.parametrize(
    ("flags", "left"),
    [
        (["--older-than", 2.5], {0, 1, 2}),
        (["--guide", "gpt-x"], {0, 2, 4}),
        (["--guide", "gpt-x", "--older-than", 2.5], {0, 1, 2, 4}),
        (["--older-than", 0], set()),
        (["--older-than", 1e6], {0, 1, 2, 3, 4, 5}),
        (["--guide", "nobody"], {0, 1, 2, 3, 4, 5}),
    ],
)
def test_prune(run_cli: Run, flags: list[object], left: set[int]) -> None:
    fill()
    done = run_cli("cache", "prune", *flags)
    assert done.exit_code == 0 and done.stdout.strip() == f"deleted: {6 - len(left)}", done.stderr
    assert {key[0] for key in kept()} == left


def test_the_file_shrinks(run_cli: Run, guide_cache: Path) -> None:
    with closing(Store.default()) as store:
        store.put((n.to_bytes(32, "big"), StoredText("g", "{}", "x" * 3000, "stop", "m", 1)) for n in range(500))
    size = (guide_cache / "guide.sqlite").stat().st_size
    assert run_cli("cache", "prune", "--guide", "g").exit_code == 0
    assert (guide_cache / "guide.sqlite").stat().st_size < size / 10


@pytest.mark.parametrize("days", ["-1", "nan", "inf", "-inf", "soon"])
def test_days_that_are_none(run_cli: Run, days: str) -> None:
    texts = fill()
    done = run_cli("cache", "prune", f"--older-than={days}")
    assert done.exit_code == 2 and "older-than" in done.stderr, done.stderr
    assert kept() == texts


def test_a_prune_of_everything_must_be_meant(run_cli: Run) -> None:
    texts = fill()
    done = run_cli("cache", "prune")
    assert done.exit_code == 2 and "neither an age nor a guide is given" in done.stderr
    assert "--older-than" in done.stderr and kept() == texts


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stats", "file.jsonl"], "takes no file"),
        (["prune", "file.jsonl", "--guide", "g"], "takes no file"),
        (["export"], "takes a file"),
        (["import"], "takes a file"),
        (["empty"], "empty"),
        (["stats", "--guide", "g"], "--guide"),
        (["import", "file.jsonl", "--guide", "g"], "--guide"),
        (["export", "file.jsonl", "--older-than", "3"], "--older-than"),
    ],
)
def test_what_makes_no_sense_is_refused(
    run_cli: Run, words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fill()
    done = run_cli("cache", *words)
    assert done.exit_code == 2 and message in done.stderr, done.stderr


def test_a_damaged_cache(run_cli: Run, guide_cache: Path) -> None:
    (guide_cache / "guide.sqlite").write_bytes(b"no database at all" * 100)
    done = run_cli("cache", "stats")
    assert done.exit_code == 1 and str(guide_cache) in done.stderr and "move it away" in done.stderr


def test_help(run_cli: Run) -> None:
    done = run_cli("cache", "--help")
    assert done.exit_code == 0
    for word in ("stats", "export", "import", "prune", "--guide", "--older-than", "RLGF_CACHE_DIR", "rlgf cache stats"):
        assert word in done.stdout
