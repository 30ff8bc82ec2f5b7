"""The table of a sweep from comparisons, and the budget that its runs share."""

from __future__ import annotations

import csv
import io
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlgf_cli.ledger.shared_budget import SharedBudget
from rlgf_cli.sweep import table as tables


def row(system: str, value: float, half: float | None, p: float | None = None, seeds: int = 2) -> dict[str, Any]:
    """A row of ``rlgf compare --json``; ``half`` is half of its interval, ``p`` None for the base."""
    low, high = (None, None) if half is None else (value - half, value + half)
    difference = None if p is None else {
        "value": 0.25, "low": 0.125, "high": 0.375, "p_bootstrap": p / 2, "p_randomisation": p / 4, "p_holm": p,
    }  # fmt: skip
    return {"system": system, "seeds": seeds, "value": value, "low": low, "high": high, "difference": difference}


def comparison(base: str, **figures: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "schema_version": 1, "base": base, "tests": {"notes": ["said of both", f"said of {base}"]},
        "figures": {k: {"n": 40, "n_skipped": 0, "aggregate": "mean", "rows": rows} for k, rows in figures.items()},
    }  # fmt: skip


SYSTEMS = [
    tables.Row("ppo", 2),
    tables.Row("ppo++", 2),
    tables.Row("x|<b>", 3, ["seed 1 failed: a <bad> | line", "seed 2 waiting"]),
    tables.Row("SFT", 1),
]
AGAINST_PPO = comparison(
    "ppo",
    bleu=[row("ppo", 0.40, 0.02), row("ppo++", 0.45, 0.02, 0.00001), row("SFT", 0.30, 0.02, 0.0312, seeds=1)],
    length=[row("ppo", 7.0, None), row("ppo++", 6.0, None, 1.0), row("SFT", 5.0, None, 0.5, seeds=1)],
)
AGAINST_SFT = comparison(
    "SFT",
    bleu=[row("SFT", 0.30, 0.02, seeds=1), row("ppo", 0.40, 0.02, 0.25), row("ppo++", 0.45, 0.02, 0.125)],
    length=[row("SFT", 5.0, None, seeds=1), row("ppo", 7.0, None, 0.5), row("ppo++", 6.0, None, 0.5)],
)


@pytest.fixture
def built() -> tables.Table:
    both = {"ppo": AGAINST_PPO, "SFT": AGAINST_SFT}
    return tables.build(both, SYSTEMS, baselines=["ppo", "SFT"], level=0.95)


def test_markdown(built):
    text = tables.to_markdown(built)
    lines = text.splitlines()
    assert lines[0] == "| system | seeds | bleu | p vs ppo | p vs SFT | length | p vs ppo | p vs SFT |"
    assert lines[2:6] == [
        "| ppo | 2 | 0.4000 [0.3800, 0.4200] | – | 0.2500 | **7.0000** | – | 0.5000 |",
        "| ppo++ | 2 | **0.4500 [0.4300, 0.4700]** | <0.0001 | 0.1250 | 6.0000 | 1.0000 | 0.5000 |",
        "| x\\|<b> | 0 of 3 | missing | missing | missing | missing | missing | missing |",
        "| SFT | 1 | 0.3000 [0.2800, 0.3200] | 0.0312 | – | 5.0000 | 0.5000 | – |",
    ]
    assert "- Mean over seeds with its 95% interval; bleu n = 40, length n = 40." in lines
    assert any("corrected after Holm, for each baseline by itself" in line for line in lines)
    assert "- Bold in bleu: the highest mean, ppo++; no other interval reaches into it." in lines
    assert "- Missing: x\\|<b>: seed 1 failed: a <bad> \\| line" in lines
    assert "- Missing: x\\|<b>: seed 2 waiting" in lines
    assert [line for line in lines if "said of" in line] == ["- said of both", "- said of ppo", "- said of SFT"]


def test_the_highest_mean_is_marked_with_whose_intervals_reach_into_its_own():
    wide = comparison("ppo", bleu=[row("ppo", 0.40, 0.02), row("ppo++", 0.43, 0.02, 0.1), row("SFT", 0.3, 0.02, 0.1)])
    built = tables.build({"ppo": wide}, [row for row in SYSTEMS if "|" not in row.system], baselines=[], level=0.9)
    assert tables.highest(built) == {"bleu": ("ppo++", ["ppo"])}
    assert any("the intervals of ppo reach into its own" in note for note in tables.notes(built))


def test_a_baseline_that_is_missing_is_named_and_not_left_out():
    built = tables.build({"SFT": AGAINST_SFT}, SYSTEMS, baselines=["x|<b>", "SFT"], level=0.95)
    assert tables.columns(built)[:5] == ["system", "seeds", "bleu", "p vs x|<b>", "p vs SFT"]
    assert tables.cells(built, built.rows[0])[:5] == ["ppo", "2", "0.4000 [0.3800, 0.4200]", "missing", "0.2500"]
    assert tables.cells(built, built.rows[2])[:5] == ["x|<b>", "0 of 3", "missing", "–", "missing"]


def test_csv_holds_the_numbers_in_full(built):
    rows = list(csv.DictReader(io.StringIO(tables.to_csv(built))))
    assert len(rows) == 8
    best = next(r for r in rows if (r["system"], r["figure"]) == ("ppo++", "bleu"))
    assert (float(best["value"]), float(best["low"])) == (0.45, 0.45 - 0.02)
    assert float(best["p_holm vs ppo"]) == 0.00001 and float(best["p_randomisation vs SFT"]) == 0.125 / 4
    assert float(best["value vs ppo"]) == 0.25
    gone = next(r for r in rows if r["system"] == "x|<b>")
    assert (gone["seeds"], gone["planned"], gone["value"], gone["p_holm vs ppo"]) == ("0", "3", "", "")
    assert gone["missing"] == "seed 1 failed: a <bad> | line; seed 2 waiting"


def test_html_is_escaped_and_stands_alone(built):
    page = tables.to_html(built, "a <sweep>")
    assert "<bad>" not in page and "x|<b>" not in page and "x|&lt;b&gt;" in page
    assert "<title>a &lt;sweep&gt;</title>" in page
    assert "<td><b>0.4500 [0.4300, 0.4700]</b></td>" in page
    assert not re.search(r"https?://|<script|<link|src=", page)
    assert "prefers-color-scheme: dark" in page


class TestPurse:
    def test_what_a_run_did_not_use_is_there_for_the_next(self):
        charged = {"a": 0.0, "b": 0.0}
        shared_budget = SharedBudget(10.0, lambda runs: sum(charged[r] for r in runs))
        assert shared_budget.lend("a", 2) == 5.0
        assert shared_budget.lend("b", 1) == 5.0
        charged["a"] = 1.0
        shared_budget.settle("a", ["a"])
        assert shared_budget.lend("c", 1) == 4.0
        charged["b"] = 5.0
        shared_budget.settle("b", ["b"])
        assert not shared_budget.has_more("b")
        shared_budget.settle("c", [])
        assert shared_budget.has_more("b") and shared_budget.lend("b", 1) == 9.0
        assert shared_budget.spent() == 6.0

    def test_no_limit(self):
        assert not SharedBudget(None, lambda runs: 0.0).has_more("a")

    @given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 1), st.integers(1, 3)), max_size=30), st.floats(0, 20))
    def test_runs_that_keep_to_their_caps_keep_to_the_total(self, moves, total):
        """Runs start, spend a share of their cap, and end, in any order."""
        charged: dict[str, float] = {}
        caps: dict[str, float] = {}
        shared_budget = SharedBudget(total, lambda runs: sum(charged.get(r, 0.0) for r in runs))
        for which, share, sharers in moves:
            name = str(which)
            if name in caps:
                charged[name] = max(charged.get(name, 0.0), caps.pop(name) * share)
                shared_budget.settle(name, [name])
            else:
                caps[name] = shared_budget.lend(name, sharers)
                assert caps[name] >= charged.get(name, 0.0) - 1e-9  # the books count in billionths
            most = sum(caps.get(n, charged.get(n, 0.0)) for n in {*caps, *charged})
            assert most <= total + 1e-6
