"""Optional trackers beside metrics.jsonl: TensorBoard, Weights & Biases, Trackio (through accelerate)."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlgf_cli.errors import UserError


@contextmanager
def tracker(name: str, folder: Path, config: Mapping[str, Any]) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that takes a metrics row, and does nothing for ``none``. UserError where the library is missing."""
    if name == "none":
        yield lambda row: None
        return
    if importlib.util.find_spec(name) is None:
        raise UserError(f"{name} is not installed", hint="pip install 'rlgf-cli[trackers]'")
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=name, project_dir=folder)
    accelerator.init_trackers("rlgf", config={"config": str(dict(config))})

    def track(row: Mapping[str, Any]) -> None:
        accelerator.log({k: v for k, v in row.items() if isinstance(v, int | float)}, step=row["step"])

    try:
        yield track
    finally:
        for running in accelerator.trackers:  # end_training would part the processes, which have work left
            running.finish()
