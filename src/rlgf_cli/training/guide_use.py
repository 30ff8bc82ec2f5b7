"""Counts of the guide's requests per prompt, and of the uses of each of its texts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from rlgf_cli.training.parallel.processes import Processes


@dataclass
class GuideUse:
    """Counts of requests and of texts: part of the trainer's state, saved and restored.

    ``uses`` counts requests per prompt; the count is the sample index of a live guide's next request, so that a cache
    never replays one text for ever. ``texts`` counts uses per text. ``unshared`` holds what this process added to both
    since the processes last exchanged their counts.
    """

    uses: Counter[str] = field(default_factory=Counter)
    texts: Counter[str] = field(default_factory=Counter)
    unshared: tuple[Counter[str], Counter[str]] = field(default_factory=lambda: (Counter(), Counter()))

    def next_index(self, example_id: str) -> int:
        index = self.uses[example_id]
        self.uses[example_id] += 1
        self.unshared[0][example_id] += 1
        return index

    def count_text(self, key: str) -> None:
        self.texts[key] += 1
        self.unshared[1][key] += 1

    def merge(self, processes: Processes) -> None:
        """Add what the other processes counted."""
        mine, self.unshared = self.unshared, (Counter(), Counter())
        for rank, (uses, texts) in enumerate(processes.gather(mine)):
            if rank != processes.rank:
                self.uses.update(uses)
                self.texts.update(texts)

    @property
    def reuse(self) -> float:
        """Mean number of uses of each distinct text that was used."""
        return sum(self.texts.values()) / len(self.texts) if self.texts else 0.0
