"""Checks of a reward before training: on the policy's texts, the guide's, the references and the empty text."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev

from rlgf_cli.errors import RlgfError
from rlgf_cli.protocols import Check, Example, Reward
from rlgf_cli.scorers.checked import score_checked

Texts = Sequence[tuple[Example, str]]
_SLOW = 30.0
"""Seconds of a training step above which the reward's time is worth a warning."""


def probe_reward(reward: Reward, texts: Mapping[str, Texts], *, per_step: int) -> list[Check]:
    """``texts``: author -> (example, text) pairs, the policy's under "policy". ``per_step``: texts of a step.

    Where the reward raises or returns no finite number, the first check fails, and there are no others.
    """
    given = {author: pairs for author, pairs in texts.items() if pairs}
    means = "a broken reward stops training, and is never turned into a number; the policy may write an empty text too"
    try:
        scores = {author: _score(reward, pairs) for author, pairs in given.items()}
        started = time.perf_counter()
        again = _score(reward, given["policy"][::-1])[::-1]
        seconds = (time.perf_counter() - started) / len(again)
    except RlgfError as error:
        return [Check("reward.scores", "fail", error.message, means, error.hint or "repair what the message names")]
    by_author = {author: fmean(values) for author, values in scores.items()}
    everything = [value for values in scores.values() for value in values]
    shown = ", ".join(f"{author} {mean:.4g}" for author, mean in by_author.items())
    finding = f"{len(everything)} texts scored {min(everything):.4g} to {max(everything):.4g}; mean by author: {shown}"
    return [
        Check("reward.scores", "ok", finding, means, numbers={"mean": by_author}),
        _of_the_text(given, scores),
        _spread(scores["policy"]),
        _repeatable(scores["policy"], again),
        _time(seconds, per_step),
    ]


def _score(reward: Reward, pairs: Texts) -> list[float]:
    return [score.value for score in score_checked(reward, [e for e, _ in pairs], [text for _, text in pairs])]


def _of_the_text(given: Mapping[str, Texts], scores: Mapping[str, Sequence[float]]) -> Check:
    """Whether different texts for one prompt score differently."""
    by_prompt: dict[str, dict[str, float]] = {}
    for author, pairs in given.items():
        for (example, text), value in zip(pairs, scores[author], strict=True):
            by_prompt.setdefault(example.id, {})[text] = value
    compared = [by_text for by_text in by_prompt.values() if len(by_text) > 1]
    telling = sum(len(set(by_text.values())) > 1 for by_text in compared)
    blind = bool(compared) and not telling
    return Check(
        "reward.text",
        "fail" if blind else "ok",
        f"for {telling} of {len(compared)} prompts, different texts score differently",
        "a reward that does not depend on the text teaches nothing: it may look at the prompt or the reference alone",
        "see which argument the reward reads: the response is `text`, the prompt `prompt`" if blind else "",
        {"prompts": len(compared), "telling": telling},
    )


def _spread(values: Sequence[float]) -> Check:
    spread = pstdev(values)
    flat = len(values) > 1 and spread <= 1e-9 * max(1.0, abs(values[0]))
    return Check(
        "reward.spread",
        "warn" if flat else "ok",
        f"the policy's {len(values)} texts score {fmean(values):.4g} on average, standard deviation {spread:.3g}",
        "where all texts score the same there is no advantage, and nothing to learn until one succeeds by chance",
        "a guide that rolls in (ppo++), a better start, or a reward with partial credit" if flat else "",
        {"std": spread},
    )


def _repeatable(values: Sequence[float], again: Sequence[float]) -> Check:
    moved = sum(abs(a - b) > 1e-6 * max(1.0, abs(a)) for a, b in zip(values, again, strict=True))
    return Check(
        "reward.repeatable",
        "warn" if moved else "ok",
        f"{len(values) - moved} of {len(values)} texts score the same when they are scored again in the reverse order",
        "a score that depends on chance, or on the texts that are scored beside it, is noise in every advantage",
        "seed the reward, turn its sampling off, and see that it scores each text alone, in the order given"
        if moved
        else "",
        {"moved": moved},
    )


def _time(seconds: float, per_step: int) -> Check:
    a_step = seconds * per_step
    slow = a_step > _SLOW
    return Check(
        "reward.time",
        "warn" if slow else "ok",
        f"{1000 * seconds:.3g} ms a text, {a_step:.3g} s for the {per_step} texts of a step",
        "training waits for the reward in every step",
        "score in batches (a function of `texts`), a smaller model, or fewer rollout.episodes" if slow else "",
        {"seconds_per_text": seconds, "seconds_per_step": a_step},
    )
