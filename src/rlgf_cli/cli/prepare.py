"""``rlgf prepare``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from rlgf_cli import console
from rlgf_cli.cli import options
from rlgf_cli.errors import UserError, did_you_mean

_SHOWN_BAD_LINES = 20
_MAP_KEYS = ("id", "prompt", "references", "meta")
_NEXT_MAP_KEY = re.compile(r",(?=\s*[A-Za-z_][\w.]*\s*=)")
_DATA, _SIZE, _CHECK = "Data", "Splits and size", "Check"


def prepare(
    files: Annotated[
        list[Path] | None, typer.Argument(help="With --check: the files to check.", show_default=False)
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            "--dataset-name",
            help="A hub name, a file, or a folder with train, validation and test files.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option("--task", help="A built-in mapping: commongen, imdb, tldr.", rich_help_panel=_DATA),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            help="KEY=COLUMN,... for prompt, references, id, meta.NAME; or a template: prompt={a} {b}.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    splits: Annotated[
        str | None,
        typer.Option("--splits", help="train=FILE,test=FILE, or the hub's split names.", rich_help_panel=_DATA),
    ] = None,
    output: options.Output = None,
    config: options.Config = None,
    set_: options.Set = None,
    seed: options.Seed = None,
    subset: Annotated[
        str | None,
        typer.Option("--subset", "--dataset-config", help="The hub dataset's configuration.", rich_help_panel=_DATA),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option("--revision", help="The hub dataset's branch, tag or commit.", rich_help_panel=_DATA),
    ] = None,
    group_by: Annotated[
        str | None,
        typer.Option(
            "--group-by",
            help="Rows with equal values here become one example with all references.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    drop_bad: Annotated[
        bool | None,
        typer.Option("--drop-bad", help="Drop and count bad rows instead of stopping.", rich_help_panel=_DATA),
    ] = None,
    allow_no_references: Annotated[
        bool | None,
        typer.Option("--allow-no-references", help="Keep prompts without references.", rich_help_panel=_DATA),
    ] = None,
    split_from: Annotated[
        str | None,
        typer.Option("--split-from", help="The split that --fractions are taken from.", rich_help_panel=_SIZE),
    ] = None,
    fractions: Annotated[
        str | None, typer.Option("--fractions", help="validation=0.05,test=0.05", rich_help_panel=_SIZE)
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", "-L", help="Keep the first N examples of a split.", rich_help_panel=_SIZE),
    ] = None,
    sample: Annotated[
        int | None, typer.Option("--sample", help="Keep N random examples of a split.", rich_help_panel=_SIZE)
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Only check JSONL files; list every bad line.", rich_help_panel=_CHECK),
    ] = False,
    kind: Annotated[
        str | None,
        typer.Option(
            "--kind",
            help="What --check expects: examples, guide, predictions, labelled.",
            show_default="what the first line looks like",
            rich_help_panel=_CHECK,
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    print_config: options.PrintConfig = False,
    as_json: options.AsJson = False,
) -> None:
    """Turn a hub dataset or local files into checked JSONL splits.

    ```
    rlgf prepare --task commongen -o data/commongen
    rlgf prepare --dataset posts.csv --map "prompt={title} {post},references=summary" -o data/posts
    rlgf prepare --dataset xsum.parquet --split-from train --fractions validation=0.05,test=0.05 -o data/xsum
    rlgf prepare --check data/posts/train.jsonl guide.jsonl
    ```
    """
    if check:
        _check(files or [], kind)
        return
    if files:
        hint = "give data as --dataset FILE; --check FILE checks a JSONL file"
        raise UserError(f"a file without a flag: {files[0]}", hint=hint)
    flags: dict[str, Any] = {
        "dataset": dataset,
        "task": task,
        "splits": _pairs(splits, "--splits"),
        **_mapping(columns or []),
        "output": output,
        "seed": seed,
        "subset": subset,
        "revision": revision,
        "group_by": group_by,
        "drop_bad": drop_bad,
        "allow_no_references": allow_no_references,
        "split_from": split_from,
        "fractions": _pairs(fractions, "--fractions"),
        "limit": limit,
        "sample": sample,
    }
    resolved = options.resolve("prepare:PrepareConfig", config, set_, flags)
    if print_config:
        options.print_config(resolved)
        return

    from rlgf_cli.stages import prepare as stage

    prepared = stage.run(resolved, existing=options.existing(False, overwrite))
    if as_json:
        console.result_json(prepared.to_json())
        return
    names = list(dict.fromkeys(name for counts in prepared.splits.values() for name in counts))
    rows = [[name, *(str(counts.get(n, 0)) for n in names)] for name, counts in prepared.splits.items()]
    console.log(console.table(["split", *names], rows))
    console.result(str(prepared.path))


def _pairs(text: str | None, flag: str) -> dict[str, str] | None:
    """``a=x,b=y`` as a mapping."""
    if text is None:
        return None
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
    errors = [error for found in checked for error in found.errors]
    for found in checked:
        console.result(f"{found.path}: {found.kind}, {found.records} good, {len(found.errors)} bad")
    for error in errors[:_SHOWN_BAD_LINES]:
        console.log(str(error))
    if len(errors) > _SHOWN_BAD_LINES:
        console.log(f"... and {len(errors) - _SHOWN_BAD_LINES} more")
    if errors:
        raise UserError(f"{len(errors)} bad lines", hint="mend them, or let rlgf prepare --drop-bad leave them out")
