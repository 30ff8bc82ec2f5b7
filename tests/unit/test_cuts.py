"""Where a policy's roll-in may be cut: on characters, on words, and what the guide goes on from.

The policy is scripted, so that every place of a known text is tried.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from rl import ScriptedGuide, ScriptedPolicy, generator_for, loaded_from, prompts_for
from rlgf_cli import noise
from rlgf_cli.algorithms.spec import Regime
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.samplers import base as samplers
from rlgf_cli.training.episodes import Episode
from rlgf_cli.training.rollout import RolloutGenerator

SCRIPT = "naïve 日本 café, ok zqzqzqzqzqzqzqzqzqzq end"
"""Single bytes in the tiny tokenizer: half characters, and a word of twenty tokens."""

FIRST = Regime(roll_in="policy", roll_out="guide", rollin_prob=1.0)
INNER = FIRST.model_copy(update={"cut": "inner"})


@pytest.fixture(scope="module")
def gpt2(tiny_gpt2: Path) -> Loaded:
    return loaded_from(tiny_gpt2)


@pytest.fixture
def script(gpt2: Loaded, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ids that the policy writes, EOS last."""
    ids = [*gpt2.text.encode_response(gpt2.tokenizer, SCRIPT), gpt2.eos_id]
    assert len(ids) > 40
    monkeypatch.setattr(samplers, "sample", ScriptedPolicy(ids, gpt2.eos_id))
    return ids


def text_of(loaded: Loaded, ids: list[int]) -> str:
    return loaded.text.decode_response(loaded.tokenizer, ids, strip=False)


def is_boundary(loaded: Loaded, script: list[int], n: int, whole_words: bool) -> bool:
    """Whether a reader of the whole text would let it be cut after n tokens."""
    before, whole = text_of(loaded, script[:n]), text_of(loaded, script)
    if not whole.startswith(before):  # half a character is not a beginning of the text
        return False
    behind = whole[len(before) :]
    return not (whole_words and before and behind and before[-1].isalnum() and behind[0].isalnum())


def roll(
    loaded: Loaded, regime: Regime, guide: ScriptedGuide, **changes: object
) -> tuple[RolloutGenerator, list[Episode]]:
    generator = generator_for(loaded, guide, max_new_tokens=64, **changes)  # type: ignore[arg-type]
    return generator, generator.generate(regime, prompts_for(loaded, 300), 0, 9.0)


@pytest.mark.parametrize("whole_words", [False, True])
def test_a_cut_inside_a_character_or_word_moves_to_its_end(gpt2: Loaded, script: list[int], whole_words: bool) -> None:
    """Forward, never back: back would select on what came after. All tokens of what it is in are one action."""
    last = len(script) - 1  # before EOS
    guide = ScriptedGuide((" and", "stop"))
    regime = FIRST.model_copy(update={"cut_horizon": len(script)})
    generator, episodes = roll(gpt2, regime, guide, whole_words=whole_words)
    asked, moved, seen = iter(guide.asked), 0, set()
    for e in episodes:
        k = 1 + int(noise.uniforms(4, 0, "plan", 0, e.group)[1] * len(script))
        seen.add(k)
        if k > last:
            assert e.segments == [("policy", script)] and e.finished and e.reached_cut
            continue
        cut = next(n for n in range(k, last + 1) if is_boundary(gpt2, script, n, whole_words))
        before = text_of(gpt2, script[:k])
        inside = before.endswith("\ufffd") or (whole_words and before[-1:].isalnum())
        start = k - 1
        if inside:
            start = next((n for n in range(k - 1, 0, -1) if is_boundary(gpt2, script, n, whole_words)), 0)
        assert (e.cut, e.action_start, e.reached_cut) == (cut, start, True), k
        assert e.segments == [("policy", script[:cut]), ("guide", e.segments[1][1])]
        prefix = next(asked).prefix
        assert prefix == text_of(gpt2, script[:cut]) and "\ufffd" not in prefix
        assert e.text == f"{prefix} and"
        moved += cut != k
    assert len(seen) > len(script) * 0.9
    assert generator.counts["cuts_moved"] == moved > 0
    assert next(asked, None) is None


def test_a_word_that_fills_the_room_is_the_policys_own_text(gpt2: Loaded, script: list[int]) -> None:
    ids = gpt2.text.encode_response(gpt2.tokenizer, "z" * 60)
    samplers.sample = ScriptedPolicy(ids, gpt2.eos_id)  # type: ignore[assignment] # restored with the fixture's patch
    guide = ScriptedGuide((" and", "stop"))
    generator = generator_for(gpt2, guide, max_new_tokens=20, whole_words=True)
    episodes = generator.generate(FIRST, prompts_for(gpt2, 20), 0, 10.0)
    one = [e for e in episodes if e.cut > 1]
    assert one and all(e.segments == [("policy", ids[:20])] and not e.finished for e in one)


def test_half_a_character_before_eos_is_the_policys_own_ending(gpt2: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    half = gpt2.text.encode_response(gpt2.tokenizer, "日")[:-1]
    ids = [*half, gpt2.eos_id]
    monkeypatch.setattr(samplers, "sample", ScriptedPolicy(ids, gpt2.eos_id))
    guide = ScriptedGuide((" and", "stop"))
    regime = FIRST.model_copy(update={"cut_horizon": len(half)})
    episodes = generator_for(gpt2, guide).generate(regime, prompts_for(gpt2, 30), 0, 9.0)
    inside = [e for e in episodes if 1 + int(noise.uniforms(4, 0, "plan", 0, e.group)[1] * len(half)) > 1]
    assert inside and all(e.segments == [("policy", ids)] and e.finished for e in inside)


@pytest.mark.parametrize("whole_words", [False, True])
def test_cut_inner_falls_in_the_finished_text_and_on_boundaries(
    gpt2: Loaded, script: list[int], whole_words: bool
) -> None:
    """k uniform on 1..L-1 of the policy's whole text, as released by earlier code, but never inside a character."""
    guide = ScriptedGuide((" and", "stop"))
    generator, episodes = roll(gpt2, INNER, guide, whole_words=whole_words)
    drawn, moved = set(), 0
    for e in episodes:
        k = 1 + int(noise.uniforms(4, 0, "plan", 0, e.group)[1] * (len(script) - 1))
        cut = next(n for n in range(k, len(script)) if is_boundary(gpt2, script, n, whole_words))
        assert e.cut == cut and e.segments[0] == ("policy", script[:cut]) and e.segments[1][0] == "guide"
        drawn.add(k)
        moved += cut != k
    assert min(drawn) == 1 and max(drawn) == len(script) - 1  # EOS alone is never in the prefix
    assert generator.counts["cuts_moved"] == moved > 0


def test_cut_inner_of_a_text_of_one_token_leaves_all_to_the_guide(
    gpt2: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samplers, "sample", ScriptedPolicy([gpt2.eos_id], gpt2.eos_id))
    episodes = generator_for(gpt2, ScriptedGuide(("the cat", "stop"))).generate(INNER, prompts_for(gpt2, 5), 0, 9.0)
    assert all(e.cut == 0 and [a for a, _ in e.segments] == ["guide"] for e in episodes)


def test_a_response_prefix_that_the_policy_wrote_is_not_written_again(
    gpt2: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy's first token is the space that stands before every response: as text it is nothing, and the guide,
    asked for a whole text, must go on behind the space and not put another one there."""
    space = gpt2.tokenizer.encode(" ", add_special_tokens=False)
    monkeypatch.setattr(samplers, "sample", ScriptedPolicy([*space, 79, 79], gpt2.eos_id))
    guide = ScriptedGuide(("the cat", "stop"))
    regime = FIRST.model_copy(update={"cut_horizon": 1})
    for e in generator_for(gpt2, guide).generate(regime, prompts_for(gpt2, 5), 0, 9.0):
        assert gpt2.tokenizer.decode(e.ids, skip_special_tokens=True) == " the cat"
        assert e.text == "the cat"
    assert {r.prefix for r in guide.asked} == {""}
