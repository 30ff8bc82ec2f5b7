"""The plots of ``rlgf evolve stats``: what was done to instructions step by step, and what became of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlgf_cli.report.draw import Look, Palette, Plot, plot, printable, style

_WIDE, _TALL = 5.2, 3.1
_LABEL = 26
Rows = Sequence[Mapping[str, Any]]


def plots(stats: Mapping[str, Any], suffix: str) -> list[Plot]:
    """The plots of one set of stats.json. ``suffix`` follows their names. What is not known is not drawn."""
    by_step: Rows = stats["by_step"] or []
    over_time: Rows = stats["over_time"] or []
    steps = [row for row in by_step if "rewrites" in row]
    found = []
    if by_step:
        found.append(_growth(f"growth{suffix}", by_step))
    if steps:
        title = "Operations by step"
        found.append(_mix(f"operations-by-step{suffix}", title, "step", [row["step"] for row in steps], steps))
        what = {"kept_share": "share in the set", "novelty": "novelty of these"}
        found.append(_lines(f"kept{suffix}", "What was new", "step", "step", steps, what))
        found.append(_spent(f"spent{suffix}", steps))
    if over_time:
        until = [row["until"] for row in over_time]
        found.append(_mix(f"operations-over-time{suffix}", "Operations over time", "rewrites so far", until, over_time))
    return found


def _growth(name: str, rows: Rows) -> Plot:
    """Length and what makes a text involved, four small axes."""
    parts = {
        "words": "words",
        "sentences": "sentences",
        "conjunctions": "conjunctions",
        "type_token_ratio": "type-token ratio",
    }

    def paint(canvas: Figure, palette: Palette) -> None:
        for axes, (key, label) in zip(canvas.subplots(2, 2).flat, parts.items(), strict=True):
            _style(axes, palette, "step", label)
            _draw(axes, palette, 0, [row["step"] for row in rows], [row[key] for row in rows], label)
            _from_zero(axes)

    alt = "; ".join(f"{label}: {_ends(rows, key)}" for key, label in parts.items())
    caption = "Means of the texts that were made at each step; step 0 are the seeds."
    return plot(name, "How instructions grow", caption, alt + ".", (_WIDE, 1.6 * _TALL), paint)


def _mix(name: str, title: str, x: str, at: Sequence[int], rows: Rows) -> Plot:
    operations = sorted({operation for row in rows for operation in row["operations"]})
    shares = [[row["operations"].get(operation, 0.0) for row in rows] for operation in operations]

    def paint(canvas: Figure, palette: Palette) -> None:
        axes = canvas.subplots()
        style(axes, palette, x=x, y="share of the rewrites")
        bottom = [0.0] * len(at)
        places = range(len(at))
        for index, values in enumerate(shares):
            label = printable(operations[index], _LABEL)
            axes.bar(places, values, bottom=bottom, width=0.85, color=palette[Look.of(index).role], label=label)
            bottom = [low + value for low, value in zip(bottom, values, strict=True)]
        axes.set_xticks(list(places), [str(value) for value in at])
        axes.set_ylim(0, 1)
        canvas.legend(loc="outside lower center", ncols=3, frameon=False, labelcolor=palette["ink"])

    alt = "; ".join(
        f"{operation}: {values[0]:.0%} at first, {values[-1]:.0%} at last"
        for operation, values in zip(operations, shares, strict=True)
    )
    return plot(name, title, "Shares of all rewrites, kept or not.", alt + ".", (_WIDE, 1.2 * _TALL), paint)


def _lines(name: str, title: str, key: str, x: str, rows: Rows, what: Mapping[str, str]) -> Plot:
    def paint(canvas: Figure, palette: Palette) -> None:
        axes = canvas.subplots()
        _style(axes, palette, x, "")
        for index, (figure, label) in enumerate(what.items()):
            _draw(axes, palette, index, [row[key] for row in rows], [row[figure] for row in rows], label)
        axes.set_ylim(0, 1.02)
        canvas.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=palette["ink"])

    alt = "; ".join(f"{label}: {_ends(rows, figure)}" for figure, label in what.items())
    return plot(name, title, "Of the rewrites of each step.", alt + ".", (_WIDE, _TALL), paint)


def _spent(name: str, rows: Rows) -> Plot:
    """Queries per instruction of the set, and cost where some is known, as far as each step. Cost ends before the first
    step with a text whose price is not known."""
    columns: dict[str, list[float | None]] = {"queries per instruction so far": _so_far(rows, "queries")}
    if any(usd := _so_far(rows, "cost_usd")):
        columns["USD per instruction so far"] = usd

    def paint(canvas: Figure, palette: Palette) -> None:
        many = canvas.subplots(1, len(columns), squeeze=False)
        for axes, (label, values) in zip(many.flat, columns.items(), strict=True):
            _style(axes, palette, "step", label)
            _draw(axes, palette, 0, [row["step"] for row in rows], values, label)
            _from_zero(axes)

    alt = "; ".join(f"{label}: {_say(values[-1])} at the last step" for label, values in columns.items())
    caption = "Chains that end after this step: what was asked for by what is in the set."
    return plot(name, "What an instruction took", caption, alt + ".", (_WIDE, _TALL), paint)


def _so_far(rows: Rows, key: str) -> list[float | None]:
    found: list[float | None] = []
    spent, kept, known = 0.0, 0, True
    for row in rows:
        known = known and not (key == "cost_usd" and row["unpriced"])
        spent += row[key] or 0
        kept += row["kept"]
        found.append(spent / kept if kept and known else None)
    return found


def _style(axes: Axes, palette: Palette, x: str, y: str) -> None:
    style(axes, palette, x=x, y=y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _from_zero(axes: Axes) -> None:
    """The axis of something that is never negative; its highest point is not cut."""
    axes.set_ylim(0, (axes.dataLim.ymax if axes.has_data() else 0) * 1.08 or 1)


def _draw(
    axes: Axes, palette: Palette, index: int, at: Sequence[int], values: Sequence[float | None], label: str
) -> None:
    """A line through what is known."""
    known = [(x, value) for x, value in zip(at, values, strict=True) if value is not None]
    look = Look.of(index)
    axes.plot(
        [x for x, _ in known],
        [value for _, value in known],
        color=palette[look.role],
        marker=look.marker,
        label=label,
    )


def _ends(rows: Rows, key: str) -> str:
    return f"{_say(rows[0][key])} at first, {_say(rows[-1][key])} at last"


def _say(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
