"""Outputs that are one file, with their manifest ``<file>.run.json`` beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlgf_cli.artifacts.lock import hold, released_on_error
from rlgf_cli.artifacts.rundir import Existing, Manifest, check_command, removable, ways_out
from rlgf_cli.errors import UserError


def manifest_of(path: Path) -> dict[str, Any] | None:
    """The content of ``<file>.run.json``, the manifest beside a file; None where there is none."""
    run_json = path.with_name(path.name + ".run.json")
    return Manifest.reopen(run_json).data if run_json.is_file() else None


def refuse_used_file(path: str | Path, existing: Existing, *, can_resume: bool = False) -> None:
    """Refuse an output file that is a folder, or that exists where it is to be made anew. Nothing is written."""
    path = Path(path)
    if path.is_dir():
        raise UserError("the output is a folder; a file name is needed", where=str(path), hint="for example -o x.jsonl")
    if path.exists() and existing == "refuse":
        raise UserError("this file already exists", where=str(path), hint=ways_out(can_resume))


def claim_file(
    path: str | Path,
    command: str,
    *,
    existing: Existing = "refuse",
    seed: int | None = None,
    can_resume: bool = False,
    beside: Sequence[Path] = (),
) -> Manifest:
    """Take a single JSONL file as a stage's product; its manifest lies beside it as ``<file>.run.json``.

    ``can_resume``: whether the command has ``--resume``, for the hint. ``beside``: further files in the same folder
    that the run writes; the manifest lists them, and ``overwrite`` alone removes those that it lists.
    """
    path = Path(path)
    run_json = path.with_name(path.name + ".run.json")
    refuse_used_file(path, existing, can_resume=can_resume)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = hold(path, command)
    with released_on_error(lock):
        refuse_used_file(path, existing, can_resume=can_resume)  # as it is now that it is ours
        if run_json.is_file():
            manifest = Manifest.reopen(run_json)
            manifest.lock = lock
            check_command(manifest, command, path, "file")
            wrote = manifest.data["wrote"]
            listed = [path.parent / name for name in filter(removable, wrote)]
            _refuse_used_beside([*beside, *listed], wrote, existing, can_resume)
            if existing == "resume":
                wrote += [other.name for other in beside if other.name not in wrote]
                return manifest
            for written in (path, *listed):
                written.unlink(missing_ok=True)
            run_json.unlink()
        elif path.exists():
            raise UserError("this file was not written by rlgf", where=str(path), hint="choose another -o")
        else:
            _refuse_used_beside(beside, (), existing, can_resume)
        manifest = Manifest(run_json, command, seed=seed, lock=lock)
        manifest.data["wrote"] = [other.name for other in beside]
        return manifest


def _refuse_used_beside(beside: Sequence[Path], wrote: Sequence[str], existing: Existing, can_resume: bool) -> None:
    for other in beside:
        if other.name in wrote:
            refuse_used_file(other, existing, can_resume=can_resume)
        elif other.exists():
            raise UserError(
                "the run writes a file of this name, and this one is not its",
                where=str(other),
                hint="choose another -o, or move the file",
            )
