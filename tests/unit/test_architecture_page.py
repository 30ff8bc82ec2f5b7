"""docs/architecture.md names rooms and files that exist, and every room."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "rlgf_cli"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_every_file_that_the_page_names_exists():
    names = set(re.findall(r"`([a-z_/]+\.py)`", PAGE))
    assert len(names) > 20
    assert sorted(n for n in names if not ((PACKAGE / n).is_file() or (ROOT / n).is_file())) == []


def test_the_page_names_every_room():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    table = set(re.findall(r"`([a-z_]+)/`", PAGE))
    assert rooms <= table
    assert table <= rooms | {"parallel", "openai"}
