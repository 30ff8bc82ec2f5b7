"""The plots of one figure against another: which figures belong together, and the data that are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rlgf_cli.errors import UserError
from rlgf_cli.report import figures, paths, tables
from rlgf_cli.report.draw import LIGHT, Look
from rlgf_cli.report.plots import StyledSystem
from rlgf_cli.report.read import Curve, Evaluation, Run
from rlgf_cli.report.systems import System, score_figure, watched_figure

START = {paths.START: {1: 0.2}, paths.START_WATCHED: {1: 0.6}}
RISING = {paths.SCORE: {4: 0.3, 8: 0.5}, paths.WATCHED: {4: 0.7, 8: 0.4}}


def part(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "weight": 1.0, "params": {}, **more}


def run(curves: Mapping[str, Mapping[int, float]] = RISING, *, reward: Any = None, watch: Any = "rouge1") -> Run:
    watched = {"name": watch, "figure": None, "params": {}} if isinstance(watch, str) else watch
    values = {"reward": reward or [part("coverage")], "watch": watched}
    made = {name: Curve(np.array(list(of)), np.array(list(of.values()))) for name, of in curves.items()}
    return Run(Path("run"), {"command": "train"}, values, curves=made)


def evaluation(*metrics: dict[str, Any], **values: float) -> Evaluation:
    entries = {
        name.replace("__", "."): {"value": v, "low": v - 0.1, "high": v + 0.2, "aggregate": "mean"}
        for name, v in values.items()
    }
    return Evaluation(Path("e"), entries, {"interval": {"level": 0.95}}, metrics)


class TestTheWatchedFigure:
    @pytest.mark.parametrize(
        ("watch", "metrics", "names", "expected"),
        [
            ("rouge1", [part("reward:rouge1")], ["reward__total", "reward__rouge1"], "reward.rouge1"),
            ("rouge1", [part("reward:rouge1"), part("reward:length", weight=0.5)], ["reward__rouge1"], "reward.rouge1"),
            ("rm:a", [part("reward:rm:a")], ["reward__total", "reward__rm"], "reward.rm"),
            ("rm:a", [part("reward:rm:b")], ["reward__total", "reward__rm"], None),
            ("rm:a", [part("reward:rm:a"), part("reward:rm:b")], ["reward__rm", "reward__rm#2"], None),
            ("coverage", [part("coverage")], ["coverage"], "coverage"),
            ("coverage", [part("coverage", params={"stem": 1})], ["coverage"], None),
            ("bleu", [part("bleu")], ["bleu", "bleu__sentence"], None),  # the reward is a hundredth of bleu.sentence
            ("rouge", [part("rouge")], ["rouge__rouge1"], None),  # the reward is a mean of three figures
            ("x/a.py:good", [part("x/a.py:good")], ["good"], "good"),
            ("x/a.py:good", [part("reward:x/a.py:good")], ["reward__good"], "reward.good"),
            ("x/a.py:good", [part("y/b.py:good")], ["good"], None),
            ("spice", [part("spice")], ["spice"], "spice"),
            ("novel", [part("novel")], ["novel__1", "novel__2"], None),
            (None, [part("rouge")], ["rouge__rouge1"], None),
        ],
    )
    def test_of_a_name(self, watch, metrics, names, expected):
        assert watched_figure(run(watch=watch), evaluation(*metrics, **dict.fromkeys(names, 0.5))) == expected

    def test_of_a_named_figure_of_a_metric(self):
        watch = {"name": "rouge", "figure": "rouge.rougeL", "params": {"stemmer": False}}
        plain, same = part("rouge"), part("rouge", params={"stemmer": False})
        assert watched_figure(run(watch=watch), evaluation(same, rouge__rougeL=0.5)) == "rouge.rougeL"
        assert watched_figure(run(watch=watch), evaluation(plain, rouge__rougeL=0.5)) is None
        assert watched_figure(run(watch=watch), evaluation(plain, same, rouge__rougeL=0.5)) is None
        assert watched_figure(run(watch=watch), evaluation(same, rouge__rouge1=0.5)) is None

    def test_a_metrics_only_mean_is_not_its_corpus_figure(self):
        scored = evaluation(part("perplexity:lm"), perplexity=9.0, perplexity__nll=2.0)
        scored.figures["perplexity"]["aggregate"] = "exp_mean"
        assert watched_figure(run(watch="perplexity:lm"), scored) == "perplexity.nll"

    def test_the_score_among_several_rewards_and_on_another_scale(self):
        both = [part("reward:coverage"), part("reward:rouge1")]
        scored = evaluation(*both, reward__total=1.0, reward__coverage=0.6, reward__rouge1=0.4)
        assert score_figure(run(), scored) == "reward.coverage"
        for changed in ({"weight": 0.5}, {"scale": 2.0}, {"clip": [0, 1]}, {"weight_steps": 3}):
            assert score_figure(run(reward=[part("coverage", **changed)]), scored) is None
        assert score_figure(run(reward=[part("bleu")]), evaluation(part("bleu"), bleu=30.0)) is None


class TestPaths:
    def test_from_the_start_over_the_steps_that_have_both(self):
        path = paths.watched_path(run({**RISING, **START, paths.SCORE: {4: 0.3, 6: 9.0, 8: 0.5}}))
        assert path is not None and path.width == 1
        assert path.x.tolist() == [0.2, 0.3, 0.5] and path.y.tolist() == [0.6, 0.7, 0.4]

    def test_of_a_run_that_did_not_record_the_starts_watched_figure(self):
        path = paths.watched_path(run({**RISING, paths.START: {1: 0.2}}))
        assert path is not None and path.x.tolist() == [0.3, 0.5]

    def test_of_a_run_without_a_watched_figure(self):
        assert paths.watched_path(run({paths.SCORE: {4: 0.3}})) is None
        assert paths.watched_path(run({paths.SCORE: {4: 0.3}, paths.WATCHED: {8: 0.1}, **START})) is None

    def test_a_long_one_is_thinned(self):
        long = {step: float(step) for step in range(1, 181)}
        path = paths.run_path(run({paths.SCORE: long, paths.WATCHED: long}), paths.SCORE, paths.WATCHED)
        assert path is not None and (len(path.x), path.width, path.x[0], path.y[-1]) == (60, 3, 2.0, 179.0)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The plots that ``paths`` draws, each with its axes in place of its files."""
    made: list[Any] = []

    def plot(name: str, title: str, caption: str, alt: str, size: Any, paint: Any) -> Any:
        canvas = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(canvas)
        paint(canvas, LIGHT)
        made.append(SimpleNamespace(name=name, title=title, caption=caption, alt=alt, axes=canvas.axes[0]))
        return made[-1]

    monkeypatch.setattr(paths, "plot", plot)
    return made


def marks(axes: Any) -> list[tuple[float, float]]:
    """The places of all scattered marks, those of paths and of seeds."""
    return [tuple(place) for group in axes.collections for place in group.get_offsets().tolist()]


def points(axes: Any) -> dict[str, tuple[float, float]]:
    """The large marks by their names in the legend."""
    return {
        line.get_label(): (line.get_xdata()[0], line.get_ydata()[0])
        for line in axes.lines
        if not line.get_label().startswith("_") and len(line.get_xdata())
    }


def whiskers(axes: Any) -> list[tuple[list[float], list[float]]]:
    lines = [line for line in axes.lines if line.get_label().startswith("_") and line.get_alpha() == 0.7]
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in lines]


def styled(*systems: Sequence[Run], names: str = "abcdef") -> list[StyledSystem]:
    return [
        StyledSystem(System(name, list(runs)), Look.of(i))
        for i, (name, runs) in enumerate(zip(names, systems, strict=False))
    ]


BOTH = [part("coverage"), part("reward:rouge1")]


class TestScoreAgainstTheWatchedFigure:
    def row(self, label: str, look: Look, *values: tuple[float, float], metrics: Any = BOTH) -> tables.EvaluationRow:
        some = [evaluation(*metrics, coverage=x, reward__rouge1=y, reward__total=y) for x, y in values]
        return tables.EvaluationRow(label, look, some)

    def test_a_path_per_run_and_a_point_per_other_system(self, drawn):
        systems = styled([run({**RISING, **START}), run()], [Run(Path("sft"), {"command": "sft"})])
        rows = [
            self.row("a", systems[0].look, (0.9, 0.9)),  # the evaluation of what has a path
            self.row("clone", systems[1].look, (0.4, 0.5)),
            self.row("guide", Look("guide", "D", "-"), (0.7, 0.8)),
            self.row("other", Look.of(5), (0.1, 0.1), metrics=[part("coverage")]),  # reward.rouge1 of something else
        ]
        assert figures._against_watched(systems, rows) is not None
        (plot,) = drawn
        assert plot.name == "score-watched"
        assert marks(plot.axes) == [
            (0.2, 0.6), (0.3, 0.7), (0.5, 0.4), (0.2, 0.6),  # the path and its hollow first point
            (0.3, 0.7), (0.5, 0.4), (0.3, 0.7),
        ]  # fmt: skip
        sizes = plot.axes.collections[0].get_sizes()
        assert list(sizes) == sorted(sizes) and len(set(sizes)) == 3
        assert points(plot.axes) == {"clone": (0.4, 0.5), "guide": (0.7, 0.8)}
        assert [line.get_label() for line in plot.axes.lines if not len(line.get_xdata())] == ["a"]
        assert whiskers(plot.axes)[:2] == [
            (pytest.approx([0.3, 0.6]), [0.5, 0.5]),
            ([0.4, 0.4], pytest.approx([0.4, 0.7])),
        ]
        assert (plot.axes.get_xlabel(), plot.axes.get_ylabel()) == ("trained on: coverage", "watched: rouge1")
        assert "Single points: evaluations by rlgf eval. Bars: 95 % bootstrap" in plot.caption
        assert "a goes from score 0.2 and watched figure 0.6 to 0.5 and 0.4; clone is at 0.4 and 0.5" in plot.alt

    def test_a_function_is_named_without_its_path(self, drawn):
        figures._against_watched(styled([run(watch="a/long/path/of/folders/to/figures.py:plain")]), [])
        assert drawn[0].axes.get_ylabel() == "watched: plain"

    def test_seeds_are_averaged_and_marked(self, drawn):
        systems = styled([run()])
        rows = [self.row("clone", Look.of(3), (0.4, 0.5), (0.6, 0.9))]
        figures._against_watched(systems, rows)
        (plot,) = drawn
        assert points(plot.axes) == {"clone": (pytest.approx(0.5), pytest.approx(0.7))}
        assert marks(plot.axes)[-2:] == [(0.4, 0.5), (0.6, 0.9)]
        assert whiskers(plot.axes)[0][0] == [0.4, 0.6] and "Small marks: the seeds." in plot.caption

    def test_seeds_that_do_not_all_have_both_are_no_point(self, drawn):
        row = self.row("clone", Look.of(3), (0.4, 0.5), (0.6, 0.9))
        alone = evaluation(part("coverage"), coverage=0.3)
        figures._against_watched(styled([run()]), [tables.EvaluationRow("x", Look.of(3), [*row.evaluations, alone])])
        assert points(drawn[0].axes) == {} and "Single points" not in drawn[0].caption

    def test_what_watches_something_else_is_left_out_and_named(self, drawn):
        other = run({paths.SCORE: {4: 5.0}, paths.WATCHED: {4: 5.0}}, watch="bleu")
        scored_otherwise = run({paths.SCORE: {4: 6.0}, paths.WATCHED: {4: 6.0}}, reward=[part("cider")])
        figures._against_watched(styled([run()], [other], [run()], [scored_otherwise]), [])
        (plot,) = drawn
        assert max(max(place) for place in marks(plot.axes)) < 1
        assert plot.caption.endswith("their reward or their watched figure is another one: b, d.")

    def test_an_evaluation_of_what_is_left_out_is_no_point_either(self, drawn):
        other = run({paths.SCORE: {4: 5.0}, paths.WATCHED: {4: 5.0}}, watch="bleu")
        systems = styled([run()], [other])
        rows = [self.row("b", systems[1].look, (0.4, 0.5)), self.row("clone", Look.of(3), (0.6, 0.7))]
        figures._against_watched(systems, rows)
        (plot,) = drawn
        assert points(plot.axes) == {"clone": (0.6, 0.7)}
        assert plot.caption.endswith("Not shown, for their reward or their watched figure is another one: b.")

    def test_nothing_is_drawn_where_nothing_is_watched(self, drawn):
        rows = [self.row("clone", Look.of(3), (0.4, 0.5))]
        assert figures._against_watched(styled([run({paths.SCORE: {4: 0.3}}, watch=None)]), rows) is None
        assert drawn == []


def test_two_figures_of_evaluations(drawn):
    rows = [
        tables.EvaluationRow("a", Look.of(0), [evaluation(f=0.5, g=2.0)]),
        tables.EvaluationRow("b", Look.of(1), [evaluation(f=0.7)]),
        tables.EvaluationRow("c", Look.of(2), [evaluation(f=0.1, g=1.0), evaluation(f=0.3, g=3.0)]),
    ]
    assert figures._against_figure(rows, "f", None) is None and figures._against_figure(rows, None, "g") is None
    figures._against_figure(rows, "f", "g")
    (plot,) = drawn
    assert points(plot.axes) == {"a": (0.5, 2.0), "c": (pytest.approx(0.2), pytest.approx(2.0))}
    assert whiskers(plot.axes)[0] == (pytest.approx([0.4, 0.7]), [2.0, 2.0])
    assert (plot.axes.get_xlabel(), plot.axes.get_ylabel()) == ("f", "g")
    with pytest.raises(UserError, match="no evaluation has both 'f' and 'g'"):
        figures._against_figure(rows[1:2], "f", "g")


def test_the_score_against_the_kl_has_a_path_per_run(drawn):
    curves = {"kl/episode": {4: 1.0, 6: 2.0, 8: 3.0}, paths.SCORE: {4: 0.3, 8: 0.5}}
    paths.against_kl(styled([run(curves)], [run({})]), figure=paths.SCORE, kl="kl/episode", what="held-out score")
    (plot,) = drawn
    assert marks(plot.axes) == [(1.0, 0.3), (3.0, 0.5), (1.0, 0.3)]
    assert plot.alt == "held-out score against KL. a ends at KL 3 and score 0.5."
