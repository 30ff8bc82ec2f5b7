"""What the system said, when a library says it in words of its own."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@contextlib.contextmanager
def os_errors(where: Path) -> Iterator[None]:
    """Turn what safetensors and tokenizers (Rust) raise on a full or read-only disk back into an OSError."""
    try:
        yield
    except Exception as error:  # tokenizers raises plain Exception; what is no system error goes on
        found = _OS_ERROR.search(str(error))
        if found is None or isinstance(error, OSError):
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(where)) from error


class RememberingWriter:
    """A stream for ``torch.save``, which swallows the system's error and complains of its own state; this keeps it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.error: OSError | None = None
        self._stream = path.open("wb", buffering=0)

    def write(self, data: bytes) -> int:
        """All of ``data``, or the system's error."""
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._stream.write(rest) :]
        except OSError as error:
            self.error = OSError(error.errno, error.strerror, str(self.path))
            raise
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""

    def __enter__(self) -> RememberingWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        self._stream.close()
        if error is not None and self.error is not None:
            raise self.error from error


def save_torch(path: Path, value: Any) -> None:
    """``torch.save`` that raises the system's error where the disk is full."""
    import torch

    with RememberingWriter(path) as stream:
        torch.save(value, cast("IO[bytes]", stream))
