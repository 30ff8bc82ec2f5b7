"""Checks of an output folder before a stage starts or resumes a run in it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rlgf_cli.artifacts.jsonl import read_json
from rlgf_cli.artifacts.lock import refuse_held
from rlgf_cli.artifacts.rundir import Existing, Manifest, parent_of, refuse_used_folder
from rlgf_cli.errors import UserError

_ANY_TIME = ("output", "push_to_hub", "report_to", "logging_steps", "save_steps", "save_total_limit")
"""Config keys that may differ when a run is resumed, because they do not change the weights."""


def refuse_used(output: str, command: str, existing: Existing, *, can_resume: bool = True) -> None:
    """Refuse a used output folder at once, before anything is loaded. Nothing is written."""
    if Path(output).is_dir():
        refuse_held(Path(output))
    if existing == "refuse":
        refuse_used_folder(Path(output), command, existing, can_resume=can_resume)


def refuse_own_input(output: str, *inputs: str | None) -> None:
    """Refuse an output that is one of the inputs, or holds one: replacing it would remove what is read."""
    target = Path(output).resolve()
    for name in inputs:
        path = Path(name or "").resolve()
        if name and path.exists() and (path == target or target in path.parents):
            raise UserError("this input lies in the output", where=name, hint="choose another -o")


def finished_result(output: str, existing: Existing) -> dict[str, Any] | None:
    """The result of a finished run under ``--resume``; None where there is work left."""
    manifest = Path(output) / "run.json"
    if existing != "resume" or not manifest.is_file():
        return None
    data = read_json(manifest)
    return dict(data.get("result", {})) if data.get("status") == "done" else None


def refuse_changed(
    output: str, resolved: Mapping[str, Any], *, free: Collection[str] = (), weights: Collection[str | None] = ()
) -> None:
    """Refuse to resume a run with other settings or data than it began with.

    ``resolved`` is what ``Resolved.to_json`` gives; ``free`` names further dotted keys and sections that may differ.
    ``weights``: input folders whose weights no checkpoint of the run holds; they must be the same, too.
    """
    folder = Path(output)
    stored = folder / "config.resolved.json"
    if not stored.is_file():
        return
    before, now = _flat(read_json(stored)["values"]), _flat(resolved["values"])
    # a key that the run's version of rlgf did not have: a default is chosen so that earlier runs go on as they began
    new = {key for key in now if key not in before and resolved["origins"].get(key) == "default"}
    allowed = {*_ANY_TIME, *free, *new}
    for key in sorted({*before, *now}):
        if key in allowed or any(key.startswith(f"{section}.") for section in allowed):
            continue
        if before.get(key) != now.get(key):
            raise UserError(
                f"{key} is {now.get(key)!r}; the run began with {before.get(key)!r}",
                where=output,
                hint="resume with the settings of the beginning, or start another run with another -o",
            )
    for parent in read_json(folder / "run.json").get("parents", []):
        path = Path(parent["path"])
        compared = path.is_file() or path in {Path(name) for name in weights if name}
        if compared and (current := parent_of(path)) and current["sha256"] != parent["sha256"]:
            what = "file" if path.is_file() else "folder"
            raise UserError(
                f"this {what} changed since the run began",
                where=str(path),
                hint=f"start another run with another -o, or put the old {what} back",
            )


def refuse_other_settings(
    manifest: Manifest, settings: Mapping[str, Any], path: Path, *, free: Collection[str] = ()
) -> None:
    """Refuse to mix texts of different settings in one file. ``free``: settings that may differ."""
    before = manifest.data.get("settings")
    if before is None:
        return
    differ = [key for key in sorted({*before, *settings} - {*free}) if before.get(key) != settings.get(key)]
    if differ:
        key = differ[0]
        raise UserError(
            f"the file was collected with other settings ({', '.join(differ)}); "
            f"{key} was {before.get(key)!r} and is now {settings.get(key)!r}",
            where=str(path),
            hint="use the old settings, --overwrite, or another -o",
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
