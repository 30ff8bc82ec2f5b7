"""Writing episodes: cuts, authors, seams, limits, and that batching changes nothing."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rl import (
    AGGREVATED,
    BC,
    PPO,
    PPO_PP,
    ScriptedGuide,
    ScriptedPolicy,
    chi_square,
    generator_for,
    loaded_from,
    prompts_for,
)
from rlgf_cli import noise
from rlgf_cli.algorithms.spec import Regime
from rlgf_cli.models import generate
from rlgf_cli.models.forward import TokenBatch
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.samplers import base as samplers
from rlgf_cli.protocols import GuideRequest
from rlgf_cli.training.episodes import Episode, build_batch, segment_texts
from rlgf_cli.training.guide_use import GuideUse

TEXT = "the cat sees the river it ."
"""Seven tokens of the tiny tokenizer."""
ALWAYS_IN = Regime(roll_in="guide", rollin_prob=1.0)
ALWAYS_POLICY_IN = Regime(roll_in="policy", roll_out="guide", rollin_prob=1.0)


@pytest.fixture(scope="module")
def gpt2(tiny_gpt2: Path) -> Loaded:
    return loaded_from(tiny_gpt2)


@pytest.fixture(scope="module", params=["gpt2", "llama", "t5", "bart"])
def several(request: pytest.FixtureRequest) -> Loaded:
    return loaded_from(request.getfixturevalue(f"tiny_{request.param}"))


def authors_of(e: Episode) -> list[str]:
    return [author for author, _ in e.segments]


def plan_of(e: Episode, step: int = 0, seed: int = 0) -> list[float]:
    return noise.uniforms(4, seed, "plan", step, e.group).tolist()


def ends_often(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several ids end a text, as in chat models; with so many of them the texts of a random model do end."""
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", [loaded.eos_id, *range(80, 110)])


# --- the guide rolls in


def test_the_guides_cut_is_uniform_and_never_holds_its_eos(gpt2: Loaded) -> None:
    """L tokens, EOS counted; k uniform on 1..L-1. Chi-square over seven cuts: the .999 quantile is 22.46."""
    length = len(gpt2.text.encode_response(gpt2.tokenizer, TEXT)) + 1
    assert length == 8
    episodes = generator_for(gpt2, ScriptedGuide((TEXT, "stop")), max_new_tokens=9).generate(
        ALWAYS_IN, prompts_for(gpt2, 700), 0, 9.0
    )
    cuts = Counter(e.cut for e in episodes)
    assert set(cuts) == set(range(1, length))
    assert chi_square([cuts[k] for k in range(1, length)]) < 22.46
    whole = [*gpt2.text.encode_response(gpt2.tokenizer, TEXT), gpt2.eos_id]
    for e in episodes:
        assert authors_of(e) == ["guide", "policy"]
        assert e.segments[0][1] == whole[: e.cut]
        assert gpt2.eos_id not in e.segments[0][1]


def test_a_text_that_ran_out_of_tokens_has_no_eos_to_cut_before(gpt2: Loaded) -> None:
    episodes = generator_for(gpt2, ScriptedGuide((TEXT, "length"))).generate(ALWAYS_IN, prompts_for(gpt2, 200), 0, 9.0)
    assert set(Counter(e.cut for e in episodes)) == set(range(1, 7))  # L is 7


def test_the_guides_text_is_capped_before_it_is_cut(gpt2: Loaded) -> None:
    """L is at most max_new_tokens, so the policy always has a token to write."""
    generator = generator_for(gpt2, ScriptedGuide((TEXT, "stop")), max_new_tokens=4)
    episodes = generator.generate(ALWAYS_IN, prompts_for(gpt2, 100), 0, 9.0)
    assert set(Counter(e.cut for e in episodes)) == {1, 2, 3}
    assert all(1 <= e.length <= 4 and authors_of(e) == ["guide", "policy"] for e in episodes)
    assert generator.counts["guide_capped"] == 100


@pytest.mark.parametrize(("answer", "length"), [(("", "stop"), 1), (("", "length"), 0), (("the", "length"), 1)])
def test_a_text_too_short_to_cut_is_no_roll_in(gpt2: Loaded, answer: Any, length: int) -> None:
    """L of one (an EOS alone, a token without one): nothing can be kept and still leave something out."""
    generator = generator_for(gpt2, ScriptedGuide(answer))
    whole = generator_for(gpt2, ScriptedGuide(answer)).generate(BC, prompts_for(gpt2, 1), 0, 9.0)[0]
    assert sum(len(ids) for author, ids in whole.segments if author == "guide") == length
    for e in generator.generate(ALWAYS_IN, prompts_for(gpt2, 20), 0, 9.0):
        assert e.cut == 0 and authors_of(e) == ["policy"]


@pytest.mark.parametrize("regime", [PPO_PP, AGGREVATED])
def test_rollin_prob_is_the_share_of_roll_ins(gpt2: Loaded, regime: Regime) -> None:
    prompts = prompts_for(gpt2, 600)
    for probability in (0.0, 0.3, 1.0):
        changed = regime.model_copy(update={"rollin_prob": probability})
        generator = generator_for(gpt2, ScriptedGuide((TEXT, "stop")), max_new_tokens=3)
        share = sum(e.cut > 0 for e in generator.generate(changed, prompts, 0, 2.0)) / 600
        assert share == pytest.approx(probability, abs=0.06 if 0 < probability < 1 else 0)


def test_a_group_shares_prompt_text_and_cut(gpt2: Loaded) -> None:
    guide = ScriptedGuide(lambda r: (f"{r.example.prompt} {TEXT}", "stop"))
    regime = Regime(roll_in="guide", estimator="group_mean", group_size=4, rollin_prob=0.7)
    episodes = generator_for(gpt2, guide, max_new_tokens=16).generate(
        regime, prompts_for(gpt2, 30, repeat=4), 0, 9.0, 4
    )
    groups = [episodes[i : i + 4] for i in range(0, 120, 4)]
    assert [e.group for e in episodes] == [i // 4 for i in range(120)]
    for group in groups:
        assert len({(e.example.id, e.cut, tuple(e.segments[0][1]) if e.cut else ()) for e in group}) == 1
    begun = [group for group in groups if group[0].cut]
    assert 0 < len(begun) < 30
    assert len(guide.asked) == len(begun)  # one text per group
    assert len({group[0].cut for group in begun}) > 3
    assert any(len({tuple(e.ids) for e in group}) == 4 for group in begun)  # what follows is each one's own


# --- the policy rolls in


def test_the_policys_cut_is_drawn_before_its_text(several: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """k depends on (seed, step, episode) alone. The roll-in is the beginning of what the policy would have written
    anyway; an ending of its own within k tokens stands, EOS included, and no guide follows."""
    ends_often(several, monkeypatch)
    prompts = prompts_for(several, 60)
    alone = generator_for(several).generate(PPO, prompts, 0, 9.0)
    guide = ScriptedGuide((TEXT, "stop"))
    horizon = 11.2
    episodes = generator_for(several, guide).generate(ALWAYS_POLICY_IN, prompts, 0, horizon)
    ended = 0
    for e, free in zip(episodes, alone, strict=True):
        k = 1 + int(plan_of(e)[1] * math.ceil(horizon))
        texts = [several.text.decode_response(several.tokenizer, free.ids[:n], strip=False) for n in range(13)]
        # the first place from k on that is not inside a character, if there is one before the end
        cut = next((n for n in range(k, free.length) if not texts[n].endswith("\ufffd")), None)
        if cut is None:
            ended += free.finished
            assert authors_of(e) == ["policy"] and e.ids == free.ids and e.finished == free.finished
            assert e.reached_cut == (free.length >= k) and e.policy_alone
        else:
            assert e.segments[0] == ("policy", free.ids[:cut]) and authors_of(e)[1:] == ["guide"]
            assert (e.cut, e.reached_cut) == (cut, True)
    assert len(guide.asked) == sum("guide" in authors_of(e) for e in episodes)
    assert ended and any("guide" in authors_of(e) for e in episodes)


def test_the_policys_cut_is_uniform_on_the_horizon(gpt2: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """k on 1..ceil(horizon), or on 1..cut_horizon; the .999 quantile for six degrees of freedom is 22.46."""
    script = gpt2.text.encode_response(gpt2.tokenizer, f"{TEXT} {TEXT}")
    monkeypatch.setattr(samplers, "sample", ScriptedPolicy(script, gpt2.eos_id))
    fixed = ALWAYS_POLICY_IN.model_copy(update={"cut_horizon": 7})
    for regime, horizon in ((ALWAYS_POLICY_IN, 6.3), (ALWAYS_POLICY_IN, 7.0), (fixed, 100.0)):
        generator = generator_for(gpt2, ScriptedGuide((" .", "stop")))
        cuts = Counter(e.cut for e in generator.generate(regime, prompts_for(gpt2, 700), 0, horizon))
        assert set(cuts) == set(range(1, 8))
        assert chi_square([cuts[k] for k in range(1, 8)]) < 22.46


def test_a_horizon_beyond_the_limit_is_the_limit(gpt2: Loaded) -> None:
    guide = ScriptedGuide((TEXT, "stop"))
    episodes = generator_for(gpt2, guide, max_new_tokens=3, min_new_tokens=3).generate(
        ALWAYS_POLICY_IN, prompts_for(gpt2, 200), 0, 1000.0
    )
    planned = Counter(1 + int(plan_of(e)[1] * 3) for e in episodes)
    assert set(planned) == {1, 2, 3}
    full = [e for e in episodes if 1 + int(plan_of(e)[1] * 3) == 3]
    assert full and all(authors_of(e) == ["policy"] and e.length == 3 for e in full)


def test_the_roll_in_plan_does_not_follow_the_tokens_noise(gpt2: Loaded) -> None:
    """Whether and where to cut, and what is written, are different streams: none repeats another."""
    streams = [tuple(noise.uniforms(4, 0, kind, 0, 0)) for kind in ("plan", "tokens", "regime", "reference")]
    streams += [tuple(noise.uniforms(4, 0, "plan", step, episode)) for step, episode in ((0, 1), (1, 0), (1, 1))]
    streams += [tuple(noise.uniforms(4, 1, "plan", 0, 0))]
    assert len(set(streams)) == len(streams)


# --- lengths and endings


def test_the_length_limit_is_for_both_authors_together(several: Loaded) -> None:
    guide = ScriptedGuide((" sees" * 30, "stop"))
    generator = generator_for(several, guide)
    episodes = generator.generate(AGGREVATED, prompts_for(several, 40), 0, 9.0)
    guided = [e for e in episodes if "guide" in authors_of(e)]
    assert guided and all(e.length == 12 and not e.finished for e in guided)
    assert [r.max_new_tokens for r in guide.asked] == [12 - e.cut for e in guided]
    assert generator.counts["guide_capped"] == len(guided) == generator.counts["guide_requests"]


def test_stop_adds_an_eos_and_length_does_not(gpt2: Loaded) -> None:
    answers: dict[bool, tuple] = {True: (" river .", "stop"), False: (" river .", "length")}
    for stops, answer in answers.items():
        episodes = generator_for(gpt2, ScriptedGuide(answer)).generate(AGGREVATED, prompts_for(gpt2, 40), 0, 4.0)
        guided = [e for e in episodes if "guide" in authors_of(e)]
        assert guided and all(e.finished == stops == (e.ids[-1] == gpt2.eos_id) for e in guided)


def test_the_policys_own_limits(several: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """max_new_tokens is the longest; before min_new_tokens no EOS, and a prefix counts towards it."""
    ends_often(several, monkeypatch)
    generator = generator_for(several, ScriptedGuide((TEXT, "stop")), max_new_tokens=9, min_new_tokens=5)
    for regime in (PPO, ALWAYS_IN):
        episodes = generator.generate(regime, prompts_for(several, 100), 0, 9.0)
        assert all(5 < e.length <= 9 for e in episodes)
        assert all(not set(e.ids[:5]) & several.eos_ids for e in episodes)
        assert all(e.finished == (e.ids[-1] in several.eos_ids) for e in episodes)
        assert all(not set(e.ids[:-1]) & several.eos_ids for e in episodes)
        assert any(e.finished and (e.cut >= 4 or regime is PPO) for e in episodes)


@pytest.mark.parametrize("regime", [PPO, ALWAYS_IN])
def test_texts_are_told_as_soon_as_they_are_written(
    gpt2: Loaded, regime: Regime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch by batch, and no text is told that is not the episode's in the end."""
    generator = generator_for(gpt2, ScriptedGuide((TEXT, "stop")), batch_size=5)
    told: list[tuple[str, str]] = []
    written: list[int] = []
    one_batch = generate._sample_batch

    def seen(model: Any, prompts: Any, *more: Any) -> Any:
        written.append(len(told))
        return one_batch(model, prompts, *more)

    monkeypatch.setattr(generate, "_sample_batch", seen)
    generator.prefetch = lambda examples, texts: told.extend(zip((e.id for e in examples), texts, strict=True))
    episodes = generator.generate(regime, prompts_for(gpt2, 20), 0, 9.0)
    assert sorted(told) == sorted((e.example.id, e.text) for e in episodes)
    assert written == [0, 5, 10, 15]


@pytest.mark.parametrize("regime", [ALWAYS_IN, BC, AGGREVATED])
def test_a_guides_text_that_spells_eos_does_not_end(gpt2: Loaded, regime: Regime) -> None:
    """Only an author's own ending is an EOS; the letters of one are letters."""
    guide = ScriptedGuide(("a<eos>b<pad>", "length"))
    for e in generator_for(gpt2, guide, max_new_tokens=30).generate(regime, prompts_for(gpt2, 20), 0, 3.0):
        for author, ids in e.segments:
            if author == "guide":
                assert not {gpt2.eos_id, gpt2.pad_id} & set(ids)


def test_where_the_guide_gives_nothing_the_policy_goes_on(gpt2: Loaded) -> None:
    """A text that merely stopped at the cut would be scored as if somebody had meant it."""
    prompts = prompts_for(gpt2, 60)
    generator = generator_for(gpt2, ScriptedGuide(("", "length")))
    free = generator_for(gpt2).generate(PPO, prompts, 0, 9.0)
    episodes = generator.generate(AGGREVATED, prompts, 0, 6.0)
    assert [e.ids for e in episodes] == [e.ids for e in free]  # the noise is the same: so is the text
    unguided = [e for e in episodes if not e.cut]
    assert generator.counts["unguided"] == len(unguided) > 0
    assert all(e.policy_alone and not e.reached_cut for e in unguided)
    stopped = generator_for(gpt2, ScriptedGuide(("", "stop"))).generate(AGGREVATED, prompts, 0, 6.0)
    assert all(e.segments[-1] == ("guide", [gpt2.eos_id]) for e in stopped if "guide" in authors_of(e))


# --- what the guide is asked


def test_a_live_guide_gets_a_fresh_index_for_every_use_of_a_prompt(gpt2: Loaded) -> None:
    guide, use = ScriptedGuide((TEXT, "stop")), GuideUse()
    prompts = prompts_for(gpt2, 2, repeat=3)
    generator = generator_for(gpt2, guide, use=use)
    generator.generate(ALWAYS_IN, prompts, 0, 9.0)
    generator.generate(ALWAYS_IN, prompts, 1, 9.0)
    for name in {p.example.id for p in prompts}:
        assert [r.sample_index for r in guide.asked if r.example.id == name] == list(range(6))
    assert sorted(use.uses.values()) == [6, 6]
    assert use.reuse == 6.0  # one text each: the same answer every time
    resumed = ScriptedGuide((TEXT, "stop"))
    generator_for(gpt2, resumed, use=GuideUse(Counter(use.uses))).generate(ALWAYS_IN, prompts[:1], 2, 9.0)
    assert resumed.asked[0].sample_index == 6


def test_a_recorded_guide_is_drawn_at_random(gpt2: Loaded) -> None:
    """One of k samples per use: over many uses all of them, about equally often."""
    guide = ScriptedGuide(lambda r: (f"{TEXT} {'abcde'[r.sample_index % 5]}", "stop"), live=False)
    generator = generator_for(gpt2, guide, max_new_tokens=9)
    generator.generate(ALWAYS_IN, prompts_for(gpt2, 1, repeat=500), 0, 9.0)
    picked = Counter(r.sample_index % 5 for r in guide.asked)
    assert set(picked) == set(range(5))
    assert chi_square([picked[i] for i in range(5)]) < 18.47  # .999 quantile, four degrees of freedom
    assert not generator.use.uses
    assert generator.use.reuse == 100.0


def test_uncovered_prompts_run_unguided(gpt2: Loaded) -> None:
    prompts = prompts_for(gpt2, 40)
    covered = frozenset(p.example.id for p in prompts[:15])
    guide = ScriptedGuide((TEXT, "stop"), live=False)
    for regime, expected in ((ALWAYS_IN, ["guide", "policy"]), (BC, ["guide"])):
        guide.asked.clear()
        generator = generator_for(gpt2, guide, covered=covered)
        episodes = generator.generate(regime, prompts, 0, 9.0)
        assert {r.example.id for r in guide.asked} == covered
        assert all(authors_of(e) == (expected if e.example.id in covered else ["policy"]) for e in episodes)
        assert generator.counts["unguided"] == (25 if regime is BC else 0)


def test_the_guide_is_shown_the_policys_text_and_goes_on_from_it(gpt2: Loaded) -> None:
    guide = ScriptedGuide((" sees", "stop"))
    episodes = generator_for(gpt2, guide).generate(ALWAYS_POLICY_IN, prompts_for(gpt2, 40), 0, 5.0)
    shown: dict[str, list[GuideRequest]] = {}
    for r in guide.asked:
        shown.setdefault(r.example.id, []).append(r)
    for e in episodes:
        if "guide" in authors_of(e):
            prefix = shown[e.example.id][0].prefix
            assert prefix == gpt2.text.decode_response(gpt2.tokenizer, e.ids[: e.cut], strip=False)
            assert e.text == f"{prefix} sees"


# --- what the numbers are taken on


@pytest.mark.parametrize("regime", [PPO_PP, AGGREVATED, BC, Regime(roll_in="policy", roll_out="guide", cut="inner")])
def test_the_segments_ids_are_what_is_scored(several: Loaded, regime: Regime) -> None:
    """Ids are joined, never text: re-tokenising the joined text would give other tokens."""
    guide = ScriptedGuide(lambda r: ("ees it .", "stop"))
    episodes = generator_for(several, guide).generate(regime, prompts_for(several, 30), 0, 6.0)
    for e in episodes:
        e.score = None
    batch = build_batch(episodes, regime, ["policy", "guide"], several)
    assert isinstance(batch.tokens, TokenBatch)
    for row, e in enumerate(episodes):
        joined = [token for _, ids in e.segments for token in ids]
        assert batch.tokens.response_ids[row, : e.length].tolist() == joined == e.ids
        assert batch.real[row].sum() == len(joined) == len(e.authors)


@pytest.mark.parametrize("regime", [PPO, PPO_PP, AGGREVATED, Regime(roll_in="policy", roll_out="guide", cut="inner")])
def test_the_batch_size_changes_nothing(several: Loaded, regime: Regime) -> None:
    prompts = prompts_for(several, 20)
    found = []
    for size in (1, 3, 64):
        guide = ScriptedGuide(lambda r: (f" {r.example.prompt} {len(r.prefix)}", "stop"))
        episodes = generator_for(several, guide, batch_size=size).generate(regime, prompts, 4, 6.0)
        found.append([(e.segments, e.cut, e.text, e.finished) for e in episodes])
    assert found[0] == found[1] == found[2]


def test_another_seed_or_step_is_another_text(gpt2: Loaded) -> None:
    prompts = prompts_for(gpt2, 8)
    texts = {
        tuple(e.text for e in generator_for(gpt2, seed=seed).generate(PPO, prompts, step, 9.0))
        for seed, step in ((0, 0), (0, 1), (1, 0))
    }
    assert len(texts) == 3


def test_the_parts_of_a_text_are_the_text(any_model: Path) -> None:
    """Each author's part as it is read; a character whose bytes both wrote is whole."""
    loaded = loaded_from(any_model)
    encode = loaded.text.encode_response
    for regime in (PPO_PP, AGGREVATED, PPO):
        generator = generator_for(loaded, ScriptedGuide((" the cät sees it .", "stop")))
        for e in generator.generate(regime, prompts_for(loaded, 8), 0, 6.0):
            parts = segment_texts(e, loaded)
            assert [author for author, _ in parts] == [author for author, _ in e.segments]
            whole = loaded.text.decode_response(loaded.tokenizer, e.ids, strip=False)
            assert "".join(text for _, text in parts) == whole
    ids = encode(loaded.tokenizer, "ä")
    if len(ids) > 1:  # the bytes of one character
        e.segments = [("guide", ids[:-1]), ("policy", ids[-1:])]
        assert [text.strip() for _, text in segment_texts(e, loaded)] == ["", "ä"]
