"""The guide gate: who may begin, by the scores so far, and whose texts those scores are of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rl import ScriptedGuide, loaded_from, trainer_for
from rlgf_cli import noise
from rlgf_cli.algorithms.spec import Author
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.protocols import Example, GuideRequest, Score
from rlgf_cli.training.episodes import Episode
from rlgf_cli.training.loop import Trainer
from rlgf_cli.training.parallel.processes import Processes
from rlgf_cli.training.restarts import Gate, text_key, update_own_scores

GOOD, BAD = "the cat sees the river it .", "in the house a dog finds it ."


@pytest.fixture
def gpt2(tiny_gpt2: Path) -> Loaded:
    return loaded_from(tiny_gpt2)


def episode(
    name: str, value: float, *segments: tuple[Author, list[int]], index: int = 0, penalty: float = 0.0
) -> Episode:
    found = Episode(
        index, Example(name, "p"), [5], index, "policy", list(segments), score=Score(value), penalty=penalty
    )
    found.cut = len(segments[0][1]) if segments and segments[0][0] == "guide" else 0
    return found


# --- the record


def test_the_record_moves_half_of_the_way_to_a_steps_mean() -> None:
    alone = ("policy", [7, 8])
    step = [episode("a", 1.0, alone), episode("a", 0.0, alone, index=1), episode("b", 0.4, alone, index=2, penalty=0.1)]
    first = update_own_scores({}, step)
    assert first == pytest.approx({"a": 0.5, "b": 0.3})
    second = update_own_scores(first, [episode("a", 1.0, alone)])
    assert second == pytest.approx({"a": 0.75, "b": 0.3})
    assert first == pytest.approx({"a": 0.5, "b": 0.3})  # what was before is left as it was


def test_a_text_with_a_token_of_the_guides_is_not_the_policys_own() -> None:
    begun = episode("a", 1.0, ("guide", [7]), ("policy", [8]))
    unscored = replace(episode("a", 1.0, ("policy", [8])), score=None)
    assert update_own_scores({"a": 0.25}, [begun, unscored]) == {"a": 0.25}


# --- the decision


class Counting:
    """Scores texts by their first id, and remembers which."""

    def __init__(self) -> None:
        self.scored: list[list[int]] = []

    def __call__(self, episodes: list[Episode]) -> None:
        for e in episodes:
            self.scored.append(e.ids)
            e.score = Score(e.ids[0] / 10)


def whole(name: str, ids: list[int], index: int = 0) -> Episode:
    return Episode(index, Example(name, "p"), [5], index, "policy", [("guide", ids)])


@pytest.mark.parametrize(("own", "shut"), [(0.59, False), (0.6, True), (0.61, True), (None, False)])
def test_the_guide_is_used_where_its_text_is_better(own: float | None, shut: bool) -> None:
    """Better, not as good; and where the policy wrote nothing alone yet, nothing is compared and nothing scored."""
    score = Counting()
    gate = Gate({} if own is None else {"a": own}, {}, score)
    assert gate.rejects([whole("a", [6, 1])]) == [shut]
    assert len(score.scored) == (own is not None)


def test_a_text_is_scored_once_and_kept() -> None:
    score = Counting()
    gate = Gate({"a": 0.5, "b": 0.65}, {}, score)
    texts = [
        whole("a", [6, 1]),
        whole("a", [4, 1], 1),
        whole("a", [6, 1], 2),
        whole("b", [6, 1], 3),
        whole("c", [6, 1], 4),
    ]
    for _ in range(2):
        assert gate.rejects(texts) == [False, True, False, True, False]
    assert score.scored == [[6, 1], [4, 1], [6, 1]]  # a text of another prompt is another text
    later = Gate({"a": 0.5, "b": 0.65, "c": 0.9}, dict(gate.new), score)
    assert later.rejects(texts) == [False, True, False, True, True]
    assert score.scored[3:] == [[6, 1]] and list(later.new) == [text_key(texts[4])]


def test_the_same_words_without_their_end_are_another_text() -> None:
    assert text_key(whole("a", [6, 1])) != text_key(whole("a", [6])) != text_key(whole("b", [6]))
    assert text_key(whole("a", [1, 23])) != text_key(whole("a", [12, 3]))


def test_processes_take_over_what_the_others_scored() -> None:
    class Two(Processes):
        def gather(self, value: Any) -> list[Any]:
            return [value, {"theirs": 0.25}]

    gate = Gate({"a": 0.1}, {}, Counting())
    gate.rejects([whole("a", [6, 1])])
    gate.merge(Two(0, 2))
    assert gate.new == {text_key(whole("a", [6, 1])): 0.6, "theirs": 0.25}


# --- in steps


def by_text(scores: dict[str, float], default: float) -> Any:
    calls: Counter[str] = Counter()

    def scorer(batch: Sequence[Example], texts: Sequence[str]) -> list[Score]:
        calls.update(f"{e.id}/{t}" for e, t in zip(batch, texts, strict=True))
        return [Score(scores.get(t.strip(), default)) for t in texts]

    scorer.calls = calls  # type: ignore[attr-defined]
    return scorer


def good_for_some(request: GuideRequest) -> tuple[str, Any]:
    """Every second prompt has a good text and a bad one."""
    even = int(request.example.id.rpartition("-")[2]) % 2 == 0
    return (GOOD if even and request.sample_index % 2 else BAD), "stop"


def gated_trainer(loaded: Loaded, name: str = "ppo++", *, default: float = 0.5, **own: Any) -> Trainer:
    scorer = by_text({GOOD: 0.9, BAD: 0.2}, default)
    parameters = {"gate": True, "rollin_prob": 0.6, **own}
    return trainer_for(
        loaded, name, ScriptedGuide(good_for_some, live=False), parameters=parameters, episodes=12, scorer=scorer
    )


@pytest.mark.parametrize(("name", "size"), [("ppo++", 1), ("grpo++", 4), ("rloo++", 2)])
def test_the_run_that_the_definition_gives(gpt2: Loaded, name: str, size: int) -> None:
    """Every step again, from its episodes and the plan's uniforms alone; the policy's own texts all score .5."""
    trainer = gated_trainer(gpt2, name, **({"group_size": size} if size > 1 else {}))
    wrote_alone: set[str] = set()
    seen: Counter[str] = Counter()
    for step in range(min(24, 10 * size)):
        row, episodes = trainer.step()
        gated = 0
        for e in episodes:
            plan = noise.uniforms(4, 0, "plan", step, e.group)
            text, _ = good_for_some(GuideRequest(e.example, "", int(plan[2] * (1 << 30)), 12))
            wanted, out = plan[0] < 0.6, e.example.id in wrote_alone and text == BAD
            seen["gated" if wanted and out else "begun" if wanted else "alone"] += 1
            gated += bool(wanted and out)
            assert (e.cut > 0) == (wanted and not out)
            assert [author for author, _ in e.segments] == (["guide", "policy"] if e.cut else ["policy"])
            if e.cut:
                ids = [*gpt2.text.encode_response(gpt2.tokenizer, text), gpt2.eos_id]
                assert e.cut == 1 + int(plan[1] * (len(ids) - 1)) and e.segments[0][1] == ids[: e.cut]
        assert row["guide/gated"] == gated
        assert row["rollin/share"] == sum(e.cut > 0 for e in episodes) / len(episodes)
        wrote_alone |= {e.example.id for e in episodes if e.policy_alone}
        assert trainer.state.own_scores == dict.fromkeys(wrote_alone, 0.5)
    assert min(seen.values()) > 5 and len(seen) == 3
    guides = {k: n for k, n in trainer.scorer.calls.items() if k.endswith((GOOD, BAD))}  # type: ignore[union-attr]
    assert guides and set(guides.values()) == {1}
    assert len(trainer.state.guide_scores) == len(guides)
    assert set(trainer.state.guide_scores.values()) == {0.9, 0.2}


def test_a_gated_episode_is_the_policys_own_and_learns_from_its_first_token(gpt2: Loaded) -> None:
    trainer = gated_trainer(gpt2, default=0.95)  # better than either text of the guide's
    trainer.state.own_scores = {p.example.id: 0.95 for p in trainer.prompts}
    row, episodes = trainer.step()
    plans = [noise.uniforms(4, 0, "plan", 0, e.group)[0] < 0.6 for e in episodes]
    assert row["guide/gated"] == sum(plans) > 0 and row["rollin/share"] == 0
    assert row["tokens/learned"] == sum(e.length for e in episodes) and row["tokens/policy"] == 1
    assert all(e.policy_alone and e.rollout_start == 0 and e.fits == "policy" for e in episodes)


def test_the_guides_text_pays_for_a_missing_end_as_an_episode_does(gpt2: Loaded) -> None:
    trainer = trainer_for(
        gpt2, "ppo++", ScriptedGuide((GOOD, "length"), live=False), parameters={"gate": True}, episodes=12,
        scorer=by_text({GOOD: 0.9}, 0.0),
    )  # fmt: skip
    trainer.missing_eos_penalty = 0.5
    trainer.state.own_scores = {p.example.id: 0.45 for p in trainer.prompts}
    row, _ = trainer.step()
    assert set(trainer.state.guide_scores.values()) == {0.4} and row["guide/gated"] > 0


def test_without_a_gate_nothing_is_scored_or_kept(gpt2: Loaded) -> None:
    trainer = gated_trainer(gpt2, gate=False)
    for _ in range(4):
        row, _ = trainer.step()
        assert "guide/gated" not in row
    assert trainer.state.own_scores == trainer.state.guide_scores == {}
    calls = trainer.scorer.calls  # type: ignore[union-attr]
    assert not any(k.endswith((GOOD, BAD)) for k in calls) and calls.total() == 48


def test_in_d2lols_the_record_is_of_the_ppo_pp_phase(gpt2: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """A roll-in of the policy's that ended by itself is a text of its own too, but one selected for being short."""
    parameters = {"switch_step": 1, "cut_horizon": 12, "rollin_prob": 0.5, "gate": True}
    guide = ScriptedGuide(lambda request: (f" {request.example.prompt} it .", "stop"))
    trainer = trainer_for(gpt2, "d2lols", guide, parameters=parameters, episodes=12)
    # with so many ids that end a text, those of a random model do end
    monkeypatch.setattr(gpt2.model.generation_config, "eos_token_id", [gpt2.eos_id, *range(80, 110)])
    _, episodes = trainer.step()
    assert any(e.policy_alone and e.cut for e in episodes) and trainer.state.own_scores == {}
    _, episodes = trainer.step()
    assert set(trainer.state.own_scores) == {e.example.id for e in episodes if e.policy_alone} != set()
