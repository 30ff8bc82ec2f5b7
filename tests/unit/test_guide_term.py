"""The guide-token term against its definition: the weights, one step of each algorithm, which texts it is taken on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from algorithms import spec_of
from rl import ScriptedGuide, generator_for, loaded_from, prompts_for, state_of, step_data, trainer_for, update_settings
from rlgf_cli.algorithms.guide_term import Coefficient, GuideTerm
from rlgf_cli.algorithms.spec import Regime
from rlgf_cli.functional import losses
from rlgf_cli.functional.advantages import group_advantages
from rlgf_cli.models.actor_critic import ActorCritic
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.protocols import Score
from rlgf_cli.training.episodes import Episode, Role
from rlgf_cli.training.minibatches import minibatches
from rlgf_cli.training.optimizer import make_optimizer
from rlgf_cli.training.update import update

RATE = 0.01


@pytest.fixture
def gpt2(tiny_gpt2: Path) -> Loaded:
    return loaded_from(tiny_gpt2)


# --- the weights


def random_case(
    seed: int, rows: int = 4, width: int = 7
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [B, T, 11] with a gradient, tokens [B, T], a mask with an empty row, and credits of both signs."""
    g = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(rows, width, 11, dtype=torch.float64, generator=g)).requires_grad_()
    tokens = torch.randint(0, 11, (rows, width), generator=g)
    mask = torch.rand(rows, width, generator=g) < 0.6
    mask[0] = False
    return logits, tokens, mask, torch.randn(rows, width, dtype=torch.float64, generator=g)


def probabilities(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def objective(kind: str, p: torch.Tensor, shaping: float) -> torch.Tensor:
    """What is maximised per token, by its definition; phi's weight is a constant of the step."""
    return {
        "one": p.log(),
        "probability": p,  # pi / 1: the guide's probability taken as 1
        "phi": (p * (1 - p)).detach() * p.log(),
        "shaped": p / (p + shaping),
    }[kind]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["one", "probability", "phi", "shaped"])
def test_the_gradient_is_that_of_the_definition(kind: Any, seed: int) -> None:
    logits, tokens, mask, credit = random_case(seed)
    count = 13.0
    defined = -(credit * objective(kind, probabilities(logits, tokens), 0.3))[mask].sum() / count
    expected = torch.autograd.grad(defined, logits)[0]
    logprobs = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    loss = losses.guide_loss(logprobs, credit, mask, kind, 0.3, count)
    found = torch.autograd.grad(loss, logits)[0]
    assert float((found - expected).abs().max()) < 1e-10 < float(expected.abs().max())


def test_shaping_in_its_limits() -> None:
    """gamma large: gamma w is the plain ratio p. p near 0: w is the ratio times 1 / gamma."""
    logprobs = torch.linspace(-9, -0.001, 50, dtype=torch.float64)
    large = 1e9 * losses.guide_weights(logprobs, "shaped", 1e9)
    assert torch.allclose(large, logprobs.exp(), rtol=1e-8)
    rare = torch.tensor([-20.0, -30.0], dtype=torch.float64)
    ratio = losses.guide_weights(rare, "shaped", 0.1) / losses.guide_weights(rare, "probability", 0.1)
    assert torch.allclose(ratio, torch.tensor([10.0, 10.0], dtype=torch.float64), rtol=1e-6)


@given(st.integers(0, 10_000), st.floats(0.05, 1.0))
@settings(max_examples=40, deadline=None)
def test_the_most_uncertain_tokens_of_each_text(seed: int, share: float) -> None:
    _, _, mask, entropies = random_case(seed)
    chosen = losses.most_uncertain(entropies, mask, share)
    for row in range(len(mask)):
        places = [t for t in range(mask.shape[1]) if mask[row, t]]
        wanted = sorted(places, key=lambda t: -float(entropies[row, t]))[: math.ceil(share * len(places))]
        assert sorted(chosen[row].nonzero()[:, 0].tolist()) == sorted(wanted)
    assert torch.equal(losses.uncertain_counts(mask, share), chosen.sum(-1))


@given(st.lists(st.tuples(st.floats(-2, 2), st.booleans()), min_size=3, max_size=9), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_baseline_of_the_counted_texts(texts: list[tuple[float, bool]], scaled: bool) -> None:
    """(score - mean) / (deviation + 1e-4), both of the counted texts; nothing is divided where these are all equal."""
    texts = [(0.25, True), (texts[0][0], True), *texts[1:]]
    scores, counted = torch.tensor([s for s, _ in texts], dtype=torch.float64), torch.tensor([c for _, c in texts])
    own = [s for s, c in texts if c]
    found = group_advantages(scores, torch.zeros(len(texts), dtype=torch.long), scaled=scaled, counted=counted)
    divisor = stdev(own) + 1e-4 if scaled and len(set(own)) > 1 else 1.0
    for value, (score, is_counted) in zip(found.tolist(), texts, strict=True):
        expected = 0.0 if is_counted and len(set(own)) == 1 else (score - fmean(own)) / divisor
        assert value == pytest.approx(expected, abs=1e-9)


def test_the_coefficient_over_a_run() -> None:
    mu = Coefficient(peak=0.9, valley=0.1, warmup_steps=2, decay_steps=4)
    assert [round(mu.at(age), 6) for age in range(9)] == [0.3, 0.6, 0.9, 0.782843, 0.5, 0.217157, 0.1, 0.1, 0.1]
    assert Coefficient(peak=0.4).at(1000) == 0.4
    assert Coefficient(peak=0.4, valley=0.1).at(0) == 0.1, "without steps it is at its last value"


# --- one step down the objective


@dataclass
class Text:
    """One text of a group: who wrote it, its tokens, its score, and whether its own tokens learn."""

    role: Role
    ids: list[int]
    score: float
    group: int
    learns: bool = True
    prefix: list[int] = field(default_factory=list)


MEMBERS = [
    Text("own", [40, 41, 300, 1], 0.1, 0),
    Text("own", [299, 1], 0.9, 0),
    Text("member", [70, 71, 72, 73, 1], 1.0, 0),
    Text("own", [81, 82], 0.4, 1),
    Text("own", [83, 84, 85], 0.2, 1),
    Text("member", [86, 1], 0.1, 1),
]
BESIDE = [Text("beside" if t.role == "member" else t.role, t.ids, t.score, t.group) for t in MEMBERS]
FAILED = [
    Text("own", [40, 41, 300, 1], 0.0, 0, learns=False),
    Text("own", [299, 1], 0.0, 0, learns=False),
    Text("beside", [70, 71, 72, 73, 1], 0.0, 0),
    Text("own", [81, 82], 0.4, 1),
    Text("own", [83, 84, 85], 0.2, 1),
]


def advantages_of(texts: list[Text], baseline: str) -> list[float]:
    """GRPO's, by its definition; 0 for a text beside its group."""
    values = []
    for t in texts:
        counted = [o.score for o in texts if o.group == t.group and o.role != "beside"]
        if baseline == "own":
            counted = [o.score for o in texts if o.group == t.group and o.role == "own"]
        spread = stdev(counted)
        values.append(0.0 if t.role == "beside" or not spread else (t.score - fmean(counted)) / (spread + 1e-4))
    return values


def by_hand(loaded: Loaded, texts: list[Text], algorithm: str, parameters: dict[str, Any], age: int) -> torch.Tensor:
    """The loss of one step, text by text, from plain calls of the model."""
    advantages = advantages_of(texts, parameters.get("baseline_of", "group"))
    own, theirs = [], []
    for row, (t, advantage) in enumerate(zip(texts, advantages, strict=True)):
        prompt = prompts_for(loaded, len(texts))[row].ids
        ids = [*t.prefix, *t.ids]
        logits = loaded.model(input_ids=torch.tensor([[*prompt, *ids[:-1]]]), use_cache=False).logits[0]
        every = logits[len(prompt) - 1 :].log_softmax(-1)
        logprobs = every[range(len(ids)), ids]
        if t.prefix:
            entropies = -(every.exp() * every).sum(-1)[: len(t.prefix)]
            kept = range(len(t.prefix)) if algorithm == "uft" else [int(entropies.argmax())]  # a fifth of three tokens
            theirs.append((logprobs[list(kept)], 0.0))
            logprobs = logprobs[len(t.prefix) :]
        if t.role != "own":
            theirs.append((logprobs, advantage))
        elif t.learns:
            own.append(((logprobs - logprobs.detach()).exp() * advantage, advantage))
    count = sum(len(x) for x, _ in own)
    gain = sum((x.sum() for x, _ in own), torch.zeros(()))
    nll = [-x for x, _ in theirs]
    tokens = sum(map(len, nll))
    if algorithm == "luffy":
        shaped = sum((a * (x.exp() / (x.exp() + parameters.get("shaping_gamma", 0.1))).sum() for x, a in theirs), gain)
        return -shaped / (count + tokens)
    if algorithm == "chord-phi":
        nll = [(-x).exp().detach() * (1 - (-x).exp().detach()) * x for x in nll]
    likelihood = sum((x.sum() for x in nll), torch.zeros(())) / tokens
    if algorithm in ("chord", "chord-phi"):
        mu = 0.05 + 0.85 * (1 + math.cos(math.pi * age / 200)) / 2
        return (1 - mu) * -gain / count + mu * likelihood
    return -gain / count + parameters.get("guide_coef", {"mix": 0.1, "hpt": 1.0}.get(algorithm)) * likelihood


PREFIXED = [
    Text("own", [300, 1], 0.1, 0, prefix=[40, 41, 42]),
    Text("own", [299, 7, 1], 0.9, 0, prefix=[40, 41, 42]),
    Text("own", [81, 82], 0.4, 1),
    Text("own", [83, 84, 85], 0.2, 1),
]

STEPS: dict[str, tuple[str, list[Text], dict[str, Any], int]] = {
    "luffy": ("luffy", MEMBERS, {}, 0),
    "luffy_own_baseline": ("luffy", MEMBERS, {"baseline_of": "own", "shaping_gamma": 0.5}, 0),
    "mix": ("mix", BESIDE, {}, 0),
    "chord": ("chord", BESIDE, {}, 50),
    "chord-phi": ("chord-phi", BESIDE, {}, 120),
    "hpt": ("hpt", FAILED, {}, 0),
    "uft": ("uft", PREFIXED, {"guide_coef": 0.3}, 0),
    "prefix-rft": ("prefix-rft", PREFIXED, {"guide_coef": 0.3}, 0),
}


def episodes_of(loaded: Loaded, texts: list[Text]) -> list[Episode]:
    episodes = []
    for i, t in enumerate(texts):
        prompt = prompts_for(loaded, len(texts))[i]
        author = "policy" if t.role == "own" else "guide"
        segments = [("guide", t.prefix), (author, t.ids)] if t.prefix else [(author, t.ids)]
        e = Episode(
            i, prompt.example, prompt.ids, t.group, author, segments, len(t.prefix), role=t.role, learns=t.learns
        )  # type: ignore[arg-type, list-item]
        e.score = Score(t.score)
        episodes.append(e)
    return episodes


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("name", STEPS)
def test_an_update_is_one_step_down_the_stated_objective(gpt2: Loaded, name: str, accumulation: int) -> None:
    algorithm, texts, parameters, age = STEPS[name]
    regime = spec_of(algorithm, {"group_size": len(texts) // 2, **parameters}).regimes[0]
    model = ActorCritic(gpt2, [], mode="head", with_ref_model=False)
    parameters_ = [p for _, p in model.trainable()]
    loss = by_hand(gpt2, texts, algorithm, parameters, age)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters_)])
    data = step_data(
        model, regime, episodes_of(gpt2, texts), generator_for(gpt2).sampling, critics=(), kl_coef=0, age=age
    )
    before = torch.cat([p.detach().flatten().clone() for p in parameters_])
    groups = make_optimizer(model.trainable(), RATE, 0.0).param_groups
    optimizer = torch.optim.SGD([{"params": g["params"], "role": g["role"]} for g in groups], lr=RATE)
    changes = update_settings(max_grad_norm=1e9, accumulation=accumulation)
    row, _ = update(model, optimizer, data, generator_for(gpt2).sampling, changes, seed=0, step=0)
    moved = (torch.cat([p.detach().flatten() for p in parameters_]) - before) / RATE
    assert float(expected.norm()) > 1e-2
    assert torch.allclose(moved, -expected, atol=2e-4, rtol=1e-3)
    theirs = [len(t.prefix or t.ids) for t in texts if t.prefix or t.role != "own"]
    assert row["loss/guide_nll"] > 0 and 0 < row["guide/probability"] < 1
    assert data.guide is not None and int(data.guide.mask.sum()) == sum(theirs)


def test_the_likelihood_is_that_of_the_models_own_distribution(gpt2: Loaded) -> None:
    """Whatever the policy samples at: a guide's early EOS is impossible under ``min_new_tokens``."""
    regime = spec_of("mix", {"group_size": 2, "guide_coef": 1.0}).regimes[0]
    rows = {}
    for name, changes in {"plain": {}, "hot": {"temperature": 2.0, "min_new_tokens": 4}}.items():
        model = ActorCritic(gpt2, [], mode="head", with_ref_model=False)
        sampling = generator_for(gpt2, **changes).sampling
        texts = [*([Text("own", [40, 41, 42, 43], s, 0) for s in (0.2, 0.9)]), Text("beside", [70, 71, 1], 0.0, 0)]
        data = step_data(model, regime, episodes_of(gpt2, texts), sampling, critics=(), kl_coef=0)
        optimizer = make_optimizer(model.trainable(), 0.0, 0.0)
        rows[name], _ = update(model, optimizer, data, sampling, update_settings(), seed=0, step=0)
    assert rows["hot"]["loss/guide_nll"] == pytest.approx(rows["plain"]["loss/guide_nll"], rel=1e-5)


def test_texts_beside_the_groups_are_spread_over_the_minibatches() -> None:
    """Their number does not change how many steps a step's episodes give."""
    compared = torch.tensor([True] * 8 + [False] * 3)
    parts = list(minibatches(compared, update_settings(epochs=2, minibatch_size=4), 0, 1))
    assert [sorted(map(int, compared[p])).count(1) for p in parts] == [4, 4, 4, 4]
    for epoch in (parts[:2], parts[2:]):
        assert sorted(torch.cat(epoch).tolist()) == list(range(11))
        assert sorted(int((~compared[p]).sum()) for p in epoch) == [1, 2]


# --- which texts a step has


def letters(pattern: str) -> Any:
    """Scores of 1 for texts that contain the pattern, else 0."""
    return lambda examples, texts: [Score(float(pattern in text)) for text in texts]


def step_of(
    loaded: Loaded, algorithm: str, scorer: Any, **more: Any
) -> tuple[dict[str, Any], list[Episode], ScriptedGuide]:
    guide = ScriptedGuide(("the dog finds the ball", "stop"), live=False)
    parameters = {"group_size": 4, **more.pop("parameters", {})}
    trainer = trainer_for(loaded, algorithm, guide, parameters=parameters, scorer=scorer, **more)
    row, episodes = trainer.step()
    return row, episodes, guide


def test_a_member_takes_the_place_of_an_own_text(gpt2: Loaded) -> None:
    row, episodes, guide = step_of(gpt2, "luffy", letters("dog finds"))
    assert [sum(e.role == r for e in episodes) for r in ("own", "member")] == [6, 2] and len(guide.asked) == 2
    assert all(e.score is not None and e.value == 1.0 and e.text == "the dog finds the ball" for e in episodes[6:])
    assert (row["guide/texts"], row["guide/score"], row["episodes"]) == (2, 1.0, 6)
    assert row["score/mean"] == fmean(e.value for e in episodes[:6])


def test_texts_beside_the_groups_are_not_scored_and_change_no_baseline(gpt2: Loaded) -> None:
    scored: list[str] = []

    def scorer(examples: Any, texts: Any) -> list[Score]:
        scored.extend(texts)
        return [Score(len(t) / 50) for t in texts]

    row, episodes, _ = step_of(gpt2, "mix", scorer)
    assert [sum(e.role == r for e in episodes) for r in ("own", "beside")] == [8, 2] and len(scored) == 8
    alone, its_episodes, _ = step_of(loaded_from(Path(gpt2.model.config.name_or_path)), "grpo", scorer)
    assert row["score/mean"] == alone["score/mean"] and row["advantage/std"] == alone["advantage/std"]
    assert [e.ids for e in episodes[:8]] == [e.ids for e in its_episodes]


def test_hpt_asks_only_where_the_whole_group_failed(gpt2: Loaded) -> None:
    """There its own texts learn nothing; where one succeeded the step is GRPO's."""
    calls = {"n": 0}

    def first_group_succeeds(examples: Any, texts: Any) -> list[Score]:
        calls["n"] += 1
        return [Score(float(i in (0, 2))) for i in range(len(texts))]

    row, episodes, guide = step_of(gpt2, "hpt", first_group_succeeds)
    assert [r.example.id for r in guide.asked] == [episodes[4].example.id] and calls["n"] == 1
    assert [e.learns for e in episodes] == [True] * 4 + [False] * 4 + [True]
    assert row["guide/gate"] == 0.5
    assert row["tokens/learned"] == sum(e.length for e in episodes[:4])


def test_hpt_without_a_failure_is_grpo(gpt2: Loaded) -> None:
    weights = []
    for algorithm in ("hpt", "grpo"):
        loaded = loaded_from(Path(gpt2.model.config.name_or_path))
        _, _, guide = step_of(loaded, algorithm, lambda e, t: [Score(1 + i % 2) for i in range(len(t))])
        assert not guide.asked
        weights.append(state_of(loaded.model))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_guide_text_learns_only_where_it_scored_above_the_policys(gpt2: Loaded) -> None:
    regime = Regime(estimator="group_mean", group_size=4, guide_term=GuideTerm(tokens="beside", gate="ahead"))
    for scorer, kept in ((letters("dog finds"), 2), (lambda e, t: [Score(0.5) for _ in t], 0)):
        guide = ScriptedGuide(("the dog finds the ball", "stop"), live=False)
        trainer = trainer_for(gpt2, "grpo", guide, parameters={"group_size": 4}, scorer=scorer)
        trainer.spec = trainer.spec.model_copy(update={"regimes": (regime,)})
        row, episodes = trainer.step()
        assert sum(e.role == "beside" for e in episodes) == row["guide/texts"] == kept
        assert row["guide/gate"] == kept / 2


@pytest.mark.parametrize("algorithm", ["luffy", "mix"])
def test_a_guide_text_without_a_score_is_left_out_where_its_score_decides(gpt2: Loaded, algorithm: str) -> None:
    def no_score_for_the_guide(examples: Any, texts: Any) -> list[Any]:
        return [None if "dog finds" in text else Score(i / 10) for i, text in enumerate(texts)]

    row, episodes, _ = step_of(gpt2, algorithm, no_score_for_the_guide)
    assert sum(e.role != "own" for e in episodes) == row["guide/texts"] == (0 if algorithm == "luffy" else 2)
    assert row.get("score/skipped", 0) == (2 if algorithm == "luffy" else 0)


def test_a_prompt_that_the_guide_has_no_text_for_is_grpos(gpt2: Loaded) -> None:
    covered = frozenset({prompts_for(gpt2, 12)[0].example.id})
    for algorithm in ("luffy", "mix", "hpt"):
        _, episodes, guide = step_of(gpt2, algorithm, letters("no such text"), covered=covered)
        assert {r.example.id for r in guide.asked} <= covered
        assert all(e.example.id in covered for e in episodes if e.role != "own")


@pytest.mark.parametrize(("values", "words"), [
    ({"tokens": "beside", "credit": "advantage"}, "tokens: member"),
    ({"tokens": "prefix", "gate": "failed"}, "whole texts"),
    ({"tokens": "beside", "alone": True}, "bc-guide"),
    ({"tokens": "beside", "entropy_share": 0.2}, "tokens: prefix"),
    ({"tokens": "member", "complement": True}, "one average"),
    ({"tokens": "beside", "complement": True, "coefficient": {"peak": 1.5}}, "up to 1"),
])  # fmt: skip
def test_terms_that_make_no_sense(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        GuideTerm.model_validate(values)


@pytest.mark.parametrize(("values", "words"), [
    ({"estimator": "likelihood", "roll_out": "guide"}, "policy's own texts"),
    ({"roll_in": "guide", "estimator": "group_mean", "group_size": 4}, "roll_in: none"),
    ({"estimator": "gae", "guide_term": {"tokens": "member"}}, "group_mean or leave_one_out"),
    ({"estimator": "group_mean", "group_size": 2, "guide_term": {"tokens": "member"}}, "at least 3"),
    ({"estimator": "leave_one_out", "group_size": 4, "guide_term": {"tokens": "member", "baseline_of": "own"}}, "own"),
])  # fmt: skip
def test_regimes_in_which_a_term_cannot_work(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Regime.model_validate({"guide_term": {"tokens": "beside"}, **values})
