"""Every config key earns its place: code outside ``config/`` reads it."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import rlgf_cli.config
from rlgf_cli.config.common import StageConfig
from rlgf_cli.config.keys import all_keys
from rlgf_cli.config.loader import resolve
from rlgf_cli.errors import UserError
from rlgf_cli.section import Strict

PACKAGE = Path(rlgf_cli.config.__file__).parents[1]


def config_models() -> list[type[Strict]]:
    """Every section that a module below ``rlgf_cli.config`` or ``rlgf_cli.algorithms`` defines."""
    for found in pkgutil.iter_modules(rlgf_cli.config.__path__, "rlgf_cli.config."):
        importlib.import_module(found.name)
    models, queue = [], [Strict]
    while queue:
        below = queue.pop().__subclasses__()
        models += [m for m in below if m.__module__.startswith(("rlgf_cli.config.", "rlgf_cli.algorithms."))]
        queue += below
    return sorted(set(models), key=lambda model: (model.__module__, model.__name__))


def attributes_read(sources: list[str]) -> set[str]:
    """Names that stand behind a dot and are read, not assigned."""
    return {
        node.attr
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


@pytest.fixture(scope="module")
def read() -> set[str]:
    outside = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "config"]
    return attributes_read([path.read_text(encoding="utf-8") for path in outside])


MODELS = config_models()


def test_the_models_are_found():
    names = {model.__name__ for model in MODELS}
    assert {"PrepareConfig", "MapConfig", "TrainConfig", "ModelConfig", "OptimConfig"} <= names
    assert StageConfig in MODELS


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_key_is_read(model, read):
    assert [name for name in model.model_fields if name not in read] == []


def test_a_key_that_nobody_reads_is_seen():
    assert "kl_coef" not in attributes_read(["config.kl_coef = 1", "kl_coef = 2", "'config.kl_coef'"])
    assert "kl_coef" in attributes_read(["x = config.kl_coef"])


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_unknown_keys_are_refused_everywhere(model):
    assert model.model_config["extra"] == "forbid"


@pytest.mark.parametrize("model", [m for m in MODELS if issubclass(m, StageConfig)], ids=lambda m: m.__name__)
def test_a_misspelled_key_of_any_stage_is_refused_with_the_right_one(model):
    for key in all_keys(model):
        if ".0." in key:
            continue  # places in lists are there only when the list is
        wrong = key + "q"
        with pytest.raises(UserError) as caught:
            resolve(model, sets=[f"{wrong}=1"], flags=_needed(model))
        assert f"unknown config key '{wrong}'" in str(caught.value), caught.value
        assert repr(key.rpartition(".")[2]) in (caught.value.hint or "")


def _needed(model: type[Strict]) -> dict[str, str]:
    """Enough for the keys that have no default, so that the unknown one is the only complaint to come first."""
    return {name: "x" for name, field in model.model_fields.items() if field.is_required()}
