"""Plots of a training: the reward and the shares of the operations over its iterations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_SIZE = (7.0, 3.6)
"""Inches."""


def write(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``reward.png`` and ``operations.png`` into a new folder, without pyplot, which keeps figures and needs a
    display.
    """
    folder.mkdir()
    at = [row["iteration"] for row in rows]
    for name, paint in (("reward", _reward), ("operations", _operations)):
        figure = Figure(figsize=_SIZE, dpi=120, layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel("iteration")
        paint(axes, at, rows)
        figure.savefig(folder / f"{name}.png")


def _reward(axes: Axes, at: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> None:
    for name, label in (("reward", "reward per rewrite"), ("kept", "share kept"), ("novelty", "novelty of the kept")):
        axes.plot(at, [row.get(name, np.nan) for row in rows], label=label)
    axes.legend()
    axes.set_title("What the rewrites earned")


def _operations(axes: Axes, at: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> None:
    names = [name for name in rows[0] if name.startswith("operation/")]
    shares = np.array([[row[name] for row in rows] for name in names])
    if len(at) > 1:
        axes.stackplot(at, shares, labels=[name.partition("/")[2] for name in names])
    else:
        axes.bar([name.partition("/")[2] for name in names], shares[:, 0])
    axes.set(ylim=(0, 1), ylabel="share of the steps", title="Which operations were chosen")
    if len(at) > 1:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
