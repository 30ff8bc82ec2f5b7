"""Groups without variance make room for groups of other prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from configured import trainer_of
from rl import ScriptedGuide, coverage_score, loaded_from
from rlgf_cli.algorithms.spec import Regime
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.protocols import Example, Score
from rlgf_cli.training.episodes import Episode, by_group
from rlgf_cli.training.loop import Trainer

SIZE = 3
GRPO = {"name": "grpo", "group_size": SIZE}
SIZES: dict[str, Any] = {"rollout": {"episodes": 4 * SIZE}, "ppo": {"minibatch_size": 4, "epochs": 1}}


@pytest.fixture
def gpt2(tiny_gpt2: Path) -> Loaded:
    return loaded_from(tiny_gpt2)


class Scorer:
    """Texts of the prompts ``flat`` all score the same, the others by their letters; it remembers its calls."""

    def __init__(self, flat: Callable[[str], bool]) -> None:
        self.flat = flat
        self.asked: list[list[str]] = []
        self.scored: list[tuple[str, str]] = []

    def __call__(self, batch: Sequence[Example], texts: Sequence[str]) -> list[Score]:
        self.asked.append([example.id for example in batch])
        self.scored += [(example.id, text) for example, text in zip(batch, texts, strict=True)]
        scores = coverage_score(batch, texts)
        return [Score(0.7) if self.flat(e.id) else s for e, s in zip(batch, scores, strict=True)]


def odd(name: str) -> bool:
    return int(name.rsplit("-", 1)[1]) % 2 == 1


def trainer(loaded: Loaded, flat: Callable[[str], bool], times: int, **changes: Any) -> Trainer:
    sections = {**SIZES, "rollout": {**SIZES["rollout"], "resample_groups": times}}
    return trainer_of(loaded, GRPO, scorer=Scorer(flat), prompts=16, **{**sections, **changes})


def contents(episodes: Sequence[Episode]) -> list[tuple[Any, ...]]:
    return [(e.index, e.group, e.example.id, e.ids, e.value) for e in episodes]


def test_only_flat_groups_are_replaced_by_whole_groups_of_prompts_that_the_step_did_not_have(gpt2: Loaded) -> None:
    """The second and the fourth of four groups teach nothing; who comes in takes their places."""
    before = trainer(gpt2, odd, 0)._rollout(Regime(estimator="group_mean", group_size=SIZE), 0)
    used = [before[i].example.id for i in range(0, 4 * SIZE, SIZE)]
    row, after = trainer(gpt2, lambda name: name in (used[1], used[3]), 1).step()
    assert [e.index for e in after] == list(range(4 * SIZE))
    assert [e.group for e in after] == [i // SIZE for i in range(4 * SIZE)]
    for group in (0, 2):
        assert [e.ids for e in by_group(after)[group]] == [e.ids for e in by_group(before)[group]]
        assert {e.example.id for e in by_group(after)[group]} == {used[group]}
    for group in (1, 3):
        members = by_group(after)[group]
        assert len({e.example.id for e in members}) == 1 and members[0].example.id not in used
        assert len({tuple(e.ids) for e in members}) > 1
    assert len({e.example.id for e in after}) == 4
    assert row["rollout/resampled"] == 2 * SIZE and row["episodes"] == 4 * SIZE
    assert row["score/groups_without_variance"] == 0.0 and row["score/mean"] == fmean(e.value for e in after)


def test_a_step_gives_up_after_so_many_times(gpt2: Loaded) -> None:
    """Every text scores the same: no prompt helps."""
    looking = trainer(gpt2, lambda name: True, 3)
    row, episodes = looking.step()
    assert len(looking.scorer.asked) == 4  # type: ignore[union-attr]
    assert row["rollout/resampled"] == 3 * 4 * SIZE and row["score/groups_without_variance"] == 1.0
    assert [e.index for e in episodes] == list(range(4 * SIZE))
    each = [tuple(asked[::SIZE]) for asked in looking.scorer.asked]  # type: ignore[union-attr]
    assert len(set(each)) == 4 and row["advantage/std"] == 0.0
    assert looking.step()[0]["rollout/resampled"] == 3 * 4 * SIZE  # of that step alone


def test_no_group_is_replaced_where_all_differ_and_none_where_it_is_off(gpt2: Loaded) -> None:
    looking = trainer(gpt2, lambda name: False, 5)
    row, _ = looking.step()
    assert len(looking.scorer.asked) == 1 and row["rollout/resampled"] == 0  # type: ignore[union-attr]
    off = trainer(gpt2, lambda name: True, 0)
    row, _ = off.step()
    assert len(off.scorer.asked) == 1 and "rollout/resampled" not in row  # type: ignore[union-attr]
    assert row["score/groups_without_variance"] == 1.0


def test_a_second_time_replaces_what_is_still_flat_alone(gpt2: Loaded) -> None:
    looking = trainer(gpt2, odd, 2)
    row, episodes = looking.step()
    first, *more = looking.scorer.asked  # type: ignore[union-attr]
    flat = [name for name in first if odd(name)]
    for asked in more:
        assert len(asked) == len(flat)
        flat = [name for name in asked if odd(name)]
    assert row["rollout/resampled"] == sum(map(len, more)) > 0
    assert sum(odd(e.example.id) for e in episodes) == len(flat)


def test_the_episodes_do_not_depend_on_batches_or_on_earlier_rollouts(gpt2: Loaded) -> None:
    """So a resumed run sees what the uninterrupted one saw."""
    whole = trainer(gpt2, odd, 2)
    regime = whole.spec.regimes[0]
    first, second = (contents(whole._rollout(regime, step)) for step in range(2))
    assert first != second
    for size in (1, 5):
        resumed = trainer(gpt2, odd, 2, rollout={"episodes": 4 * SIZE, "resample_groups": 2, "batch_size": size})
        assert contents(resumed._rollout(regime, 1)) == second


def test_no_text_is_drawn_twice(gpt2: Loaded) -> None:
    """Eight prompts, four a step, all flat: the same prompts come in again and again, with new texts."""
    looking = trainer(gpt2, lambda name: True, 3)
    looking.prompts = looking.prompts[:8]
    for step in range(3):
        looking._rollout(looking.spec.regimes[0], step)
    texts: dict[str, list[str]] = {}
    for name, text in looking.scorer.scored:  # type: ignore[union-attr]
        texts.setdefault(name, []).append(text)
    assert len(texts) == 8 and sum(map(len, texts.values())) == 3 * 4 * 4 * SIZE
    assert all(len(set(found)) == len(found) for found in texts.values())


def test_the_seed_decides_who_comes_in(gpt2: Loaded) -> None:
    found = set()
    for seed in range(3):
        looking = trainer(gpt2, lambda name: True, 1)
        looking.seed = looking.generator.seed = seed
        looking._rollout(looking.spec.regimes[0], 0)
        found.add(tuple(looking.scorer.asked[1]))  # type: ignore[union-attr]
    assert len(found) == 3


def test_each_other_prompt_comes_once_before_any_comes_twice(gpt2: Loaded) -> None:
    """Of six prompts a step has four: the two others come in for its four flat groups."""
    for seed in range(4):
        looking = trainer(gpt2, lambda name: True, 1)
        looking.prompts, looking.seed = looking.prompts[:6], seed
        looking.step()
        first, fresh = (set(asked) for asked in looking.scorer.asked)  # type: ignore[union-attr]
        assert len(first) == 4 and fresh == {p.example.id for p in looking.prompts} - first


def test_few_prompts_are_better_than_none(gpt2: Loaded) -> None:
    """Where the step had all prompts there are, they come again with other texts."""
    looking = trainer(gpt2, lambda name: True, 1)
    looking.prompts = looking.prompts[:2]
    _, episodes = looking.step()
    assert len(looking.scorer.asked) == 2 and len(episodes) == 4 * SIZE  # type: ignore[union-attr]
    assert {len(members) for members in by_group(episodes).values()} == {SIZE}
    assert {e.example.id for e in episodes} <= {p.example.id for p in looking.prompts}


def test_what_the_guide_was_asked_for_is_counted_in_all(gpt2: Loaded) -> None:
    """And groups that come in share a roll-in of their own."""
    guide = ScriptedGuide(lambda request: (f" {request.example.prompt} it .", "stop"))
    looking = trainer_of(
        gpt2,
        {"name": "grpo++", "group_size": SIZE, "rollin_prob": 1.0},
        scorer=Scorer(lambda name: True),
        guide=guide,
        prompts=16,
        rollout={"episodes": 4 * SIZE, "resample_groups": 2},
        ppo={"minibatch_size": 4, "epochs": 1},
    )
    row, episodes = looking.step()
    assert row["guide/requests"] == len(guide.asked) == 3 * 4
    assert Counter(r.example.id for r in guide.asked) == looking.state.guide_uses
    for members in by_group(episodes).values():
        assert len({(e.cut, tuple(e.segments[0][1])) for e in members}) == 1
