"""The guide ``echo:WORD``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlgf_cli.protocols import Completion, Guide, GuideAbilities, GuideRequest


class Echo(Guide):
    """Goes on with the first reference from where the prefix ends, and with WORD where there is none."""

    def __init__(self, config: Any, *, seed: int) -> None:
        super().__init__(config.name, self.describe(config))
        self.word = config.name.partition(":")[2]

    @classmethod
    def describe(cls, config: Any) -> GuideAbilities:
        return GuideAbilities(live=True, continues=True, at_once=config.batch_size)

    def complete(self, requests: Sequence[GuideRequest]) -> list[Completion]:
        return [self._complete(request) for request in requests]

    def _complete(self, request: GuideRequest) -> Completion:
        whole = [*request.example.references, self.word][0].split()
        words = whole[len(request.prefix.split()) :] or [self.word]
        text = " ".join(words[: request.max_new_tokens])
        ended = len(words) <= request.max_new_tokens
        return Completion(f" {text}" if request.prefix else text, "stop" if ended else "length", model=self.name)
