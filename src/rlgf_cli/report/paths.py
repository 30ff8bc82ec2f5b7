"""The plots of one figure against another: a path per run, a point per evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlgf_cli.report.draw import LABEL, Look, Palette, Plot, plot, printable, style
from rlgf_cli.report.plots import StyledSystem, legend, rounded, size_with_legend
from rlgf_cli.report.read import Curve, Run
from rlgf_cli.report.systems import thinned

SCORE, WATCHED, START, START_WATCHED = "eval/score", "eval/watch", "eval/start", "eval/start_watch"
_POINTS = 60
"""The largest number of points of a path; beyond it, consecutive ones are drawn as their mean."""


class RunPath(NamedTuple):
    """The path of a run: ``x`` and ``y`` [n], in the order of its steps, each point the mean of ``width`` steps."""

    x: np.ndarray
    y: np.ndarray
    width: int


SystemPaths = tuple[StyledSystem, Sequence[RunPath]]
"""A system, and the path of each of its runs that has one."""


class Estimate(NamedTuple):
    """A figure with its interval, where it has one."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Point:
    """Two figures of an evaluation; of several seeds their means, and in ``seeds`` the (x, y) of each."""

    label: str
    look: Look
    x: Estimate
    y: Estimate
    seeds: Sequence[tuple[float, float]] = ()


def run_path(run: Run, x: str, y: str) -> RunPath | None:
    """The path of two figures of metrics.jsonl at the steps that have both; None where no step has."""
    if x not in run.curves or y not in run.curves:
        return None
    across, up = run.curves[x], run.curves[y]
    steps, i, j = np.intersect1d(across.steps, up.steps, return_indices=True)
    width = max(1, -(-len(steps) // _POINTS))
    return RunPath(_means(across.values[i], width), _means(up.values[j], width), width) if len(steps) else None


def watched_path(run: Run) -> RunPath | None:
    """The path of score and watched figure over the held-out evaluations, from the start where both are known of it."""
    path = run_path(run, SCORE, WATCHED)
    start = run_path(run, START, START_WATCHED)
    if path is None or start is None:
        return path
    return RunPath(np.append(start.x, path.x), np.append(start.y, path.y), path.width)


def against_kl(systems: Sequence[StyledSystem], *, figure: str, kl: str, what: str) -> Plot | None:
    """The score against the KL from the start, a path per run from its first point to its last."""
    paths = _of_systems(systems, lambda run: run_path(run, kl, figure))
    if not paths:
        return None
    unit = "nats per episode" if kl == "kl/episode" else "nats per token"

    def paint(canvas: Figure, palette: Palette) -> None:
        axes = canvas.subplots()
        style(axes, palette, x=f"KL from the start: {kl} ({unit})", y=what, grid="both")
        _draw_paths(axes, palette, paths)
        legend(canvas, axes, palette)

    caption = (
        "A path per run from its first point (hollow) to its last; later points are larger. Up and to the left is "
        f"more score for less distance. {what[:1].upper()}{what[1:]} against {kl} of the same step.{_thinning(paths)}"
    )
    ends = [f"{s.name} ends at KL {rounded(of[0].x[-1])} and score {rounded(of[0].y[-1])}" for s, of in paths]
    alt = f"{what} against KL. " + "; ".join(ends) + "."
    return plot("score-kl", "Score against KL", caption, alt, size_with_legend(len(paths)), paint)


def against_watched(
    systems: Sequence[StyledSystem], points: Sequence[Point], *, score: str, watched: str, notes: str = ""
) -> Plot | None:
    """The held-out score against the watched figure, a path per run; ``points`` are systems without one. None where no
    run has a path.

    ``score`` and ``watched`` are the names of the two figures, ``notes`` more sentences of the caption.
    """
    paths = _of_systems(systems, watched_path)
    if not paths:
        return None

    def paint(canvas: Figure, palette: Palette) -> None:
        axes = canvas.subplots()
        x, y = f"trained on: {_named(score, 40)}", f"watched: {_named(watched, 30)}"
        style(axes, palette, x=x, y=y, grid="both")
        _draw_paths(axes, palette, paths)
        _draw_points(axes, palette, points)
        legend(canvas, axes, palette)

    caption = (
        "A path per run from its first held-out evaluation (hollow; that before the first step, where the run recorded "
        "it) to its last; later points are larger. To the right is a higher score, which was trained on; up is a "
        "higher watched figure, which was not. Up and to the right is better on both; a path that falls to the right "
        f"has gamed its reward.{_thinning(paths)}{notes}"
    )
    moves = [
        f"{s.name} goes from score {rounded(of[0].x[0])} and watched figure {rounded(of[0].y[0])} to "
        f"{rounded(of[0].x[-1])} and {rounded(of[0].y[-1])}"
        for s, of in paths
    ]
    alt = f"{score} against {watched}. " + "; ".join([*moves, *map(_in_words, points)]) + "."
    size = size_with_legend(len(paths) + len(points))
    return plot("score-watched", "Score against the watched figure", caption, alt, size, paint)


def against_figure(points: Sequence[Point], *, x: str, y: str, caption: str) -> Plot:
    """Two figures of each evaluation against each other, with their intervals."""

    def paint(canvas: Figure, palette: Palette) -> None:
        axes = canvas.subplots()
        style(axes, palette, x=x, y=y, grid="both")
        _draw_points(axes, palette, points)
        legend(canvas, axes, palette)

    alt = f"{x} against {y}. " + "; ".join(map(_in_words, points)) + "."
    return plot("score-against", f"{x} against {y}", caption, alt, size_with_legend(len(points)), paint)


def _named(figure: str, most: int) -> str:
    """The name of a figure on an axis: of ``folder/file.py:function`` the function, for the path would be cut first."""
    return printable(figure.rpartition(":")[2] if ".py:" in figure and "," not in figure else figure, most)


def _of_systems(systems: Sequence[StyledSystem], path: Callable[[Run], RunPath | None]) -> list[SystemPaths]:
    of_all = [(styled, [p for run in styled.system.trained if (p := path(run)) is not None]) for styled in systems]
    return [(styled, paths) for styled, paths in of_all if paths]


def _draw_paths(axes: Axes, palette: Palette, paths: Sequence[SystemPaths]) -> None:
    for styled, of_system in paths:
        colour, look = palette[styled.look.role], styled.look
        axes.plot([], [], color=colour, linestyle=look.dashes, marker=look.marker, markersize=4.5, label=styled.name)
        for x, y, _ in of_system:
            axes.plot(x, y, color=colour, linewidth=0.9, alpha=0.6, linestyle=look.dashes)
            axes.scatter(x, y, s=8 + 22 * np.linspace(0, 1, len(x)), color=colour, marker=look.marker, linewidths=0)
            axes.scatter(x[:1], y[:1], s=34, facecolors=palette["paper"], edgecolors=colour, linewidths=1.2,
                         marker=look.marker, zorder=3)  # fmt: skip


def _draw_points(axes: Axes, palette: Palette, points: Sequence[Point]) -> None:
    for point in points:
        colour, (x, y) = palette[point.look.role], (point.x, point.y)
        if x.low is not None and x.high is not None:
            axes.plot([x.low, x.high], [y.value, y.value], color=colour, linewidth=1, alpha=0.7)
        if y.low is not None and y.high is not None:
            axes.plot([x.value, x.value], [y.low, y.high], color=colour, linewidth=1, alpha=0.7)
        for seed in point.seeds:
            axes.scatter(*seed, s=9, color=colour, marker=point.look.marker, alpha=0.6, linewidths=0)
        axes.plot([x.value], [y.value], color=colour, marker=point.look.marker, markersize=7.5, linestyle="none",
                  markeredgecolor=palette["paper"], label=printable(point.label, LABEL), zorder=4)  # fmt: skip


def _in_words(point: Point) -> str:
    return f"{point.label} is at {rounded(point.x.value)} and {rounded(point.y.value)}"


def _thinning(paths: Sequence[SystemPaths]) -> str:
    width = max(path.width for _, of_system in paths for path in of_system)
    return f" A point is the mean of up to {width} steps." if width > 1 else ""


def _means(values: np.ndarray, width: int) -> np.ndarray:
    return thinned(Curve(np.arange(len(values)), values), width).values
