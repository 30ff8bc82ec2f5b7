"""A line that is longer than any record is refused before it fills the memory."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import pytest

from rlgf_cli.artifacts import jsonl
from rlgf_cli.errors import UserError

READ = """
import resource, sys
from rlgf_cli.artifacts.jsonl import read_objects
from rlgf_cli.errors import UserError
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), int(sys.argv[2])))
try:
    print(len(list(read_objects(sys.argv[1]))))
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("packed", [False, True])
def test_a_line_of_3_gb_is_refused_within_little_memory(tmp_path: Path, packed: bool) -> None:
    """The plain file is sparse; the packed one has a few megabytes."""
    size = 3 * 2**30 if not packed else 2**28
    path = tmp_path / ("long.jsonl.gz" if packed else "long.jsonl")
    if packed:
        with gzip.open(path, "wb", compresslevel=1) as stream:
            stream.write(b'{"prompt": "a"}\n')
            for _ in range(size // 2**20):
                stream.write(b"x" * 2**20)
    else:
        with path.open("wb") as stream:
            stream.write(b'{"prompt": "a"}\n')
            stream.truncate(size)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path), str(2**31)], capture_output=True, text=True, check=False
    )
    assert f"{path}:2: this line has more than {jsonl.LONGEST_LINE:,} bytes" in done.stdout, done.stderr


def test_a_line_of_the_longest_length_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = b'{"prompt": "' + b"x" * 20 + b'"}\n'
    path = tmp_path / "data.jsonl"
    path.write_bytes(line * 3)
    monkeypatch.setattr(jsonl, "LONGEST_LINE", len(line))
    assert len(list(jsonl.read_objects(path))) == 3
    monkeypatch.setattr(jsonl, "LONGEST_LINE", len(line) - 1)
    with pytest.raises(UserError, match="more than") as caught:
        list(jsonl.read_objects(path))
    assert caught.value.where == f"{path}:1"
