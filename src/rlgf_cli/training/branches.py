"""Where the guide writes for ``guide_mc``: from just before and from just after the action at the cut.

The action is ``action_start..cut``: one token, or a whole word where the cut had to move. Both sides may go on to the
same total length, so their difference is what the action was worth to the guide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rlgf_cli.training.episodes import Branch, Episode

Boundary = Callable[[list[int], int], bool]
"""Whether the text of the first n ids is one that a guide can be given."""


@dataclass(frozen=True)
class Place:
    """One text that the guide is asked for: what it goes on from."""

    episode: Episode
    side: Literal["before", "after"]
    prefix: list[int]


def places(episodes: Sequence[Episode], samples: int, limit: int, boundary: Boundary) -> list[Place]:
    """``samples`` texts on each side of every action that was drawn, episode by episode.

    A roll-in that ended before k has no action at the cut. One that ended exactly there, or filled ``limit`` tokens, is
    its own text on the side after. Moves ``action_start`` back to where the text can be given to the guide.
    """
    found = []
    for e in episodes:
        if not e.reached_cut:
            continue
        ids = e.ids
        e.action_start = next((n for n in range(e.action_start, 0, -1) if boundary(ids, n)), 0)
        found += [Place(e, "before", ids[: e.action_start])] * samples
        if not e.finished and len(ids) < limit:
            found += [Place(e, "after", ids)] * samples
    return found


def attach(found: Iterable[tuple[Place, list[int]]], asked: Sequence[Place], counts: Counter[str]) -> set[int]:
    """Give episodes what the guide wrote, each text with its place; returns the episodes that it finished.

    The first text from after the action finishes the episode, the others become branches. An episode without any text
    on a side that was asked learns nothing and is counted (``one_sided``).
    """
    finished: set[int] = set()
    missing = {(place.episode.index, place.side): place.episode for place in asked}
    for place, ids in found:
        e = place.episode
        missing.pop((e.index, place.side), None)
        if place.side == "after" and e.index not in finished:
            e.segments.append(("guide", ids))
            finished.add(e.index)
        else:
            e.branches.append(Branch(place.side, len(place.prefix), [*place.prefix, *ids]))
    for e in missing.values():
        e.branches, e.reached_cut = [], False
    counts["one_sided"] += len({index for index, _ in missing})
    return finished
