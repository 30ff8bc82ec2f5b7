"""The command ``rlgf prepare``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rlgf_cli import console
from rlgf_cli.cli.invocation import Invocation
from rlgf_cli.errors import UserError, did_you_mean

_SHOWN_BAD_LINES = 20
_MAP_KEYS = ("id", "prompt", "references", "meta")
_NEXT_MAP_KEY = re.compile(r",(?=\s*[A-Za-z_][\w.]*\s*=)")


def prepare(invocation: Invocation) -> None:
    """Turn a hub dataset or local files into checked JSONL splits.

    ```
    rlgf prepare --task commongen -o data/commongen
    rlgf prepare --dataset posts.csv --map "prompt={title} {post},references=summary" -o data/posts
    rlgf prepare --dataset xsum.parquet --split-from train --fractions validation=0.05,test=0.05 -o data/xsum
    rlgf prepare --check data/posts/train.jsonl guide.jsonl
    ```
    """
    files = invocation.options["files"] or []
    if invocation.options["check"]:
        _check(files, invocation.options["kind"])
        return
    if files:
        hint = "give data as --dataset FILE; --check FILE checks a JSONL file"
        raise UserError(f"a file without a flag: {files[0]}", hint=hint)
    for key in ("splits", "fractions"):
        if key in invocation.keys:
            invocation.keys[key] = _pairs(invocation.keys[key], f"--{key}")
    invocation.keys.update(_mapping(invocation.options["map"] or []))
    resolved, existing = invocation.resolve(), invocation.existing
    from rlgf_cli.stages import prepare as stage

    prepared = stage.run(resolved, existing=existing)
    if not invocation.as_json:
        names = list(dict.fromkeys(name for counts in prepared.splits.values() for name in counts))
        rows = [[name, *(str(counts.get(n, 0)) for n in names)] for name, counts in prepared.splits.items()]
        console.log(console.table(["split", *names], rows))
    invocation.print(prepared.to_json(), prepared.path)


def _pairs(text: str, flag: str) -> dict[str, str]:
    """``a=x,b=y`` as a mapping."""
    pairs: dict[str, str] = {}
    for part in _NEXT_MAP_KEY.split(text):
        name, equals, value = part.partition("=")
        if not equals or not name.strip() or not value.strip():
            raise UserError(f"{flag}: {part!r} is not NAME=VALUE")
        pairs[name.strip()] = value.strip()
    return pairs


def _mapping(texts: list[str]) -> dict[str, Any]:
    """``--map`` as dotted config keys. A template may hold commas; ``references`` may be given again."""
    flags: dict[str, Any] = {}
    for part in (part for text in texts for part in _NEXT_MAP_KEY.split(text)):
        name, equals, value = (piece.strip(" ") for piece in part.partition("="))
        if not equals:
            raise UserError(f"--map: {part!r} is not KEY=COLUMN", hint="for example --map prompt=article")
        if name.partition(".")[0] not in _MAP_KEYS or name == "meta":
            hint = "meta.KEY=COLUMN" if name == "meta" else did_you_mean(name, _MAP_KEYS)
            raise UserError(f"--map: unknown key {name!r}", hint=hint)
        value = value.replace("\\n", "\n").replace("\\t", "\t")
        if name == "references":
            flags.setdefault("map.references", []).append(value)
        else:
            flags[f"map.{name}"] = value
    return flags


def _check(files: list[Path], kind: str | None) -> None:
    from rlgf_cli.artifacts.check import KINDS, check

    if not files:
        raise UserError("--check needs files", hint="rlgf prepare --check train.jsonl test.jsonl")
    if kind is not None and kind not in KINDS:
        raise UserError(f"unknown kind {kind!r}", hint=did_you_mean(kind, KINDS))
    checked = [check(path, kind) for path in files]
    errors = [error for file in checked for error in file.errors]
    for file in checked:
        console.result(f"{file.path}: {file.kind}, {file.records} good, {len(file.errors)} bad")
    for error in errors[:_SHOWN_BAD_LINES]:
        console.log(str(error))
    if len(errors) > _SHOWN_BAD_LINES:
        console.log(f"... and {len(errors) - _SHOWN_BAD_LINES} more")
    if errors:
        raise UserError(f"{len(errors)} bad lines", hint="correct them, or let rlgf prepare --drop-bad leave them out")
