"""Rewards of the user's own, and the gate that every score passes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rlgf_cli.config.common import PartConfig
from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.protocols import Example, Reward, Score
from rlgf_cli.scorers.base import signature_of
from rlgf_cli.scorers.checked import score_checked
from rlgf_cli.scorers.weighted_sum import make_reward

ONE = Example("one", "first prompt", ("ref a", "ref b"), {"k": 1})
TWO = Example("two", "second prompt", ("ref c",), {"k": 2})
TEXTS = ["short", "a longer text"]


@pytest.fixture
def score(tmp_path: Path):
    """``score(code, **params)``: the scores of the function ``f`` that ``code`` defines."""

    def run(code: str, **params):
        file = tmp_path / "mine.py"
        file.write_text(code)
        reward = make_reward([PartConfig(name=f"{file}:f", params=params)])
        return score_checked(reward, [ONE, TWO], TEXTS)

    return run


class TestSignatures:
    @pytest.mark.parametrize(
        ("code", "expected"),
        [
            ("def f(text): return len(text)", [5, 13]),
            ("def f(completion): return len(completion)", [5, 13]),
            ("def f(meta, prompt): return meta['k'] + len(prompt)", [13, 15]),
            ("def f(references, id): return len(references) if id == 'one' else -1", [2, -1]),
            ("def f(text, unused=3): return unused", [3, 3]),
            ("def f(**kwargs): return len(kwargs['text']) + kwargs['meta']['k']", [6, 15]),
            ("def f(texts): return [len(t) for t in texts]", [5, 13]),
            ("def f(completions, **kwargs): return [m['k'] for m in kwargs['metas']]", [1, 2]),
            (
                "def f(prompts, texts, references, metas, ids):\n"
                "    return [len(r) + m['k'] for r, m in zip(references, metas)]",
                [3, 3],
            ),
            ("def f(texts): return (i for i, _ in enumerate(texts))", [0, 1]),
            ("f = lambda text: True", [1, 1]),
        ],
    )
    def test_parameters_are_passed_by_name(self, score, code, expected):
        assert [s.value for s in score(code)] == expected

    def test_params_of_the_config_are_passed(self, score):
        assert score("def f(text, scale, shift=0): return scale + shift", scale=2, shift=1)[0].value == 3

    def test_numpy_and_torch_numbers_are_numbers(self, score):
        code = "import numpy, torch\ndef f(texts): return [numpy.float32(1.5), torch.tensor(2.5)]"
        assert [s.value for s in score(code)] == [1.5, 2.5]

    def test_a_dict_is_the_score_and_its_parts(self, score):
        first, _ = score("def f(text): return {'score': 2.0, 'fluency': 1.0}")
        assert first == Score(2.0, {"f": 2.0, "f.fluency": 1.0})

    @pytest.mark.parametrize(
        ("code", "params", "message"),
        [
            ("def f(txt): return 1", {}, "asks for 'txt'"),
            ("def f(text, /): return 1", {}, "asks for 'text'"),
            ("def f(text): return 1", {"scale": 1}, "has no parameter 'scale'"),
            ("def f(text): return 1", {"text": 1}, "'text' cannot be a parameter"),
            ("class f: pass", {}, "not a function"),
            ("f = 3", {}, "not a function"),
            ("def g(text): return 1", {}, "no function 'f'"),
            ("def f(text: return 1", {}, "SyntaxError"),
            ("import not_there\ndef f(text): return 1", {}, "ModuleNotFoundError"),
        ],
    )
    def test_refused_before_the_run(self, score, code, params, message):
        with pytest.raises(UserError, match=message):
            score(code, **params)

    def test_missing_file(self, tmp_path):
        with pytest.raises(UserError, match="no such file"):
            make_reward([PartConfig(name=f"{tmp_path}/none.py:f")])

    def test_the_signature_follows_the_code(self, tmp_path):
        signatures = []
        for number in (1, 2):
            (tmp_path / "mine.py").write_text(f"def f(text): return {number}")
            signatures.append(signature_of(make_reward([PartConfig(name=f"{tmp_path}/mine.py:f")])))
        assert signatures[0] != signatures[1]


BATCHED = {
    "[1.0]": "returned 1 scores for 2 texts",
    "[1.0] * 3": "returned 3 scores for 2 texts",
    "1.0": "returned float instead of a list",
    "'ab'": "returned str instead of a list",
    "None": "returned NoneType instead of a list",
    "[1.0, float('nan')]": "nan",
    "1 / 0": "ZeroDivisionError",
}
"""What a function returns for two texts, and the reason why it is refused."""


class TestBroken:
    """A broken reward is exit code 1 with the offending example, never a number."""

    @pytest.mark.parametrize(
        ("body", "reason"),
        [
            ("float('nan')", "nan"),
            ("float('-inf')", "-inf"),
            ("None", "None, which is not a number"),
            ("'0.5'", "'0.5', which is not a number"),
            ("[1.0, 2.0]", "which is not a number"),
            ("{'fluency': 1.0}", "without the key 'score'"),
            ("{'score': 1.0, 'part': float('nan')}", "in its part 'part'"),
            ("{'score': 1.0, 'part': None}", "None, which is not a number"),
            ("1 / 0", "raised ZeroDivisionError: division by zero"),
        ],
    )
    def test_the_offending_example_is_shown(self, score, body, reason):
        with pytest.raises(RlgfError) as caught:
            score(f"def f(text):\n    return 1.0 if text == 'short' else {body}")
        letter = str(caught.value)
        assert caught.value.exit_code == 1
        assert reason in letter
        assert "example 'two'" in letter and "prompt: second prompt" in letter and "text: a longer text" in letter

    def test_where_it_raised(self, score):
        with pytest.raises(RlgfError) as caught:
            score("def deeper(x):\n    raise ValueError('no')\n\ndef f(text):\n    return deeper(text)")
        assert caught.value.where is not None and caught.value.where.endswith("mine.py:2")

    @pytest.mark.parametrize(("returned", "reason"), BATCHED.items())
    def test_batched(self, score, returned, reason):
        with pytest.raises(RlgfError) as caught:
            score(f"def f(texts): return {returned}")
        assert caught.value.exit_code == 1
        assert reason in str(caught.value)
        assert ("'two'" if reason == "nan" else "a batch of 2 texts, the first of example 'one'") in str(caught.value)

    def test_a_long_text_is_shortened_and_an_empty_one_is_named(self):
        class Nan(Reward):
            name = "nan"

            def score(self, examples, texts):
                return [Score(float("nan")) for _ in texts]

        with pytest.raises(RlgfError) as caught:
            score_checked(Nan(), [ONE], ["word " * 1000])
        assert len(str(caught.value)) < 700
        with pytest.raises(RlgfError, match=r"text: \(empty\)"):
            score_checked(Nan(), [ONE], [""])

    @pytest.mark.parametrize("returned", [[1.0, 2.0], [Score(1.0)], None, np.ones(2)])
    def test_a_reward_class_that_breaks_the_protocol(self, returned):
        class Plugin(Reward):
            name = "plugin"

            def score(self, examples, texts):
                return returned

        with pytest.raises(RlgfError, match="'plugin' returned"):
            score_checked(Plugin(), [ONE, TWO], TEXTS)

    def test_nothing_to_score_is_no_error(self):
        assert score_checked(make_reward([PartConfig(name="rouge")]), [], []) == []
