"""Operations: the built-in six, files of one's own, and the reviewer's verdict."""

from __future__ import annotations

import pytest

from rlgf_cli.errors import UserError
from rlgf_cli.evolve.operations import read_operations
from rlgf_cli.evolve.reviewer import read_verdict


def test_the_built_in_six():
    operations = read_operations(None)
    assert [(operation.name, operation.breadth) for operation in operations] == [
        ("breadth", True),
        ("constraints", False),
        ("deepening", False),
        ("concretizing", False),
        ("reasoning", False),
        ("complicate_input", False),
    ]
    for operation in operations:
        asked = operation.prompt_for("Do {this} and {instruction}.")
        assert asked.endswith("Task:\nDo {this} and {instruction}.")
    assert len({operation.prompt_for("x") for operation in operations}) == 6


def test_a_file_of_one_s_own(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(
        "operations:\n- {name: rhyme, prompt: 'Let {instruction} rhyme.'}\n"
        "- {name: cut, prompt: '{instruction} Short!'}\n"
    )
    assert [operation.prompt_for("it") for operation in read_operations(str(path))] == ["Let it rhyme.", "it Short!"]


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("operations:\n- {name: a, prompt: '{instruction}'}\n", "at least 2", ":1"),
        ("operations:\n- {name: a, prompt: '{instruction}'}\n- {name: b, prompt: nothing}\n", "must hold", ":3"),
        ("operations:\n- {name: a, prompt: '{instruction}'}\n- {name: a, prompt: '{instruction}'}\n", "twice", ":1"),
        ("operations:\n- {name: A b, prompt: '{instruction}'}\n- {name: b, prompt: '{instruction}'}\n", "name", ":2"),
        ("operations:\n- {name: a, promt: '{instruction}'}\n- {name: b, prompt: '{instruction}'}\n", "promt", ":2"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_its_line(tmp_path, text, message, line):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_operations(str(path))
    assert f"own.yaml{line}" in str(caught.value)


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match="no such"):
        read_operations(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("The second one asks for rhymes.\nVerdict: different", True),
        ("Verdict: Equal\n", False),
        ("Verdict: different\nBut I am not sure.", None),
        ("different", None),
        ("", None),
    ],
)
def test_the_reviewers_last_line_is_read_strictly(answer, verdict):
    assert read_verdict(answer) is verdict
