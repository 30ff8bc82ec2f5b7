"""Optional trackers beside metrics.jsonl (TensorBoard, Weights & Biases, Trackio); a resumed run continues its own."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlgf_cli.errors import UserError

Track = Callable[[Mapping[str, Any]], None]
PROJECT = "rlgf"
"""The trackers' project; ``WANDB_PROJECT`` names another one for Weights & Biases."""


@dataclass(frozen=True)
class Tracked:
    """The run that a tracker receives: its folder, its id in run.json, its config.

    ``step``: where this session begins (0: a new run); ``sent``: the last step that an earlier session sent to this
    tracker.
    """

    folder: Path
    run_id: str
    config: Mapping[str, Any]
    step: int = 0
    sent: int = 0


def check(name: str) -> None:
    """Refuse a tracker whose library is missing, before anything is loaded."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise UserError(f"{name} is not installed", hint="pip install 'rlgf-cli[trackers]'")


@contextmanager
def tracker(name: str, run: Tracked | None) -> Iterator[Track]:
    """A function that takes a metrics row, and does nothing for ``none`` (or without a run).

    The tracker's run is found by the id of this one, so that a resumed run goes on in it. Repeated steps are
    not sent again, except to TensorBoard, which then hides the earlier events.
    """
    if name == "none" or run is None:
        yield lambda row: None
        return
    with redirect_stdout(sys.stderr):  # Trackio prints a greeting on stdout
        send, end = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}[name](run)

    def track(row: Mapping[str, Any]) -> None:
        if name == "tensorboard" or row["step"] > run.sent:
            send({k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}, row["step"])

    try:
        yield track
    finally:
        with redirect_stdout(sys.stderr):
            end()


Send = Callable[[dict[str, float], int], None]


def _tensorboard(run: Tracked) -> tuple[Send, Callable[[], None]]:
    """Events below ``<run>/tensorboard``. Those of later steps than the one that is resumed from are hidden."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step + 1 if run.step else None)

    def send(values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, global_step=step)
        writer.flush()

    return send, writer.close


def _wandb(run: Tracked) -> tuple[Send, Callable[[], None]]:
    import wandb

    theirs = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        id=run.run_id,
        name=run.folder.name,
        resume="allow",
        config=dict(run.config),
    )
    return lambda values, step: theirs.log(values, step=step), theirs.finish


def _trackio(run: Tracked) -> tuple[Send, Callable[[], None]]:
    import trackio

    # its runs are found by name
    name = f"{run.folder.name}-{run.run_id}"
    theirs = trackio.init(project=PROJECT, name=name, resume="allow", config=dict(run.config))
    return lambda values, step: theirs.log(values, step=step), theirs.finish
