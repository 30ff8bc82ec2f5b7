"""How recipes, ``--set`` and flags become one config, and where each value says it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import Field, model_validator

from rlgf_cli.cli.invocation import print_config
from rlgf_cli.config.common import LoraConfig, ModelConfig, OptimConfig, Parts, StageConfig, TextConfig
from rlgf_cli.config.keys import all_keys
from rlgf_cli.config.loader import resolve
from rlgf_cli.config.recipes import read_layer
from rlgf_cli.errors import UserError
from rlgf_cli.section import Strict


class Range(Strict):
    low: int = 0
    high: int = 9

    @model_validator(mode="after")
    def _check(self) -> Range:
        if self.low > self.high:
            raise ValueError("low is above high")
        return self


class Config(StageConfig):
    model: ModelConfig
    optim: OptimConfig = Field(default_factory=OptimConfig)
    text: TextConfig = Field(default_factory=TextConfig)
    rewards: Parts = Field(default_factory=list)
    lora: LoraConfig | None = None
    guide: ModelConfig | None = None
    range: Range = Field(default_factory=Range)
    kl: float | None = 0.1
    whiten: bool = True
    kind: Literal["guide_mc", "gae"] = "gae"
    extra: dict[str, Any] = Field(default_factory=dict)


@pytest.fixture
def recipe(tmp_path):
    def write(text: str, name: str = "recipe.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


NEEDED = {"output": "out", "model.name": "gpt2"}


def error_of(**sources: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        resolve(Config, **{"flags": NEEDED, **sources})
    return caught.value


# precedence


def test_flag_beats_set_beats_later_file_beats_earlier_file_beats_default(recipe):
    early = recipe("{seed: 1, kl: 1, whiten: false, optim: {learning_rate: 1, warmup_steps: 1}}", "a.yaml")
    late = recipe("{seed: 2, kl: 2, optim: {learning_rate: 2}}", "b.yaml")
    flags = {**NEEDED, "seed": 4, "optim.schedule": None}
    found = resolve(Config, files=[early, late], sets=["seed=3", "kl=3"], flags=flags)
    config = found.config
    assert (config.seed, config.kl, config.optim.learning_rate) == (4, 3, 2)
    assert (config.optim.warmup_steps, config.whiten, config.optim.schedule) == (1, False, "linear")


def test_the_later_of_two_sets_wins():
    assert resolve(Config, sets=["seed=1", "seed=2"], flags=NEEDED).config.seed == 2


GIVEN = [("kl", None, "null"), ("whiten", False, "false"), ("kl", 0, "0")]


@pytest.mark.parametrize(("key", "value", "text"), GIVEN)
def test_null_false_and_zero_in_a_recipe_count_as_given(recipe, key, value, text):
    earlier = recipe("{kl: 5, whiten: true}", "earlier.yaml")
    found = resolve(Config, files=[earlier, recipe(f"{key}: {text}")], flags=NEEDED)
    assert getattr(found.config, key) == value


@pytest.mark.parametrize(("key", "value", "text"), GIVEN)
def test_null_false_and_zero_in_a_set_count_as_given(recipe, key, value, text):
    found = resolve(Config, files=[recipe("{kl: 5, whiten: true}")], sets=[f"{key}={text}"], flags=NEEDED)
    assert getattr(found.config, key) == value


@pytest.mark.parametrize(("key", "value"), [("whiten", False), ("kl", 0)])
def test_false_and_zero_as_flags_count_as_given(recipe, key, value):
    found = resolve(Config, files=[recipe("{kl: 5, whiten: true}")], flags={**NEEDED, key: value})
    assert getattr(found.config, key) == value


def test_a_flag_that_is_none_was_not_given(recipe):
    found = resolve(Config, files=[recipe("kl: 7")], flags={**NEEDED, "kl": None})
    assert found.config.kl == 7


def test_sections_are_merged_and_lists_are_replaced(recipe):
    early = recipe("{rewards: [rouge, length], extra: {a: 1, b: 2}}", "a.yaml")
    late = recipe("{rewards: [coverage], extra: {b: 3}}", "b.yaml")
    config = resolve(Config, files=[early, late], flags=NEEDED).config
    assert [part.name for part in config.rewards] == ["coverage"]
    assert config.extra == {"a": 1, "b": 3}


# shorthand


def test_a_name_stands_for_a_section(recipe):
    path = recipe("{model: gpt2, guide: t5-small}")
    config = resolve(Config, files=[path], flags={"output": "o"}).config
    assert (config.model.name, config.guide.name) == ("gpt2", "t5-small")


def test_a_name_given_later_keeps_the_rest_of_the_section(recipe):
    path = recipe("model: {name: gpt2, dtype: bfloat16}")
    model = resolve(Config, files=[path], sets=["model=llama"], flags={"output": "o"}).config.model
    assert (model.name, model.dtype) == ("llama", "bfloat16")


@pytest.mark.parametrize("text", ["rouge,length", "[rouge, length]", "[rouge, {name: length}]"])
def test_names_stand_for_a_list_of_parts(text):
    parts = resolve(Config, sets=[f"rewards={text}"], flags=NEEDED).config.rewards
    assert [(part.name, part.weight) for part in parts] == [("rouge", 1.0), ("length", 1.0)]


def test_a_place_in_a_list_can_be_set(recipe):
    path = recipe("rewards: [rouge, {name: length, params: {low: 3}}]")
    parts = resolve(Config, files=[path], sets=["rewards.0.weight=2", "rewards.1.params.low=4"], flags=NEEDED)
    assert [(p.name, p.weight, p.params) for p in parts.config.rewards] == [
        ("rouge", 2.0, {}),
        ("length", 1.0, {"low": 4}),
    ]


def test_a_place_that_the_list_does_not_have_is_refused(recipe):
    error = error_of(files=[recipe("rewards: [rouge]")], sets=["rewards.1.weight=2"])
    assert error.where == "--set rewards.1.weight=2"
    assert "'rewards' is a list of 1" in error.message


def test_a_section_may_be_null(recipe):
    found = resolve(Config, files=[recipe("guide: t5", "a.yaml"), recipe("guide: null", "b.yaml")], flags=NEEDED)
    assert found.config.guide is None
    assert found.to_json()["origins"]["guide"].endswith("b.yaml:1")


# values


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        ("1e-5", 1e-5), ("1.5e3", 1500.0), ("3", 3), ("-2.5", -2.5), (".5", 0.5), ("true", True), ("null", None),
        ("text", "text"), ("{prompt}", "{prompt}"), ("{title} {post}", "{title} {post}"), ("2024-01-31", "2024-01-31"),
        ("{a: 1}", {"a": 1}), ("[1, 2]", [1, 2]), ("", None), ("a: b: c", "a: b: c"), ("1_000", 1000),
    ],
)  # fmt: skip
def test_values_of_set_are_yaml(raw, value):
    found = resolve(Config, sets=[f"extra.x={raw}"], flags=NEEDED).config.extra["x"]
    assert found == value and type(found) is type(value)


def test_hyphens_in_keys_of_set_are_underscores_but_not_in_open_mappings():
    config = resolve(Config, sets=["optim.learning-rate=2", "extra.my-key=1"], flags=NEEDED).config
    assert config.optim.learning_rate == 2
    assert config.extra == {"my-key": 1}


def test_numbers_in_recipes_are_numbers(recipe):
    assert resolve(Config, files=[recipe("optim: {learning_rate: 1e-5}")], flags=NEEDED).config.optim.learning_rate


def test_variables_come_from_the_environment(recipe, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", "/data")
    monkeypatch.delenv("ABSENT", raising=False)
    path = recipe("{output: '${DATA_ROOT}/x', extra: {list: ['${DATA_ROOT}', '${ABSENT:-d}'], n: '${ABSENT:-}'}}")
    config = resolve(Config, files=[path], flags={"model.name": "m"}).config
    assert config.output == "/data/x"
    assert config.extra == {"list": ["/data", "d"], "n": ""}


def test_a_variable_that_is_not_set_is_an_error_with_its_line(recipe, monkeypatch):
    monkeypatch.delenv("ABSENT", raising=False)
    path = recipe("seed: 1\nextra:\n  a: [x, '${ABSENT}']\n")
    error = error_of(files=[path])
    assert error.where == f"{path}:3"
    assert "ABSENT is not set" in error.message


@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "HF_TOKEN", "MY_SECRET", "password"])
def test_a_secret_does_not_get_into_a_config(recipe, monkeypatch, name):
    monkeypatch.setenv(name, "sk-123")
    error = error_of(files=[recipe(f"extra: {{a: '${{{name}}}'}}")])
    assert "secret" in error.message and "sk-123" not in str(error)


def test_a_variable_that_only_looks_like_a_secret_is_one_of_many(recipe, monkeypatch):
    monkeypatch.setenv("TOKENIZER", "bpe")
    assert resolve(Config, files=[recipe("extra: {a: '${TOKENIZER}'}")], flags=NEEDED).config.extra == {"a": "bpe"}


# origins


def test_origins(recipe):
    early = recipe("seed: 1\nmodel: gpt2\noptim:\n  learning_rate: 1\n  warmup_steps: 1\n", "a.yaml")
    late = recipe("\noptim: {learning_rate: 2}\nrewards: [rouge, {name: length, weight: 2}]\n", "b.yaml")
    found = resolve(
        Config,
        files=[early, late],
        sets=["kl=null", "rewards.0.weight=3"],
        flags={"output": "o", "model.dtype": "bfloat16"},
    )
    origins = found.to_json()["origins"]
    given = {key: origin for key, origin in origins.items() if origin != "default"}
    assert given == {
        "output": "flag",
        "seed": f"{early}:1",
        "model.name": f"{early}:2",
        "model.dtype": "flag",
        "optim.learning_rate": f"{late}:2",
        "optim.warmup_steps": f"{early}:5",
        "rewards.0.name": f"{late}:3",
        "rewards.0.weight": "--set rewards.0.weight=3",
        "rewards.1.name": f"{late}:3",
        "rewards.1.weight": f"{late}:3",
        "kl": "--set kl=null",
    }
    assert origins["optim.schedule"] == "default"  # the section was given, this key of it was not


def test_what_replaces_a_list_takes_its_origins_away(recipe):
    early = recipe("rewards:\n  - name: rouge\n    weight: 2\n", "a.yaml")
    late = recipe("rewards: [length]\n", "b.yaml")
    origins = resolve(Config, files=[early, late], flags=NEEDED).to_json()["origins"]
    assert origins["rewards.0.name"] == f"{late}:1"
    assert origins["rewards.0.weight"] == "default"


def test_every_value_has_an_origin_and_the_values_load_again(recipe):
    found = resolve(Config, files=[recipe("{rewards: rouge, extra: {a: {b: 1}}}")], flags=NEEDED)
    data = found.to_json()
    assert Config.model_validate(data["values"]) == found.config
    assert data["origins"]["extra.a.b"].endswith(":1")
    assert {key.split(".")[0] for key in data["origins"]} == set(Config.model_fields)


def test_print_config_shows_values_and_where_they_came_from(recipe, capsys):
    path = recipe("seed: 5\n")
    print_config(resolve(Config, files=[path], flags=NEEDED))
    shown = capsys.readouterr().out
    assert yaml.safe_load(shown)["seed"] == 5
    assert f"# seed: {path}:1" in shown and "# model.name: flag" in shown and "# kl" not in shown


def test_all_keys():
    keys = all_keys(Config)
    assert {"seed", "model.name", "lora.r", "rewards.0.weight", "extra"} <= set(keys)
    assert "model" not in keys


# errors


@pytest.mark.parametrize(
    ("text", "key", "line", "hint"),
    [
        ("sede: 1\n", "sede", 1, "did you mean 'seed'?"),
        ("seed: 1\noptim:\n  lerning_rate: 1\n", "optim.lerning_rate", 3, "did you mean 'learning_rate'?"),
        ("rewards:\n- name: a\n- name: b\n  wieght: 2\n", "rewards.1.wieght", 4, "did you mean 'weight'?"),
        ("learning_rate: 1\n", "learning_rate", 1, "did you mean 'optim.learning_rate'?"),
        ("guide:\n  name: x\n  dytpe: y\n", "guide.dytpe", 3, "did you mean 'dtype'?"),
    ],
)
def test_unknown_keys_have_their_line_and_the_nearest_key(recipe, text, key, line, hint):
    path = recipe(text)
    error = error_of(files=[path])
    assert error.message == f"unknown config key {key!r}"
    assert error.where == f"{path}:{line}"
    assert error.hint == hint


def test_the_line_is_that_of_the_file_that_won(recipe):
    early = recipe("rewards:\n  - name: a\n    weight: high\n", "a.yaml")
    late = recipe("\n\n\nrewards: [{name: a, weight: low}]\n", "b.yaml")
    assert error_of(files=[early, late]).where == f"{late}:4"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("seed: 1\nkl: high\n", 2, "kl: "),
        ("optim: {learning_rate: -1}\n", 1, "optim.learning_rate: "),
        ("range:\n  low: 3\n  high: 2\n", 1, "range: low is above high"),
        ("kind: guide\n", 1, "kind: "),
        ("lora:\n  target_modules: {a: b}\n", 2, "lora.target_modules: "),
        ("seed: [1\n", 2, "not YAML"),
        ("seed: 1\nseed: 2\n", 2, "the key 'seed' is here twice (first on line 1)"),
        ("- a\n- b\n", 1, "a config file holds keys and values"),
        ("optim:\n", 1, "optim: "),
    ],
)
def test_bad_values_have_their_line(recipe, text, line, message):
    path = recipe(text)
    error = error_of(files=[path])
    assert error.where == f"{path}:{line}", error
    assert error.message.startswith(message), error


def test_a_bad_flag_shows_what_was_given():
    error = error_of(flags={**NEEDED, "optim.learning_rate": -1})
    assert error.where is None
    assert "(given: -1)" in error.message


@pytest.mark.parametrize(
    ("flags", "key", "hint"),
    [
        ({"model.name": "m"}, "output", "give --output or"),
        ({"output": "o"}, "model", "give --model or"),
        ({"output": "o", "model.dtype": "float32"}, "model.name", "give --model or"),
        ({**NEEDED, "rewards": [{"weight": 2}]}, "rewards.0.name", "rewards.0.name="),
    ],
)
def test_what_is_missing_says_how_to_give_it(flags, key, hint):
    error = error_of(flags=flags)
    assert error.message == f"{key!r} is needed and was not given"
    assert hint in error.hint


def test_a_missing_recipe():
    assert error_of(files=["nowhere.yaml"]).where == "nowhere.yaml"


def test_a_recipe_that_is_no_text(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"a: \xff\xfe")
    assert error_of(files=[path]).where == str(path)


def test_a_control_character_in_a_recipe(recipe):
    assert "not YAML" in error_of(files=[recipe("a: \x07")]).message


@pytest.mark.parametrize("text", ["seed", "=3", " =3"])
def test_a_set_without_key_or_value(text):
    assert "is not key=value" in error_of(sets=[text]).message


def test_an_empty_recipe_gives_nothing(recipe):
    assert resolve(Config, files=[recipe(""), recipe("# nothing\n", "b.yaml")], flags=NEEDED).config.seed == 0


@pytest.mark.parametrize("kind", ["lists", "merges", "itself"])
def test_aliases_that_repeat_values_without_end_are_refused(tmp_path: Path, kind: str) -> None:
    """A few hundred bytes whose values would fill any memory."""
    if kind == "itself":
        text = "a: &a [1, *a]\n"
    elif kind == "lists":
        text = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
    else:
        text = "a0: &a0 {x: 1}\n" + "".join(
            f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
        )
    (tmp_path / "bomb.yaml").write_text(text)
    with pytest.raises(UserError, match="aliases") as caught:
        read_layer(tmp_path / "bomb.yaml")
    assert str(caught.value.where).startswith(str(tmp_path / "bomb.yaml"))


def test_anchors_are_for_use(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\n")
    assert read_layer(tmp_path / "recipe.yaml").values == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}


def test_a_file_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 5000 + "]" * 5000)
    with pytest.raises(UserError, match="nested too deeply"):
        read_layer(tmp_path / "deep.yaml")
