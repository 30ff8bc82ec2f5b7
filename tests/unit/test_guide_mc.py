"""``guide_mc``: the guide's own texts from before and after an action, in the place of a critic.

The policy and the guide are scripted, so that what the guide is worth can be added up over all of its texts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rl import ScriptedGuide, ScriptedPolicy, generator_for, loaded_from, prompts_for, trainer_for
from rlgf_cli import noise
from rlgf_cli.algorithms.spec import Regime
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.samplers import base as samplers
from rlgf_cli.protocols import Completion, Example, GuideRequest, Score
from rlgf_cli.runs.metric_names import known
from rlgf_cli.training.advantages import AdvantageInputs, AdvantageSettings, RolloutStats, compute_advantages
from rlgf_cli.training.episodes import Episode, build_batch
from rlgf_cli.training.rollout import RolloutGenerator

LIMIT = 6
WORDS = (" it", " .")
"""What the guide writes next, each as likely as the other; a full stop ends its text."""
PENALTY = 0.25
TEXT = "the cat it sees the dog"
"""The policy's, without an end; a token a word."""


def regime(samples: int = 1, horizon: int = LIMIT) -> Regime:
    return Regime(
        roll_in="policy", roll_out="guide", rollin_prob=1.0, credit="cut", cut_horizon=horizon,
        estimator="guide_mc", mc_samples=samples,
    )  # fmt: skip


@pytest.fixture(scope="module")
def gpt2(tiny_gpt2: Path) -> Loaded:
    return loaded_from(tiny_gpt2)


@pytest.fixture
def policy_writes(gpt2: Loaded, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """``policy_writes("the cat", ends=True)``: the policy's response to every prompt; returns its ids."""

    def script(text: str, *, ends: bool = False) -> list[int]:
        ids = [*gpt2.text.encode_response(gpt2.tokenizer, text), *([gpt2.eos_id] if ends else [])]
        monkeypatch.setattr(samplers, "sample", ScriptedPolicy(ids, gpt2.eos_id))
        return ids

    return script


def coin_guide() -> ScriptedGuide:
    """Writes by the binary digits of its sample index: 64 indices in a row are all of its texts, each as likely."""

    def answer(request: GuideRequest) -> Any:
        text = ""
        for place in range(request.max_new_tokens):
            text += WORDS[request.sample_index >> place & 1]
            if text.endswith("."):
                return text, "stop"
        return text, "length"

    return ScriptedGuide(answer)


def score_of(text: str) -> float:
    words = text.split()
    return words.count("it") ** 2 / 10 + 0.4 * ("cat it" in text) - 0.3 * (len(words) == 3)


def scorer(batch: Sequence[Example], texts: Sequence[str]) -> list[Score]:
    return [Score(score_of(text)) for text in texts]


def worth(text: str, tokens: int) -> float:
    """The expected value of a text that the guide finishes, added up over its next words. EOS is a token too."""
    if tokens == LIMIT:
        return score_of(text) - PENALTY
    ended = score_of(f"{text} .") - (PENALTY if tokens + 1 == LIMIT else 0.0)
    return (ended + worth(f"{text} it", tokens + 1)) / 2


def rolled(
    loaded: Loaded, guide: Any, samples: int, count: int = 60, **changes: Any
) -> tuple[RolloutGenerator, list[Episode]]:
    generator = generator_for(loaded, guide, **{"max_new_tokens": LIMIT, **changes})
    episodes = generator.generate(regime(samples), prompts_for(loaded, count), 0, 9.0)
    trainer = trainer_for(loaded, "ppo", scorer=scorer)
    trainer.missing_eos_penalty = PENALTY
    trainer._score(episodes)
    return generator, episodes


def drawn_cut(e: Episode, horizon: int = LIMIT) -> int:
    return 1 + int(noise.uniforms(4, 0, "plan", 0, e.group)[1] * horizon)


def test_the_difference_is_the_guides_own_advantage_of_the_action(gpt2: Loaded, policy_writes: Any) -> None:
    """Its mean over all texts of the guide is Q(before + action) - V(before), by enumeration, at every place."""
    ids, words = policy_writes(TEXT), TEXT.split()
    assert len(ids) == len(words) == LIMIT
    _, episodes = rolled(gpt2, coin_guide(), 64)
    gaps = set()
    for e in episodes:
        k = drawn_cut(e)
        assert (e.cut, e.action_start, e.reached_cut) == (k, k - 1, True)
        before, after = e.mc_returns or (math.nan, math.nan)
        assert before == pytest.approx(worth(" ".join(words[: k - 1]), k - 1), abs=1e-9)
        assert after == pytest.approx(worth(" ".join(words[:k]), k), abs=1e-9)
        # the episode itself is the first text after the action; a roll-in that filled the limit is all of that side
        sides = Counter(branch.side for branch in e.branches)
        assert sides == ({"before": 64, "after": 63} if k < LIMIT else {"before": 64})
        assert e.ids[:k] == ids[:k] and all(b.ids[: b.start] == ids[: b.start] for b in e.branches)
        gaps.add((k, round(after - before, 6)))
    assert len(gaps) == LIMIT and max(abs(gap) for _, gap in gaps) > 0.1


def test_an_ending_at_the_cut_is_its_own_text_and_an_earlier_one_learns_nothing(
    gpt2: Loaded, policy_writes: Any
) -> None:
    policy_writes("the cat .", ends=True)  # four tokens, EOS the last
    guide = coin_guide()
    generator, episodes = rolled(gpt2, guide, 64)
    batch = build_batch(episodes, regime(64), [], gpt2)
    asked: Counter[str] = Counter()
    for row, e in enumerate(episodes):
        k = drawn_cut(e)
        learned = batch.learned[row].nonzero()[:, 0].tolist()
        asked[e.example.id] += 64 * ((k <= 4) + (k < 4))
        if k > 4:
            assert e.policy_alone and e.finished and not e.branches and e.mc_returns is None and learned == []
        elif k == 4:
            assert e.policy_alone and e.finished and learned == [3]
            assert e.mc_returns == pytest.approx((worth("the cat .", 3), score_of("the cat .")))
        else:
            assert learned == [k - 1] and e.segments[1][0] == "guide"
        assert float(batch.differences[row]) == pytest.approx(
            e.mc_returns[1] - e.mc_returns[0] if e.mc_returns else 0.0, abs=1e-6
        )
    assert {drawn_cut(e) for e in episodes} == set(range(1, 7))
    assert Counter(r.example.id for r in guide.asked) == +asked == generator.use.uses
    for name, count in asked.items():  # every text has a sample index of its own, whichever side it is for
        assert [r.sample_index for r in guide.asked if r.example.id == name] == list(range(count))
    assert generator.counts["guide_requests"] == len(guide.asked) and generator.counts["one_sided"] == 0


def test_the_advantage_is_the_difference_less_the_actions_kl(gpt2: Loaded, policy_writes: Any) -> None:
    """log pi above log pi_ref costs; the same for every token of the action, and nothing on any other."""
    policy_writes(TEXT)
    _, episodes = rolled(gpt2, coin_guide(), 2, count=20)
    episodes[0].action_start = max(0, episodes[0].cut - 2)  # a word of several tokens
    batch = build_batch(episodes, regime(2), [], gpt2)
    shape = batch.real.shape
    torch.manual_seed(0)
    stats = RolloutStats(torch.randn(shape), torch.randn(shape), {})
    advantages = compute_advantages(regime(2), batch, stats, AdvantageSettings(scale="none"), AdvantageInputs(0.3))
    assert not advantages.returns
    for row, e in enumerate(episodes):
        before, after = e.mc_returns or (0.0, 0.0)
        action = slice(e.action_start, e.cut)
        kl = float((stats.old_logprobs - stats.ref_logprobs)[row, action].sum())
        expected = torch.zeros(shape[1])
        expected[action] = after - before - 0.3 * kl
        assert torch.allclose(advantages.per_token[row], expected, atol=1e-5)
    whitened = compute_advantages(regime(2), batch, stats, AdvantageSettings(scale="batch"), AdvantageInputs(0.3))
    learned, raw = whitened.per_token[batch.learned], advantages.per_token[batch.learned]
    assert torch.allclose(learned * raw.std(unbiased=False) + raw.mean(), raw, atol=1e-5)
    assert float(learned.mean()) == pytest.approx(0, abs=1e-5)
    assert not whitened.per_token[~batch.learned].any()


@pytest.mark.parametrize("whole_words", [False, True])
def test_a_word_is_one_action_and_the_guide_never_sees_half_of_it(
    gpt2: Loaded, policy_writes: Any, whole_words: bool
) -> None:
    """Also where the cut itself did not have to move: the token before the end of a character begins inside it."""
    text = "naïve 日本 café, ok zqzqzq end"
    ids = policy_writes(text, ends=True)
    guide = ScriptedGuide((" and", "stop"))
    generator = generator_for(gpt2, guide, max_new_tokens=64, whole_words=whole_words)
    episodes = generator.generate(regime(1, horizon=len(ids)), prompts_for(gpt2, 200), 0, 9.0)
    requests = iter(guide.asked)
    several = 0
    for e in episodes:
        shown = [gpt2.text.decode_response(gpt2.tokenizer, ids[:n], strip=False) for n in (e.action_start, e.cut)]
        assert next(requests).prefix == shown[0]
        if not e.policy_alone:
            assert next(requests).prefix == shown[1]
        for prefix in shown:
            assert text.startswith(prefix) and "\ufffd" not in prefix
            behind = text[len(prefix) :]
            assert not (whole_words and prefix[-1:].isalnum() and behind[:1].isalnum())
        assert e.action_start < drawn_cut(e, len(ids)) <= e.cut
        several += e.cut - e.action_start > 1
    assert next(requests, None) is None and several > 20


class Refusing(ScriptedGuide):
    """Refuses the texts that ``refuses`` says, as a live guide may."""

    def __init__(self, refuses: Callable[[GuideRequest], bool]) -> None:
        super().__init__(coin_guide()._answer)
        self.refuses = refuses

    def attempt(self, requests: Sequence[GuideRequest]) -> list[Completion | None]:
        found = self.complete(requests)
        return [None if self.refuses(r) else c for r, c in zip(requests, found, strict=True)]


def test_what_the_guide_refuses_is_left_out_of_the_mean(gpt2: Loaded, policy_writes: Any) -> None:
    """It refuses a half of its texts, those that begin with "it"; the other half ends at once."""
    policy_writes(TEXT)
    _, episodes = rolled(gpt2, Refusing(lambda r: r.sample_index % 2 == 0), 64, count=20)
    for e in episodes:
        k = drawn_cut(e)
        before, after = e.mc_returns or (math.nan, math.nan)
        one, other = (score_of(" ".join([*TEXT.split()[:n], "."])) - PENALTY * (n + 1 == LIMIT) for n in (k - 1, k))
        assert before == pytest.approx(one)
        assert after == pytest.approx(other if k < LIMIT else score_of(TEXT) - PENALTY)
        assert sum(b.side == "before" for b in e.branches) == 32


@pytest.mark.parametrize("side", ["before", "after"])
def test_an_episode_without_a_text_on_a_side_learns_nothing_and_is_counted(
    gpt2: Loaded, policy_writes: Any, side: str
) -> None:
    ids = policy_writes(TEXT)
    cuts = [drawn_cut(e) for e in rolled(gpt2, coin_guide(), 1)[1]]
    sides = iter([s for k in cuts for s in (["before", "after"] if k < LIMIT else ["before"])])
    generator, episodes = rolled(gpt2, Refusing(lambda r: next(sides) == side), 1)
    batch = build_batch(episodes, regime(), [], gpt2)
    for row, (e, k) in enumerate(zip(episodes, cuts, strict=True)):
        if side == "after" and k == LIMIT:  # nobody was asked for that side
            assert e.mc_returns is not None
            continue
        assert e.mc_returns is None and not batch.learned[row].any()
        if side == "after":  # the policy goes on, as everywhere
            assert e.ids == ids and e.policy_alone
        elif k < LIMIT:
            assert e.segments[1][0] == "guide"
    open_ends = sum(k < LIMIT for k in cuts)
    assert generator.counts["one_sided"] == (open_ends if side == "after" else len(cuts))
    assert generator.counts["unguided"] == (open_ends if side == "after" else 0)
    assert generator.counts["guide_failed"] == generator.counts["one_sided"]


def test_the_loop_scores_all_texts_in_one_call_and_logs_both_sides(tiny_gpt2: Path) -> None:
    calls = []

    def counted(batch: Sequence[Example], texts: Sequence[str]) -> list[Score]:
        calls.append(len(texts))
        return [Score(len(text) / 20) for text in texts]

    guide = ScriptedGuide(lambda r: (" it" * (r.sample_index % 3 + 1), "stop"))
    parameters = {"advantage": "guide_mc", "mc_samples": 2, "cut_horizon": 4}
    loaded = loaded_from(tiny_gpt2)
    trainer = trainer_for(loaded, "aggrevated", guide, parameters=parameters, kl_coef=0.1, scorer=counted)
    for _ in range(2):
        asked = len(guide.asked)
        row, episodes = trainer.step()
        assert all(known(key) for key in row)
        calls_per_episode = [4 - 2 * e.policy_alone for e in episodes if e.reached_cut]
        assert row["guide/requests"] == len(guide.asked) - asked == sum(calls_per_episode)
        sides = [e.mc_returns for e in episodes if e.mc_returns]
        assert len(sides) == sum(e.reached_cut for e in episodes) > 4
        assert row["mc/before"] == pytest.approx(sum(b for b, _ in sides) / len(sides))
        assert row["mc/after"] == pytest.approx(sum(a for _, a in sides) / len(sides))
        assert row["tokens/learned"] == sum(e.cut - e.action_start for e in episodes if e.mc_returns) > 0
        assert calls.pop() == 8 + sum(len(e.branches) for e in episodes) and not calls
        assert "loss/value_guide" not in row and row["update/skipped"] < 1
        record = next(e for e in episodes if e.branches).to_record(loaded)
        assert "".join(segment["text"] for segment in record["segments"]).strip() == record["text"].strip() != ""
        assert set(record["branches"][0]) == {"side", "ids", "text", "finished", "score"}
