"""The plots of a report, with their captions and alternative texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlgf_cli.report.draw import HEIGHT, LABEL, WIDTH, Look, Palette, Plot, plot, printable, style
from rlgf_cli.report.systems import FEW_SEEDS, Band, Level, System, band, curves_of

POINTS = 4000
"""The largest number of points of all lines of a plot; beyond it, consecutive rows are drawn as their mean."""


@dataclass(frozen=True)
class StyledSystem:
    """A system with its look and its name in legends."""

    system: System
    look: Look

    @property
    def name(self) -> str:
        return printable(self.system.label, LABEL)


class IntervalRow(NamedTuple):
    """A figure of an evaluation with its interval, where it has one."""

    label: str
    look: Look
    value: float
    low: float | None
    high: float | None


class Distribution(NamedTuple):
    """The values of a system's texts."""

    label: str
    look: Look
    values: Sequence[float]


def learning(
    name: str, title: str, systems: Sequence[StyledSystem], figure: str, *, what: str, levels: Sequence[Level] = (),
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
        for styled, each in bands:
            _line(axes, palette, styled, each)
        for level in shown:
            _level(axes, palette, level)
        legend(canvas, axes, palette)

    lasts = [f"{styled.name} ends at {rounded(each.mean[-1])}" for styled, each in bands if len(each.mean)]
    alt = f"{what} over training steps. " + "; ".join([*lasts, *(f"{n.name} level {rounded(n.value)}" for n in shown)])
    return plot(
        name, title, _caption([each for _, each in bands]), alt + ".", size_with_legend(len(bands) + len(shown)), paint
    )


def intervals(rows: Sequence[IntervalRow], figure: str, caption: str) -> Plot:
    """A figure of each evaluation with its interval, the first on top."""

    def paint(canvas: Figure, palette: Palette) -> None:
        axes = canvas.subplots()
        style(axes, palette, x=figure, grid="x")
        for i, row in enumerate(rows):
            colour = palette[row.look.role]
            if row.low is not None and row.high is not None:
                axes.plot([row.low, row.high], [i, i], color=colour, linewidth=2.2, solid_capstyle="round")
            axes.scatter([row.value], [i], color=colour, marker=row.look.marker, s=42, zorder=3, linewidths=0)
        axes.set_yticks(range(len(rows)), [printable(row.label, LABEL) for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)

    alt = "; ".join(f"{row.label} {rounded(row.value)}" for row in rows)
    size = (WIDTH, 0.75 + 0.3 * len(rows))
    return plot("evaluation", f"Evaluation: {figure}", caption, f"{figure}: {alt}.", size, paint)


def histograms(name: str, title: str, rows: Sequence[Distribution], what: str, caption: str) -> Plot | None:
    """One histogram per row over the same bins, shares of its own texts; None without a value."""
    rows = [row for row in rows if row.values]
    if not rows:
        return None
    edges, whole = _bins(np.concatenate([np.asarray(row.values, dtype=float) for row in rows]))
    shares = [np.histogram(row.values, edges)[0] / len(row.values) for row in rows]

    def paint(canvas: Figure, palette: Palette) -> None:
        grid = canvas.subplots(len(rows), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        engine: Any = canvas.get_layout_engine()
        engine.set(hspace=0.0, h_pad=0.02)
        for axes, row, share in zip(grid, rows, shares, strict=True):
            style(axes, palette, x=what if row is rows[-1] else "", grid="")
            axes.bar(edges[:-1], share, np.diff(edges) * 0.94, align="edge", color=palette[row.look.role], linewidth=0)
            axes.set_ylim(0, 1.05 * max(float(np.max(each)) for each in shares))
            axes.set_yticks([])
            if whole:
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.spines["left"].set_visible(False)
            axes.set_ylabel(printable(row.label, 18), rotation=0, ha="right", va="center", color=palette["ink"])
            axes.plot(
                [np.mean(row.values)], [0], marker="^", markersize=6, color=palette["ink"], clip_on=False, zorder=5
            )

    alt = "; ".join(f"{row.label} mean {rounded(float(np.mean(row.values)))} of {len(row.values)}" for row in rows)
    size = (WIDTH, 0.55 + 0.42 * len(rows))
    return plot(name, title, caption, f"Histograms of {what}. {alt}.", size, paint)


def time_parts(systems: Sequence[StyledSystem]) -> Plot | None:
    """Seconds of a step by part (``time/*``), a bar per system."""
    seconds: dict[str, list[float]] = {}
    timed = [s for s in systems if any(name.startswith("time/") for run in s.system.trained for name in run.curves)]
    for i, styled in enumerate(timed):
        rows = sum(max((len(c) for c in run.curves.values()), default=0) for run in styled.system.trained)
        for run in styled.system.trained:
            for name, curve in run.curves.items():
                if name.startswith("time/"):
                    seconds.setdefault(name[5:], [0.0] * len(timed))[i] += float(curve.values.sum()) / rows
    if not seconds:
        return None
    parts = sorted(seconds, key=lambda part: -sum(seconds[part]))[:8]
    fills = ("", "//", "\\\\", "xx", "--", "||", "++", "/")

    def paint(canvas: Figure, palette: Palette) -> None:
        axes = canvas.subplots()
        style(axes, palette, x="seconds per step", grid="x")
        left = np.zeros(len(timed))
        for j, part in enumerate(parts):
            axes.barh(range(len(timed)), seconds[part], left=left, height=0.62, label=part, color=palette[f"s{j}"],
                      hatch=fills[j], edgecolor=palette["paper"], linewidth=0.6)  # fmt: skip
            left += seconds[part]
        axes.set_yticks(range(len(timed)), [s.name for s in timed])
        axes.set_ylim(len(timed) - 0.4, -0.6)
        legend(canvas, axes, palette)

    alt = "; ".join(f"{s.name} {rounded(sum(part[i] for part in seconds.values()))} s" for i, s in enumerate(timed))
    caption = "Mean seconds of a step, by the time/* of metrics.jsonl"
    caption += f"; the {len(parts)} largest parts." if len(seconds) > len(parts) else "."
    size = (WIDTH, 1.3 + 0.32 * len(timed))
    return plot("time", "Where the time goes", caption, f"Seconds per step. {alt}.", size, paint)


def _bands(systems: Sequence[StyledSystem], figure: str, points: int) -> list[tuple[StyledSystem, Band]]:
    curves = [(styled, drawn) for styled in systems if (drawn := curves_of(styled.system, figure))]
    lines = sum(len(drawn) + 1 for _, drawn in curves)
    return [(styled, band(drawn, max(20, points // lines))) for styled, drawn in curves]


def _line(axes: Axes, palette: Palette, styled: StyledSystem, of: Band) -> None:
    colour, look = palette[styled.look.role], styled.look
    if of.low is not None and of.high is not None:
        axes.fill_between(of.steps, of.low, of.high, color=colour, alpha=0.16, linewidth=0)
        for seed in of.seeds:
            axes.plot(seed.steps, seed.values, color=colour, linewidth=0.6, alpha=0.55)
    every = max(1, len(of.steps) // 8)
    axes.plot(of.steps, of.mean, color=colour, linewidth=1.7, linestyle=look.dashes, marker=look.marker,
              markersize=4.5, markevery=every, label=styled.name)  # fmt: skip


def _level(axes: Axes, palette: Palette, level: Level) -> None:
    start = level.name.startswith("start")
    colour, dashes = (palette["start"], (0, (1, 1.6))) if start else (palette["guide"], (0, (6, 3)))
    name = f"{printable(level.name, LABEL)} ({rounded(level.value)})"  # several starts have one style
    axes.axhline(level.value, color=colour, linewidth=1.3, linestyle=dashes, label=name, zorder=1.5)


def legend(canvas: Figure, axes: Axes, palette: Palette) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    columns = 2 if max(map(len, labels)) > 14 else 3
    canvas.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, labelcolor=palette["ink"],
                  handlelength=2.6, columnspacing=1.4)  # fmt: skip


def size_with_legend(entries: int) -> tuple[float, float]:
    return WIDTH, HEIGHT + 0.2 * -(-entries // 3)


def _caption(bands: Sequence[Band]) -> str:
    words = []
    if any(each.low is not None for each in bands):
        fewest = min(len(each.seeds) for each in bands if each.low is not None)
        most = max(len(each.seeds) for each in bands)
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
    if any(each.width > 1 for each in bands):
        words.append(
            f"Thinned: a point is the mean of up to {max(each.width for each in bands)} rows of metrics.jsonl."
        )
    return " ".join(words)


def _bins(values: np.ndarray) -> tuple[np.ndarray, bool]:
    """Bin edges, and whether they are a bin per whole number: where there are few of them, else twenty equal ones."""
    low, high = float(values.min()), float(values.max())
    if np.all(values == np.round(values)) and high - low <= 40:
        return np.arange(low - 0.5, high + 1), True
    return np.linspace(low, high if high > low else low + 1, 21), False


def rounded(value: float) -> str:
    return f"{value:.3g}"
