"""docs/architecture.md names rooms and files that exist, and every room; its picture is that of the imports."""

from __future__ import annotations

import re
from pathlib import Path

from test_layers import SRC, imports, module_name

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


def test_a_line_of_the_picture_imports_from_lines_below_it():
    picture = PAGE.split("```")[1]
    caption = picture.splitlines()[1].index("one file a command")
    lines = [line[:caption] for line in picture.splitlines()]
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} | {"registry"}
    height = {name: -n for n, line in enumerate(lines) for name in re.findall(r"[a-z]+", line) if name in rooms}
    within = {tuple(re.split(" *-> *", pair)) for line in lines for pair in re.findall(r"[a-z]+ -> [a-z]+", line)}
    assert set(height) == rooms
    bottom = min(height.values())
    wrong = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        module = module_name(path, SRC)
        room = module.split(".")[1] if "." in module else ""
        for target in imports(path.read_text(encoding="utf-8"), module):
            other = target.split(".")[1] if target.startswith("rlgf_cli.") else ""
            if room == other or not {room, other} <= set(height) or height[room] == bottom == height[other]:
                continue
            if height[other] >= height[room] and (room, other) not in within:
                wrong.add((room, other))
    assert wrong == set()
