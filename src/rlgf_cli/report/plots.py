"""The plots of a report: what is drawn, and what its caption and its alternative text say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlgf_cli.report.draw import Look, Palette, Plot, plot, printable, style
from rlgf_cli.report.read import Curve
from rlgf_cli.report.systems import FEW_SEEDS, Band, Level, System, band, curves_of, thinned

POINTS = 4000
"""Points of all lines of a plot together, at most; beyond it consecutive rows are drawn as their mean."""
_WIDE, _TALL = 5.2, 3.1
_LABEL = 26


@dataclass(frozen=True)
class Styled:
    """A system with its look and its name in legends."""

    system: System
    look: Look

    @property
    def name(self) -> str:
        return printable(self.system.label, _LABEL)


def learning(
    name: str, title: str, systems: Sequence[Styled], figure: str, *, what: str, levels: Sequence[Level] = (),
    points: int = POINTS,
) -> Plot | None:  # fmt: skip
    """A figure over steps, a line per system; None where no run has it."""
    bands = _bands(systems, figure, points)
    if not bands:
        return None
    shown = [level for level in levels if np.isfinite(level.value)]

    def paint(canvas: Figure, palette: Palette) -> None:
        axes = canvas.subplots()
        style(axes, palette, x="step", y=what)
        for styled, found in bands:
            _line(axes, palette, styled, found)
        for level in shown:
            _level(axes, palette, level)
        _legend(canvas, axes, palette)

    lasts = [f"{styled.name} ends at {_say(found.mean[-1])}" for styled, found in bands if len(found.mean)]
    alt = f"{what} over training steps. " + "; ".join([*lasts, *(f"{n.name} level {_say(n.value)}" for n in shown)])
    return plot(name, title, _caption([found for _, found in bands]), alt + ".", _size(len(bands) + len(shown)), paint)


def against_kl(systems: Sequence[Styled], *, figure: str, kl: str, what: str) -> Plot | None:
    """The score against the distance from the reference, a path per run from its first point to its last."""
    paths: list[tuple[Styled, list[tuple[np.ndarray, np.ndarray]]]] = []
    width = 1
    for styled in systems:
        found = []
        for run in styled.system.trained:
            if figure in run.curves and kl in run.curves:
                scores, divergence = run.curves[figure], run.curves[kl]
                steps, at, of = np.intersect1d(scores.steps, divergence.steps, return_indices=True)
                if len(steps):
                    k = max(1, -(-len(steps) // 60))
                    width = max(width, k)
                    found.append((_means(divergence.values[of], k), _means(scores.values[at], k)))
        if found:
            paths.append((styled, found))
    if not paths:
        return None
    unit = "nats per episode" if kl == "kl/episode" else "nats per token"

    def paint(canvas: Figure, palette: Palette) -> None:
        axes = canvas.subplots()
        style(axes, palette, x=f"KL from the start: {kl} ({unit})", y=what, grid="both")
        for styled, found in paths:
            colour = palette[styled.look.role]
            axes.plot([], [], color=colour, linestyle=styled.look.dashes, marker=styled.look.marker, markersize=4.5,
                      label=styled.name)  # fmt: skip
            for x, y in found:
                axes.plot(x, y, color=colour, linewidth=0.9, alpha=0.6, linestyle=styled.look.dashes)
                axes.scatter(x, y, s=8 + 22 * np.linspace(0, 1, len(x)), color=colour, marker=styled.look.marker,
                             linewidths=0)  # fmt: skip
                axes.scatter(x[:1], y[:1], s=34, facecolors=palette["paper"], edgecolors=colour, linewidths=1.2,
                             marker=styled.look.marker, zorder=3)  # fmt: skip
        _legend(canvas, axes, palette)

    caption = (
        "A path per run from its first point (hollow) to its last; later points are larger. Up and to the left is "
        f"more score for less distance. {what[:1].upper()}{what[1:]} against {kl} of the same step."
    )
    if width > 1:
        caption += f" A point is the mean of up to {width} steps."
    ends = [
        f"{styled.name} ends at KL {_say(x[-1])} and score {_say(y[-1])}"
        for styled, found in paths
        for x, y in found[:1]
    ]
    alt = f"{what} against KL. " + "; ".join(ends) + "."
    return plot("score-kl", "Score against KL", caption, alt, _size(len(paths)), paint)


def intervals(rows: Sequence[tuple[str, Look, float, float | None, float | None]], figure: str, caption: str) -> Plot:
    """A figure of each evaluation with its interval, the first on top."""

    def paint(canvas: Figure, palette: Palette) -> None:
        axes = canvas.subplots()
        style(axes, palette, x=figure, grid="x")
        for i, (_, look, value, low, high) in enumerate(rows):
            colour = palette[look.role]
            if low is not None and high is not None:
                axes.plot([low, high], [i, i], color=colour, linewidth=2.2, solid_capstyle="round")
            axes.scatter([value], [i], color=colour, marker=look.marker, s=42, zorder=3, linewidths=0)
        axes.set_yticks(range(len(rows)), [printable(label, _LABEL) for label, *_ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)

    said = [f"{label} {_say(value)}" for label, _, value, *_ in rows]
    size = (_WIDE, 0.75 + 0.3 * len(rows))
    return plot("evaluation", f"Evaluation: {figure}", caption, f"{figure}: " + "; ".join(said) + ".", size, paint)


def histograms(
    name: str, title: str, rows: Sequence[tuple[str, Look, Sequence[float]]], what: str, caption: str
) -> Plot:
    """One histogram per row over the same bins, shares of its own texts."""
    everything = np.concatenate([np.asarray(values, dtype=float) for _, _, values in rows])
    edges, whole = _bins(everything)

    def paint(canvas: Figure, palette: Palette) -> None:
        grid = canvas.subplots(len(rows), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        engine: Any = canvas.get_layout_engine()
        engine.set(hspace=0.0, h_pad=0.02)
        for i, (axes, (label, look, values)) in enumerate(zip(grid, rows, strict=True)):
            style(axes, palette, x=what if i == len(rows) - 1 else "", grid="")
            share = np.histogram(values, edges)[0] / len(values)
            axes.bar(edges[:-1], share, np.diff(edges) * 0.94, align="edge", color=palette[look.role], linewidth=0)
            axes.set_ylim(0, 1.05 * _highest(rows, edges))
            axes.set_yticks([])
            if whole:
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.spines["left"].set_visible(False)
            axes.set_ylabel(printable(label, 18), rotation=0, ha="right", va="center", color=palette["ink"])
            axes.plot([np.mean(values)], [0], marker="^", markersize=6, color=palette["ink"], clip_on=False, zorder=5)

    said = [f"{label} mean {_say(float(np.mean(values)))} of {len(values)}" for label, _, values in rows]
    size = (_WIDE, 0.55 + 0.42 * len(rows))
    return plot(name, title, caption, f"Histograms of {what}. " + "; ".join(said) + ".", size, paint)


def time_parts(systems: Sequence[Styled]) -> Plot | None:
    """Seconds of a step by what they were spent on, a bar per system."""
    found: dict[str, list[float]] = {}
    kept = [s for s in systems if any(name.startswith("time/") for run in s.system.trained for name in run.curves)]
    for i, styled in enumerate(kept):
        rows = sum(max((len(c) for c in run.curves.values()), default=0) for run in styled.system.trained)
        for run in styled.system.trained:
            for name, curve in run.curves.items():
                if name.startswith("time/"):
                    found.setdefault(name[5:], [0.0] * len(kept))[i] += float(curve.values.sum()) / rows
    if not found:
        return None
    parts = sorted(found, key=lambda part: -sum(found[part]))[:8]
    fills = ("", "//", "\\\\", "xx", "--", "||", "++", "/")

    def paint(canvas: Figure, palette: Palette) -> None:
        axes = canvas.subplots()
        style(axes, palette, x="seconds per step", grid="x")
        left = np.zeros(len(kept))
        for j, part in enumerate(parts):
            axes.barh(range(len(kept)), found[part], left=left, height=0.62, label=part, color=palette[f"s{j}"],
                      hatch=fills[j], edgecolor=palette["paper"], linewidth=0.6)  # fmt: skip
            left += found[part]
        axes.set_yticks(range(len(kept)), [s.name for s in kept])
        axes.set_ylim(len(kept) - 0.4, -0.6)
        _legend(canvas, axes, palette)

    said = [f"{s.name} {_say(sum(values[i] for values in found.values()))} s" for i, s in enumerate(kept)]
    caption = "Mean seconds of a step, by the time/* of metrics.jsonl"
    caption += f"; the {len(parts)} largest parts." if len(found) > len(parts) else "."
    size = (_WIDE, 1.3 + 0.32 * len(kept))
    return plot("time", "Where the time goes", caption, "Seconds per step. " + "; ".join(said) + ".", size, paint)


def _bands(systems: Sequence[Styled], figure: str, points: int) -> list[tuple[Styled, Band]]:
    found = [(styled, curves_of(styled.system, figure)) for styled in systems]
    lines = sum(len(curves) + 1 for _, curves in found if curves)
    return [(styled, band(curves, max(20, points // max(1, lines)))) for styled, curves in found if curves]


def _line(axes: Axes, palette: Palette, styled: Styled, found: Band) -> None:
    colour, look = palette[styled.look.role], styled.look
    if found.low is not None and found.high is not None:
        axes.fill_between(found.steps, found.low, found.high, color=colour, alpha=0.16, linewidth=0)
        for seed in found.seeds:
            axes.plot(seed.steps, seed.values, color=colour, linewidth=0.6, alpha=0.55)
    every = max(1, len(found.steps) // 8)
    axes.plot(found.steps, found.mean, color=colour, linewidth=1.7, linestyle=look.dashes, marker=look.marker,
              markersize=4.5, markevery=every, label=styled.name)  # fmt: skip


def _level(axes: Axes, palette: Palette, level: Level) -> None:
    start = level.name.startswith("start")
    colour, dashes = (palette["start"], (0, (1, 1.6))) if start else (palette["guide"], (0, (6, 3)))
    name = printable(level.name, _LABEL)
    axes.axhline(level.value, color=colour, linewidth=1.3, linestyle=dashes, label=name, zorder=1.5)


def _legend(canvas: Figure, axes: Axes, palette: Palette) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    columns = 2 if max(map(len, labels)) > 14 else 3
    canvas.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, labelcolor=palette["ink"],
                  handlelength=2.6, columnspacing=1.4)  # fmt: skip


def _size(entries: int) -> tuple[float, float]:
    return _WIDE, _TALL + 0.2 * -(-entries // 3)


def _caption(bands: Sequence[Band]) -> str:
    words = []
    if any(found.low is not None for found in bands):
        fewest = min(len(found.seeds) for found in bands if found.low is not None)
        most = max(len(found.seeds) for found in bands)
        kinds = []
        if fewest < FEW_SEEDS:
            kinds.append("from the lowest to the highest seed")
        if most >= FEW_SEEDS:
            kinds.append(f"the mean plus and minus one standard deviation (from {FEW_SEEDS} seeds on)")
        words.append(
            "Line: mean over seeds, at the steps that all of them have; "
            f"band: {', or '.join(kinds)}; thin lines: the seeds."
        )
    elif bands:
        words.append("One seed per line: there is no band.")
    if any(found.width > 1 for found in bands):
        words.append(
            f"Thinned: a point is the mean of up to {max(found.width for found in bands)} rows of metrics.jsonl."
        )
    return " ".join(words)


def _means(values: np.ndarray, width: int) -> np.ndarray:
    return thinned(Curve(np.arange(len(values)), values), width).values


def _bins(values: np.ndarray) -> tuple[np.ndarray, bool]:
    """Bin edges, and whether they are a bin per whole number: where there are few of them, else twenty equal ones."""
    low, high = float(values.min()), float(values.max())
    if np.all(values == np.round(values)) and high - low <= 40:
        return np.arange(low - 0.5, high + 1), True
    return np.linspace(low, high if high > low else low + 1, 21), False


def _highest(rows: Sequence[tuple[str, Look, Sequence[float]]], edges: np.ndarray) -> float:
    return max(float(np.max(np.histogram(values, edges)[0] / len(values))) for _, _, values in rows)


def _say(value: float) -> str:
    return f"{value:.3g}"
