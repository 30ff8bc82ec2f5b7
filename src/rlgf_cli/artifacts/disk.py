"""Files as such: the cache folder, digests, and operating-system errors (a full disk) that libraries hide."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

_BLOCKS, _BLOCK_BYTES = 16, 4096
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def cache_folder() -> Path:
    """The folder of bought texts and converted models: ``RLGF_CACHE_DIR``, else ``~/.cache/rlgf``."""
    named = os.environ.get("RLGF_CACHE_DIR")
    return Path(named) if named else Path.home() / ".cache" / "rlgf"


def blocks_digest(files: Iterable[Path]) -> str:
    """A sha256 of every file's size and of blocks spread over it, which tells weights apart without reading them
    whole."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{size}:".encode())
        with path.open("rb") as stream:
            for i in range(_BLOCKS):
                stream.seek(max(0, size - _BLOCK_BYTES) * i // (_BLOCKS - 1))
                digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()


@contextlib.contextmanager
def os_errors(where: Path) -> Iterator[None]:
    """Turn the errors of safetensors and tokenizers (Rust) on a full or read-only disk into an OSError."""
    try:
        yield
    except Exception as error:  # tokenizers raises plain Exception; other errors are raised again
        match = _OS_ERROR.search(str(error))
        if match is None or isinstance(error, OSError):
            raise
        raise OSError(int(match[1]), os.strerror(int(match[1])), str(where)) from error


class RememberingWriter:
    """A stream for ``torch.save``, which hides the system's error behind one about its own state; this raises it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.error: OSError | None = None
        self._stream = path.open("wb", buffering=0)

    def write(self, data: bytes) -> int:
        """Write all of ``data``; raises the system's error."""
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._stream.write(rest) :]
        except OSError as error:
            self.error = OSError(error.errno, error.strerror, str(self.path))
            raise
        return len(data)

    def flush(self) -> None:
        """The stream has no buffer."""

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
