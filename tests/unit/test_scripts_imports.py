"""What benchmarks and recipes take from the package is there: nothing else runs them in the suite."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "recipes").rglob("*.py")])


def missing(source: str) -> list[str]:
    """``module.name`` of every import from the package that does not exist."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rlgf_cli":
            module = importlib.import_module(node.module or "")
            names = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            found += [f"{node.module}.{name}" for name in names if not is_module(f"{node.module}.{name}")]
    return found


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is no package
        return False


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_script_imports_exists(path):
    assert missing(path.read_text(encoding="utf-8")) == []


def test_a_name_that_is_gone_is_seen():
    source = "from rlgf_cli.evolve.describe import totals, in_set\nfrom rlgf_cli.evolve import describe, nothing\n"
    assert missing(source) == ["rlgf_cli.evolve.describe.in_set", "rlgf_cli.evolve.nothing"]
