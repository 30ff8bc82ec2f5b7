"""How often a guide was asked and its texts were used."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from rlgf_cli.training.parallel.processes import Processes


@dataclass
class GuideUse:
    """How often the guide was asked, and with which sample index: part of the trainer's state, saved and restored.

    ``uses`` counts requests per prompt; inside training it is the sample index of a live guide, so that a cache
    never replays one text for ever. ``fresh`` holds what this process added since the processes last told each other.
    """

    uses: Counter[str] = field(default_factory=Counter)
    texts: Counter[str] = field(default_factory=Counter)
    fresh: tuple[Counter[str], Counter[str]] = field(default_factory=lambda: (Counter(), Counter()))

    def next_index(self, example_id: str) -> int:
        index = self.uses[example_id]
        self.uses[example_id] += 1
        self.fresh[0][example_id] += 1
        return index

    def note_text(self, key: str) -> None:
        self.texts[key] += 1
        self.fresh[1][key] += 1

    def share(self, processes: Processes) -> None:
        """Take over what the other processes added."""
        mine, self.fresh = self.fresh, (Counter(), Counter())
        for rank, (uses, texts) in enumerate(processes.gather(mine)):
            if rank != processes.rank:
                self.uses.update(uses)
                self.texts.update(texts)

    @property
    def reuse(self) -> float:
        """Mean number of uses of each distinct text that was used."""
        return sum(self.texts.values()) / len(self.texts) if self.texts else 0.0
