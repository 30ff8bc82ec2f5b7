"""Linear schedules of a reward's numbers during training: a part's weight, or the target of a penalty."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearSchedule:
    """From ``start`` in the first iteration, in equal steps, to ``end`` after ``steps`` iterations; constant from
    there.

    ``steps`` 0: it is ``end`` at all times.
    """

    end: float
    start: float = 0.0
    steps: int = 0

    @property
    def moves(self) -> bool:
        return self.steps > 0

    def at(self, step: int | None) -> float:
        """The number in iteration ``step``, counted from 0; the last one for None."""
        if step is None or step >= self.steps:
            return self.end
        return self.start + (self.end - self.start) * step / self.steps

    def __str__(self) -> str:
        return f"{self.start:g}..{self.end:g}/{self.steps}" if self.moves else f"{self.end:g}"


def linear_schedule(end: float, start: float | None, steps: int | None) -> LinearSchedule:
    """The schedule that a config describes; without ``start`` and ``steps`` a constant."""
    return LinearSchedule(end) if start is None or steps is None else LinearSchedule(end, start, steps)
