"""Reading a set and its steps, and what the figures say of them."""

from __future__ import annotations

import numpy as np
import pytest

from conftest import write_rows
from evolved_sets import instruction, step, write_set
from rlgf_cli.errors import UserError
from rlgf_cli.evolve import describe
from rlgf_cli.evolve.measure import complexity, figures, measure_texts
from rlgf_cli.evolve.novelty import NgramSpace
from rlgf_cli.evolve.sets import read_set
from rlgf_cli.report.evolution import plots


def test_a_folder_has_texts_their_seeds_steps_and_rows(tmp_path):
    found = read_set(str(write_set(tmp_path / "set", seeds=3, steps=2)))
    assert sorted(found.texts) == sorted(instruction(f"s{i}", k) for i in range(3) for k in (1, 2))
    assert {text: (seed, at) for text, seed, at in zip(found.texts, found.seeds, found.steps, strict=True)} == {
        instruction(f"s{i}", k): (f"s{i}", k) for i in range(3) for k in (1, 2)
    }
    assert len(found.rows) == 9 and found.notes == []
    assert [file.name for file in found.files] == ["instructions.jsonl", "steps.jsonl"]
    assert read_set(str(tmp_path / "set" / "instructions.jsonl")).rows == found.rows


def test_a_set_without_steps_has_a_note(tmp_path):
    folder = write_set(tmp_path / "set", seeds=3, steps=2)
    (folder / "steps.jsonl").unlink()
    found = read_set(str(folder))
    assert found.rows is None and found.steps is not None
    assert found.notes == ["no steps.jsonl beside it: operations, outcomes, novelty, queries and cost are left out"]


def test_any_file_of_prompts_is_a_set_whose_texts_are_seeds(tmp_path):
    rows = [{"prompt": "Name a bird."}, {"id": "x", "prompt": "?!"}, {"prompt": "Bake bread.", "references": [""]}]
    found = read_set(str(write_rows(tmp_path / "p.jsonl", rows)))
    assert sorted(zip(found.texts, found.seeds, strict=True)) == [("Bake bread.", "line-3"), ("Name a bird.", "line-1")]
    assert found.wordless == 1 and found.steps is None and "every text counts as a seed" in found.notes[0]


def test_the_order_in_the_file_is_nothing(tmp_path):
    rows = [{"id": str(i), "prompt": f"Say the number {i * i}."} for i in range(9)]
    one, two = (read_set(str(write_rows(tmp_path / name, some))) for name, some in (("a", rows), ("b", rows[::-1])))
    assert (one.texts, one.seeds) == (two.texts, two.seeds)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the file holds no records"),
        ([{"text": "a"}], ":1: the field 'prompt' is missing"),
        ([{"prompt": "Name a bird."}], "there is 1 text with a word"),
        ([{"prompt": "..."}, {"prompt": "?"}], "there is 0 texts with a word"),
        ([{"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"}], ":2: the id 'a' is here twice"),
        ([{"prompt": "x", "seed_id": "s"}], ":1: the field 'visit' is missing"),
    ],
)
def test_a_file_that_is_no_set_is_refused(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        read_set(str(write_rows(tmp_path / "p.jsonl", rows)))


def test_a_folder_without_instructions_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no instructions\.jsonl"):
        read_set(str(tmp_path))


def test_totals_count_every_rewrite_and_its_price(tmp_path):
    rows = [
        step("a", 1, queries=2, cost_usd=0.5, answer="kept", answer_cost_usd=0.25, novelty=0.4),
        step("a", 2, outcome="refusal", text="", cost_usd=None, novelty=None),
        step("a", 3, answer="empty", queries=2, cost_usd=0.5),
        step("b", 1, operation="breadth", outcome="duplicate", cost_usd=None),
    ]
    found = describe.totals(rows)
    assert found["outcomes"] == {"kept": 1, "refusal": 1, "answer:empty": 1, "duplicate": 1}
    assert (found["rewrites"], found["kept"], found["kept_share"], found["novelty"]) == (4, 1, 0.25, 0.4)
    assert (found["queries"], found["queries_per_kept"]) == (6, 6.0)
    assert (found["cost_usd"], found["unpriced"]) == (1.25, 1)  # a text without a price; what gave no text costs none
    assert found["operations"] == {"breadth": 0.25, "deepening": 0.75}
    per_seed = describe.by_seed_totals(rows)
    assert describe.per_kept(per_seed, ["a"]) == {"queries_per_kept": 5.0, "cost_per_kept": 1.25}
    assert describe.per_kept(per_seed, ["a", "b", "c"]) == {"queries_per_kept": 6.0}
    assert describe.per_kept(per_seed, ["b"]) == {}


@pytest.mark.parametrize(("prices", "said"), [([0.5, 0.25], "0.375"), ([0.5, None], "unknown"), ([None, 0.5], None)])
def test_cost_is_drawn_as_far_as_all_of_it_is_known(prices, said):
    """As ``per_kept``: what a text without a price cost is not 0."""
    means = {"texts": 1, "words": 6.0, "sentences": 1.0, "conjunctions": 0.0, "type_token_ratio": 1.0}
    rows = [{"step": k, **means, **describe.totals([step("a", k, cost_usd=p)])} for k, p in enumerate(prices, 1)]
    (spent,) = [p for p in plots({"by_step": rows, "over_time": None}, "") if p.name == "spent"]
    assert (f"USD per instruction so far: {said} at the last step" in spent.svg) == (said is not None)
    assert ("USD per instruction" in spent.svg) == (said is not None)


def test_nothing_kept_and_nothing_priced_is_null(tmp_path):
    found = describe.totals([step("a", 1, outcome="refusal", text="", cost_usd=None)])
    assert (found["queries_per_kept"], found["cost_usd"], found["novelty"]) == (None, None, None)


def test_by_step_the_seeds_come_first(tmp_path):
    found = read_set(str(write_set(tmp_path / "set", seeds=3, steps=2)))
    rows = describe.by_step(found, measure_texts(found.texts, NgramSpace().embed(found.texts)).complexity)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["texts"] for row in rows] == [3, 3, 3, 0]
    assert [row["words"] for row in rows] == [3, 6, 9, None]
    assert [row.get("kept_share") for row in rows] == [None, 1, 1, 0]


def test_over_time_is_ten_parts(tmp_path):
    rows = [step(f"s{i}", 1, operation="breadth" if i < 10 else "deepening") for i in range(25)]
    parts = describe.over_time(rows)
    assert [part["until"] for part in parts] == [2, 5, 8, 10, 12, 15, 18, 20, 22, 25]
    assert [part["operations"].get("breadth", 0) for part in parts] == [1] * 4 + [0] * 6
    assert len(describe.over_time(rows[:3])) == 3 and describe.over_time([]) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Name a bird.", (3, 1, 0, 1)),
        ("Say why it is so, and if it is, when. Then stop!", (12, 2, 4, 10 / 12)),
        ("Version 2.5 of a.b\n- one\n- two", (8, 3, 0, 1)),
    ],
)
def test_complexity_by_hand(text, expected):
    assert complexity(text) == pytest.approx(expected)


def test_the_figures_of_a_set_with_everything_twice_and_of_its_texts_alone():
    texts = ["Name a bird of prey.", "Bake bread with rye flour and salt.", "Sort five numbers by size, please."]
    of = measure_texts(texts, NgramSpace().embed(texts))
    once, twice = (figures(of, np.array(which), 0.5) for which in ([0, 1, 2], [0, 1, 2, 0, 1, 2]))
    assert once["clusters"] == twice["clusters"] == 3
    assert twice["vendi"] == pytest.approx(once["vendi"]) and 2.5 < once["vendi"] < 3.001
    assert twice["distinct_2"] == pytest.approx(once["distinct_2"] / 2)
    assert twice["self_bleu"] == pytest.approx(100) and once["self_bleu"] < 10
    assert twice["words"] == once["words"] == 6


def test_a_figure_that_no_text_is_long_enough_for_is_left_out():
    texts = ["Sing.", "Dance."]
    found = figures(measure_texts(texts, NgramSpace().embed(texts)), np.arange(2), 0.5)
    assert "distinct_2" not in found and found["distinct_1"] == 1
