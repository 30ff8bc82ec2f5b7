"""Retired names: identifiers and messages in src use the field's words; each failure names the replacement.

Keys on disk (``mended``, ``credit``) are strings, which are checked only where they are prose.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src" / "rlgf_cli"

WORDS = {
    "roller": "RolloutGenerator",
    "truths": "invariants",
    "exam": "probe",
    "examine": "probe",
    "examined": "probed",
    "keeper": "RunWriter",
    "keeping": "run_writer",
    "purse": "shared_budget",
    "seam": "token_boundary",
    "seams": "token_boundaries",
    "wording": "request",
    "mend": "clean or repair",
    "mended": "cleaned or repaired",
    "mends": "repairs",
    "mending": "cleaning or repair",
    "letter": "error message, render_error",
    "ramp": "LinearSchedule",
    "ramps": "schedules",
    "told": "what was reported",
    "said": "what was reported, sampler_logprobs",
    "asked": "requests",
    "found": "what it is: matches, rows, scores",
    "kept": "what was kept: kept_rows, selected",
    "everyones": "gather_episodes",
    "books": "spend ledger, record_spend",
    "paid": "billed",
    "sides": "mc_returns",
}
"""Words of identifiers (``old_seams`` has ``old`` and ``seams``), and their replacements."""

NAMES = {
    "Truth": "Invariant",
    "Orders": "BatchJobs",
    "Notes": "RolloutStats",
    "Credit": "Advantages",
    "CreditSettings": "AdvantageSettings",
    "Group": "Processes",
    "ALONE": "SINGLE",
    "World": "Environment",
    "Scored": "TokenOutputs, or what was scored",
    "reference_logprobs": "ref_logprobs",
    "has_reference": "has_ref_model",
}
"""Whole identifiers, and their replacements."""

CALLED = {
    "roll": "generate",
    "assign": "compute_advantages",
    "annotate": "compute_stats",
    "written": "scored_texts",
    "expect": "prefetch",
    "tell": "broadcast",
    "agree": "raise_together",
    "main_does": "on_main",
    "findings": "guide_checks",
    "held": "collected",
    "orders": "batch_jobs",
    "pieces": "sentences",
}
"""Whole names of functions and modules, and their replacements; variables may have them."""

PROSE = {
    "truths": "invariants",
    "purse": "shared budget",
    "mend": "clean or repair",
    "mended": "cleaned or repaired",
    "mends": "repairs",
    "mending": "repair",
    "seam": "boundary",
    "seams": "boundaries",
    "roller": "rollout generator",
    "the books": "the spend ledger",
    "the exam": "the probe",
}
"""Words of messages and docstrings, and their replacements."""

ON_DISK: dict[str, set[str]] = {
    "algorithms/parameters.py": {"Group"},  # the episodes of one prompt
    "artifacts/records.py": {"mended"},
}
"""Identifiers that are keys of files, or have the field's meaning, by file; in evolve a rewrite is kept or rejected."""


def words_of(name: str) -> list[str]:
    """``_everyRow_of`` to every, row, of."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def definitions(tree: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """Line, name and whether it is a function's: of functions, classes, arguments, variables, attributes, imports."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield node.lineno, name, True
            case ast.ClassDef(name=name) | ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()):
                yield node.lineno, name, False
            case ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name, False
            case ast.alias(asname=str(name)) | ast.ExceptHandler(name=str(name)):
                yield node.lineno, name, False


def prose(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Strings with a space: messages and docstrings. Others are keys."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value.strip():
            yield node.lineno, node.value


def retired(source: str, file: str) -> list[str]:
    """Each retired name of a file as ``file:line: name: use replacement``."""
    tree = ast.parse(source)
    uses = []
    for line, name, called in [(1, Path(file).stem, True), *definitions(tree)]:
        if name in ON_DISK.get(file, ()) or (file.startswith("evolve/") and "kept" in words_of(name)):
            continue
        whole = {**NAMES, **CALLED} if called else NAMES
        replacement = whole.get(name.strip("_")) or next((WORDS[w] for w in words_of(name) if w in WORDS), None)
        if replacement is not None:
            uses.append(f"{file}:{line}: {name}: use {replacement}")
    for line, text in prose(tree):
        for word, replacement in PROSE.items():
            if word not in ON_DISK.get(file, ()) and re.search(rf"(?<![\w`/-]){word}(?![\w`/-])", text, re.IGNORECASE):
                uses.append(f"{file}:{line}: {word!r} in a text: use {replacement}")
    return uses


def test_no_retired_name_is_in_use() -> None:
    uses = []
    for path in sorted(SRC.rglob("*.py")):
        uses += retired(path.read_text(encoding="utf-8"), path.relative_to(SRC).as_posix())
    assert uses == [], "\n".join(uses)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("class Roller: ...", "Roller"),
        ("def roll(self): ...", "roll"),
        ("def f(old_seams): ...", "old_seams"),
        ("rows = [found for found in ()]", "found"),
        ("self.purse = None", "purse"),
        ("import a as keeper", "keeper"),
        ("for told in (): ...", "told"),
        ("(kept := 1)", "kept"),
        ('f"{x} of the truths hold"', "'truths'"),
        ('"""Texts that are mended."""', "'mended'"),
    ],
)
def test_a_retired_name_is_seen(source: str, name: str) -> None:
    assert any(f": {name}" in line for line in retired(source, "room/file.py"))


def test_keys_and_the_fields_words_are_no_retired_names() -> None:
    source = 'row["guide/mended"] = {"mended": 1, "credit": "cut"}\nroll_in = roll_out = boundary = credit = 1'
    assert retired(source, "room/file.py") == []
    assert retired("x = 1", "room/seams.py") == ["room/seams.py:1: seams: use token_boundaries"]
