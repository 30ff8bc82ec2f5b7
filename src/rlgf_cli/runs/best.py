"""``<run>/best``: the policy with the best held-out score so far, as a checkpoint that from_pretrained loads.

``<run>/best_watched`` is the one with the best watched figure (see training.divergence). A new folder is written, and
the former one moved away, below ``checkpoints/``, which belongs to the run; the rotation of checkpoints ignores both.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from rlgf_cli.artifacts.checkpoints import new_folder
from rlgf_cli.artifacts.jsonl import read_json, write_json
from rlgf_cli.models import load as loading
from rlgf_cli.models.loaded import Loaded

NOTE = "rlgf_best.json"
"""Beside the weights: ``{"schema_version": 1, "step": ..., "score": ...}``."""


def save(
    folder: Path,
    loaded: Loaded,
    *,
    step: int,
    score: float,
    workshop: Path,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Replace ``folder`` by the current policy. The former one stays until the new one is whole on disk.

    A kill between the two renames leaves the former one in ``workshop``; :func:`finish_interrupted` puts it back.
    """
    new, old = _new(folder, workshop), _old(folder, workshop)
    with new_folder(new):
        loading.save(new, loaded, weights=weights)
        write_json(new / NOTE, {"schema_version": 1, "step": step, "score": score})
    if folder.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        folder.replace(old)
    new.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def finish_interrupted(folder: Path, workshop: Path) -> None:
    """Finish what a kill interrupted: ``folder`` is then the new one or the former one, and nothing else is left."""
    old = _old(folder, workshop)
    if old.is_dir() and not folder.is_dir():
        old.replace(folder)
    for left in (old, _new(folder, workshop)):
        shutil.rmtree(left, ignore_errors=True)


def read(folder: Path) -> dict[str, Any] | None:
    """The step and the score of the saved policy; None where there is none."""
    return read_json(folder / NOTE) if (folder / NOTE).is_file() else None


def copy(folder: Path, target: Path) -> None:
    """Copy the saved policy into the folder ``target``, without the file :data:`NOTE`."""
    shutil.copytree(folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(NOTE))


def _new(folder: Path, workshop: Path) -> Path:
    return workshop / f".{folder.name}.new"


def _old(folder: Path, workshop: Path) -> Path:
    return workshop / f".{folder.name}.old"
