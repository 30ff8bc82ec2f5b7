"""Drawing with matplotlib, without pyplot: each plot as an SVG that follows the page's theme, an SVG file and a PNG.

Plots are drawn in the colours of the light theme. In the page's SVG each colour becomes the CSS variable of its role.
"""

from __future__ import annotations

import io
import re
import unicodedata
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

SYSTEMS = 8
"""The number of system colours; the ninth system has the first one with another marker and other dashes."""
WIDTH, HEIGHT = 5.2, 3.1
"""Of a plot, in inches."""
LABEL = 26
"""Characters of a label."""

LIGHT = {
    "s0": "#0072b2", "s1": "#b84a00", "s2": "#007a58", "s3": "#a23f7c", "s4": "#866000", "s5": "#5b4bb7",
    "s6": "#4d5358", "s7": "#9a1b30", "ink": "#1c2126", "muted": "#59626b", "grid": "#e3e7eb", "paper": "#ffffff",
    "guide": "#1c2127", "start": "#59626c",
}  # fmt: skip
"""After Okabe and Ito (2008), darker: each has a contrast of 4.5 : 1 against the paper. All differ, since they identify
the roles in an SVG.
"""

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
    """A drawn plot: ``inline`` is its SVG in the page, ``svg`` and ``png`` are its files."""

    name: str
    title: str
    caption: str
    inline: str
    svg: str
    png: bytes


@dataclass(frozen=True)
class Look:
    """The look of a system in every plot: its colour's role, its marker and its dashes."""

    role: str
    marker: str
    dashes: Any

    @classmethod
    def of(cls, index: int) -> Look:
        turn = index // SYSTEMS
        return cls(f"s{index % SYSTEMS}", _MARKERS[(index + turn) % len(_MARKERS)], _DASHES[turn % len(_DASHES)])


def plot(name: str, title: str, caption: str, alt: str, size: tuple[float, float], paint: Paint) -> Plot:
    """Draw a plot. ``alt`` describes it in words; ``size`` is in inches, of 72 units of the page each."""
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
    inline, svg = (re.sub(r"<svg[^>]*>", lambda m: m[0] + about, text, count=1) for text in (inline, body))
    for role, colour in LIGHT.items():
        inline = inline.replace(colour, f"var(--{role})")
    head = '<?xml version="1.0" encoding="utf-8" standalone="no"?>\n'
    return Plot(name, title, caption, inline, head + svg, png)


def style(axes: Axes, palette: Palette, *, x: str = "", y: str = "", grid: str = "y") -> None:
    """Labels, colours, spines and grid of all axes."""
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
    """A text as a label: one line without control characters, of at most ``most`` characters."""
    line = "".join("\ufffd" if unicodedata.category(c)[0] == "C" else c for c in " ".join(text.split()))
    return line if len(line) <= most else line[: most - 1] + "…"


def _rendered(size: tuple[float, float], paint: Paint) -> tuple[str, bytes]:
    """A figure as SVG and as PNG, both in the layout of the SVG."""
    svg, png = io.StringIO(), io.BytesIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # a label may have characters that the PNG's font lacks: they are boxes there
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        figure = Figure(figsize=size, layout="constrained", facecolor=LIGHT["paper"])
        FigureCanvasAgg(figure)
        paint(figure, LIGHT)
        figure.savefig(svg, format="svg", metadata={"Date": None})
        figure.set_layout_engine("none")
        figure.savefig(png, format="png", dpi=160, metadata={"Software": "rlgf"})
    return svg.getvalue(), png.getvalue()
