"""Plots of a reward model on held-out texts: scores by kind, confusion by kind, calibration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlgf_cli.supervised.reward_report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH = 7.0
"""Inches; a kind's row is 0.35 high."""


def write(folder: Path, report: Report) -> None:
    """Write ``scores.png``, ``calibration.png`` and, for a classifier, ``confusion.png`` into a new folder."""
    folder.mkdir()
    height = 1.5 + 0.35 * len(report.scores)
    with _figure(folder / "scores.png", height) as axes:
        _scores(axes, report)
    with _figure(folder / "calibration.png", 5.0) as axes:
        _calibration(axes, report.figures["calibration"])
    if "confusion" in report.figures:
        with _figure(folder / "confusion.png", height) as axes:
            _confusion(axes, report.figures["confusion"])


class _figure:
    """A figure with one pair of axes, saved when the block ends. No pyplot: it keeps figures and chooses a display."""

    def __init__(self, path: Path, height: float) -> None:
        from matplotlib.figure import Figure

        self.path, self.figure = path, Figure(figsize=(_WIDTH, height), dpi=120, layout="constrained")

    def __enter__(self) -> Axes:
        return self.figure.add_subplot()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.figure.savefig(self.path)


def _scores(axes: Axes, report: Report) -> None:
    axes.boxplot(
        list(report.scores.values())[::-1],
        orientation="horizontal",
        tick_labels=[_plain(kind) for kind in report.scores][::-1],
    )
    axes.set_xlabel(f"probability of {_plain(report.figures['good'])}" if "good" in report.figures else "score")
    axes.set_title("Scores of held-out texts")


def _calibration(axes: Axes, bins: list[dict[str, Any]]) -> None:
    used = [b for b in bins if b["n"]]
    axes.plot([0, 1], [0, 1], linestyle=":", color="0.5", label="perfect")
    x, y = [b["probability"] for b in used], [b["observed"] for b in used]
    axes.plot(x, y, marker="o", label="held out")
    for b in used:
        axes.annotate(str(b["n"]), (b["probability"], b["observed"]), textcoords="offset points", xytext=(5, -10))
    axes.set(xlim=(0, 1), ylim=(-0.02, 1.02), xlabel="predicted probability", ylabel="observed share")
    axes.set_title("Calibration (with the number of texts in each bin)")
    axes.legend(loc="upper left")


def _confusion(axes: Axes, confusion: dict[str, Any]) -> None:
    counts = np.array(list(confusion["kinds"].values()))
    shares = counts / counts.sum(1, keepdims=True)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), count in np.ndenumerate(counts):
        dark = shares[row, column] > 0.6
        axes.text(column, row, str(count), ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(counts.shape[1]), [_plain(name) for name in confusion["predicted"]])
    axes.set_yticks(range(counts.shape[0]), [_plain(kind) for kind in confusion["kinds"]])
    axes.set(xlabel="predicted", ylabel="kind", title="What held-out texts of each kind were taken for")


def _plain(name: str) -> str:
    """A name for matplotlib, which reads a dollar sign as the begin of a formula."""
    return name.replace("$", r"\$")
