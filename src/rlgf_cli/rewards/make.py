"""From config to one reward: a weighted sum whose parts are all logged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from rlgf_cli import registry
from rlgf_cli.config.common import PartConfig, Parts
from rlgf_cli.errors import UserError
from rlgf_cli.protocols import Example, Reward, Score
from rlgf_cli.rewards.base import check_examples, counts_of, signature_of
from rlgf_cli.rewards.checked import score_checked
from rlgf_cli.rewards.python import PythonReward
from rlgf_cli.rewards.ramp import Ramp, ramp
from rlgf_cli.rewards.workers import WorkersReward


class SumReward:
    """``sum_i weight_i * part_i``.

    ``Score.parts`` holds each part's raw (unweighted) score under its name, and what the part itself logs
    under ``name.key``. A name that comes again gets ``#2``, ``#3``, ... behind it.

    A weight can be a :class:`Ramp`, and a part can have ``at(step)``, which gives it as it is in that iteration, and
    ``moves``, whether that ever changes. The sum itself scores with what all these end at; :meth:`at` gives the sum of
    an iteration.
    """

    def __init__(self, parts: Sequence[tuple[float | Ramp, Reward]]) -> None:
        if not parts:
            raise ValueError("a sum of no rewards")
        names = unique_names(part.name for _, part in parts)
        ramps = [weight if isinstance(weight, Ramp) else Ramp(weight) for weight, _ in parts]
        self.parts = [(name, weight, part) for name, weight, (_, part) in zip(names, ramps, parts, strict=True)]
        self.name = "+".join(n if w.end == 1 else f"{w.end:g}*{n}" for n, w, _ in self.parts)

    @property
    def signature(self) -> str:
        return " + ".join(f"{weight}*[{signature_of(part)}]" for _, weight, part in self.parts)

    @property
    def moves(self) -> bool:
        """Whether what a text scores depends on the iteration."""
        return any(weight.moves or getattr(part, "moves", False) for _, weight, part in self.parts)

    def at(self, step: int) -> SumReward:
        """The sum as it is in iteration ``step``, counted from 0. It shares the parts that do not move."""
        return SumReward(
            [
                (weight.at(step), part.at(step) if getattr(part, "moves", False) else part)  # type: ignore[attr-defined]
                for _, weight, part in self.parts
            ]
        )

    def moving_weights(self, step: int) -> dict[str, float]:
        """The weights in iteration ``step`` of the parts whose weight moves."""
        return {name: weight.at(step) for name, weight, _ in self.parts if weight.moves}

    @property
    def counts(self) -> dict[str, int]:
        return {f"{name}.{key}": n for name, _, part in self.parts for key, n in counts_of(part).items()}

    def check(self, examples: Sequence[Example]) -> None:
        for _, _, part in self.parts:
            check_examples(part, examples)

    @property
    def expects(self) -> bool:
        """Whether a part can begin with texts before it is asked for their scores."""
        return any(hasattr(part, "expect") for _, _, part in self.parts)

    def expect(self, examples: Sequence[Example], texts: Sequence[str]) -> None:
        """Let parts that can begin with texts that the next :meth:`score` will be asked for."""
        for _, _, part in self.parts:
            if (expect := getattr(part, "expect", None)) is not None:
                expect(examples, texts)

    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> list[Score]:
        totals = [0.0] * len(texts)
        logged: list[dict[str, float]] = [{} for _ in texts]
        for name, weight, part in self.parts:
            for i, score in enumerate(score_checked(part, examples, texts)):
                totals[i] += weight.end * score.value
                logged[i][name] = score.value
                logged[i].update({f"{name}.{key}": value for key, value in score.parts.items()})
        return [Score(total, parts) for total, parts in zip(totals, logged, strict=True)]


def make_reward(parts: Parts, *, device: str = "auto", workers: int = 0) -> SumReward:
    """The weighted sum that the ``reward`` section of a config describes.

    ``device`` is for parts that hold a model; ``workers``: processes for each Python function that scores one text at
    a time, 0 for none. Raises UserError for unknown names and parameters, and for
    what a part cannot be built from.
    """
    if not parts:
        raise UserError("no reward was given", hint="for example --reward rouge; `rlgf ls rewards` lists them")
    made: list[tuple[float | Ramp, Reward]] = []
    for part in parts:
        weight = ramp(part.weight, part.weight_start, part.weight_steps)
        if registry.is_python_target(part.name):
            made.append((weight, _python(part, workers)))
        else:
            made.append((weight, registry.build("rewards", part.name, part.params, device=device)))
    return SumReward(made)


def scorer_at(
    reward: SumReward, step: int
) -> tuple[Callable[[Sequence[Example], Sequence[str]], list[Score]], dict[str, float]]:
    """What scores in iteration ``step``, checked, and the weights that move, as figures for its row."""
    weights = {f"score/weight/{name}": weight for name, weight in reward.moving_weights(step).items()}
    return partial(score_checked, reward.at(step)), weights


def _python(part: PartConfig, workers: int) -> Reward:
    here = PythonReward(part.name, part.params)
    if not workers or here.batched:  # what a function makes of a batch may depend on all of it
        return here
    return WorkersReward(part.name, part.params, workers)


def unique_names(names: Iterable[str]) -> list[str]:
    """The names in order; a repeated one gets ``#2``, ``#3``, ... behind it."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return found
