"""Reading and writing JSONL: errors name ``file:line``, writers append whole lines or rename whole files."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import itertools
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from pydantic import BaseModel, ValidationError

from rlgf_cli.artifacts.conversations import located, plain
from rlgf_cli.artifacts.records import ExampleRecord, Record
from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.protocols import Example

R = TypeVar("R", bound=Record)
LONGEST_LINE = 2**26
"""Bytes of a line: a longer one is no record, and would fill the memory."""


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for reading; ``.gz`` is unpacked. A missing file or a folder is a UserError."""
    if path.is_dir():
        raise UserError("it is a folder; a JSONL file is needed", where=str(path), hint="name the file in it")
    if not path.is_file():
        raise UserError("no such file", where=str(path), hint="check the path; paths are relative to where rlgf runs")
    return cast("IO[bytes]", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yield ``(line number, line)`` as bytes, line end included. A damaged gzip file and a line of more than
    :data:`LONGEST_LINE` bytes are UserErrors."""
    path = Path(path)
    number = 0
    try:
        with open_bytes(path) as lines:
            for number, line in enumerate(iter(lambda: lines.readline(LONGEST_LINE + 1), b""), 1):
                if len(line) > LONGEST_LINE:
                    raise UserError(
                        f"this line has more than {LONGEST_LINE:,} bytes",
                        where=f"{path}:{number}",
                        hint="every line must be one JSON object; is the whole file one list?",
                    )
                yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        hint = "it was cut off, or is not packed: copy it once more, or take .gz from its name"
        raise UserError(f"not a whole gzip file: {error}", where=f"{path}:{number + 1}", hint=hint) from None


def parse_object(line: bytes, where: str) -> dict[str, Any]:
    """One line as a JSON object that can be written again: no NaN, no half of a surrogate pair."""
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
        if b"\\ud" in line.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        hint = "save the file as UTF-8, for example: iconv -f LATIN1 -t UTF-8 OLD > NEW"
        raise UserError(f"not UTF-8 text: {error.reason} at byte {error.start + 1}", where=where, hint=hint) from None
    except UnicodeEncodeError:
        hint = "a text was cut inside a character: cut off its end, or drop the line"
        raise UserError("half of a surrogate pair is no text", where=where, hint=hint) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"this line is not JSON: {error.msg} at column {error.colno}",
            where=where,
            hint="every line must be one JSON object; rlgf prepare --check lists all bad lines",
        ) from None
    except (ValueError, RecursionError) as error:
        hint = "a value that is not known is null; NaN and infinity are no numbers in JSON"
        raise UserError(f"this line is not JSON that can be used: {error}", where=where, hint=hint) from None
    if not isinstance(value, dict):
        raise UserError(
            f"this line holds a {type(value).__name__}, not a JSON object",
            where=where,
            hint="every line must be one JSON object",
        )
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    """A number with a point or an exponent; one that Python reads as infinity (1e999) is refused."""
    if math.isinf(number := float(text)):
        raise ValueError(f"{text} is too large for a number")
    return number


def read_objects(path: str | Path, *, torn_tail: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield ``(line number, object)``; blank lines are passed over.

    ``torn_tail``: drop a last line without its newline that does not parse, as a killed writer leaves it. For files
    that rlgf itself appends to, never for a user's input.
    """
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            value = parse_object(line, f"{path}:{number}")
        except UserError:
            if torn_tail and not line.endswith(b"\n"):
                return
            raise
        yield number, value


def parse_record(kind: type[R], value: Mapping[str, Any], where: str) -> R:
    """Check one object against its record model; the error names the field and the line."""
    try:
        with located(where):
            return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "record"
        if first["type"] == "missing":
            message = f"the field {field!r} is missing"
            hint = f"this file has: {', '.join(sorted(value))}; rlgf prepare --map renames columns"
        elif first["type"] in ("string_too_short", "string_pattern_mismatch"):
            message, hint = f"the field {field!r} is empty", "drop the record or fill the field"
        else:
            message, hint = f"the field {field!r}: {first['msg'].lower()}", f"it holds {str(first['input'])[:60]!r}"
        raise UserError(message, where=where, hint=hint) from None


def read_records(path: str | Path, kind: type[R], *, torn_tail: bool = False) -> Iterator[R]:
    """Yield the records of a JSONL file, each checked against ``kind``."""
    for number, value in read_objects(path, torn_tail=torn_tail):
        yield parse_record(kind, value, f"{path}:{number}")


def example_records(
    path: str | Path, *, limit: int | None = None, need_references: bool = False, references: bool = True
) -> Iterator[tuple[int, ExampleRecord]]:
    """``(line number, record)`` of a prompt/references file. Missing ids become ``line-N``. ``references`` False:
    the file's references are not read.
    """
    for number, value in itertools.islice(read_objects(path), limit):
        if not references:
            value.pop("references", None)
        record = parse_record(ExampleRecord, value, f"{path}:{number}")
        record.references = record.references if references else []
        record.id = record.id or f"line-{number}"
        if need_references and not record.references:
            raise UserError(
                "this record has no references",
                where=f"{path}:{number}",
                hint="the stage needs at least one reference per prompt"
                + ("; a completion that is a text is a guide's (--guide)" if "completion" in value else ""),
            )
        yield number, record


def id_twice(id_: str, first: int, where: str) -> UserError:
    """The error of a data file that has an id twice."""
    return UserError(
        f"the id {id_!r} is here twice (first on line {first})",
        where=where,
        hint="ids must be unique; leave them out and line numbers are used",
    )


def read_examples(
    path: str | Path,
    *,
    limit: int | None = None,
    need_references: bool = False,
    references: bool = True,
    conversations: bool = True,
) -> list[Example]:
    """The examples of a prompt/references file, as :func:`example_records` reads it. An id twice is refused; so is a
    prompt that is a conversation, where ``conversations`` is False.
    """
    examples: list[Example] = []
    lines: dict[str, int] = {}
    for number, record in example_records(path, limit=limit, need_references=need_references, references=references):
        if record.id in lines:
            raise id_twice(record.id, lines[record.id], f"{path}:{number}")
        lines[record.id] = number
        if not conversations:
            plain(record.prompt, f"{path}:{number}")
        examples.append(record.to_example())
    if not examples:
        raise UserError("the file holds no records", where=str(path), hint='one per line: {"prompt": "..."}')
    return examples


def dump_line(value: BaseModel | Mapping[str, Any]) -> str:
    """One JSON line. NaN and infinity are refused: they are not JSON."""
    data = value.model_dump(mode="json", exclude_none=False) if isinstance(value, BaseModel) else value
    return json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n"


@contextlib.contextmanager
def atomic_text(path: str | Path) -> Iterator[io.TextIOBase]:
    """Write a file under a temporary name and rename it when the block ends well; else leave nothing."""
    with _atomic(path, "w", encoding="utf-8", newline="\n") as stream:
        yield cast("io.TextIOBase", stream)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    with _atomic(path, "wb") as stream:
        stream.write(content)


@contextlib.contextmanager
def _atomic(path: str | Path, mode: str, **how: str) -> Iterator[IO[Any]]:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open(mode, **how) as stream:  # type: ignore[call-overload]
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_jsonl(path: str | Path, records: Iterable[BaseModel | Mapping[str, Any]]) -> int:
    """Write all records, whole or not at all. Returns how many."""
    count = 0
    with atomic_text(path) as stream:
        for record in records:
            stream.write(dump_line(record))
            count += 1
    return count


def write_json(path: str | Path, value: Any) -> None:
    """Write one JSON document, whole or not at all."""
    with atomic_text(path) as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False, allow_nan=False)
        stream.write("\n")


def read_json(path: str | Path) -> Any:
    """Read one JSON document; a damaged file is an error with its name."""
    path = Path(path)
    try:
        with open_bytes(path) as stream:
            return json.load(stream)
    except json.JSONDecodeError as error:
        raise RlgfError(f"not JSON: {error.msg}", where=f"{path}:{error.lineno}") from None
    except UnicodeDecodeError as error:
        raise RlgfError(f"not UTF-8 text: {error.reason}", where=str(path)) from None


class Appender:
    """Append whole lines to a JSONL file; a torn last line of an earlier run is cut off first."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._repair_tail()
        # unbuffered: a later flush must not write the rest of a failed write
        self._stream = self.path.open("ab", buffering=0)

    def _repair_tail(self) -> None:
        """Add the newline to a last line that is a whole object; cut off any other last line without one."""
        if not self.path.exists():
            return
        with self.path.open("rb+") as stream:
            end = keep = stream.seek(0, os.SEEK_END)
            tail = b""
            while keep > 0:
                start = max(0, keep - 65536)
                stream.seek(start)
                block = stream.read(keep - start)
                newline = block.rfind(b"\n")
                tail = block[newline + 1 :] + tail
                keep = start + newline + 1
                if newline >= 0:
                    break
            if keep == end:
                return
            try:
                parse_object(tail, str(self.path))
            except UserError:
                stream.truncate(keep)
            else:
                stream.seek(end)
                stream.write(b"\n")

    def write(self, record: BaseModel | Mapping[str, Any]) -> None:
        """Append one line and hand it to the operating system; a line that does not fit is taken back."""
        rest = memoryview(dump_line(record).encode("utf-8"))
        before = os.fstat(self._stream.fileno()).st_size
        try:
            while rest:
                rest = rest[self._stream.write(rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._stream.fileno(), before)
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> Appender:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
