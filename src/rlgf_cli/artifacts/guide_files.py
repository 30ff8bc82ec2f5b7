"""GuideFiles: the file of a guide's texts, and beside it the file of those that did not score enough."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rlgf_cli.artifacts.jsonl import Appender
from rlgf_cli.artifacts.records import GuideRecord
from rlgf_cli.errors import UserError


@dataclass(frozen=True)
class GuideFiles:
    """``guide.jsonl`` and, where texts are dropped, ``guide.dropped.jsonl``: a text is in one of them."""

    path: Path
    drops: bool

    @classmethod
    def of(cls, output: str, *, drops: bool) -> GuideFiles:
        """The files of an output. Raises UserError for a packed one."""
        path = Path(output)
        if path.suffix == ".gz":
            raise UserError("the output is appended to, so it cannot be .gz", where=output, hint="pack it afterwards")
        return cls(path, drops)

    @property
    def beside(self) -> Path:
        """The path of the dropped texts, whether there are any or not."""
        return self.path.with_name(f"{self.path.stem}.dropped{self.path.suffix}")

    @property
    def dropped(self) -> Path | None:
        """The file of the dropped texts; None where all are kept."""
        return self.beside if self.drops else None

    def hold_texts(self) -> bool:
        """Whether one of the files has a line."""
        return any(file is not None and file.is_file() and file.stat().st_size for file in (self.path, self.dropped))

    @contextmanager
    def appending(self) -> Iterator[Callable[[GuideRecord, bool], None]]:
        """``write(record, keep)`` appends a line to one of the files. Torn last lines are cut off first."""
        with ExitStack() as stack:
            out = stack.enter_context(Appender(self.path))
            dropped = stack.enter_context(Appender(self.beside)) if self.drops else out
            yield lambda record, keep: (out if keep else dropped).write(record)

    def remove(self) -> None:
        """Remove the files that :meth:`appending` made."""
        for file in (self.path, self.dropped):
            if file is not None:
                file.unlink(missing_ok=True)
