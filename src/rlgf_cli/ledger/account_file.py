"""The account of a run in its own folder, ``spend.json``, beside the one in the cache.

It is written with every charge, before the call is sent: neither a lost cache nor another machine lets a resumed run
pass its cap. Once the run's manifest has the spend, the file is removed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

_SIZE = 512
"""Bytes of the file: it is written in one piece, at its beginning."""


@dataclass(frozen=True)
class Totals:
    """The charges of a run: ``calls`` answered or of unknown outcome, ``unknown`` of them open or of unknown outcome
    (charged at the upper bound), ``unpriced`` answered without a price. Money is in billionths of a US dollar.
    """

    calls: int = 0
    nano_usd: int = 0
    unknown: int = 0
    unpriced: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


def account_path(manifest: Path) -> Path:
    """The account's file beside a manifest: ``spend.json`` of a folder, ``FILE.spend.json`` of a file."""
    return manifest.with_name(manifest.name.removesuffix("run.json") + "spend.json")


class AccountFile:
    """The file of one run's account. Who writes holds the transaction in which the charge is made."""

    def __init__(self, path: Path, run: str) -> None:
        self.path, self.run = path, run
        self._stream: IO[bytes] | None = None

    def read(self) -> Totals | None:
        """The charges in the file; None where there is none of this run."""
        try:
            data = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return None
        if not isinstance(data, dict) or data.get("run_id") != self.run:
            return None
        counts: dict[str, Any] = {field.name: data.get(field.name) for field in fields(Totals)}
        return Totals(**{name: count for name, count in counts.items() if type(count) is int})

    def write(self, totals: Totals) -> None:
        """Replace the charges. Nothing is written where the folder is missing: it is on another machine."""
        if self._stream is None:
            if not self.path.parent.is_dir():
                return
            self._stream = self.path.open("r+b" if self.path.is_file() else "w+b", buffering=0)
        self._stream.seek(0)
        self._stream.write(json.dumps({"run_id": self.run, **asdict(totals)}).encode().ljust(_SIZE - 1) + b"\n")
