"""The table of a sweep, from one comparison per baseline, as Markdown, CSV and HTML."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

_DASH = "–"
_CSV_OF_BASELINE = ("value", "low", "high", "p_bootstrap", "p_randomisation", "p_holm")


@dataclass(frozen=True)
class Entry:
    """One system's figure: mean over seeds, interval, and ``against[baseline]``, the difference of ``rlgf compare``."""

    value: float
    low: float | None
    high: float | None
    against: Mapping[str, Mapping[str, Any] | None]


@dataclass(frozen=True)
class Row:
    """A system: ``seeds`` of its ``planned`` runs are evaluated; ``missing`` has the reason for each other one."""

    system: str
    planned: int
    missing: Sequence[str] = ()
    seeds: int = 0
    entries: Mapping[str, Entry] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """``sizes[figure]``: its examples; ``level``: of the intervals; ``remarks``: notes of ``rlgf compare``."""

    rows: Sequence[Row]
    sizes: Mapping[str, int]
    baselines: Sequence[str]
    level: float
    remarks: Sequence[str] = ()

    @property
    def figures(self) -> list[str]:
        return list(self.sizes)


def build(
    comparisons: Mapping[str, Mapping[str, Any]], systems: Sequence[Row], *, baselines: Sequence[str], level: float
) -> Table:
    """The table of all systems, those without a figure included.

    ``comparisons[base]`` is the JSON of ``rlgf compare`` with that base; values and intervals are those of the first.
    ``systems`` have their planned and missing runs; seeds and entries are filled in here. Baselines without a
    comparison have a column too.
    """
    first = next(iter(comparisons.values()))
    rows = {row.system: replace(row, entries={}) for row in systems}
    for figure, compared in first["figures"].items():
        for result in compared["rows"]:
            label = result["system"]
            against = {base: _difference(other, figure, label) for base, other in comparisons.items()}
            entry = Entry(result["value"], result["low"], result["high"], against)
            rows[label] = replace(rows[label], seeds=result["seeds"], entries={**rows[label].entries, figure: entry})
    sizes = {figure: compared["n"] for figure, compared in first["figures"].items()}
    remarks = dict.fromkeys(note for comparison in comparisons.values() for note in comparison["tests"]["notes"])
    return Table(list(rows.values()), sizes, list(baselines), level, list(remarks))


def _difference(comparison: Mapping[str, Any], figure: str, label: str) -> Mapping[str, Any] | None:
    rows = comparison["figures"].get(figure, {"rows": []})["rows"]
    return next((row.get("difference") for row in rows if row["system"] == label), None)


def columns(table: Table) -> list[str]:
    """The headings."""
    return ["system", "seeds", *(h for f in table.figures for h in (f, *(f"p vs {b}" for b in table.baselines)))]


def cells(table: Table, row: Row) -> list[str]:
    """The texts of a row, without mark-up."""
    seeds = f"{row.seeds} of {row.planned}" if row.seeds < row.planned else str(row.seeds)
    texts = [row.system, seeds]
    for figure in table.figures:
        entry = row.entries.get(figure)
        texts.append("missing" if entry is None else shown(entry))
        texts += [_p(table, row, entry, base) for base in table.baselines]
    return texts


def shown(entry: Entry) -> str:
    """``0.4312 [0.4201, 0.4423]``; without the brackets where a figure has no interval."""
    if entry.low is None or entry.high is None:
        return f"{entry.value:.4f}"
    return f"{entry.value:.4f} [{entry.low:.4f}, {entry.high:.4f}]"


def _p(table: Table, row: Row, entry: Entry | None, base: str) -> str:
    """The corrected p-value; a dash where a system is its own baseline or the figure has none."""
    if row.system == base:
        return _DASH
    if entry is None or not any(other.system == base and other.entries for other in table.rows):
        return "missing"
    difference = entry.against.get(base)
    p = None if difference is None else difference.get("p_holm")
    return _DASH if p is None else "<0.0001" if p < 0.0001 else f"{p:.4f}"


class Highest(NamedTuple):
    """The system with the highest mean of a figure, and the others whose intervals overlap with its interval."""

    system: str
    near: list[str]


def highest(table: Table) -> dict[str, Highest]:
    """The highest system of each figure."""
    best: dict[str, Highest] = {}
    for figure in table.figures:
        entries = {row.system: row.entries[figure] for row in table.rows if figure in row.entries}
        system, top = max(entries.items(), key=lambda pair: pair[1].value)
        low = top.value if top.low is None else top.low
        near = [s for s, e in entries.items() if s != system and (e.value if e.high is None else e.high) >= low]
        best[figure] = Highest(system, near)
    return best


def notes(table: Table) -> list[str]:
    """The notes below the table."""
    level = f"{100 * table.level:g}%"
    sizes = ", ".join(f"{figure} n = {n}" for figure, n in table.sizes.items())
    lines = [f"Mean over seeds with its {level} interval; {sizes}."]
    if table.baselines:
        each = ", for each baseline by itself" if len(table.baselines) > 1 else ""
        lines.append(f"p: of the difference to the baseline, corrected after Holm{each} (`rlgf compare`).")
    for figure, (best, near) in highest(table).items():
        reach = (
            f"the intervals of {', '.join(near)} reach into its own" if near else "no other interval reaches into it"
        )
        lines.append(f"Bold in {figure}: the highest mean, {best}; {reach}.")
    lines += table.remarks
    lines += [f"Missing: {row.system}: {why}" for row in table.rows for why in row.missing]
    return lines


def to_markdown(table: Table) -> str:
    """The table as Markdown, with its notes below it."""

    def line(parts: Sequence[str]) -> str:
        return "| " + " | ".join(_escaped(part) for part in parts) + " |"

    heads = columns(table)
    lines = [line(heads), "|---|" + "---:|" * (len(heads) - 1)]
    for row in table.rows:
        lines.append(line([f"**{text}**" if bold else text for text, bold in marked(table, row)]))
    return "\n".join([*lines, "", *(f"- {_escaped(note)}" for note in notes(table))]) + "\n"


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def marked(table: Table, row: Row) -> Iterator[tuple[str, bool]]:
    """The texts of a row, and whether each is the highest mean of its column."""
    best = {figure: system for figure, (system, _) in highest(table).items()}
    for head, text in zip(columns(table), cells(table, row), strict=True):
        yield text, best.get(head) == row.system


def to_csv(table: Table) -> str:
    """One line per system and figure with unrounded numbers; an unknown one is empty, the reason is in ``missing``."""
    heads = ["system", "seeds", "planned", "figure", "n", "value", "low", "high"]
    heads += [f"{name} vs {base}" for base in table.baselines for name in _CSV_OF_BASELINE]
    stream = io.StringIO()
    write = csv.writer(stream, lineterminator="\n").writerow
    write([*heads, "missing"])
    for row in table.rows:
        for figure, n in table.sizes.items():
            entry = row.entries.get(figure)
            own: list[Any] = ["", "", ""] if entry is None else [entry.value, entry.low, entry.high]
            for base in table.baselines:
                difference = (entry.against.get(base) if entry is not None else None) or {}
                own += [difference.get(name) for name in _CSV_OF_BASELINE]
            write([row.system, row.seeds, row.planned, figure, n, *own, "; ".join(row.missing)])
    return stream.getvalue()


def to_html(table: Table, title: str) -> str:
    """One self-contained page, light or dark as the reader's system is."""
    import jinja2

    source = Path(__file__).with_name("table.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    rows = [list(marked(table, row)) for row in table.rows]
    return environment.from_string(source).render(title=title, heads=columns(table), rows=rows, notes=notes(table))
