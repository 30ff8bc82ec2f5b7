"""The continuations that a guide is asked for in a roll-out; for ``guide_mc``, on both sides of the action at the cut.

The action is ``action_start..cut``: one token, or a whole word where the cut had to move. Continuations from before and
from after it may have the same total length, so their difference is what the action was worth to the guide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rlgf_cli.training.episodes import Branch, Episode

Boundary = Callable[[list[int], int], bool]
"""Whether the text of the first n ids can be given to a guide."""


@dataclass(frozen=True)
class BranchPoint:
    """An episode and the ids that the guide is to continue."""

    episode: Episode
    side: Literal["before", "after"]
    prefix: list[int]


def branch_points(episodes: Sequence[Episode], samples: int, limit: int, boundary: Boundary) -> list[BranchPoint]:
    """``samples`` continuations on each side of every action that was drawn, episode by episode.

    A roll-in that ended before k has no action at the cut. One that ended exactly there, or filled ``limit`` tokens, is
    its own text on the side after. Moves ``action_start`` back to where the text can be given to the guide.
    """
    points = []
    for e in episodes:
        if not e.reached_cut:
            continue
        ids = e.ids
        e.action_start = next((n for n in range(e.action_start, 0, -1) if boundary(ids, n)), 0)
        points += [BranchPoint(e, "before", ids[: e.action_start])] * samples
        if not e.finished and len(ids) < limit:
            points += [BranchPoint(e, "after", ids)] * samples
    return points


def attach(points: Sequence[BranchPoint], continuations: Sequence[list[int] | None]) -> tuple[set[int], int]:
    """Append each continuation's ids to its episode; None or empty: the guide gave none.

    The first continuation from after the action finishes the episode, the others become branches. An episode without
    any continuation on a requested side learns nothing. Returns the indices of the finished episodes, and the number
    of those that learn nothing.
    """
    finished: set[int] = set()
    missing = {(point.episode.index, point.side): point.episode for point in points}
    for point, ids in zip(points, continuations, strict=True):
        if not ids:
            continue
        e = point.episode
        missing.pop((e.index, point.side), None)
        if point.side == "after" and e.index not in finished:
            e.segments.append(("guide", ids))
            finished.add(e.index)
        else:
            e.branches.append(Branch(point.side, len(point.prefix), [*point.prefix, *ids]))
    for e in missing.values():
        e.branches, e.reached_cut = [], False
    return finished, len({index for index, _ in missing})
