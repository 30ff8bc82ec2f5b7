"""What a report is made of: curves and their bands, systems, levels, texts that are safe, plots."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reporting import rows, write_run
from rlgf_cli.artifacts.jsonl import write_jsonl
from rlgf_cli.errors import UserError
from rlgf_cli.report import draw, page, plots, tables, texts
from rlgf_cli.report.draw import DARK, LIGHT, Look
from rlgf_cli.report.read import Curve, Evaluation, Run, read_curves, read_run
from rlgf_cli.report.systems import System, band, group_systems, passing_step, score_figure, thinned


def curve(*values: float, steps: list[int] | None = None) -> Curve:
    return Curve(np.array(steps or range(1, len(values) + 1)), np.array(values, dtype=float))


class TestPassingTheGuide:
    @pytest.mark.parametrize(
        ("values", "step"),
        [
            ([0.1, 0.6, 0.7], 20),
            ([0.6, 0.4, 0.7, 0.8], 30),  # it was above before, and fell below again
            ([0.6, 0.7], 10),
            ([0.6, 0.7, 0.5], None),  # level with the guide is not above it
            ([0.1, 0.2], None),
            ([], None),
        ],
    )
    def test_the_first_step_from_which_on_all_are_above(self, values, step):
        assert passing_step(curve(*values, steps=[10 * i for i in range(1, len(values) + 1)]), 0.5) == step

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0, 1))
    def test_against_the_definition(self, values, level):
        expected = next((i + 1 for i in range(len(values)) if all(v > level for v in values[i:])), None)
        assert passing_step(curve(*values), level) == expected


class TestBands:
    def test_few_seeds_span_from_the_lowest_to_the_highest(self):
        found = band([curve(0, 1), curve(2, 5), curve(4, 0)], 100)
        assert found.mean.tolist() == [2, 2] and found.low.tolist() == [0, 0] and found.high.tolist() == [4, 5]

    def test_five_seeds_have_their_standard_deviation(self):
        found = band([curve(float(v)) for v in range(5)], 100)
        assert found.mean[0] == 2 and found.high[0] - 2 == pytest.approx(np.std(range(5), ddof=1)) == 2 - found.low[0]

    def test_one_seed_has_none(self):
        assert band([curve(1, 2)], 100).low is None

    def test_the_mean_is_of_the_steps_that_all_have(self):
        found = band([curve(1, 2, 3, steps=[10, 20, 30]), curve(3, 4, steps=[20, 30])], 100)
        assert found.steps.tolist() == [20, 30] and found.mean.tolist() == [2.5, 3.5]
        assert found.seeds[0].steps.tolist() == [10, 20, 30]

    @given(st.lists(st.floats(-5, 5), min_size=1, max_size=60), st.integers(1, 70))
    def test_thinning_is_the_mean_of_each_group(self, values, width):
        found = thinned(curve(*values), width)
        groups = [values[i : i + width] for i in range(0, len(values), width)]
        assert found.values == pytest.approx([sum(g) / len(g) for g in groups])
        assert len(found.steps) == len(groups) and found.steps[0] == pytest.approx((1 + min(width, len(values))) / 2)

    def test_a_long_run_is_thinned_and_the_caption_says_so(self):
        found = band([curve(*range(100_000))], 400)
        assert len(found.steps) <= 400 and found.width == 250
        assert "mean of up to 250 rows" in plots._caption([found])


def run_of(tmp_path: Path, name: str, **how: Any) -> Run:
    return read_run(write_run(tmp_path / name, metrics=rows(4), **how))


class TestSystems:
    def test_equal_labels_are_seeds(self, tmp_path):
        a, b, c = (run_of(tmp_path, name, seed=i) for i, name in enumerate("abc"))
        assert [(s.label, len(s.runs)) for s in group_systems([("PPO", a), ("x", b), ("PPO", c)])] == [
            ("PPO", 2),
            ("x", 1),
        ]

    def test_without_labels_the_seed_and_folders_make_no_other_system(self, tmp_path):
        guided = {"algorithm.name": "ppo++", "guide.name": "g.jsonl"}
        runs = [
            run_of(tmp_path, "a", seed=0, flags={"model": "s0/sft"}),
            run_of(tmp_path, "b", seed=1, flags={"model": "s1/sft"}),
            run_of(tmp_path, "c", seed=0, flags=guided),
            run_of(tmp_path, "d", seed=1, flags={"optim.learning_rate": 0.1}),
        ]
        systems = group_systems([(None, run) for run in runs])
        assert [(s.label, len(s.runs)) for s in systems] == [("ppo", 2), ("c", 1), ("d", 1)]

    def test_other_data_or_a_seed_again_is_another_system(self, tmp_path):
        def run(name: str, seed: int, data: str) -> Run:
            found = run_of(tmp_path, name, seed=seed)
            parent = {"path": found.values["data"], "sha256": data}
            return replace(found, manifest={**found.manifest, "parents": [parent]})

        runs = [run("a", 0, "one"), run("b", 1, "one"), run("c", 0, "one"), run("d", 2, "other")]
        assert [[r.folder.name for r in s.runs] for s in group_systems([(None, r) for r in runs])] == [
            ["a", "b"],
            ["c"],
            ["d"],
        ]

    def test_folders_with_one_name_have_different_labels(self, tmp_path):
        one = run_of(tmp_path, "x/run", flags={"kl": 0.1})
        two = run_of(tmp_path, "y/run", flags={"kl": 0.2})
        assert [s.label for s in group_systems([(None, one), (None, two)])] == [str(one.folder), str(two.folder)]

    def test_a_folder_twice_is_refused(self, tmp_path):
        run = run_of(tmp_path, "a")
        with pytest.raises(UserError, match="named twice"):
            group_systems([("x", run), ("y", run)])

    def test_a_label_of_unlike_runs_is_noted(self, tmp_path):
        a, b = run_of(tmp_path, "a"), run_of(tmp_path, "b", seed=1, flags={"kl": 0.5})
        assert tables.unlike_seeds(System("PPO", [a, b])) == ["kl.coef"]
        assert tables.unlike_seeds(System("PPO", [a])) == []


class TestTheTrainingsScore:
    def run(self, *parts: dict[str, Any]) -> Run:
        return Run(Path("r"), {}, {"reward": list(parts)})

    def evaluation(self, *metrics: dict[str, Any], figures: tuple[str, ...]) -> Evaluation:
        return Evaluation(Path("e"), {name: {"value": 1.0} for name in figures}, {}, metrics)

    def part(self, name: str, weight: float = 1.0, **params: Any) -> dict[str, Any]:
        return {"name": name, "weight": weight, "params": params}

    def test_rewards_that_add_up_to_the_trainings(self):
        run = self.run(self.part("coverage"), self.part("length", 0.5))
        same = [self.part("reward:coverage"), self.part("reward:length", 0.5)]
        assert score_figure(run, self.evaluation(*same, figures=("reward.total",))) == "reward.total"
        other = [self.part("reward:coverage"), self.part("reward:length", 0.4)]
        assert score_figure(run, self.evaluation(*other, figures=("reward.total",))) is None

    def test_the_same_function_or_metric(self):
        function = self.part("a/b.py:good")
        assert score_figure(self.run(function), self.evaluation(function, figures=("good",))) == "good"
        plain = self.part("coverage")
        assert score_figure(self.run(plain), self.evaluation(plain, figures=("coverage",))) == "coverage"
        halved = self.part("coverage", 0.5)
        assert score_figure(self.run(halved), self.evaluation(halved, figures=("coverage",))) is None
        set_otherwise = self.part("coverage", stem=True)
        assert score_figure(self.run(plain), self.evaluation(set_otherwise, figures=("coverage",))) is None


class TestReading:
    def test_a_torn_last_line_is_dropped(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        write_jsonl(path, rows(3))
        with path.open("a") as stream:
            stream.write('{"step": 4, "score/me')
        curves, regimes = read_curves(path)
        assert curves["score/mean"].steps.tolist() == [1, 2, 3] and regimes == ["guide>policy"]

    def test_the_status_of_a_run_says_how_far_it_is(self, tmp_path):
        assert run_of(tmp_path, "a", status="running").status() == "running, step 4 of 40"
        assert run_of(tmp_path, "b", status="interrupted").status() == "interrupted, step 4 of 40"
        assert run_of(tmp_path, "c").status() == "done"

    def test_spend_of_a_run_that_goes_on_is_that_of_its_last_row(self, tmp_path):
        paid = [{**row, "guide/calls": 3 * row["step"], "guide/usd": 0.5, "guide/requests": 2} for row in rows(4)]
        running = read_run(write_run(tmp_path / "a", metrics=paid, status="running", spend={"calls": 1}))
        assert tables.spend(running) == {"calls": 12, "charged_usd": 0.5, "episodes": 32, "requests": 8}
        done = read_run(write_run(tmp_path / "b", metrics=paid, spend={"calls": 13, "usage": {"prompt_tokens": 7}}))
        assert tables.spend(done) == {"calls": 13, "prompt_tokens": 7, "episodes": 32, "requests": 8}

    def test_config_values_with_their_origins(self, tmp_path):
        given_, defaults = tables.config_rows(run_of(tmp_path, "a"))
        assert ("max_steps", "40", "flag") in given_ and ("kl.coef", "0.02") in defaults
        assert not {key for key, *_ in given_} & {key for key, _ in defaults}

    def test_what_differs_leaves_out_the_defaults_of_a_guide_that_only_some_have(self, tmp_path):
        guided = {"algorithm.name": "ppo++", "guide.name": "g.jsonl", "kl": 0.3}
        systems = [System("a", [run_of(tmp_path, "a")]), System("b", [run_of(tmp_path, "b", flags=guided, seed=1)])]
        rows_ = dict(tables.differing(systems))
        assert rows_ == {"algorithm.name": ["ppo", "ppo++"], "guide.name": ["–", "g.jsonl"], "kl.coef": ["0.02", "0.3"]}


class TestTexts:
    def test_what_a_browser_would_obey_or_hide_is_seen(self):
        assert texts.visible("a\x00b\x1b[1m\u202ec\x85\ud800d\te\n") == "a␀b␛[1m⟨U+202E⟩c⟨U+0085⟩�d\te\n"
        assert texts.visible("né 日本 👩‍👧 שלום <b>&") == "né 日本 👩‍👧 שלום <b>&"

    def test_a_long_text_says_how_much_is_left_out(self):
        assert texts.excerpt("x" * 1000) == texts.Excerpt("x" * texts.SHOWN, 1000 - texts.SHOWN)

    def test_segments_without_text_are_shown_without_authors(self):
        segments = [{"author": "guide", "ids": [1, 2]}, {"author": "policy", "ids": [3]}]
        sample = texts._sample({"prompt": "p", "text": "a b c", "segments": segments, "score": 1.0, "finished": True})
        assert [author for author, _ in sample.parts] == [""] and sample.tokens == {"guide": 2, "policy": 1}

    def test_numbers_are_never_made_up(self):
        assert (page.number(None), page.count(None), page.p_value(None), page.duration(None)) == ("–",) * 4
        assert (page.number(0.12345), page.number(0.5, signed=True), page.p_value(1e-9)) == (
            "0.123",
            "+0.500",
            "< 0.0001",
        )
        assert (page.duration(59.6), page.duration(3700), page.count(1234.0)) == ("1 min 0 s", "1 h 1 min", "1,234")


def luminance(colour: str) -> float:
    """Relative luminance of ``#rrggbb`` (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


class TestPlots:
    @pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
    def test_every_colour_stands_out_from_the_paper(self, colours):
        paper = luminance(colours["paper"])
        for role, colour in colours.items():
            light, dark = sorted((paper, luminance(colour)), reverse=True)
            assert role in ("paper", "grid") or (light + 0.05) / (dark + 0.05) >= 4.5, role

    def test_systems_differ_in_more_than_colour(self):
        looks = [Look.of(i) for i in range(20)]
        assert len({(look.marker, str(look.dashes)) for look in looks[:8]}) == 8 and len(set(map(str, looks))) == 20

    def test_an_svg_follows_the_theme_and_is_whole_without_the_page(self, tmp_path):
        runs = [run_of(tmp_path, name, seed=i) for i, name in enumerate("ab")]
        styled = [plots.StyledSystem(System("a $x_1$ <b>&\x07", runs), Look.of(0))]
        made = plots.learning("p", 'T "q" <i>', styled, "score/mean", what="score")
        assert made is not None
        assert (
            "var(--s0)" in made.inline
            and "var(--ink)" in made.inline
            and not set(LIGHT.values()) & set(re.findall("#[0-9a-f]{6}", made.inline))
        )
        assert LIGHT["s0"] in made.svg and "var(" not in made.svg
        ElementTree.fromstring(made.svg)
        root = ElementTree.fromstring(made.inline)
        assert root.get("role") == "img" and "width" not in root.attrib
        assert root[0].text == 'T "q" <i>' and "a $x_1$ <b>&\ufffd ends at" in (root[1].text or "")
        ids = re.findall(r'\bid="([^"]*)"', made.inline)
        assert ids and all(name.startswith("p-") for name in ids)
        assert all(f'id="{name}"' in made.inline for name in re.findall(r'href="#([^"]*)"', made.inline))
        assert made.png.startswith(b"\x89PNG")
        assert "from the lowest to the highest seed" in made.caption
        assert plots.learning("p", "T", styled, "no/such", what="score") is None

    def test_the_same_plot_twice_is_the_same_file(self):
        rows_ = [plots.IntervalRow("x", Look.of(0), 0.5, 0.4, 0.6)]
        one, two = plots.intervals(rows_, "f", ""), plots.intervals(rows_, "f", "")
        assert one.svg == two.svg and one.png == two.png

    def test_whole_numbers_have_a_bin_each(self):
        edges, whole = plots._bins(np.array([0.0, 1.0, 1.0]))
        assert whole and edges.tolist() == [-0.5, 0.5, 1.5]
        edges, whole = plots._bins(np.array([0.3, 0.3]))
        assert not whole and len(edges) == 21 and edges[0] < edges[-1]

    def test_labels_are_one_short_line(self):
        assert draw.printable("a\n b\x00 c" + "d" * 40, 10) == "a b\ufffd cddd…"


class TestEvaluations:
    def scored(self, label: str, signature: str, **about: Any) -> tables.EvaluationRow:
        figures = {"bleu": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 4, "n_skipped": 0, "signature": signature}}
        return tables.EvaluationRow(label, Look.of(0), [Evaluation(Path(label), figures, about)])

    def test_other_signatures_cannot_be_compared(self):
        (column,) = tables.columns([self.scored("a", "x"), self.scored("b", "x"), self.scored("c", "y")])
        assert not column.comparable and column.signatures == {"x": ["a", "b"], "y": ["c"]}
        assert tables.columns([self.scored("a", "x"), self.scored("b", "x")])[0].comparable

    def test_other_prompts_and_decoding_are_noted(self):
        a = self.scored("a", "x", dataset={"sha256": "1"}, decoding={"temperature": 1.0})
        b = self.scored("b", "x", dataset={"sha256": "2"}, decoding={"temperature": 0.0})
        first, second = tables.data_notes([a, b])
        assert "different data files: a; b." in first and "different decoding: a; b." in second
        assert tables.data_notes([a, a]) == []

    def test_seeds_are_averaged_and_a_seed_without_the_figure_is_no_zero(self):
        one, two = self.scored("a", "x").evaluations[0], Evaluation(Path("b"), {"bleu": {"value": 0.7}}, {})
        assert tables.EvaluationRow("s", Look.of(0), [one, two]).value("bleu") == pytest.approx(0.6)
        assert tables.EvaluationRow("s", Look.of(0), [one, Evaluation(Path("c"), {}, {})]).value("bleu") is None
