"""The cache's file, opened by several at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rlgf_cli.guides.store import Store


def test_several_make_the_same_new_file(tmp_path: Path) -> None:
    """The change to WAL is refused at once where two processes make it: opening has to try again."""
    together = threading.Barrier(6)

    def opened(path: Path) -> int:
        together.wait()
        store = Store(path)
        store.at_least("run", 3, 0)
        calls = store.totals("run").calls
        store.close()
        return calls

    with ThreadPoolExecutor(6) as pool:
        for number in range(15):
            assert list(pool.map(opened, [tmp_path / f"{number}.sqlite"] * 6)) == [3] * 6
