"""Texts made elsewhere, joined to examples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlgf_cli.artifacts.predictions import answers_alone, answers_to
from rlgf_cli.errors import UserError
from rlgf_cli.protocols import Example

EXAMPLES = [Example("a", "prompt a", ("ref a",)), Example("b", "prompt b"), Example("c", "prompt c")]


@pytest.fixture
def given(tmp_path: Path):
    """``given(rows)``: a JSONL file with them."""

    def write(*rows: dict) -> Path:
        path = tmp_path / "texts.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def joined(path: Path, **options) -> list[tuple[str, str]]:
    return [(answer.example.id, answer.text) for answer in answers_to(EXAMPLES, path, **options)[0]]


class TestJoin:
    def test_by_id_in_the_order_of_the_data_whatever_the_texts_key(self, given):
        path = given(
            {"id": "c", "text": "C"},
            {"id": "a", "prediction": "A", "prompt": "prompt a"},
            {"id": "b", "completion": ""},
        )
        assert joined(path) == [("a", "A"), ("b", ""), ("c", "C")]

    def test_by_prompt_where_there_is_no_id(self, given):
        rows = [{"prompt": f"prompt {x}", "completion": x.upper()} for x in "bca"]
        assert joined(given(*rows)) == [("a", "A"), ("b", "B"), ("c", "C")]

    def test_the_data_decides_on_references_and_finish_reasons_are_kept(self, given):
        rows = [{"id": x, "prediction": x, "references": ["other"], "finish_reason": "length"} for x in "abc"]
        answers, _ = answers_to(EXAMPLES, given(*rows))
        assert [a.example for a in answers] == EXAMPLES
        assert {a.finish_reason for a in answers} == {"length"}

    def test_a_guide_files_further_samples_are_left_out_and_counted(self, given):
        rows = [
            {"id": x, "prompt": f"prompt {x}", "completion": f"{x}{k}", "sample_index": k}
            for x in "abc"
            for k in (0, 1)
        ]
        answers, counts = answers_to(EXAMPLES, given(*rows))
        assert [a.text for a in answers] == ["a0", "b0", "c0"]
        assert counts == {"other_samples": 3, "missing": 0}

    def test_of_a_limit_the_first_examples_need_a_prediction(self, given):
        answers, counts = answers_to(EXAMPLES, given({"id": "a", "text": "A"}), limit=1)
        assert [answer.text for answer in answers] == ["A"] and counts["missing"] == 0
        some = given({"id": "b", "text": "B"})
        answers, counts = answers_to(EXAMPLES, some, limit=2, on_missing="skip")
        assert [answer.text for answer in answers] == ["B"] and counts["missing"] == 1
        with pytest.raises(UserError, match="none of the first 1 examples has a prediction") as caught:
            answers_to(EXAMPLES, some, limit=1, on_missing="skip")
        assert caught.value.where == str(some) and "--limit" in caught.value.hint
        with pytest.raises(UserError, match="1 of 1 examples have no prediction: 'a'"):
            answers_to(EXAMPLES, given({"id": "b", "text": "B"}), limit=1)

    def test_missing_ones_can_be_skipped_and_are_counted(self, given):
        answers, counts = answers_to(EXAMPLES, given({"id": "b", "text": "B"}), on_missing="skip")
        assert [a.example.id for a in answers] == ["b"] and counts["missing"] == 2

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([{"id": "a", "text": "A"}], "2 of 3 examples have no prediction: 'b', 'c'"),
            (
                [{"id": x, "text": x} for x in "abcd"],
                "1 of 4 predictions belong to no example of the data: 'd' on line 4",
            ),
            ([{"id": x, "text": x} for x in "abcab"], "2 of 5 predictions are for an example that has one already"),
            ([{"id": x, "text": x, "prompt": "p"} for x in "abc"], "3 of 3 predictions have the id of an example but"),
            ([{"prompt": "unknown", "text": "x"}], "1 of 1 predictions belong to no example"),
        ],
    )
    def test_mismatches_are_counted_and_named(self, given, rows, message):
        with pytest.raises(UserError) as caught:
            answers_to(EXAMPLES, given(*rows))
        assert message in caught.value.message

    def test_a_prompt_that_two_examples_share_does_not_join(self, given):
        twins = [Example("x", "same"), Example("y", "same")]
        with pytest.raises(UserError, match="belong to no example"):
            answers_to(twins, given({"prompt": "same", "text": "t"}))


class TestAlone:
    def test_own_references_and_line_numbers_for_ids(self, given):
        answers, _ = answers_alone(given({"prompt": "p", "text": "t", "references": ["r"]}, {"id": "z", "text": ""}))
        assert [(a.example.id, a.example.prompt, a.example.references, a.text) for a in answers] == [
            ("line-1", "p", ("r",), "t"),
            ("z", "", (), ""),
        ]

    def test_an_id_twice(self, given):
        with pytest.raises(UserError, match=r"texts.jsonl:2: the id 'a' is here twice \(first on line 1\)"):
            answers_alone(given({"id": "a", "text": "1"}, {"id": "a", "text": "2"}))


class TestRecords:
    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"id": "a", "txt": "x"}, "no field 'prediction', 'completion' or 'text'"),
            ({"id": "a", "text": None}, "the field 'text' is None, not a text"),
            ({"id": "a", "completion": "x", "prefix": "he"}, "continues a prefix"),
            ({"id": "a", "text": "x", "finish_reason": "tired"}, "'finish_reason'"),
        ],
    )
    def test_refused_with_the_line(self, given, row, message):
        with pytest.raises(UserError) as caught:
            answers_alone(given({"id": "ok", "text": "fine"}, row))
        assert message in str(caught.value) and (caught.value.where or "").endswith("texts.jsonl:2")

    def test_no_records(self, given):
        with pytest.raises(UserError, match="holds no predictions"):
            answers_alone(given())
