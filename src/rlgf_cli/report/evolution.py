"""The plots of ``rlgf evolve stats``: operations, outcomes, growth and cost of the rewrites by step and over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlgf_cli.report.draw import HEIGHT, LABEL, WIDTH, Look, Palette, Plot, plot, printable, style

Rows = Sequence[Mapping[str, Any]]
Values = Sequence[float | None]
_GROWTH = {
    "words": "words",
    "sentences": "sentences",
    "conjunctions": "conjunctions",
    "type_token_ratio": "type-token ratio",
}
"""Means of texts, with the words on their axis."""


def plots(stats: Mapping[str, Any], suffix: str) -> list[Plot]:
    """The plots of one set of stats.json; ``suffix`` follows their names. Unknown figures are not drawn."""
    by_step: Rows = stats["by_step"] or []
    over_time: Rows = stats["over_time"] or []
    steps = [row for row in by_step if "rewrites" in row]
    made = []
    if by_step:
        columns = {label: [row[key] for row in by_step] for key, label in _GROWTH.items()}
        alt = "; ".join(f"{label}: {_ends(values)}" for label, values in columns.items())
        caption = "Means of the texts that were made at each step; step 0 are the seeds."
        title = "How instructions grow"
        made.append(_panels(f"growth{suffix}", title, caption, alt, (WIDTH, 1.6 * HEIGHT), 2, by_step, columns))
    if steps:
        title = "Operations by step"
        made.append(_mix(f"operations-by-step{suffix}", title, "step", [row["step"] for row in steps], steps))
        made.append(_novelty(f"kept{suffix}", steps))
        made.append(_cost(f"spent{suffix}", steps))
    if over_time:
        until = [row["until"] for row in over_time]
        made.append(_mix(f"operations-over-time{suffix}", "Operations over time", "rewrites so far", until, over_time))
    return made


def _panels(
    name: str, title: str, caption: str, alt: str, size: tuple[float, float], lines: int, rows: Rows,
    columns: Mapping[str, Values],
) -> Plot:  # fmt: skip
    """Axes for each column over the steps, in so many lines, from zero on."""

    def paint(canvas: Figure, palette: Palette) -> None:
        grid = canvas.subplots(lines, len(columns) // lines, squeeze=False)
        for axes, (label, values) in zip(grid.flat, columns.items(), strict=True):
            _line(axes, palette, 0, rows, values, label)
            style(axes, palette, x="step", y=label)
            # its highest point is not cut
            axes.set_ylim(0, (axes.dataLim.ymax if axes.has_data() else 0) * 1.08 or 1)

    return plot(name, title, caption, alt + ".", size, paint)


def _mix(name: str, title: str, x: str, at: Sequence[int], rows: Rows) -> Plot:
    """Stacked bars of the operations' shares."""
    operations = sorted({operation for row in rows for operation in row["operations"]})
    shares = {operation: [row["operations"].get(operation, 0.0) for row in rows] for operation in operations}

    def paint(canvas: Figure, palette: Palette) -> None:
        axes = canvas.subplots()
        style(axes, palette, x=x, y="share of the rewrites")
        bottom = [0.0] * len(at)
        places = range(len(at))
        for index, (operation, values) in enumerate(shares.items()):
            colour, label = palette[Look.of(index).role], printable(operation, LABEL)
            axes.bar(places, values, bottom=bottom, width=0.85, color=colour, label=label)
            bottom = [low + value for low, value in zip(bottom, values, strict=True)]
        axes.set_xticks(list(places), [str(value) for value in at])
        axes.set_ylim(0, 1)
        canvas.legend(loc="outside lower center", ncols=3, frameon=False, labelcolor=palette["ink"])

    alt = "; ".join(
        f"{operation}: {values[0]:.0%} at first, {values[-1]:.0%} at last" for operation, values in shares.items()
    )
    return plot(name, title, "Shares of all rewrites, kept or not.", alt + ".", (WIDTH, 1.2 * HEIGHT), paint)


def _novelty(name: str, rows: Rows) -> Plot:
    keys = {"share in the set": "kept_share", "novelty of these": "novelty"}
    columns = {label: [row[key] for row in rows] for label, key in keys.items()}

    def paint(canvas: Figure, palette: Palette) -> None:
        axes = canvas.subplots()
        style(axes, palette, x="step")
        for index, (label, values) in enumerate(columns.items()):
            _line(axes, palette, index, rows, values, label)
        axes.set_ylim(0, 1.02)
        canvas.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=palette["ink"])

    alt = "; ".join(f"{label}: {_ends(values)}" for label, values in columns.items())
    return plot(name, "What was new", "Of the rewrites of each step.", alt + ".", (WIDTH, HEIGHT), paint)


def _cost(name: str, rows: Rows) -> Plot:
    """Queries per instruction of the set up to each step, and cost where some is known. The cost ends before the first
    step with a text without a known price."""
    columns = {"queries per instruction so far": _so_far(rows, "queries")}
    if any(usd := _so_far(rows, "cost_usd")):
        columns["USD per instruction so far"] = usd
    alt = "; ".join(f"{label}: {_shown(values[-1])} at the last step" for label, values in columns.items())
    caption = "Chains that end after this step: queries or cost divided by the instructions in the set."
    return _panels(name, "What an instruction took", caption, alt, (WIDTH, HEIGHT), 1, rows, columns)


def _so_far(rows: Rows, key: str) -> Values:
    ratios: list[float | None] = []
    spent, in_set, known = 0.0, 0, True
    for row in rows:
        known = known and not (key == "cost_usd" and row["unpriced"])
        spent += row[key] or 0
        in_set += row["kept"]
        ratios.append(spent / in_set if in_set and known else None)
    return ratios


def _line(axes: Axes, palette: Palette, index: int, rows: Rows, values: Values, label: str) -> None:
    """A line over the steps through the known values."""
    known = [(row["step"], value) for row, value in zip(rows, values, strict=True) if value is not None]
    look = Look.of(index)
    x, y = [x for x, _ in known], [value for _, value in known]
    axes.plot(x, y, color=palette[look.role], marker=look.marker, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _ends(values: Values) -> str:
    return f"{_shown(values[0])} at first, {_shown(values[-1])} at last"


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
