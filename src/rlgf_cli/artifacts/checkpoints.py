"""Folders of checkpoints: ``checkpoints/step_N``, each whole or not there.

A checkpoint is written under a temporary name; its ``COMPLETE`` file, written last, lists every file with its size. A
folder without it, or with other files or sizes, counts as no checkpoint.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from rlgf_cli.artifacts.jsonl import read_json, write_json
from rlgf_cli.errors import RlgfError

COMPLETE = "COMPLETE"
"""The file in a checkpoint that is written last: ``{"files": {name: bytes}}``."""


def mark_complete(folder: Path) -> None:
    """Write the COMPLETE file of a folder: every other file with its size."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p != folder / COMPLETE]
    write_json(folder / COMPLETE, {"files": {str(p.relative_to(folder)): p.stat().st_size for p in files}})


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, in the place of an earlier attempt; removed where the block fails."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # a half-written folder would keep a full disk full
        raise


@contextlib.contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder to fill. When the block succeeds, ``COMPLETE`` is written and the folder renamed to
    ``folder``; otherwise it is removed."""
    with new_folder(folder.with_name(f".{folder.name}.tmp")) as temporary:
        yield temporary
        mark_complete(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)


def is_complete(folder: Path) -> bool:
    """Whether ``COMPLETE`` is there and every file that it lists has its size."""
    if not (folder / COMPLETE).is_file():
        return False
    try:
        files = read_json(folder / COMPLETE)["files"]
    except RlgfError:  # cut short as well
        return False
    return all((folder / n).is_file() and (folder / n).stat().st_size == size for n, size in files.items())


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def complete_checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints below ``root``, oldest first."""
    return sorted((f for f in root.glob("step_*") if f.is_dir() and is_complete(f)), key=step_of)


def newest(root: Path) -> tuple[Path | None, list[Path]]:
    """The newest complete checkpoint (None: there is none), and the damaged ones of later steps."""
    complete = complete_checkpoints(root)
    latest = complete[-1] if complete else None
    first = 0 if latest is None else step_of(latest) + 1
    later = [f for f in root.glob("step_*") if f.is_dir() and f not in complete and step_of(f) >= first]
    return latest, sorted(later, key=step_of)


def rotate(root: Path, keep: int | None) -> None:
    """Remove all but the newest ``keep`` complete checkpoints (None: keep all), and what a killed run left."""
    for torn in root.glob(".step_*.tmp"):
        shutil.rmtree(torn, ignore_errors=True)
    if keep is not None:
        for old in complete_checkpoints(root)[:-keep]:
            # renamed first: where the removal is interrupted, the next call removes the rest as a temporary folder
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.tmp")))
