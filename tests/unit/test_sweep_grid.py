"""The grid of a sweep: which points there are, what they are called, what is refused and where."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlgf_cli.config.loader import resolve
from rlgf_cli.config.recipes import Layer, as_set, as_yaml, read_layer
from rlgf_cli.config.train import TrainConfig
from rlgf_cli.errors import UserError
from rlgf_cli.section import Strict
from rlgf_cli.sweep import grid
from rlgf_cli.sweep.grid import expand, safe_name, train_key

BASE = Layer({"model": {"name": "m"}, "data": "d", "reward": [{"name": "rouge"}], "guide": {"name": "hf:g"}}, "base")


def points(written: dict[str, list[Any]], **more: Any) -> list[grid.Point]:
    return list(expand(written, base=more.pop("base", BASE), **more).points)


class TestCounting:
    def test_the_last_axis_runs_fastest(self):
        found = points({"alg": ["ppo++", "aggrevated"], "rollin_prob": [0.5, 0.8], "seed": [0, 3]})
        assert [p.name for p in found] == [
            f"{a}-rollin_prob-{p}/seed_{s}" for a in ("ppo++", "aggrevated") for p in (0.5, 0.8) for s in (0, 3)
        ]
        assert found[2].title == "ppo++, rollin_prob 0.8, seed 0"
        assert dict(found[2].settings) == {"algorithm": "ppo++", "algorithm.rollin_prob": 0.8, "seed": 0}

    def test_what_an_algorithm_does_not_take_is_folded(self):
        found = expand(
            {"alg": ["ppo", "ppo++"], "rollin_prob": [0.5, 0.8], "guide": ["hf:a", "hf:b"], "seed": [0, 1]}, base=BASE
        )
        names = [p.name for p in found.points]
        assert names[:2] == ["ppo/seed_0", "ppo/seed_1"] and len(names) == 2 + 8
        assert (found.folded, found.left_out) == (6, 0)
        assert dict(found.points[0].settings) == {"algorithm": "ppo", "seed": 0, "guide": None}

    def test_an_unguided_algorithm_is_given_no_guide_of_the_base(self):
        (ppo,) = points({"alg": ["ppo"]})
        config = resolve(TrainConfig, layers=[BASE, *ppo.layers], flags={"output": "o"}).config
        assert config.guide is None and config.algorithm.name == "ppo"

    def test_rules(self):
        axes = {"alg": ["ppo++", "aggrevated"], "rollin_prob": [0.2, 0.5, 0.8]}
        skipped = expand(axes, base=BASE, skip=[{"alg": "aggrevated", "rollin_prob": [0.2, 0.5]}])
        assert [p.system for p in skipped.points] == [
            "ppo++, rollin_prob 0.2", "ppo++, rollin_prob 0.5", "ppo++, rollin_prob 0.8", "aggrevated, rollin_prob 0.8",
        ]  # fmt: skip
        assert skipped.left_out == 2
        kept = points(axes, only=[{"alg": "ppo++", "rollin_prob": 0.5}, {"rollin_prob": 0.8}])
        assert [p.system for p in kept] == [
            "ppo++, rollin_prob 0.5", "ppo++, rollin_prob 0.8", "aggrevated, rollin_prob 0.8",
        ]  # fmt: skip

    @given(
        algorithms=st.lists(st.sampled_from(["ppo", "ppo++", "aggrevated", "rloo++"]), min_size=1, unique=True),
        probs=st.lists(st.floats(0, 1).map(lambda x: round(x, 3)), min_size=1, max_size=3, unique=True),
        seeds=st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True),
    )
    def test_every_combination_is_once_there(self, algorithms, probs, seeds):
        if algorithms == ["ppo"]:
            algorithms = ["ppo++"]
        found = expand({"alg": algorithms, "rollin_prob": probs, "seed": seeds}, base=BASE)
        guided = [a for a in algorithms if a != "ppo"]
        expected = [("ppo", None, s) for s in seeds] if "ppo" in algorithms else []
        expected += list(itertools.product(guided, probs, seeds))
        assert len(found.points) == len(expected)
        assert found.folded == len(algorithms) * len(probs) * len(seeds) - len(expected)
        told = [dict(p.settings) for p in found.points]
        assert {(t["algorithm"], t.get("algorithm.rollin_prob"), t["seed"]) for t in told} == set(expected)
        names = [p.name for p in found.points]
        assert len({name.casefold() for name in names}) == len(names)
        assert all(re.fullmatch(r"[A-Za-z0-9._+-]+/seed_\d+", name) for name in names)


class TestNames:
    @given(st.lists(st.text(min_size=1), min_size=2, max_size=5, unique=True))
    def test_any_values_have_names_of_their_own(self, values):
        found = points({"alg": ["ppo++"], "guide.system": values, "seed": [0]})
        names = [p.name for p in found]
        assert len({name.casefold() for name in names}) == len(values)
        assert all(re.fullmatch(r"[A-Za-z0-9._+][A-Za-z0-9._+-]*/seed_0", name) for name in names)
        assert len({p.system for p in found}) == len(values)
        assert not any("=" in p.system for p in found)
        assert all(len(name) < 100 for name in names)

    def test_paths_are_called_by_their_last_part(self):
        found = points({"alg": ["ppo++"], "guide": ["hf:runs/a", "hf:runs/b", "hf:other/a"]})
        assert [p.system for p in found] == ["ppo++, guide a", "ppo++, guide b", "ppo++, guide hf:other/a"]

    def test_a_value_that_is_added_changes_no_name(self):
        before = points({"alg": ["ppo++"], "guide": ["hf:runs/a"]})
        after = points({"alg": ["ppo++", "ppo"], "guide": ["hf:runs/a", "hf:other/a"]})
        assert before[0].name == after[0].name

    def test_names_that_the_sweep_uses_itself(self):
        inline = {"name": "logs", "regimes": [{"roll_in": "guide"}]}
        assert points({"algorithm": [inline]})[0].name.split("/")[0] != "logs"

    def test_a_long_one_is_cut(self):
        assert len(safe_name("x" * 500)) <= 80
        assert safe_name("x" * 500) != safe_name("x" * 501)


class TestKeys:
    @pytest.mark.parametrize(
        ("written", "key"),
        [
            ("alg", "algorithm"), ("algorithm", "algorithm"), ("algorithm.name", "algorithm"),
            ("rollin_prob", "algorithm.rollin_prob"), ("rollin-prob", "algorithm.rollin_prob"),
            ("learning_rate", "optim.learning_rate"), ("guide", "guide"), ("guide.name", "guide"),
            ("kl", "kl"), ("kl.coef", "kl"), ("seed", "seed"), ("reward", "reward"), ("ppo.gamma", "ppo.gamma"),
            ("limit", "limit"),
        ],
    )  # fmt: skip
    def test_what_a_grid_calls_a_key(self, written, key):
        assert train_key(written) == key

    @pytest.mark.parametrize(
        ("written", "said", "hint"),
        [
            ("rolin_prob", "unknown config key 'rolin_prob'", "'rollin_prob'"),
            ("algorithm.rollin_prop", "unknown config key", "'algorithm.rollin_prob'"),
            ("temperature", "more than one meaning", "rollout.temperature"),
            ("output", "the sweep gives 'output'", "leave it out"),
        ],
    )
    def test_refused(self, written, said, hint):
        with pytest.raises(UserError, match=re.escape(said)) as caught:
            expand({written: [1]}, base=BASE, places={f"grid.{written}": "s.yaml:7"})
        assert caught.value.where == "s.yaml:7" and hint in caught.value.hint


@pytest.mark.parametrize(
    ("axes", "more", "said", "where"),
    [
        ({"alg": ["ppo", "pppo"]}, {}, "unknown algorithm 'pppo'", "grid.alg.1"),
        ({"alg": []}, {}, "no values", "grid.alg"),
        ({"alg": ["ppo", "ppo"]}, {}, "'ppo' of 'alg' is here twice", "grid.alg.1"),
        ({"alg": ["ppo"], "algorithm.name": ["ppo"]}, {}, "in the grid twice", "grid.algorithm.name"),
        ({"seed": [0, "x"]}, {}, "'x' is no seed", "grid.seed.1"),
        ({"alg": ["ppo"], "rollin_prob": [0.5]}, {}, "takes 'rollin_prob'", "grid.rollin_prob.0"),
        ({"alg": ["ppo"], "guide": ["hf:a"]}, {}, "no algorithm of the grid takes 'guide'", "grid.guide.0"),
        ({"alg": ["ppo"]}, {"skip": [{"seed": 0}]}, "skip: 'seed' is not in the grid", "skip.0.seed"),
        ({"alg": ["ppo"]}, {"only": [{"alg": "grpo"}]}, "only: 'alg' is never 'grpo'", "only.0.alg"),
        ({"alg": ["ppo"]}, {"skip": [{"alg": "ppo"}]}, "leave no combination", "skip"),
    ],
)  # fmt: skip
def test_refused_with_its_place(axes, more, said, where):
    places = {f"grid.{key}.{n}": f"grid.{key}.{n}" for key, values in axes.items() for n in range(len(values))}
    places |= {f"grid.{key}": f"grid.{key}" for key in axes} | {"skip": "skip"}
    places |= {
        f"{what}.{n}.{k}": f"{what}.{n}.{k}" for what, rules in more.items() for n, r in enumerate(rules) for k in r
    }
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        expand(axes, base=BASE, places=places, **more)
    assert caught.value.where == where


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="$\u2028\u2029\ufeff\x85")),
    lambda below: st.lists(below, max_size=3),
    max_leaves=4,
)  # fmt: skip


class Anything(Strict):
    x: Any = None


def same(a: Any, b: Any) -> bool:
    return repr(a) == repr(b)  # True is not 1, and 1.0 is not 1


@given(VALUES)
def test_what_a_command_sets_is_read_back(value):
    assert same(resolve(Anything, sets=[as_set("x", value)]).config.x, value)


@given(value=VALUES)
def test_what_a_base_file_holds_is_read_back(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("base") / "base.yaml"
    path.write_text(as_yaml({"x": value}), encoding="utf-8")
    assert same(read_layer(path).values, {"x": value})


@pytest.mark.parametrize(
    "text", ["1e-5", "1e5", "null", "true", "2020-01-01", "{prompt}", "[a", "a: b", "#x", "0.5", ""]
)
def test_texts_that_look_like_something_else(text, tmp_path):
    assert same(resolve(Anything, sets=[as_set("x", text)]).config.x, text)
    (tmp_path / "base.yaml").write_text(as_yaml({"x": text}), encoding="utf-8")
    assert same(read_layer(tmp_path / "base.yaml").values["x"], text)
