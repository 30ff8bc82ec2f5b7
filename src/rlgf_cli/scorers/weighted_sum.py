"""The reward of a run: a weighted sum of rewards whose parts are all logged, made from config."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from rlgf_cli import registry
from rlgf_cli.config.common import PartConfig, Parts
from rlgf_cli.errors import UserError
from rlgf_cli.protocols import Example, Reward, Score
from rlgf_cli.scorers.base import signature_of
from rlgf_cli.scorers.checked import score_or_skip
from rlgf_cli.scorers.python import PythonReward
from rlgf_cli.scorers.schedule import LinearSchedule, linear_schedule
from rlgf_cli.scorers.workers import WorkersReward


@dataclass(frozen=True)
class Normalisation:
    """``clip((score - shift) / scale, low, high)``; ``bounds`` None: nothing is clipped."""

    shift: float = 0.0
    scale: float = 1.0
    bounds: tuple[float, float] | None = None

    def apply(self, score: float) -> tuple[float, bool]:
        """The normalised score, and whether it was clipped."""
        moved = (score - self.shift) / self.scale
        if self.bounds is None:
            return moved, False
        low, high = self.bounds
        return min(max(moved, low), high), not low <= moved <= high

    def describe(self, score: str) -> str:
        """The formula, for signatures."""
        moved = f"({score} - {self.shift!r}) / {self.scale!r}"
        return f"clip({moved}, {self.bounds[0]!r}, {self.bounds[1]!r})" if self.bounds else moved


class Part(NamedTuple):
    """A term of the sum. ``normalise`` None: the reward's score as it is."""

    weight: float | LinearSchedule
    reward: Reward
    normalise: Normalisation | None = None


class SumReward(Reward):
    """``sum_i weight_i * normalise_i(part_i)``.

    ``Score.parts`` holds each part's raw (unweighted) score under its name, and what the part itself logs
    under ``name.key``. A part that is normalised has ``name.normalised`` besides, and ``name.clipped`` (1 where it
    was) where it has bounds; ``counts`` says how many were clipped. A text that a part skips has no sum (None). A name
    that comes again gets ``#2``, ``#3``, ... behind it.

    A weight can be a :class:`LinearSchedule`, and a part can change with the iteration (``moves``, ``at``). The sum
    itself uses their final values; :meth:`at` gives the sum of an iteration.
    """

    def __init__(self, parts: Sequence[Part | tuple[float | LinearSchedule, Reward]]) -> None:
        if not parts:
            raise ValueError("a sum of no rewards")
        made = [Part(*part) for part in parts]
        names = unique_names(part.reward.name for part in made)
        self.parts = list(zip(names, made, strict=True))
        self._weights = {
            n: w if isinstance(w := part.weight, LinearSchedule) else LinearSchedule(w) for n, part in self.parts
        }
        self.name = "+".join(n if w.end == 1 else f"{w.end:g}*{n}" for n, w in self._weights.items())
        self._clipped = {name: 0 for name, part in self.parts if part.normalise and part.normalise.bounds}
        self.guides = [guide for part in made for guide in part.reward.guides]
        self.moves = any(w.moves for w in self._weights.values()) or any(part.reward.moves for part in made)
        self.prefetches = any(part.reward.prefetches for part in made)

    @property
    def signature(self) -> str:  # type: ignore[override]
        return " + ".join(f"{self._weights[name]}*{_described(part)}" for name, part in self.parts)

    def at(self, step: int) -> SumReward:
        """The sum as it is in iteration ``step``, counted from 0. It shares the parts that do not move, and counts."""
        now = SumReward(
            [
                Part(
                    self._weights[name].at(step),
                    part.reward.at(step),
                    part.normalise,
                )
                for name, part in self.parts
            ]
        )
        now._clipped = self._clipped
        return now

    def moving_weights(self, step: int) -> dict[str, float]:
        """The weights in iteration ``step`` of the parts whose weight moves."""
        return {name: weight.at(step) for name, weight in self._weights.items() if weight.moves}

    @property
    def counts(self) -> dict[str, int]:  # type: ignore[override]
        counts = {f"{name}.{key}": n for name, part in self.parts for key, n in part.reward.counts.items()}
        return counts | {f"{name}.clipped": n for name, n in self._clipped.items()}

    def stop_when(self, stop: Callable[[], bool]) -> None:
        for _, part in self.parts:
            part.reward.stop_when(stop)

    def check(self, examples: Sequence[Example]) -> None:
        for _, part in self.parts:
            part.reward.check(examples)

    def prefetch(self, examples: Sequence[Example], texts: Sequence[str]) -> None:
        for _, part in self.parts:
            part.reward.prefetch(examples, texts)

    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> list[Score | None]:
        totals = [0.0] * len(texts)
        skipped: set[int] = set()
        logged: list[dict[str, float]] = [{} for _ in texts]
        for name, part in self.parts:
            for i, score in enumerate(score_or_skip(part.reward, examples, texts)):
                if score is None:
                    skipped.add(i)
                    continue
                counted = score.value
                logged[i][name] = score.value
                logged[i].update({f"{name}.{key}": value for key, value in score.parts.items()})
                if part.normalise is not None:
                    counted, clipped = part.normalise.apply(score.value)
                    logged[i][f"{name}.normalised"] = counted
                    if name in self._clipped:
                        logged[i][f"{name}.clipped"] = float(clipped)
                        self._clipped[name] += clipped
                totals[i] += self._weights[name].end * counted
        return [
            None if i in skipped else Score(total, parts)
            for i, (total, parts) in enumerate(zip(totals, logged, strict=True))
        ]


def _described(part: Part) -> str:
    signature = f"[{signature_of(part.reward)}]"
    return part.normalise.describe(signature) if part.normalise else signature


def make_reward(parts: Parts, *, device: str = "auto", workers: int = 0) -> SumReward:
    """The weighted sum that the ``reward`` section of a config describes.

    ``device`` is for parts that hold a model; ``workers``: processes for each Python function that scores one text at
    a time, 0 for none. Raises UserError for unknown names and parameters, and for
    what a part cannot be built from.
    """
    if not parts:
        raise UserError("no reward was given", hint="for example --reward rouge; `rlgf ls rewards` lists them")
    made: list[Part] = []
    for part in parts:
        if registry.is_python_target(part.name):
            reward = _python(part, workers)
        else:
            reward = registry.build("rewards", part.name, part.params, device=device)
        weight = linear_schedule(part.weight, part.weight_start, part.weight_steps)
        made.append(Part(weight, reward, normalisation(part)))
    return SumReward(made)


def normalisation(part: PartConfig) -> Normalisation | None:
    """The normalisation by a part's ``shift``, ``scale`` and ``clip``; None where they change nothing."""
    made = Normalisation(part.shift, part.scale, (part.clip[0], part.clip[1]) if part.clip else None)
    return made if made != Normalisation() else None


def scorer_at(
    reward: SumReward, step: int
) -> tuple[Callable[[Sequence[Example], Sequence[str]], list[Score | None]], dict[str, float]]:
    """The checked scoring function of iteration ``step``, and the weights that move, as figures for its row."""
    weights = {f"score/weight/{name}": weight for name, weight in reward.moving_weights(step).items()}
    return partial(score_or_skip, reward.at(step)), weights


def _python(part: PartConfig, workers: int) -> Reward:
    here = PythonReward(part.name, part.params)
    if not workers or here.batched:  # a function of a batch may score each text in dependence on the others
        return here
    return WorkersReward(part.name, part.params, workers)


def unique_names(names: Iterable[str]) -> list[str]:
    """The names in order; a repeated one gets ``#2``, ``#3``, ... behind it."""
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return unique
