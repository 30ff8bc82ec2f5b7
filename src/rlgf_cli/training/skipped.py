"""Leaves out the episodes whose texts have no score: a judge may give none (``on_unreadable: skip``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rlgf_cli.errors import RlgfError
from rlgf_cli.training.episodes import Episode, scored_texts


def with_scores(episodes: Sequence[Episode], counts: Counter[str]) -> list[Episode]:
    """The policy's episodes whose texts all have a score, and all episodes of the guide, whose texts may need none."""
    left = [e for e in episodes if e.role != "own" or all(part.score is not None for _, part in scored_texts([e]))]
    counts["skipped"] += len(episodes) - len(left)
    return left


def comparable(episodes: Sequence[Episode], group_size: int, counts: Counter[str]) -> list[Episode]:
    """As :func:`with_scores`, without a group of which fewer than two are left to compare.

    Raises RlgfError where no episode of the policy is left.
    """
    scored = with_scores(episodes, counts)
    sizes = Counter(e.group for e in scored if e.role != "beside")
    left = [e for e in scored if e.role == "beside" or sizes[e.group] >= min(2, group_size)]
    counts["skipped"] += len(scored) - len(left)
    if not any(e.role == "own" for e in left):
        raise RlgfError(
            "the reward gave none of the step's episodes a score, or too few of them to compare",
            hint="a judge whose ratings can be read (rlgf doctor), or its on_unreadable: value; --resume goes on",
        )
    return left
