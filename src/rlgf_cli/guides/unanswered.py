"""The error for requests that a guide left unanswered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rlgf_cli.errors import RlgfError
from rlgf_cli.protocols import Failure


def unanswered(who: str, failures: Sequence[Failure], requests: str) -> RlgfError:
    """``who`` did not answer some of the ``requests`` ("12 questions"): the failures by kind, and the first message."""
    kinds = ", ".join(f"{kind}: {n}" for kind, n in Counter(f.kind for f in failures).most_common())
    return RlgfError(
        f"{who} did not answer {len(failures)} of {requests} ({kinds}); the first: {failures[0].message}",
        hint="the other answers are in the cache: the same command with --resume requests the rest",
    )
