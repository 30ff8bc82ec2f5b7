"""The gate: a guide's text begins an episode only where it scored above what the policy writes alone on that prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from rlgf_cli import noise
from rlgf_cli.training.episodes import Episode
from rlgf_cli.training.parallel.processes import Processes

MEMORY = 0.5
"""Weight of the past in the running score of the policy's own texts: it learns, and its first texts should fade."""


@dataclass
class Gate:
    """One step's decisions, from what the steps before it found (``TrainerState.own_scores``, ``guide_scores``).

    ``own``: prompt id -> running score of the texts that the policy wrote alone; ``known``: :func:`text_key` -> score
    of a guide's text; ``score`` scores episodes in place; ``fresh``: the texts that were scored in this step.
    """

    own: Mapping[str, float]
    known: Mapping[str, float]
    score: Callable[[list[Episode]], None]
    fresh: dict[str, float] = field(default_factory=dict)

    def shuts(self, whole: Sequence[Episode]) -> list[bool]:
        """For each episode, as if the guide had written all of it: whether its text is kept out.

        Where the policy has no score of its own yet the guide's text is used, and not scored.
        """
        rivals = {text_key(e): e for e in whole if e.example.id in self.own}
        new = {key: e for key, e in rivals.items() if key not in self.known and key not in self.fresh}
        self.score(list(new.values()))
        self.fresh |= {key: e.value for key, e in new.items()}
        return [e.example.id in self.own and self._guides(e) <= self.own[e.example.id] for e in whole]

    def _guides(self, episode: Episode) -> float:
        key = text_key(episode)
        return self.known[key] if key in self.known else self.fresh[key]

    def share(self, processes: Processes) -> None:
        """Take over what the other processes scored. No text is with two of them: a prompt's episodes are with one."""
        for fresh in processes.gather(self.fresh):
            self.fresh |= fresh


def text_key(episode: Episode) -> str:
    """A prompt and a text on it, as tokens: whether it has its EOS is part of it."""
    return f"{episode.example.id}\x1f{noise.short_hash(' '.join(map(str, episode.ids)))}"


def own_scores(before: Mapping[str, float], episodes: Sequence[Episode]) -> dict[str, float]:
    """The running scores after a step: the mean of a prompt's texts that the policy wrote alone moves its record
    half of the way; the first one is the record."""
    found: dict[str, list[float]] = {}
    for e in episodes:
        if e.policy_alone and e.score is not None:
            found.setdefault(e.example.id, []).append(e.value)
    after = dict(before)
    for name, values in found.items():
        now = fmean(values)
        after[name] = MEMORY * before[name] + (1 - MEMORY) * now if name in before else now
    return after
