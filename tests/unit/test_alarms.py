"""Warnings during training: rows that call for one, rows that are nearly those, and that each is said once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rlgf_cli.runs.alarms import ALARMS, Alarms
from rlgf_cli.runs.metric_names import known

Rows = list[dict[str, Any]]


def rows(count: int, figures: Callable[[int], dict[str, Any]]) -> Rows:
    return [{"step": n + 1, **figures(n)} for n in range(count)]


def warned(given: Rows, **settings: Any) -> list[tuple[int, str]]:
    """(step, alarm) of each warning, in order."""
    alarms, found = Alarms(**settings), []
    for row in given:
        assert all(known(name) for name in row), row
        before = set(alarms.counts)
        for text in alarms(row):
            (name,) = set(alarms.counts) - before
            assert text.startswith(f"step {row['step']}: ")
            assert text.endswith(f"\n  likely causes: {'; '.join(ALARMS[name].causes)}")
            found.append((row["step"], name))
    return found


def guide(failed: float, empty: float, *, steps: int = 5) -> Rows:
    asked = {"guide/requests": 4}
    return rows(
        8, lambda n: {**asked, **({"guide/failed": failed, "guide/empty": empty} if 2 <= n < 2 + steps else {})}
    )


def roll_ins(now: float, *, horizon: bool = True) -> Rows:
    extra = {"length/horizon": 9.0} if horizon else {}
    return rows(14, lambda n: {"rollin/tokens": 4.0 if n < 12 else now, **extra})


def kl(mean: float, k3: float, *, steps: int = 5) -> Rows:
    """Five hundred policy tokens a step."""
    few = {"episodes": 100, "length/mean": 10.0, "tokens/policy": 0.5}
    return rows(8, lambda n: {"kl/mean": mean if 2 <= n < 2 + steps else 0.01, "kl/k3": k3, **few})


def update(**figures: float) -> Rows:
    quiet = {"ratio": 1.0, "approx_kl": 0.01, "clip_fraction": 0.1}
    return rows(8, lambda n: {f"ppo/{k}": v for k, v in ({**quiet, **figures} if n >= 2 else quiet).items()})


def critic(explained: float, *, trusted_at: int | None = None, count: int = 52) -> Rows:
    return rows(
        count,
        lambda n: {"value/explained_guide": explained, "value/trusted_guide": float(n == trusted_at)},
    )


def values(bias: float, level: float, *, trusted: float = 1.0, frozen: float = 0.0, sign: int = 1) -> Rows:
    """A bias from the third row on; ``sign`` -1: it changes its sign from step to step."""
    learns = {"value/return_policy": level, "value/trusted_policy": trusted, "update/policy_frozen": frozen}
    return rows(8, lambda n: {"value/bias_policy": bias * sign**n if n >= 2 else 0.0, **learns})


def entropy(first: float, last: float) -> Rows:
    return rows(12, lambda n: {"policy/entropy": first if n < 6 else last})


def gaps(first: float, later: float) -> Rows:
    return rows(8, lambda n: {"sampler/gap": first if n < 2 else later})


def lengths(share: float, *, steps: int = 5) -> Rows:
    return rows(8, lambda n: {"length/truncated": share if 2 <= n < 2 + steps else 0.1})


def scores(std: float, *, mean: float = 0.0, steps: int = 5) -> Rows:
    return rows(8, lambda n: {"score/mean": mean, "score/std": std if 2 <= n < 2 + steps else 0.2})


def mixture(guides: float) -> Rows:
    """Every other row has a roll-in of the guide's, whose length says nothing of the policy's."""
    return rows(40, lambda n: {"rollin/tokens": 4.0, "length/horizon": 9.0} if n % 2 else {"rollin/tokens": guides})


def held_out(*own: float, episodes: float = 0.1, prompts: int = 200, start: float | None = None) -> Rows:
    """The policy's own score, of texts that score 0 or 1, in every fifth row from the second on; the episodes' is
    0.1, and ``episodes`` from the seventh row on."""

    def error(score: float) -> float:
        return (score * (1 - score) / prompts) ** 0.5

    def figures(n: int) -> dict[str, Any]:
        row: dict[str, Any] = {"score/mean": 0.1 if n < 6 else episodes}
        if n == 0 and start is not None:
            row |= {"eval/start": start, "eval/start_error": error(start)}
        if n % 5 == 1:
            row |= {"eval/score": own[n // 5], "eval/score_error": error(own[n // 5])}
        return row

    return rows(5 * len(own) - 3, figures)


def watched(*diverged: float) -> Rows:
    """An evaluation in every row from the second on, which the first one cannot be held against."""
    first, more = {"eval/watch": 0.5}, {"eval/watch_best_step": 1, "eval/watch_change": -0.1, "eval/score_change": 2.0}
    return rows(
        1 + len(diverged),
        lambda n: {"eval/score": 1.0, **first, **({} if n == 0 else {**more, "eval/diverged": diverged[n - 1]})},
    )


TRIPPED: list[tuple[str, str, int, Rows]] = [
    ("roll-ins", "shrinking-roll-ins", 13, roll_ins(1.9)),
    ("held-out score", "falls-alone", 12, held_out(0.12, 0.08, 0.01, 0.0, 0.0)),
    ("held-out score that had risen", "falls-alone", 12, held_out(0.02, 0.3, 0.1)),
    ("held-out score, from before the first step on", "falls-alone", 2, held_out(0.01, 0.02, start=0.1)),
    ("held-out score, the episodes' a little too", "falls-alone", 17, held_out(0.12, 0.1, 0.08, 0.0, episodes=0.06)),
    ("kl", "negative-kl", 7, kl(-0.02, 0.0001)),
    ("kl, noisy but far off", "negative-kl", 7, kl(-0.2, 0.5)),
    ("ratio up", "exploding-ratio", 3, update(ratio=2.5)),
    ("ratio down", "exploding-ratio", 3, update(ratio=0.3)),
    ("approx_kl", "exploding-ratio", 3, update(approx_kl=0.7)),
    ("clipping", "exploding-ratio", 7, update(clip_fraction=0.6)),
    ("a critic that explains nothing", "idle-critic", 50, critic(0.01)),
    ("a critic that was the baseline once", "idle-critic", 50, critic(0.01, trusted_at=30)),
    ("values at 0, returns at 1", "uncalibrated-critic", 7, values(-1.0, 1.0)),
    ("values above returns below 0", "uncalibrated-critic", 7, values(0.6, -1.0)),
    ("entropy", "collapsed-entropy", 11, entropy(2.0, 0.1)),
    ("no entropy at all", "collapsed-entropy", 5, entropy(0.005, 0.005)),
    ("weights that do not arrive", "stale-sampler", 5, gaps(0.001, 0.2)),
    ("weights that do not arrive, in bfloat16", "stale-sampler", 6, gaps(0.02, 0.25)),
    ("truncated", "truncated", 7, lengths(0.9)),
    ("constant", "constant-reward", 7, scores(0.0)),
    ("constant but for rounding", "constant-reward", 7, scores(1e-14, mean=0.7)),
    ("watched", "gamed-reward", 3, watched(0, 1, 1)),
    ("a guide that refuses or says nothing", "unguided", 7, guide(3, 1)),
    ("a judge without a rating", "skipped-scores", 1, rows(2, lambda n: {"score/skipped": 1 - n})),
    ("a judge without a rating of a held-out text", "skipped-scores", 2, rows(2, lambda n: {"eval/skipped": n})),
    ("groups that agree", "constant-reward", 5, rows(6, lambda n: {"advantage/std": 0.0})),
]
QUIET: list[tuple[str, Rows]] = [
    ("a guide with a text a step", guide(3, 0)),
    ("a guide without a text for a while", guide(4, 0, steps=4)),
    ("a guide that nobody asks", rows(8, lambda n: {"guide/requests": 0})),
    ("roll-ins, a little shorter", roll_ins(2.1)),
    ("a mixture in which the guide's are longer", mixture(16.0)),
    ("a guide's roll-ins", roll_ins(0.1, horizon=False)),
    ("a held-out score that rises", held_out(0.02, 0.08, 0.12, 0.3, start=0.03)),
    ("a held-out score that stays, the guide's rises", held_out(0.02, 0.01, 0.02, 0.02, episodes=0.6, start=0.03)),
    ("a held-out score that falls a little", held_out(0.2, 0.18, 0.12)),
    ("a held-out score that falls a little, many prompts", held_out(0.2, 0.18, 0.12, prompts=5000)),
    ("a held-out score that falls by chance", held_out(0.03, 0.0, 0.02, 0.01)),
    ("a fall on few prompts", held_out(0.12, 0.01, 0.02, prompts=20)),
    ("everything falls", held_out(0.12, 0.1, 0.01, 0.0, 0.0, episodes=0.0)),
    ("kl, within its noise", kl(-0.02, 0.1)),
    ("kl, too few steps", kl(-0.2, 0.0001, steps=4)),
    ("kl of nothing", kl(-1e-9, 0.0)),
    ("clipping", update(ratio=1.3, approx_kl=0.3, clip_fraction=0.45)),
    ("a critic that is the baseline", critic(0.2, trusted_at=45)),
    ("a critic, too early", critic(0.01, count=49)),
    ("values a little off", values(-0.4, 1.0)),
    ("values that are not the baseline", values(-1.0, 1.0, trusted=0.0)),
    ("values that nothing is learned from yet", values(-1.0, 1.0, frozen=1.0)),
    ("values off by chance", values(-1.0, 1.0, sign=-1)),
    ("entropy that falls", entropy(2.0, 0.3)),
    ("a gap of rounding", gaps(0.001, 0.04)),
    ("a gap that was there at first", gaps(0.05, 0.3)),
    ("truncated, half", lengths(0.5)),
    ("truncated, too few steps", lengths(1.0, steps=4)),
    ("sparse", scores(1e-3)),
    ("watched, a fall that did not last", watched(0, 0, 0)),
    ("constant, too few steps", scores(0.0, steps=4)),
    ("no policy gradient", rows(60, lambda n: {"loss/likelihood": 2.0, "score/std": 0.1, "score/mean": 0})),
]  # fmt: skip


@pytest.mark.parametrize(("name", "step", "given"), [t[1:] for t in TRIPPED], ids=[t[0] for t in TRIPPED])
def test_said_once_at_the_first_step_that_calls_for_it(name: str, step: int, given: Rows) -> None:
    assert warned(given) == [(step, name)]


@pytest.mark.parametrize("given", [q[1] for q in QUIET], ids=[q[0] for q in QUIET])
def test_not_said(given: Rows) -> None:
    assert warned(given) == []


def test_every_alarm_is_tripped_here_and_says_when_and_why() -> None:
    assert {t[1] for t in TRIPPED} == set(ALARMS)
    assert all(alarm.when and len(alarm.causes) > 1 for alarm in ALARMS.values())


def test_where_no_text_may_end_early_none_is_expected_to() -> None:
    assert warned(lengths(1.0), may_end=False) == []
    assert warned(scores(0.0), may_end=False) == [(7, "constant-reward")]


def test_counted_after_that_and_summed_up_at_the_end() -> None:
    alarms = Alarms()
    assert alarms.summary(3) is None
    said = [text for row in rows(20, lambda n: {"length/truncated": 1.0}) for text in alarms(row)]
    assert len(said) == 1 and alarms.counts == {"truncated": 16}
    assert alarms.summary(20) == "of 20 steps, these held: truncated at 16 (docs/doctor.md)"


def test_a_resumed_run_counts_as_an_undisturbed_one_and_says_nothing_twice() -> None:
    given = entropy(2.0, 0.1) + lengths(1.0) + held_out(0.12, 0.1, 0.0, 0.0)
    for n, row in enumerate(given):
        row["step"] = n
    whole = Alarms()
    expected = [whole(row) for row in given]
    for at in (4, 11, 15, 25, 34):
        again = Alarms()
        again.replay(given[:at])
        assert [again(row) for row in given[at:]] == expected[at:]
        assert again.counts == whole.counts


def test_a_gamed_reward_is_told_with_its_numbers() -> None:
    alarms = Alarms()
    (said,) = [text for row in watched(0, 1) for text in alarms(row)]
    assert (
        "since step 1 the held-out texts' score rose by 2, to 1, and their watched figure fell by 0.1, to 0.5" in said
    )
