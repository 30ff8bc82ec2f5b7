"""The picture of the code: arrows go down only, and what --help loads imports nothing heavy."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"
BOTTOM = {
    "errors",
    "signals",
    "section",
    "protocols",
    "noise",
    "registry",
    "algorithms",
    "artifacts",
    "config",
    "__version__",
}
MIDDLE = {"failures", "functional", "stats", "models", "ledger", "guides", "tasks", "scorers", "training"}
AROUND = {"supervised", "checks", "runs", "evolve", "report", "sweep"}

ALLOWED: dict[str, set[str]] = {
    "__init__": set(),
    "__main__": {"cli"},
    "errors": set(),
    "signals": {"errors"},
    "protocols": {"errors"},
    "noise": set(),
    "registry": {"errors", "protocols"},
    "section": set(),
    "algorithms": {"errors", "section"},
    "artifacts": {"errors", "protocols", "__version__"},
    "config": {"errors", "section", "algorithms", "artifacts"},
    "failures": {"protocols", "noise"},
    "functional": set(),
    "stats": {"errors", "artifacts"},
    "ledger": BOTTOM,
    "models": BOTTOM | {"functional"},
    "guides": BOTTOM | {"models", "ledger"},
    "tasks": {"errors", "protocols", "artifacts"},
    # a judge is a guide
    "scorers": {"errors", "signals", "protocols", "noise", "registry", "artifacts", "config"}
    | {"failures", "stats", "models", "guides"},
    "training": BOTTOM | {"models", "functional"},
    "supervised": BOTTOM | {"models", "stats"},
    "checks": BOTTOM | {"models", "functional", "guides", "scorers", "training"},
    "runs": BOTTOM | {"models", "ledger", "guides", "training", "checks"},
    "evolve": BOTTOM | {"failures", "functional", "stats", "models", "ledger", "guides", "scorers"},
    "report": BOTTOM,
    "sweep": BOTTOM | {"guides", "ledger"},
    "console": {"errors", "signals"},
    "stages": BOTTOM | MIDDLE | AROUND | {"console"},
    "cli": BOTTOM | {"models", "guides", "stages", "console"},
}
"""Which part may import which. A part may always import itself, but stages only their common ``stages.session``."""
SESSION = "rlgf_cli.stages.session"

HEAVY = {"torch", "transformers", "trl", "datasets", "accelerate", "peft", "bert_score", "openai"}
SLOW_FOR_HELP = {*HEAVY, "pydantic", "numpy", "scipy", "yaml", "matplotlib", "jinja2"}


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, *, at_import_only: bool = False) -> set[str]:
    """The modules that a file imports; ``at_import_only`` leaves out what stands in functions or is for types."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *([base] if base else [])])
            # `from package import module` names a module too
            found.update(f"{base}.{alias.name}" for alias in node.names)
        elif at_import_only and _runs_later(node):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def _runs_later(node: ast.AST) -> bool:
    """A function's body, or what is there for the type checker alone."""
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.dump(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def part_of(module: str) -> str:
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else "__init__"


def forbidden_arrows(sources: dict[str, str]) -> list[str]:
    """Imports against the picture, as ``importing module -> imported module``."""
    found = []
    for module, source in sources.items():
        part = part_of(module)
        for target in sorted(imports(source, module)):
            name, goal = f"{module} -> {target}", part_of(target)
            if target.split(".")[0] != "rlgf_cli":
                if part == "functional" and target.split(".")[0] in (HEAVY | {"numpy", "pydantic"}) - {"torch"}:
                    found.append(name)
                internal = target.startswith("trl.") and target.count(".") > 1
                if internal and module != "rlgf_cli.models.trl_primitives":
                    found.append(name)
            elif part == "stages" and (target == SESSION or target.startswith(f"{SESSION}.")):
                continue
            elif goal not in ALLOWED[part] | ({part} - {"stages"}):
                found.append(name)
    return found


def loads(start: set[str], sources: dict[str, str], wanted: set[str]) -> list[str]:
    """Chains by which importing one of the ``start`` modules imports one of the ``wanted`` libraries."""
    chains = {module: module for module in start}
    queue, found = sorted(start), []
    while queue:
        module = queue.pop()
        for target in sorted(imports(sources[module], module, at_import_only=True)):
            if target.split(".")[0] in wanted:
                found.append(f"{chains[module]} -> {target}")
            pieces = target.split(".")
            for n in range(1, len(pieces) + 1):  # importing a.b.c imports a and a.b
                name = ".".join(pieces[:n])
                if name in sources and name not in chains:
                    chains[name] = f"{chains[module]} -> {name}"
                    queue.append(name)
    return found


def known(target: str, sources: dict[str, str]) -> str | None:
    """The module that an imported name is, or lies in."""
    return target if target in sources else parent if (parent := target.rpartition(".")[0]) in sources else None


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that can reach each other."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        queue = [start]
        while queue:
            new = graph[queue.pop()] - seen
            seen |= new
            queue += new
        return seen

    reach = {module: reachable(module) for module in graph}
    groups = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in graph if a in reach[a]}
    return sorted(list(group) for group in groups)


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return {module_name(path, SRC): path.read_text(encoding="utf-8") for path in sorted(SRC.rglob("*.py"))}


def test_every_part_has_its_place(sources):
    assert {part_of(module) for module in sources} == set(ALLOWED)


def test_arrows_go_down_only(sources):
    assert forbidden_arrows(sources) == []


def test_other_rooms_know_the_contract_of_guides_and_no_kind(sources):
    """Outside guides/ a guide is a ``protocols.Guide``; ``make`` creates it. Recorded texts are read as such by sft."""
    kinds = {f"rlgf_cli.guides.{name}" for name in ("base", "local", "hf", "vllm", "openai.guide", "openai.batch")}
    known = {
        f"{module} -> {kind}"
        for module, source in sources.items()
        if part_of(module) != "guides"
        for target in imports(source, module)
        for kind in kinds
        if target == kind or target.startswith(f"{kind}.")
    }
    assert known == set()


def test_the_picture_has_no_circle():
    left = {part: {p for p in below if p in ALLOWED} for part, below in ALLOWED.items()}
    while left:
        free = [part for part, below in left.items() if not below & set(left)]
        assert free, f"these import each other: {sorted(left)}"
        for part in free:
            del left[part]


def test_no_modules_import_each_other(sources):
    """Also not from inside functions: a circle says that two files hold one idea, or that a third one is missing."""
    graph = {module: {known(t, sources) for t in imports(source, module)} for module, source in sources.items()}
    assert circles({module: targets - {None, module} for module, targets in graph.items()}) == []


def test_a_circle_of_modules_is_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_the_bottom_layer_loads_nothing_heavy(sources):
    bottom = {module for module in sources if part_of(module) in BOTTOM}
    assert loads(bottom, sources, HEAVY) == []


def test_the_command_line_loads_nothing_slow(sources):
    start = {module for module in sources if part_of(module) in ("cli", "console", "errors", "protocols", "registry")}
    assert loads(start, sources, SLOW_FOR_HELP) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("rlgf_cli.training.loop", "from rlgf_cli.scorers import rouge"),
        ("rlgf_cli.training.loop", "from ..guides.hf import HFGuide"),
        ("rlgf_cli.training.loop", "import rlgf_cli.scorers.rouge"),
        ("rlgf_cli.stages.train", "from rlgf_cli.stages import sft"),
        ("rlgf_cli.stages.session", "from rlgf_cli.stages import sft"),
        ("rlgf_cli.stages.train", "from rlgf_cli.cli.options import Seed"),
        ("rlgf_cli.models.load", "from rlgf_cli import console"),
        ("rlgf_cli.functional.masks", "from rlgf_cli.errors import UserError"),
        ("rlgf_cli.functional.masks", "import transformers"),
        ("rlgf_cli.artifacts.jsonl", "def f():\n    from rlgf_cli.models import load"),
        ("rlgf_cli.models.load", "from trl.trainer.utils import pad"),
        ("rlgf_cli.stages.sft", "def f():\n    from trl.models.utils import prepare_fsdp"),
    ],
)
def test_an_import_against_the_picture_is_seen(module, line):
    assert len(forbidden_arrows({module: line})) == 1


def test_imports_that_the_picture_allows():
    fine = {
        "rlgf_cli.stages.train": "from rlgf_cli import console\nfrom rlgf_cli.training import loop",
        "rlgf_cli.stages.sft": "from rlgf_cli.stages.session import StageSession",
        "rlgf_cli.models.trl_primitives": "from trl.trainer.utils import pad",
        "rlgf_cli.models.load": "from trl import SFTTrainer\nfrom rlgf_cli.functional import logprobs",
        "rlgf_cli.functional.masks": "import torch\nimport math",
    }
    assert forbidden_arrows(fine) == []


def test_a_heavy_import_is_seen_through_other_modules():
    tree = {
        "rlgf_cli.cli.app": "from rlgf_cli.cli import eval",
        "rlgf_cli.cli.eval": "from rlgf_cli import helper",
        "rlgf_cli.helper": "try:\n    import torch.nn\nexcept ImportError:\n    torch = None",
        "rlgf_cli": "",
    }
    assert loads({"rlgf_cli.cli.app"}, tree, HEAVY) == [
        "rlgf_cli.cli.app -> rlgf_cli.cli.eval -> rlgf_cli.helper -> torch.nn"
    ]
    tree["rlgf_cli.helper"] = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\ndef f():\n    import torch"
    )
    assert loads({"rlgf_cli.cli.app"}, tree, HEAVY) == []
