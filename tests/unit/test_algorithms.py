"""The catalogue, what is refused, the schedules, and who learns on what."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from algorithms import NAMES, spec_of
from rlgf_cli import noise
from rlgf_cli.algorithms.catalog import Algorithm
from rlgf_cli.algorithms.spec import AlgorithmSpec, Author, Regime
from rlgf_cli.config.loader import resolve
from rlgf_cli.config.recipes import Layer
from rlgf_cli.config.train import TrainConfig
from rlgf_cli.errors import UserError
from rlgf_cli.protocols import Example, Score
from rlgf_cli.training.episodes import Episode, build_batch

PPO = ("none", "policy", "gae")
PPO_PP = ("guide", "policy", "gae")
AGGREVATED = ("policy", "guide", "gae")
GRPO = ("none", "policy", "group_mean")
MC = {"roll_in": "policy", "roll_out": "guide", "estimator": "guide_mc", "rollin_prob": 1.0, "credit": "cut"}

# name: (roll_in, roll_out, estimator) of each regime, needs a guide, needs a live one, critics, charges KL
TABLE: dict[str, tuple[list[tuple[str, str, str]], bool, bool, tuple[str, ...], bool]] = {
    "ppo": ([PPO], False, False, ("policy",), True),
    "ppo++": ([PPO_PP], True, False, ("policy",), True),
    "aggrevated": ([AGGREVATED], True, True, ("guide",), True),
    "lols": ([PPO_PP, AGGREVATED], True, True, ("policy", "guide"), True),
    "d2lols": ([AGGREVATED, PPO_PP], True, True, ("guide", "policy"), True),
    "grpo": ([("none", "policy", "group_mean")], False, False, (), True),
    "rloo": ([("none", "policy", "leave_one_out")], False, False, (), True),
    "grpo++": ([("guide", "policy", "group_mean")], True, False, (), True),
    "rloo++": ([("guide", "policy", "leave_one_out")], True, False, (), True),
    "bc-guide": ([("none", "guide", "likelihood")], True, False, (), False),
    "dagger": ([("policy", "guide", "likelihood")], True, True, (), False),
    **dict.fromkeys(("luffy", "mix", "chord", "chord-phi", "hpt"), ([GRPO], True, False, (), True)),
    **dict.fromkeys(("uft", "prefix-rft"), ([("guide", "policy", "group_mean")], True, False, (), True)),
    **dict.fromkeys(("on-failure", "pope"), ([GRPO], True, False, (), True)),
}


def test_the_table_is_the_whole_catalogue() -> None:
    assert list(TABLE) == NAMES
    assert all(kind.summary() for kind in Algorithm.named.values())


@pytest.mark.parametrize("name", TABLE)
def test_each_algorithm_is_the_row_that_it_should_be(name: str) -> None:
    regimes, needs_guide, needs_live, critics, has_policy_gradient = TABLE[name]
    spec = spec_of(name)
    assert [(r.roll_in, r.roll_out, r.estimator) for r in spec.regimes] == regimes
    assert (spec.needs_guide, spec.needs_live_guide) == (needs_guide, needs_live)
    assert (spec.critics, spec.has_policy_gradient) == (critics, has_policy_gradient)
    for regime in spec.regimes:
        assert regime.learn_author == ("guide" if regime.estimator == "likelihood" else "policy")
        assert regime.critic == (regime.roll_out if regime.estimator == "gae" else None)
        assert regime.rollin_prob < 1 or regime.critic is None  # else the guide's critic never sees the bare prompt
        assert (regime.cut, regime.credit) == ("first", "prefix")
    sizes = {"group_mean": 8, "leave_one_out": 4}
    assert spec.group_size == sizes.get(spec.regimes[0].estimator, 1)


def test_parameters_reach_the_regimes() -> None:
    spec = spec_of("lols", {"rollin_prob": 0.3, "p_ppo_pp": 0.25, "credit": "cut", "cut_horizon": 7})
    assert [r.rollin_prob for r in spec.regimes] == [0.3, 0.3]
    assert spec.schedule.weights == (0.25, 0.75)
    assert (spec.regimes[1].credit, spec.regimes[1].cut_horizon) == ("cut", 7)
    assert (spec.regimes[0].credit, spec.regimes[0].cut_horizon) == ("prefix", None)
    assert spec_of("grpo++", {"group_size": 3}).group_size == 3
    mc = spec_of("aggrevated", {"advantage": "guide_mc", "mc_samples": 3, "cut_horizon": 5})
    assert mc.regimes == (Regime.model_validate({**MC, "mc_samples": 3, "cut_horizon": 5}),)
    assert (mc.critics, mc.needs_live_guide, mc.has_policy_gradient, mc.regimes[0].guide_calls) == ((), True, True, 6)


@pytest.mark.parametrize("name", ["ppo++", "lols", "d2lols", "grpo++", "rloo++"])
def test_restart_and_gate_reach_the_regime_in_which_the_guide_rolls_in(name: str) -> None:
    spec = spec_of(name, {"restart": "backward", "restart_steps": 7, "gate": True})
    for regime in spec.regimes:
        own = ("backward", 7, True) if regime.roll_in == "guide" else ("uniform", None, False)
        assert (regime.restart, regime.restart_steps, regime.gate) == own
    plain = spec_of(name, {"restart": "uniform", "gate": False})
    assert plain == spec_of(name)


@pytest.mark.parametrize(
    ("regime", "reason"),
    [
        ({"roll_in": "policy", "roll_out": "policy"}, "one author writes all"),
        ({"roll_in": "guide", "roll_out": "guide", "estimator": "likelihood"}, "one author writes all"),
        ({"estimator": "likelihood"}, "learns on the guide's tokens"),
        ({"roll_in": "guide", "estimator": "likelihood"}, "learns on the guide's tokens"),
        ({"roll_out": "guide"}, "a policy gradient has no token to learn on"),
        ({"roll_in": "policy", "roll_out": "guide", "estimator": "group_mean", "group_size": 4}, "no baseline"),
        ({"estimator": "leave_one_out"}, "group_size of at least 2"),
        ({"group_size": 4}, "is for group_mean and leave_one_out"),
        ({"credit": "cut"}, "in which the policy rolls in"),
        ({"roll_in": "guide", "cut": "inner"}, "in which the policy rolls in"),
        ({"roll_in": "guide", "cut_horizon": 5}, "in which the policy rolls in"),
        ({"roll_in": "policy", "roll_out": "guide", "cut": "inner", "credit": "cut"}, "credit: prefix only"),
        ({"roll_in": "policy", "roll_out": "guide", "cut": "inner", "cut_horizon": 5}, "no cut_horizon"),
        (
            {"roll_in": "policy", "roll_out": "guide", "estimator": "likelihood", "credit": "cut"},
            "estimator likelihood the guide's tokens",
        ),
        ({"estimator": "guide_mc", "rollin_prob": 1.0}, "takes roll_in: policy"),
        ({"estimator": "guide_mc", "roll_in": "guide", "rollin_prob": 1.0}, "takes roll_in: policy"),
        ({**MC, "rollin_prob": 0.8}, "rollin_prob: 1,"),
        ({**MC, "credit": "prefix"}, "credit: cut"),
        ({**MC, "mc_samples": 0}, "greater than or equal to 1"),
        ({**MC, "estimator": "gae", "mc_samples": 2}, "mc_samples is for the estimator guide_mc"),
        ({**MC, "group_size": 2}, "is for group_mean and leave_one_out"),
        ({"restart": "backward", "restart_steps": 5}, "in which the guide rolls in"),
        ({"roll_in": "policy", "roll_out": "guide", "restart": "uncertain"}, "in which the guide rolls in"),
        ({"restart_steps": 5}, "in which the guide rolls in"),
        ({"gate": True}, "in which the guide rolls in"),
        ({"roll_in": "guide", "restart": "backward"}, "go together"),
        ({"roll_in": "guide", "restart_steps": 5}, "go together"),
        ({"roll_in": "guide", "restart": "uncertain", "restart_steps": 5}, "go together"),
        ({"roll_in": "guide", "restart": "backward", "restart_steps": 0}, "greater than or equal to 1"),
        ({"roll_in": "guide", "restart": "forward"}, "'uniform', 'backward', 'uncertain', 'slices'"),
        (
            {"roll_in": "guide", "restart": "uncertain", "estimator": "leave_one_out", "group_size": 4},
            "asks the policy's critic, and estimator 'leave_one_out' has none; use restart: uniform or backward",
        ),
        ({"roll_in": "guide", "gate": True, "rollin_prob": 1.0}, "writes nothing alone; use a rollin_prob below 1"),
        ({"rollin_prob": 1.2}, "less than or equal to 1"),
        ({"rollin_prob": -0.1}, "greater than or equal to 0"),
        ({"roll_in": "teacher"}, "'none', 'policy' or 'guide'"),
    ],
)
def test_a_regime_that_makes_no_sense_is_refused(regime: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Regime.model_validate(regime)


@pytest.mark.parametrize(
    ("schedule", "regimes", "reason"),
    [
        ({}, 2, "schedule always takes one regime"),
        ({"kind": "switch", "switch_step": 3}, 1, "takes two regimes and a switch_step"),
        ({"kind": "switch"}, 2, "takes two regimes and a switch_step"),
        ({"kind": "mixture", "weights": (1.0,)}, 2, "one weight per regime"),
        ({"kind": "mixture", "weights": (0.5, 0.6)}, 2, "sum to 1"),
        ({"kind": "mixture", "weights": (1.5, -0.5)}, 2, "at least 0"),
        ({"weights": (1.0,)}, 1, "weights are for schedule mixture"),
        ({"kind": "mixture", "weights": (0.5, 0.5), "switch_step": 2}, 2, "switch_step is for schedule switch"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(schedule: dict[str, Any], regimes: int, reason: str) -> None:
    rows = [{}, {"roll_in": "guide"}][:regimes]
    with pytest.raises(ValueError, match=reason):
        AlgorithmSpec.model_validate({"name": "mine", "regimes": rows, "schedule": schedule})


def test_regimes_of_one_algorithm_share_the_group_size() -> None:
    rows = [{"estimator": "group_mean", "group_size": 4}, {"estimator": "leave_one_out", "group_size": 2}]
    with pytest.raises(ValueError, match="same group_size"):
        AlgorithmSpec.model_validate(
            {"name": "mine", "regimes": rows, "schedule": {"kind": "mixture", "weights": [0.5, 0.5]}}
        )


@pytest.mark.parametrize(
    ("name", "parameters", "message", "hint"),
    [
        ("pppo", {}, "unknown algorithm 'pppo'", "'ppo'"),
        ("ppo", {"rollin_prob": 0.5}, "no parameter 'rollin_prob'", "ppo takes no parameters"),
        ("ppo++", {"switch_step": 5}, "no parameter 'switch_step'", "ppo++ takes rollin_prob"),
        ("ppo++", {"rollin_prob": 2.0}, "algorithm.rollin_prob: Input should be less than or equal to 1", None),
        ("lols", {"p_ppo_pp": 1.5}, "p_ppo_pp: Input should be less than or equal to 1", None),
        ("aggrevated", {"cut": "somewhere"}, "cut: Input should be 'first' or 'inner'", None),
        ("aggrevated", {"advantage": "td"}, "'gae' or 'guide_mc'", None),
        ("aggrevated", {"advantage": "guide_mc", "rollin_prob": 0.8}, "rollin_prob: 1", None),
        ("aggrevated", {"advantage": "guide_mc", "cut": "inner"}, "cut: first", None),
        ("aggrevated", {"mc_samples": 2}, "mc_samples is for the estimator guide_mc", None),
        ("lols", {"advantage": "guide_mc"}, "no parameter 'advantage'", "lols takes"),
        ("grpo", {"group_size": 1}, "group_size of at least 2", None),
        ("d2lols", {"switch_step": -1}, "greater than or equal to 0", None),
        ("grpo++", {"restart": "uncertain"}, "'group_mean' has none", None),
        ("aggrevated", {"gate": True}, "no parameter 'gate'", "aggrevated takes rollin_prob, "),
    ],
)
def test_a_wrong_name_or_parameter_is_a_user_error(
    name: str, parameters: dict[str, Any], message: str, hint: str | None
) -> None:
    needed = {"model": "m", "data": "d.jsonl", "output": "o", "reward": "length", "guide": "hf:g"}
    recipe = Layer({**needed, "algorithm": {"name": name, **parameters}}, "recipe.yaml")
    with pytest.raises(UserError) as refused:
        resolve(TrainConfig, layers=[recipe])
    assert message in str(refused.value)
    assert hint is None or hint in (refused.value.hint or "")


def test_a_run_keeps_the_same_keys_for_every_algorithm_and_reads_them_back() -> None:
    """Runs of before have each algorithm's parameters in their config, those not given as null."""
    keys = {"rollin_prob", "p_ppo_pp", "switch_step", "group_size", "credit", "cut", "cut_horizon", "advantage"}
    keys |= {"mc_samples", "restart", "restart_steps", "gate", "regimes", "schedule"}
    keys |= {
        "guide_coef",
        "guide_coef_last",
        "guide_coef_warmup",
        "guide_coef_decay",
        "shaping_gamma",
        "baseline_of",
        "failed_at",
        "target_success",
        "restarted",
        "longest_prefix",
        "hint_steps",
    }
    for name in NAMES:
        stored = {"name": name, **dict.fromkeys(keys)}
        read = Algorithm.model_validate(stored)
        assert type(read) is Algorithm.named[name] and read.model_dump() == stored
    given = {**dict.fromkeys(keys), "name": "ppo++", "rollin_prob": 0.5, "gate": True}
    assert Algorithm.model_validate(given).model_dump(mode="json") == given
    assert TrainConfig.model_fields["algorithm"].default.model_dump() == {"name": "ppo", **dict.fromkeys(keys)}


# --- schedules


def test_d2lols_switches_at_exactly_the_step() -> None:
    spec = spec_of("d2lols", {"switch_step": 3})
    assert [spec.regime_at(step, 0.99).roll_in for step in range(5)] == ["policy"] * 3 + ["guide"] * 2
    assert spec_of("d2lols", {"switch_step": 0}).regime_at(0, 0.0).roll_in == "guide"


def test_lols_mixes_with_its_probability() -> None:
    """As the loop draws it: one number per step, a function of the seed."""
    spec = spec_of("lols", {"p_ppo_pp": 0.8})
    drawn = Counter(spec.regime_at(s, noise.uniforms(1, 0, "regime", s)[0]).roll_in for s in range(4000))
    assert drawn["guide"] / 4000 == pytest.approx(0.8, abs=0.02)
    assert set(drawn) == {"guide", "policy"}
    boundary = [spec.regime_at(0, draw).roll_in for draw in (0.0, 0.7999999, 0.8000001, 1 - 2**-53)]
    assert boundary == ["guide", "guide", "policy", "policy"]


@pytest.mark.parametrize(("probability", "roll_in"), [(1.0, "guide"), (0.0, "policy")])
def test_lols_with_a_certain_phase_never_takes_the_other(probability: float, roll_in: str) -> None:
    spec = spec_of("lols", {"p_ppo_pp": probability})
    assert {spec.regime_at(0, draw).roll_in for draw in (0.0, 0.5, 1 - 2**-53)} == {roll_in}


# --- algorithms of one's own, in a config

INLINE = """\
model: m
data: d.jsonl
output: o
reward: length
guide: g.jsonl
rollout: {episodes: 64}
algorithm:
  name: mine
  regimes:
    - {roll_in: none}
    - {roll_in: guide, rollin_prob: 0.5}
    - {roll_in: none, roll_out: guide, estimator: likelihood}
  schedule: {kind: mixture, weights: [0.5, 0.3, 0.2]}
"""


def config_from(tmp_path: Path, text: str, *sets: str) -> TrainConfig:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    return resolve(TrainConfig, files=[recipe], sets=sets).config


def test_a_mixture_of_ones_own_is_written_in_a_recipe(tmp_path: Path) -> None:
    spec = config_from(tmp_path, INLINE).algorithm.spec()
    assert (spec.name, len(spec.regimes), spec.critics) == ("mine", 3, ("policy",))
    assert [spec.regime_at(0, d).roll_out for d in (0.49, 0.6, 0.9)] == ["policy", "policy", "guide"]
    assert spec.needs_guide and not spec.needs_live_guide


@pytest.mark.parametrize(
    ("old", "new", "message", "place", "hint"),
    [
        ("weights: [0.5, 0.3, 0.2]", "weights: [0.5, 0.5]", "one weight per regime", ":7", None),
        ("roll_in: guide,", "roll_in: guid,", "roll_in: Input should be 'none'", ":7", None),
        ("    - {roll_in: none}", "    - {roll_inn: none}", "roll_inn: Extra inputs", ":7", None),
        ("  name: mine", "  name: mine\n  rollin_prob: 0.5", "parameters go into the regimes", ":7", None),
        ("guide: g.jsonl\n", "", "needs a guide", "", None),
    ],
)
def test_a_wrong_mixture_is_refused_with_its_line(
    tmp_path: Path, old: str, new: str, message: str, place: str, hint: str | None
) -> None:
    assert old in INLINE
    with pytest.raises(UserError) as refused:
        config_from(tmp_path, INLINE.replace(old, new))
    assert message in str(refused.value)
    assert f"recipe.yaml{place}" in (refused.value.where or "") or not place


@pytest.mark.parametrize(
    ("algorithm", "message", "hint"),
    [
        ("algorithm: pppo", "unknown algorithm 'pppo'", "did you mean 'ppo'"),
        ("algorithm: {name: ppo, p_ppo_pp: 0.5}", "no parameter 'p_ppo_pp'", "ppo takes no parameters"),
        ("algorithm: {name: ppo, schedule: {kind: always}}", "schedule goes with regimes", None),
    ],
)
def test_a_wrong_algorithm_in_a_recipe_has_its_line_and_a_hint(
    tmp_path: Path, algorithm: str, message: str, hint: str | None
) -> None:
    with pytest.raises(UserError) as refused:
        config_from(tmp_path, f"model: m\ndata: d.jsonl\noutput: o\nreward: length\n{algorithm}\n")
    assert message in str(refused.value)
    assert (refused.value.where or "").endswith("recipe.yaml:5")
    assert hint is None or hint in (refused.value.hint or "")


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["algorithm=ppo++"], "needs a guide"),
        (["algorithm=grpo", "rollout.episodes=63", "ppo.minibatch_size=1"], "not a multiple of the group size"),
        (["rollout.episodes=8"], "minibatch_size (32) is larger than rollout.episodes (8)"),
        (["reward=[]"], "at least one reward is needed"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path: Path, sets: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        config_from(tmp_path, "model: m\ndata: d.jsonl\noutput: o\nreward: length\n", *sets)
    assert message in str(refused.value)


# --- who learns on what

PAD = EOS = 1  # pad is EOS: masks must not look at ids
LOADED = SimpleNamespace(device=torch.device("cpu"), pad_id=PAD, encoder_decoder=False)


def episode(regime: Regime, *segments: tuple[Author, int], index: int = 0, **more: Any) -> Episode:
    """Segments of so many tokens; the last token of all is EOS."""
    parts: list[tuple[Author, list[int]]] = [(author, [7] * count) for author, count in segments]
    if parts:
        parts[-1][1][-1] = EOS
    found = Episode(index, Example("e", "p"), [5, 6], index // 2, regime.roll_out, parts, **more)
    found.score = Score(0.5)
    return found


def as_text(mask: torch.Tensor) -> list[str]:
    return ["".join(".X"[int(x)] for x in row) for row in mask]


PP = Regime(roll_in="guide")
AGG = Regime(roll_in="policy", roll_out="guide")
AGG_CUT = Regime(roll_in="policy", roll_out="guide", credit="cut")


@pytest.mark.parametrize(
    ("regime", "made", "learned", "fit_policy", "fit_guide"),
    [
        (Regime(), episode(Regime(), ("policy", 4)), "XXXX", "XXXX", "...."),
        # PPO++: after the cut, EOS included; without a roll-in all of it
        (PP, episode(PP, ("guide", 2), ("policy", 3), cut=2), "..XXX", "..XXX", "....."),
        (PP, episode(PP, ("policy", 3)), "XXX", "XXX", "..."),
        # AggreVaTeD: before the cut; the guide's critic is fitted behind it
        (AGG, episode(AGG, ("policy", 2), ("guide", 3), cut=2, reached_cut=True), "XX...", ".....", "..XXX"),
        (AGG, episode(AGG, ("guide", 3)), "...", "...", "XXX"),
        # a roll-in that ended by itself is a policy roll-out from its first token on
        (AGG, episode(AGG, ("policy", 3), cut=3), "XXX", "XXX", "..."),
        # credit: cut: the token at the cut, or the whole word where it moved; nothing where it was not reached
        (
            AGG_CUT,
            episode(AGG_CUT, ("policy", 3), ("guide", 1), cut=3, action_start=2, reached_cut=True),
            "..X.",
            "....",
            "...X",
        ),
        (
            AGG_CUT,
            episode(AGG_CUT, ("policy", 4), ("guide", 1), cut=4, action_start=1, reached_cut=True),
            ".XXX.",
            ".....",
            "....X",
        ),
        (AGG_CUT, episode(AGG_CUT, ("policy", 3), cut=3, action_start=2), "...", "XXX", "..."),
        (AGG_CUT, episode(AGG_CUT, ("policy", 3), cut=3, action_start=2, reached_cut=True), "..X", "XXX", "..."),
        (AGG_CUT, episode(AGG_CUT, ("guide", 3)), "...", "...", "XXX"),
    ],
)
def test_masks_of_hand_made_episodes(
    regime: Regime, made: Episode, learned: str, fit_policy: str, fit_guide: str
) -> None:
    batch = build_batch([made], regime, ["policy", "guide"], LOADED)
    assert as_text(batch.real) == ["X" * len(learned)]
    assert as_text(batch.learned) == [learned]
    assert as_text(batch.fit["policy"]) == [fit_policy]
    assert as_text(batch.fit["guide"]) == [fit_guide]
    assert as_text(batch.last) == ["." * (len(learned) - 1) + "X"]
    assert batch.scores.tolist() == [0.5]


@pytest.mark.parametrize("name", ["bc-guide", "dagger"])
def test_likelihood_learns_the_guides_tokens_and_eos(name: str) -> None:
    regime = spec_of(name).regimes[0]
    made = [episode(regime, ("policy", 2), ("guide", 3), cut=2), episode(regime, ("guide", 2), index=1)]
    batch = build_batch(made, regime, [], LOADED)
    assert as_text(batch.learned) == ["..XXX", "XX..."]
    assert batch.fit == {}


@st.composite
def any_episode(draw: st.DrawFn, regime: Regime, index: int) -> Episode:
    """What the regime can come to: both authors, either alone, a roll-in that ended early, a cut that moved."""
    first: Author = "guide" if regime.roll_in == "guide" else "policy"
    kinds = ["alone"] if regime.roll_in == "none" else ["alone", "both", "ended"]
    kind = draw(st.sampled_from(kinds))
    if kind == "ended" and first == "policy":
        length = draw(st.integers(1, 5))
        return episode(
            regime,
            ("policy", length),
            index=index,
            cut=length,
            action_start=draw(st.integers(0, length - 1)),
            reached_cut=draw(st.booleans()),
        )
    if kind == "both":
        cut, rest = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        start = draw(st.integers(0, cut - 1))
        segments: list[tuple[Author, int]] = [(first, cut), (regime.roll_out, rest)]
        return episode(regime, *segments, index=index, cut=cut, action_start=start, reached_cut=first == "policy")
    return episode(regime, (draw(st.sampled_from([regime.roll_out, "policy"])), draw(st.integers(1, 5))), index=index)


@pytest.mark.parametrize("name", TABLE)
@given(data=st.data())
def test_masks_of_any_episode_follow_from_its_authors(name: str, data: st.DataObject) -> None:
    spec = spec_of(name, {"credit": "cut"} if data.draw(st.booleans()) and name in ("lols", "d2lols") else {})
    regime = data.draw(st.sampled_from(spec.regimes))
    episodes = [data.draw(any_episode(regime, index)) for index in range(data.draw(st.integers(1, 4)))]
    batch = build_batch(episodes, regime, spec.critics, LOADED)
    assert batch.groups.tolist() == [index // 2 for index in range(len(episodes))]
    assert set(batch.fit) == set(spec.critics)
    for row, e in enumerate(episodes):
        authors = [author for author, ids in e.segments for _ in ids]
        finisher = "policy" if "guide" not in authors else regime.roll_out
        for t in range(batch.real.shape[1]):
            inside = t < len(authors)
            author = authors[t] if inside else None
            assert bool(batch.real[row, t]) == inside
            assert bool(batch.policy[row, t]) == (author == "policy")
            wanted = author == regime.learn_author
            if regime.credit == "cut":
                wanted = wanted and e.reached_cut and e.action_start <= t < e.cut
            assert bool(batch.learned[row, t]) == wanted
            for critic in spec.critics:
                start = e.cut if "guide" in authors else 0
                fitted = inside and critic == finisher and t >= start
                assert bool(batch.fit[critic][row, t]) == fitted
                if fitted:
                    assert author == critic  # a critic is never fitted on the other author's tokens
        assert bool(batch.last[row, len(authors) - 1]) and int(batch.last[row].sum()) == 1
        assert e.ids[-1] == EOS == PAD and bool(batch.real[row, len(authors) - 1])


def test_the_score_is_less_the_penalty_and_an_unscored_episode_has_none() -> None:
    scored, bare = episode(PP, ("policy", 2)), episode(PP, ("policy", 2), index=1)
    scored.penalty, bare.score = 0.2, None
    batch = build_batch([scored, bare], PP, ["policy"], LOADED)
    assert batch.scores.tolist() == pytest.approx([0.3, 0.0])
