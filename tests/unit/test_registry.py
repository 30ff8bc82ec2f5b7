"""Names and where their code lives: builtins, other packages' entry points, a function in a file."""

from __future__ import annotations

import sys
from importlib import metadata

import pytest

from rlgf_cli import registry
from rlgf_cli.errors import RlgfError, UserError, did_you_mean


@pytest.fixture
def plugins(monkeypatch):
    """Entry points of packages that are not installed."""

    def install(group: str, **targets: str):
        points = [metadata.EntryPoint(name, target, group) for name, target in targets.items()]
        monkeypatch.setattr(
            registry.metadata, "entry_points", lambda *, group: [point for point in points if point.group == group]
        )

    return install


@pytest.mark.parametrize("kind", list(registry.BUILTIN))
def test_every_builtin_leads_somewhere_and_says_what_it_is(kind):
    for name, entry in registry.entries(kind).items():
        assert registry.load(kind, name) is not None
        assert entry.summary


def test_a_name_of_another_package(plugins):
    plugins("rlgf.rewards", mine="rlgf_cli.scorers.ending:Ending")
    assert "mine" in registry.entries("rewards") and "mine" not in registry.entries("metrics")
    assert registry.load("rewards", "mine").__name__ == "Ending"


@pytest.mark.parametrize(
    ("kind", "target", "message"),
    [
        ("rewards", "collections:Counter", "is no class derived from rlgf_cli.protocols.Reward"),
        ("rewards", "json:dumps", "is no class derived from rlgf_cli.protocols.Reward"),
        ("metrics", "rlgf_cli.scorers.ending:Ending", "is no class derived from rlgf_cli.protocols.Metric"),
        ("metrics", "rlgf_cli.protocols:Metric", "does not define compute"),
        ("tasks", "rlgf_cli.protocols:Task", "is no Task of rlgf_cli.protocols"),
    ],
)
def test_what_does_not_derive_from_its_base_is_refused(plugins, kind, target, message):
    plugins(f"rlgf.{kind}", mine=target)
    with pytest.raises(UserError, match=message) as caught:
        registry.load(kind, "mine")
    assert caught.value.where == target and "docs/extensions.md" in caught.value.hint


@pytest.mark.parametrize(
    ("own", "name"),
    [
        ("", "mine"),
        ("    name = 'own'\n", "own"),
        ("    @property\n    def name(self):\n        return 'own'\n", "own"),
    ],
    ids=["none", "an attribute", "a property"],
)
def test_a_scorer_without_a_name_has_the_registered_one(plugins, tmp_path, monkeypatch, own, name):
    (tmp_path / "rlgf_test_named.py").write_text(
        "from rlgf_cli.protocols import Reward, Score\n\n"
        "class Named(Reward):\n"
        f"{own}"
        "    def __init__(self, target=None): ...\n"
        "    def score(self, examples, texts):\n"
        "        return [Score(0.0) for _ in texts]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rlgf_test_named", raising=False)
    plugins("rlgf.rewards", mine="rlgf_test_named:Named")
    assert registry.build("rewards", "mine", {}).name == name


def test_a_name_that_is_taken_is_an_error(plugins):
    plugins("rlgf.rewards", rouge="collections:Counter")
    with pytest.raises(UserError, match="taken twice") as caught:
        registry.load("rewards", "length")
    assert caught.value.where == "collections:Counter"


@pytest.mark.parametrize("target", ["no_such_module:x", "collections:NoSuchThing"])
def test_another_packages_code_that_does_not_load_is_named(plugins, target):
    plugins("rlgf.metrics", mine=target)
    with pytest.raises(RlgfError, match="'mine' of an installed package") as caught:
        registry.load("metrics", "mine")
    assert (caught.value.where, caught.value.exit_code) == (target, 1)


@pytest.mark.parametrize(
    ("kind", "name", "hint"),
    [
        ("rewards", "rogue", "did you mean 'rouge'"),
        ("rewards", "comet", "file.py:function"),
        ("tasks", "comongen", "did you mean 'commongen'?"),
        ("metrics", "xyz", "known: "),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(kind, name, hint):
    with pytest.raises(UserError, match=f"unknown {kind[:-1]} {name!r}") as caught:
        registry.load(kind, name)
    assert hint in caught.value.hint


@pytest.mark.parametrize(("text", "is_one"), [("a/b.py:f", True), ("b.py", False), ("b.py:", False), ("b:f", False)])
def test_what_is_a_function_in_a_file(text, is_one):
    assert registry.is_python_target(text) is is_one


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(text: str, name: str = "own.py"):
        (tmp_path / name).write_text(text)
        return f"{tmp_path / 'own.py'}:reward"

    return write


def test_a_function_in_a_file_may_use_its_neighbours(module):
    module("def helper(x):\n    return x + 1\n", "rlgf_test_neighbour.py")
    target = module("from rlgf_test_neighbour import helper\n\n\ndef reward(x):\n    return helper(x)\n")
    assert registry.load_python_target(target)(1) == 2


def test_a_file_does_not_hide_what_is_installed(module):
    module("raise RuntimeError('not this one')\n", "json.py")
    assert registry.load_python_target(module("import json\nreward = json.dumps\n"))([1]) == "[1]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def other(): ...\n", "no function 'reward' in it"),
        ("import no_such_module\n", "importing it failed: ModuleNotFoundError"),
        ("def reward(:\n", "importing it failed: SyntaxError"),
        ("import sys\nsys.exit(3)\n", "importing it failed: SystemExit"),
    ],
)
def test_a_file_that_does_not_hold_it(module, tmp_path, text, message):
    with pytest.raises(UserError) as caught:
        registry.load_python_target(module(text))
    assert caught.value.message.startswith(message)
    assert caught.value.where == str(tmp_path / "own.py")


def test_a_file_that_failed_leaves_no_half_made_module(module):
    before = set(sys.modules)
    with pytest.raises(UserError):
        registry.load_python_target(module("x = 1 / 0\n"))
    assert set(sys.modules) == before


def test_a_missing_file():
    with pytest.raises(UserError, match="no such file"):
        registry.load_python_target("nowhere.py:reward")


def test_did_you_mean():
    assert did_you_mean("ruoge", ["rouge", "length"]) == "did you mean 'rouge'?"
    assert did_you_mean("zzz", ["b", "a"]) == "known: a, b"
    assert did_you_mean("zzz", []) == "nothing is known here"


@pytest.mark.parametrize(
    ("kind", "spec", "params"),
    [
        ("metrics", "length", {"max_words": 3}),
        ("metrics", "repetition", {"n": 2}),
        ("metrics", "failures", {"share": True}),
        ("metrics", "bertscore", {"idf_references": "train.jsonl"}),
        ("rewards", "bertscore", {"idf": True}),
    ],
)
def test_a_parameter_of_the_other_use_of_a_scorer_is_refused(kind, spec, params):
    (key,) = params
    with pytest.raises(UserError, match=f"unknown parameter '{key}' of the {kind[:-1]} '{spec}'"):
        registry.build(kind, spec, params)
