"""Rows of files (JSONL, JSON, CSV, TSV, parquet) and of hub datasets, each with its place for error messages."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlgf_cli.artifacts.jsonl import open_bytes, parse_object, read_lines
from rlgf_cli.errors import UserError, did_you_mean

SPLIT_ALIASES = {"valid": "validation", "val": "validation", "dev": "validation"}
_SPLIT_FILE = re.compile(r"(train|validation|valid|val|dev|test)([-_.]\d.*)?")
_CSV_FIELD_LIMIT = 1 << 27


@dataclass(frozen=True)
class Row:
    """One row with its place (``file:line``). An unreadable row has an ``error`` and no values."""

    where: str
    values: Mapping[str, Any]
    error: UserError | None = None


Rows = Callable[[], Iterator[Row]]
"""A split: calling it starts reading."""


def is_local(dataset: str) -> bool:
    """Whether a dataset's name is a file or folder: it exists, or has the form of a path."""
    path = Path(dataset)
    return path.exists() or path.is_absolute() or dataset.startswith((".", "~")) or _suffix(path) in _READERS


def local_splits(dataset: str | None, splits: Mapping[str, str]) -> tuple[dict[str, Rows], list[Path]]:
    """The splits of local files, and the files. One file alone is the split ``train``."""
    base = Path(dataset).expanduser() if dataset else Path()
    if splits:
        if dataset and not base.is_dir():
            raise UserError("splits name files in a folder, and this is none", where=str(base))
        files = {name: [base / Path(file).expanduser()] for name, file in splits.items()}
    elif base.is_dir():
        files = _files_in(base)
    else:
        files = {"train": [base]}
    for path in (path for paths in files.values() for path in paths):
        open_bytes(path).close()
        if _suffix(path) not in _READERS:
            known = ", ".join(_READERS)
            raise UserError(f"a file of an unknown kind: {path.suffix!r}", where=str(path), hint=f"known: {known}")
    return {name: _reader(paths) for name, paths in files.items()}, [p for paths in files.values() for p in paths]


def _files_in(folder: Path) -> dict[str, list[Path]]:
    """``train.jsonl``, ``valid.csv``, ``test-00000-of-00002.parquet``, ... by split."""
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        suffix = _suffix(path)
        match = _SPLIT_FILE.fullmatch(path.name.lower().removesuffix(suffix))
        if suffix in _READERS and match:
            files.setdefault(SPLIT_ALIASES.get(match[1], match[1]), []).append(path)
    if not files:
        hint = "name the files: --splits train=FILE,test=FILE"
        raise UserError("no train, validation or test file in this folder", where=str(folder), hint=hint)
    for name, paths in files.items():
        if len(paths) > 1 and not all(re.search(r"\d", path.name) for path in paths):
            names = ", ".join(path.name for path in paths)
            hint = f"choose one: --splits {name}={paths[0].name}"
            raise UserError(f"several files for the split {name!r}: {names}", where=str(folder), hint=hint)
    return {name: files[name] for name in ("train", "validation", "test") if name in files}


def _suffix(path: Path) -> str:
    name = path.name.lower()
    ends = [end for end in _READERS if name.endswith(end)]
    return max(ends, key=len) if ends else path.suffix


def _reader(paths: list[Path]) -> Rows:
    def rows() -> Iterator[Row]:
        for path in paths:
            yield from _READERS[_suffix(path)](path)

    return rows


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in read_lines(path):
        if line.strip():
            where = f"{path}:{number}"
            try:
                yield Row(where, parse_object(line, where))
            except UserError as error:
                yield Row(where, {}, error)


def _read_json(path: Path) -> Iterator[Row]:
    """A list of objects, alone or as the only list in an object; also JSON lines under this name."""
    with open_bytes(path) as stream:
        try:
            value = json.load(stream)
        except UnicodeDecodeError as error:
            raise UserError(f"not UTF-8 text: {error.reason}", where=str(path)) from None
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":
                raise UserError(f"not JSON: {error.msg}", where=f"{path}:{error.lineno}") from None
            value = None
    if value is None:
        yield from _read_jsonl(path)
        return
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
        value = lists[0] if len(lists) == 1 else [value]
    for number, item in enumerate(value if isinstance(value, list) else [value], 1):
        where = f"{path}: record {number}"
        if isinstance(item, dict):
            yield Row(where, item)
        else:
            yield Row(where, {}, UserError(f"not an object, but {type(item).__name__}", where=where))


def _read_csv(path: Path, delimiter: str = ",") -> Iterator[Row]:
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        end = 0
        try:
            for cells in reader:
                where, end = f"{path}:{end + 1}", reader.line_num
                if not cells:
                    continue
                if header is None:
                    header = cells
                    if len(set(header)) < len(header):
                        raise UserError("a column's name is here twice", where=where)
                elif len(cells) != len(header):
                    message = f"{len(cells)} cells, but the header names {len(header)} columns"
                    yield Row(where, {}, UserError(message, where=where))
                else:
                    yield Row(where, dict(zip(header, cells, strict=True)))
        except csv.Error as error:
            raise UserError(f"not CSV: {error}", where=f"{path}:{end + 1}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"not UTF-8 text: {error.reason}", where=str(path)) from None


def _read_tsv(path: Path) -> Iterator[Row]:
    return _read_csv(path, "\t")


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{path}: row {number}", values)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"not a parquet file: {str(error).splitlines()[0]}", where=str(path)) from None


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".json": _read_json,
    ".json.gz": _read_json,
    ".csv": _read_csv,
    ".csv.gz": _read_csv,
    ".tsv": _read_tsv,
    ".tsv.gz": _read_tsv,
    ".parquet": _read_parquet,
}


def hub_splits(name: str, *, subset: str | None, revision: str | None, splits: Mapping[str, str]) -> dict[str, Rows]:
    """The splits of a hub dataset (``splits``: ours -> the hub's; none: train, validation and test)."""
    import datasets

    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset(name, subset, revision=revision)
    except datasets.exceptions.DatasetNotFoundError as error:
        hint = "check the name; a private or gated dataset needs HF_TOKEN; a local file needs its path"
        raise UserError(str(error).splitlines()[0], hint=hint) from None
    except (ConnectionError, OSError) as error:
        hint = "the hub cannot be reached; without network, download it first or give local files"
        raise UserError(f"loading {name} failed: {_first_line(error)}", hint=hint) from None
    except (ValueError, RuntimeError) as error:
        # a subset or revision that does not exist, or a dataset that is a script
        hint = "--subset names a configuration; for a script dataset try --revision refs/convert/parquet"
        raise UserError(f"loading {name} failed: {_first_line(error)}", hint=hint) from None
    if not splits:
        ours = {SPLIT_ALIASES.get(split, split): split for split in dataset}
        splits = {k: v for k, v in ours.items() if k in ("train", "validation", "test")} or ours
    for theirs in splits.values():
        if theirs not in dataset:
            raise UserError(f"{name} has no split {theirs!r}", hint=did_you_mean(theirs, dataset))
    return {ours: _hub_reader(name, theirs, dataset[theirs]) for ours, theirs in splits.items()}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _hub_reader(name: str, split: str, data: Any) -> Rows:
    def rows() -> Iterator[Row]:
        for number, values in enumerate(data):
            yield Row(f"{name}[{split}]: row {number}", values)

    return rows
