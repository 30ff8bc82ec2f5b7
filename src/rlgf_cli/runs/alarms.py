"""Alarms: conditions on the rows of metrics.jsonl that show a failing run, also where the mean score does not.

Each alarm is reported once, with its likely causes, and counted from then on. Alarms depend on rows alone, so a resumed
run that replays its earlier rows counts as an uninterrupted one.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean
from typing import Any

Row = Mapping[str, Any]
_FEW, _MANY = 5, 10
"""Rows that must agree before an alarm; rows whose means are compared."""
_LATE = 50
"""Rows that a critic has before its loss must have fallen."""


@dataclass(frozen=True)
class Alarm:
    """``condition`` takes the rows so far and returns a finding, or None; ``when`` and ``causes`` are for the user."""

    condition: Callable[[History], str | None]
    when: str
    causes: tuple[str, ...]


class History:
    """The rows that have a figure: the first ones, the last ones, and how many there were."""

    def __init__(self) -> None:
        self._first: dict[str, list[Row]] = {}
        self._last: dict[str, deque[Row]] = {}
        self._seen: Counter[str] = Counter()
        self.row: Row = {}
        self.peak: tuple[float, float, float, str] | None = None
        """The policy's best held-out score so far, its standard error, the episodes' mean score then, and when."""

    def add(self, row: Row) -> None:
        self.row = row
        for name in row:
            self._seen[name] += 1
            if len(first := self._first.setdefault(name, [])) < _MANY:
                first.append(row)
            self._last.setdefault(name, deque(maxlen=_MANY)).append(row)
        for name, when in (("eval/start", "before the first step"), ("eval/score", f"at step {row.get('step')}")):
            score, episodes = row.get(name), self.episodes_score()
            if score is not None and episodes is not None and (self.peak is None or score > self.peak[0]):
                self.peak = (score, row.get(f"{name}_error", 0.0), episodes, when)

    def episodes_score(self) -> float | None:
        """Mean score of the episodes of the last rows; None where they have none."""
        rows = self._last.get("score/mean")
        return fmean(row["score/mean"] for row in rows) if rows else None

    def seen(self, name: str) -> int:
        """The number of rows that had the figure; 0 where this row lacks it."""
        return self._seen[name] if name in self.row else 0

    def first(self, name: str, count: int) -> list[Row]:
        """The first ``count`` rows that had the figure, or all that had it."""
        return self._first.get(name, [])[:count]

    def last(self, name: str, count: int) -> list[Row]:
        """The last ``count`` rows that had the figure; none where there are not so many, or this row has it not."""
        if self.seen(name) < count:
            return []
        rows = self._last[name]
        return list(islice(rows, len(rows) - count, None))


def _shrinking_roll_ins(seen: History) -> str | None:
    name, own = "rollin/tokens", "length/horizon"  # a mixture's other rows have the guide's roll-ins
    if name not in seen.row or seen.seen(own) <= _MANY:
        return None
    earlier = [row[name] for row in seen.first(own, _MANY) if name in row]
    if not earlier:
        return None
    start, now = fmean(earlier), seen.row[name]
    if now >= 0.5 * start:
        return None
    return (
        f"the policy's roll-ins shrank from {start:.1f} to {now:.1f} tokens; the guide writes almost everything, and "
        "the score is the guide's. Look at eval/score"
    )


def _falls_alone(seen: History) -> str | None:
    now, episodes = seen.row.get("eval/score"), seen.episodes_score()
    if now is None or episodes is None or seen.peak is None:
        return None
    best, error, then, when = seen.peak
    fall, chance = best - now, 3 * math.hypot(error, seen.row.get("eval/score_error", 0.0))
    if fall <= max(chance, 0.5 * abs(best)) or then - episodes > 0.5 * fall:
        return None
    return (
        f"the policy alone scores {now:.3g} on held-out prompts, and scored {best:.3g} {when}; the episodes' score, "
        f"{then:.3g} then and {episodes:.3g} now, does not show it"
    )


def _negative_kl(seen: History) -> str | None:
    rows = seen.last("kl/mean", _FEW)
    if not rows or any(row["kl/mean"] >= 0 for row in rows):
        return None
    # a true KL is never negative; its estimate is a mean of log-ratios, whose variance is about twice the KL
    tokens = sum(row["episodes"] * row["length/mean"] * row["tokens/policy"] for row in rows)
    mean, spread = fmean(row["kl/mean"] for row in rows), fmean(row["kl/k3"] for row in rows)
    if mean > -3 * math.sqrt(2 * spread / max(1.0, tokens)) - 1e-5:
        return None
    return f"the KL estimate has been below zero for {_FEW} steps (mean {mean:.2g} nats a token, k3 {spread:.2g})"


def _exploding_ratio(seen: History) -> str | None:
    row = seen.row
    ratio, moved = row.get("ppo/ratio", 1.0), row.get("ppo/approx_kl", 0.0)
    if not 0.5 <= ratio <= 2.0:
        return f"the mean ratio of new to old probability is {ratio:.3g}"
    if moved > 0.5:
        return f"the policy moved by {moved:.2g} nats a token within one step (ppo/approx_kl)"
    rows = seen.last("ppo/clip_fraction", _FEW)
    if rows and all(r["ppo/clip_fraction"] > 0.5 for r in rows):
        return f"more than half of the tokens were clipped for {_FEW} steps"
    return None


def _idle_critic(seen: History) -> str | None:
    for author in ("policy", "guide"):
        name, trusted = f"value/explained_{author}", f"value/trusted_{author}"
        rows = seen.last(name, _MANY)
        if seen.seen(name) < _LATE or any(row[trusted] for row in rows):
            continue
        share = fmean(row[name] for row in rows)
        return (
            f"after {seen.seen(name)} steps the {author}'s critic explains {share:.2g} of the returns' variance; the "
            "mean score is the baseline in its place"
        )
    return None


def _uncalibrated_critic(seen: History) -> str | None:
    for author in ("policy", "guide"):
        bias, level, trusted = (f"value/{part}_{author}" for part in ("bias", "return", "trusted"))
        rows = [row for row in seen.last(bias, _FEW) if row[trusted] and not row["update/policy_frozen"]]
        if len(rows) < _FEW or any(abs(row[bias]) < 0.5 * abs(row[level]) for row in rows):
            continue
        if len({row[bias] > 0 for row in rows}) == 1:
            worst = rows[-1]
            return (
                f"the values of the {author}'s critic are {worst[bias]:+.3g} away from returns of {worst[level]:.3g} "
                f"on average, for {_FEW} steps in which the policy learned from them"
            )
    return None


def _collapsed_entropy(seen: History) -> str | None:
    rows = seen.last("policy/entropy", _FEW)
    if not rows:
        return None
    start = fmean(row["policy/entropy"] for row in seen.first("policy/entropy", _FEW))
    now = fmean(row["policy/entropy"] for row in rows)
    if now >= max(0.1 * start, 0.01):
        return None
    return f"the policy's entropy fell from {start:.3g} to {now:.3g} nats a token: it hardly explores any more"


def _stale_sampler(seen: History) -> str | None:
    rows = seen.last("sampler/gap", _FEW)
    if not rows:
        return None
    start, now = seen.first("sampler/gap", 1)[0]["sampler/gap"], fmean(row["sampler/gap"] for row in rows)
    if now < max(10 * start, 0.05):
        return None
    return f"vLLM's log-probabilities are {now:.2g} nats a token away from the policy's, and were {start:.2g} at first"


def _truncated(seen: History) -> str | None:
    rows = seen.last("length/truncated", _FEW)
    if not rows or any(row["length/truncated"] <= 0.5 for row in rows):
        return None
    share = fmean(row["length/truncated"] for row in rows)
    return f"{100 * share:.0f}% of the texts of the last {_FEW} steps ended at the limit, without EOS"


def _constant_reward(seen: History) -> str | None:
    rows = seen.last("score/std", _FEW)
    if rows and all(row["score/std"] <= 1e-9 * max(1.0, abs(row["score/mean"])) for row in rows):
        return f"all texts of the last {_FEW} steps scored the same ({seen.row['score/mean']:.4g} in this one)"
    rows = seen.last("advantage/std", _FEW)
    if rows and all(row["advantage/std"] == 0 for row in rows):
        return f"every advantage of the last {_FEW} steps was the same: nothing could be learned"
    return None


def _skipped_scores(seen: History) -> str | None:
    skipped, held_out = seen.row.get("score/skipped", 0), seen.row.get("eval/skipped", 0)
    if not (skipped or held_out):
        return None
    return (
        f"the judge's rating could not be read for {skipped:g} episodes, which are left out of the step, and "
        f"{held_out:g} held-out texts"
    )


def _unguided(seen: History) -> str | None:
    rows = [row for row in seen.last("guide/requests", _FEW) if row["guide/requests"]]
    if len(rows) < _FEW or any(usable_texts(row) for row in rows):
        return None
    return f"the guide gave no usable text in the last {_FEW} steps: their episodes ran without it"


def usable_texts(row: Row) -> int:
    """The usable texts that the guide gave in a row's step."""
    return row.get("guide/requests", 0) - row.get("guide/failed", 0) - row.get("guide/empty", 0)


def _gamed_reward(seen: History) -> str | None:
    row = seen.row
    if not row.get("eval/diverged"):
        return None
    return (
        f"since step {row['eval/watch_best_step']} the held-out texts' score rose by {row['eval/score_change']:.3g}, "
        f"to {row['eval/score']:.3g}, and their watched figure fell by {-row['eval/watch_change']:.3g}, "
        f"to {row['eval/watch']:.3g}: the score no longer measures the watched quality"
    )


ALARMS: dict[str, Alarm] = {
    "shrinking-roll-ins": Alarm(
        _shrinking_roll_ins,
        f"roll-ins of the policy below half of their mean length in the first {_MANY} steps",
        ("cut: inner, where this is expected (docs/algorithms.md)", "a score that rewards ending early"),
    ),
    "falls-alone": Alarm(
        _falls_alone,
        "`eval/score` below half of its best (`eval/start` counts), by more than three standard errors, while the mean "
        f"`score/mean` of {_MANY} steps fell by less than half as much",
        (
            "aggrevated: the guide finishes what the policy spoils; a third of optim.learning_rate, kl.where: loss "
            "(docs/algorithms.md, AggreVaTeD from a cloned start)",
            "the guide begins them, and the policy forgets how to (ppo++): kl.coef, or a smaller rollin_prob",
            "few training prompts, which the policy has memorised",
        ),
    ),
    "negative-kl": Alarm(
        _negative_kl,
        f"`kl/mean` below 0 for {_FEW} steps, by more than three standard errors",
        (
            "top_k or top_p in rollouts: texts are drawn from another distribution than the one that is scored",
            "a reference that is not the model that training started from",
            "padding or positions that are scored otherwise than they were sampled (rlgf doctor)",
        ),
    ),
    "exploding-ratio": Alarm(
        _exploding_ratio,
        f"`ppo/ratio` outside 0.5 to 2, `ppo/approx_kl` above 0.5, or `ppo/clip_fraction` above 0.5 for {_FEW} steps",
        ("optim.learning_rate is too high", "too many ppo.epochs", "a reward of large scale with whitening off"),
    ),
    "idle-critic": Alarm(
        _idle_critic,
        f"after {_LATE} steps with a critic it was not the baseline in any of the last {_MANY}: it explains less than "
        "`ppo.critic_min_explained` of the returns' variance",
        (
            "the score depends on words that are not written yet: then grpo or rloo does as well without a critic",
            "ppo.critic_learning_rate or ppo.value_coef is too small for the critic",
            "ppo.critic: separate, or ppo.critic_warmup_steps with ppo.critic_warmup_explained",
        ),
    ),
    "uncalibrated-critic": Alarm(
        _uncalibrated_critic,
        f"the mean of value - return above half of the mean return, with the same sign in each of {_FEW} steps, while "
        "the policy learns from these values",
        (
            "with lambda below 1 the advantage is then a function of the position, and lengths drift: read length/mean",
            "the score changed its level faster than the critic follows: a higher ppo.critic_learning_rate",
            "a critic that was trained on another reward",
        ),
    ),
    "collapsed-entropy": Alarm(
        _collapsed_entropy,
        f"`policy/entropy` of {_FEW} steps below a tenth of the first {_FEW} steps' (or below 0.01 nats)",
        (
            "kl.coef is too small, or optim.learning_rate too high",
            "one text scores high on every prompt: read rollouts/",
            "no ppo.entropy_coef, and no guide that shows other texts",
        ),
    ),
    "stale-sampler": Alarm(
        _stale_sampler,
        f"`sampler/gap` of {_FEW} steps above 0.05 nats and above ten times the first step's",
        (
            "the weights do not arrive in vLLM: it samples from an older policy",
            "a policy that is sure of few tokens, whose rare ones round far apart: sampler.correction: truncate",
        ),
    ),
    "truncated": Alarm(
        _truncated,
        f"more than half of the texts without EOS in each of {_FEW} steps, where texts may end before the limit",
        (
            "lengths.max_new_tokens is too short for the task",
            "a starting policy that never learned to end (sft with its EOS)",
            "a score that grows with length; rollout.missing_eos_penalty charges texts without an ending",
        ),
    ),
    "constant-reward": Alarm(
        _constant_reward,
        f"`score/std` or `advantage/std` 0 in each of {_FEW} steps",
        (
            "the start never succeeds: a guide's roll-in (ppo++), an easier reward or a better start",
            "the reward does not look at the text, or is saturated (rlgf doctor --reward ...)",
            "a policy that writes one text for everything (policy/entropy)",
        ),
    ),
    "skipped-scores": Alarm(
        _skipped_scores,
        "`score/skipped` or `eval/skipped` above 0: a judge gave a text no rating that could be read",
        (
            "the judge refuses such texts: read rollouts/",
            "an answer that is cut before its rating: a larger max_new_tokens of the judge, or less reasoning",
            "a judge that cannot keep to the form of the last line",
        ),
    ),
    "unguided": Alarm(
        _unguided,
        f"no usable text of the guide in {_FEW} steps that requested some; a run without any text of its guide ends "
        "with exit code 1",
        (
            "a filter or the model refuses these prompts (guide/failed)",
            "answers that are empty (guide/empty): rlgf doctor --guide shows a few",
        ),
    ),
    "gamed-reward": Alarm(
        _gamed_reward,
        "with `--watch`: for watch.patience evaluations in a row the watched figure is below its best, and the score "
        "above that step's, on more held-out prompts than chance explains (docs/lastmile.md)",
        (
            "the reward can be had without what it stands for: read rollouts/, and give it the parts that it lacks "
            "(length, repetition, ending, failures)",
            "kl.coef is too small for how far the policy goes",
            "the watched figure does not measure what the policy learned: read texts before you trust either figure",
        ),
    ),
}


class Alarms:
    """Sees every row. ``counts``: rows at which each alarm's condition held; it is reported at the first of them only.

    ``may_end``: whether a text may end before the limit (else every text is cut there, as configured).
    """

    def __init__(self, *, may_end: bool = True) -> None:
        self.counts: Counter[str] = Counter()
        self._watched = {name: alarm for name, alarm in ALARMS.items() if may_end or name != "truncated"}
        self._seen = History()

    def __call__(self, row: Row) -> list[str]:
        """The warnings that this row calls for."""
        self._seen.add(row)
        warnings = []
        for name, alarm in self._watched.items():
            if (finding := alarm.condition(self._seen)) is None:
                continue
            self.counts[name] += 1
            if self.counts[name] == 1:
                warnings.append(f"step {row['step']}: {finding}\n  likely causes: {'; '.join(alarm.causes)}")
        return warnings

    def replay(self, rows: Sequence[Row]) -> None:
        """Read the rows of the run that is resumed; their warnings were reported in the earlier session."""
        for row in rows:
            self(row)

    def summary(self, steps: int) -> str | None:
        """The message at the end of a run with alarms; None without one."""
        if not self.counts:
            return None
        held = ", ".join(f"{name} at {count}" for name, count in self.counts.items())
        return f"of {steps} steps, these held: {held} (docs/doctor.md)"
