"""What comes of asking a guide."""

from __future__ import annotations

from dataclasses import dataclass

from rlgf_cli.protocols import Completion, GuideRequest


@dataclass(frozen=True)
class Failure:
    """A request that brought no text.

    ``kind`` is what failures are counted by; ``message`` holds no key; ``final``: asking again would not help.
    """

    kind: str
    message: str
    final: bool = False


@dataclass(frozen=True)
class Answer:
    """What became of the ``index``-th request of a stream."""

    index: int
    request: GuideRequest
    outcome: Completion | Failure
