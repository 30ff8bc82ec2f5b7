"""Every flag of a command is declared at a field of its config, appears once, and gives that field its value."""

from __future__ import annotations

import json
from typing import Any

import pytest
from test_config_keys import MODELS
from test_docs import generator

from rlgf_cli.algorithms.catalog import Algorithm
from rlgf_cli.algorithms.spec import Regime
from rlgf_cli.cli import commands, invocation
from rlgf_cli.cli.commands import COMMANDS, load
from rlgf_cli.cli.options import OPTIONS, option_of
from rlgf_cli.config.flags import flagged_keys, flags_of, is_option
from rlgf_cli.config.keys import all_keys, field_model
from rlgf_cli.config.train import TrainConfig
from rlgf_cli.section import Flag, Strict

ROWS: dict[str, list[dict[str, Any]]] = json.loads(invocation.FLAGS.read_text(encoding="utf-8"))
STAGES: dict[str, type[Strict]] = generator().STAGES
KEYS = [(command, row) for command, rows in ROWS.items() for row in rows if "key" in row]


def test_the_file_that_the_help_reads_is_fresh() -> None:
    assert invocation.FLAGS.read_text(encoding="utf-8") == generator().flags(), "stale: run `make docs`"
    assert set(ROWS) == {name for name, target in COMMANDS.items() if target.config}


@pytest.mark.parametrize("command", STAGES)
def test_a_command_names_each_key_and_each_option_once(command: str) -> None:
    words = [word for panel in STAGES[command].panels.values() for word in panel.split()]
    assert sorted(words) == sorted(set(words))
    keys = [row["key"] for row in ROWS[command] if "key" in row]
    assert sorted(keys) == sorted(set(keys))
    names = [name for p in load(command).params for name in [*p.opts, *p.secondary_opts]]
    assert sorted(names) == sorted(set(names))
    unused = set(STAGES[command].__dict__.get("flags", {})) - set(keys)
    assert not unused, "an own flag for a key that the command does not show"


@pytest.mark.parametrize("command", STAGES)
def test_every_flag_is_a_config_key(command: str) -> None:
    model = STAGES[command]
    known = {*all_keys(model), *model.section_fields()}
    assert [row["key"] for row in ROWS[command] if "key" in row and row["key"] not in known] == []


@pytest.mark.parametrize("command", STAGES)
def test_the_hint_for_a_missing_argument_is_a_line_of_its_own_command(command: str) -> None:
    assert all(hint.startswith(f"rlgf {command} ") for hint in STAGES[command].usage.values())


def test_every_declared_flag_is_shown_by_a_command() -> None:
    shown: dict[str, list[type[Strict]]] = {}
    for command, row in KEYS:
        *sections, name = row["key"].split(".")
        section = STAGES[command]
        for part in sections:
            inner, _ = field_model(section, part)
            assert inner is not None
            section = inner
        shown.setdefault(name, []).extend(Algorithm.named.values() if section is Algorithm else [section])
    declared = [
        (model, name)
        for model in MODELS
        if model is not Regime
        for name, field in model.model_fields.items()
        if name in model.__annotations__ and any(isinstance(item, Flag) for item in field.metadata)
    ]
    assert len(declared) > 100
    assert [(m, name) for m, name in declared if not any(issubclass(s, m) for s in shown.get(name, []))] == []


def test_every_option_is_used_and_none_is_a_config_key() -> None:
    used = {option_of(command, row["option"]) for command, rows in ROWS.items() for row in rows if "option" in row}
    assert used == set(OPTIONS.values())
    assert all(is_option(flag.rpartition(" ")[2]) for flag in OPTIONS)


@pytest.mark.parametrize(("command", "row"), KEYS, ids=[f"{command} {row['key']}" for command, row in KEYS])
def test_a_flag_gives_its_key_a_value(command: str, row: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[invocation.Invocation] = []
    monkeypatch.setattr(commands.importlib, "import_module", lambda name: _Recorder(given))
    value: Any = {"str": "a", "int": 3, "float": 0.5, "bool": True}[row["type"]]
    for name in row.get("names", ["--"]):
        names, expected = [name.partition("/")[0]], [value]
        if "/" in name:
            names, expected = name.split("/"), [True, False]
        for flag, wanted in zip(names, expected, strict=True):
            words = [flag] if row["type"] == "bool" else [flag, str(wanted)]
            load(command)(args=words, standalone_mode=False)
            assert given.pop().keys == {row["key"]: [wanted] if row.get("many") else wanted}
    load(command)(args=[], standalone_mode=False)
    assert given.pop().keys == {}


class _Recorder:
    """A module whose commands keep what they are asked for."""

    def __init__(self, given: list[invocation.Invocation]) -> None:
        self.given = given

    def __getattr__(self, name: str) -> Any:
        def command(asked: invocation.Invocation) -> None:
            """Record."""
            self.given.append(asked)

        return command


def test_a_new_parameter_of_an_algorithm_has_its_flag_without_another_line() -> None:
    shown = {row["key"] for row in flags_of(TrainConfig) if "key" in row}
    assert {key for key in flagged_keys(TrainConfig) if key.startswith("algorithm.")} <= shown
    assert "algorithm.restart_steps" in shown
