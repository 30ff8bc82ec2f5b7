"""Drawing: matplotlib without pyplot, one figure to an SVG that follows the page's theme, an SVG file and a PNG.

It is drawn in the light theme's colours. In the page's SVG each of them becomes the CSS variable of its role.
"""

from __future__ import annotations

import io
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

SYSTEMS = 8
"""Colours of systems; a ninth begins again with another marker and other dashes."""

LIGHT = {
    "s0": "#0072b2", "s1": "#b84a00", "s2": "#007a58", "s3": "#a23f7c", "s4": "#866000", "s5": "#5b4bb7",
    "s6": "#4d5358", "s7": "#9a1b30", "ink": "#1c2126", "muted": "#59626b", "grid": "#e3e7eb", "paper": "#ffffff",
    "guide": "#1c2127", "start": "#59626c",
}  # fmt: skip
"""After Okabe and Ito (2008), darker: every one has a contrast of 4.5 : 1 against the paper. No two are the same, for
a colour in an SVG is known again by them."""

DARK = {
    "s0": "#5cb8f0", "s1": "#ff8f52", "s2": "#35c79a", "s3": "#ea95c8", "s4": "#e3b13c", "s5": "#ab9dff",
    "s6": "#b9c2ca", "s7": "#ff8594", "ink": "#e8ebee", "muted": "#a7b0b9", "grid": "#2e353d", "paper": "#191e24",
    "guide": "#e8ebee", "start": "#a7b0b9",
}  # fmt: skip

_MARKERS = "os^DvPX*"
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)))
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rlgf",
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": False,
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.labelsize": 9.5,
    "legend.fontsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "path.simplify_threshold": 0.3,
}

Palette = Mapping[str, str]
Paint = Callable[[Figure, Palette], None]


@dataclass(frozen=True)
class Plot:
    """A drawn plot. ``inline`` is for the page, ``svg`` and ``png`` are files of their own."""

    name: str
    title: str
    caption: str
    inline: str
    svg: str
    png: bytes


@dataclass(frozen=True)
class Look:
    """How a system looks in every plot: its colour's role, its marker and its dashes."""

    role: str
    marker: str
    dashes: Any

    @classmethod
    def of(cls, index: int) -> Look:
        turn = index // SYSTEMS
        return cls(f"s{index % SYSTEMS}", _MARKERS[(index + turn) % len(_MARKERS)], _DASHES[turn % len(_DASHES)])


def plot(name: str, title: str, caption: str, alt: str, size: tuple[float, float], paint: Paint) -> Plot:
    """Draw. ``alt`` says in words what is to be seen; ``size`` is in inches, of 72 units of the page each."""
    raw, png = _rendered(size, paint)
    body = raw[raw.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    body = re.sub(r'( d=| transform=|(?<=\s)[xy]=)"[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m[0]), body)
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", body)
    body = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", "system-ui, sans-serif", body)
    about = f"<title>{escape(title)}</title><desc>{escape(alt)}</desc>"
    inline = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", body, count=1)
    inline = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", inline, count=1)
    inline = inline.replace("<svg", f'<svg role="img" aria-label="{escape(f"{title}. {alt}")}"', 1)
    inline, svg = (re.sub(r"(<svg[^>]*>)", rf"\1{_group_safe(about)}", text, count=1) for text in (inline, body))
    for role, colour in LIGHT.items():
        inline = inline.replace(colour, f"var(--{role})")
    head = '<?xml version="1.0" encoding="utf-8" standalone="no"?>\n'
    return Plot(name, title, caption, inline, head + svg, png)


def style(axes: Axes, palette: Palette, *, x: str = "", y: str = "", grid: str = "y") -> None:
    """What all axes have in common."""
    axes.set_facecolor("none")
    axes.set_xlabel(x, color=palette["muted"])
    axes.set_ylabel(y, color=palette["muted"])
    axes.tick_params(colors=palette["muted"], labelcolor=palette["ink"], length=3)
    for spine in axes.spines.values():
        spine.set_color(palette["muted"])
        spine.set_linewidth(0.7)
    if grid:
        axes.grid(axis=grid, color=palette["grid"], linewidth=0.8)  # type: ignore[arg-type]


def printable(text: str, most: int) -> str:
    """One line for a label: without control characters, and not longer than ``most``."""
    line = "".join("\ufffd" if unicodedata.category(c)[0] == "C" else c for c in " ".join(text.split()))
    return line if len(line) <= most else line[: most - 1] + "…"


def _rendered(size: tuple[float, float], paint: Paint) -> tuple[str, bytes]:
    """A figure as SVG and as PNG; the second goes by the layout that was found for the first."""
    svg, png = io.StringIO(), io.BytesIO()
    with _styled():
        figure = Figure(figsize=size, layout="constrained", facecolor=LIGHT["paper"])
        FigureCanvasAgg(figure)
        paint(figure, LIGHT)
        figure.savefig(svg, format="svg", metadata={"Date": None})
        figure.set_layout_engine("none")
        figure.savefig(png, format="png", dpi=160, metadata={"Software": "rlgf"})
    return svg.getvalue(), png.getvalue()


@contextmanager
def _styled() -> Iterator[None]:
    """The look of all plots. A label may hold characters that the PNG's font does not have: they are boxes there."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        yield


def _group_safe(text: str) -> str:
    return text.replace("\\", r"\\")
