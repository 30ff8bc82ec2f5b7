"""Helpers for tests of training: scripted authors, loaded tiny models, and what is built from them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from algorithms import spec_of
from conftest import toy_examples
from rlgf_cli.algorithms.spec import Regime
from rlgf_cli.config.common import LengthConfig, ModelConfig
from rlgf_cli.config.loader import resolve
from rlgf_cli.config.train import KLConfig, TrainConfig
from rlgf_cli.models.actor_critic import ActorCritic
from rlgf_cli.models.forward import TokenBatch
from rlgf_cli.models.generate import Generated
from rlgf_cli.models.load import load
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.prompts import Encoded, encode_prompts
from rlgf_cli.protocols import Completion, Example, FinishReason, Guide, GuideAbilities, GuideRequest, Score
from rlgf_cli.runs.build import make_trainer
from rlgf_cli.training.advantages import AdvantageInputs, AdvantageSettings, compute_advantages, compute_stats
from rlgf_cli.training.checkpoint import TrainerState
from rlgf_cli.training.critics import CriticSettings
from rlgf_cli.training.episodes import Episode, build_batch
from rlgf_cli.training.guide_tokens import GuideTokens
from rlgf_cli.training.loop import Trainer
from rlgf_cli.training.minibatches import StepData, UpdateSettings
from rlgf_cli.training.optimizer import make_optimizer
from rlgf_cli.training.parallel.processes import SINGLE
from rlgf_cli.training.rollout import RolloutGenerator, Sampling

PPO = Regime()
PPO_PP = Regime(roll_in="guide")
AGGREVATED = Regime(roll_in="policy", roll_out="guide")
BC = Regime(roll_out="guide", estimator="likelihood")

Answer = tuple[str, FinishReason]


class ScriptedGuide(Guide):
    """Answers from a function of the request; stores its requests."""

    def __init__(self, answer: Answer | Callable[[GuideRequest], Answer], *, live: bool = True) -> None:
        super().__init__("scripted", GuideAbilities(live=live, continues=live))
        self._answer = answer if callable(answer) else lambda request: answer
        self.asked: list[GuideRequest] = []

    def complete(self, requests: Sequence[GuideRequest]) -> list[Completion]:
        self.asked += requests
        return [Completion(*self._answer(request), model="scripted") for request in requests]


def loaded_from(path: Path, **changes: Any) -> Loaded:
    return load(ModelConfig(name=str(path), device="cpu", **changes), for_training=True)


def examples(count: int) -> list[Example]:
    """Prompts of three, four, eight or nine tokens: a batch of them has padding."""
    rows = toy_examples(count, seed=3)
    extra = ("", " river", " in the house a dog", " finds it in the river .")
    return [Example(r["id"], r["prompt"] + extra[i % 4], tuple(r["references"]), r["meta"]) for i, r in enumerate(rows)]


def prompts_for(loaded: Loaded, count: int, *, repeat: int = 1) -> list[Encoded]:
    encoded, _ = encode_prompts(loaded, examples(count), LengthConfig(max_new_tokens=16))
    return [e for e in encoded for _ in range(repeat)]


def generator_for(loaded: Loaded, guide: Any = None, *, seed: int = 0, **changes: Any) -> RolloutGenerator:
    """``changes``: fields of Sampling (12 new tokens by default), or of RolloutGenerator."""
    own = {k: changes.pop(k) for k in ("covered", "whole_words", "use") if k in changes}
    return RolloutGenerator(loaded, Sampling(**{"max_new_tokens": 12, **changes}), seed, guide=guide, **own)


class ScriptedPolicy:
    """Replaces ``sample``: every prompt's response is the same given ids, up to the limit."""

    def __init__(self, ids: Sequence[int], eos_id: int) -> None:
        self.ids, self.eos_id = list(ids), eos_id

    def __call__(
        self, model: Any, prompts: Any, *, prefixes: Any, max_new_tokens: Sequence[int], **_: Any
    ) -> list[Generated]:
        rows = []
        for prefix, limit in zip(prefixes, max_new_tokens, strict=True):
            assert prefix == self.ids[: len(prefix)]
            ids = self.ids[len(prefix) : len(prefix) + limit]
            rows.append(Generated(ids, bool(ids) and ids[-1] == self.eos_id))
        return rows


def chi_square(observed: Sequence[int]) -> float:
    """The chi-square statistic of counts that should be equal."""
    expected = sum(observed) / len(observed)
    return sum((o - expected) ** 2 / expected for o in observed)


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def plain_logits(loaded: Loaded, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
    """Logits [T, V] that predict each response token: one text at a time, nothing padded, no cache, no hooks."""
    model, start = loaded.model, []
    if loaded.encoder_decoder:
        start = [model.config.decoder_start_token_id]
        out = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[*start, *response[:-1]]]))
        return out.logits[0]
    out = model(input_ids=torch.tensor([[*prompt, *response[:-1]]]), use_cache=False)
    return out.logits[0, len(prompt) - 1 :]


def plain_logprobs(
    loaded: Loaded,
    prompt: Sequence[int],
    response: Sequence[int],
    *,
    temperature: float = 1.0,
    min_new_tokens: int = 0,
) -> torch.Tensor:
    """Log-probabilities [T] of a response under the temperature-scaled distribution, EOS impossible before its time."""
    logits = plain_logits(loaded, prompt, response).double() / temperature
    logits[:min_new_tokens, sorted(loaded.eos_ids)] = float("-inf")
    return logits.log_softmax(-1)[torch.arange(len(response)), torch.tensor(response)]


RESPONSES = [[40, 41, 300, 42, 1], [299, 1], [70, 71, 72]]


def of_responses(loaded: Loaded) -> torch.Tensor:
    """Log-probabilities of RESPONSES, one plain call each."""
    prompts = [p.ids for p in prompts_for(loaded, 3)]
    return torch.cat([plain_logprobs(loaded, p, r) for p, r in zip(prompts, RESPONSES, strict=True)])


def actor_critic(loaded: Loaded, critics: Sequence[str] = ("policy",), *, mode: str = "shared") -> ActorCritic:
    """An ActorCritic whose value heads are not zero, so that a wrong position changes their values."""
    model = ActorCritic(loaded, critics, mode=mode, with_ref_model=True)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.critics.named_parameters():
            if name.endswith(("head.out.weight", "policy.out.weight", "guide.out.weight")):
                parameter.normal_(std=0.3)
    return model


def token_batch(loaded: Loaded, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> TokenBatch:
    return TokenBatch.build(
        prompts, responses, pad_id=loaded.pad_id, encoder_decoder=loaded.encoder_decoder, device=torch.device("cpu")
    )


def real_mask(batch: TokenBatch) -> torch.Tensor:
    return torch.arange(batch.response_ids.shape[1]) < batch.lengths.unsqueeze(-1)


def step_data(
    model: ActorCritic,
    regime: Regime,
    episodes: list[Episode],
    sampling: Sampling,
    *,
    critics: Sequence[str] = ("policy",),
    kl_coef: float = 0.1,
    max_tokens: int | None = 60,
    age: int = 0,
) -> StepData:
    """The update's data; episodes without a score get one by their length."""
    for e in episodes:
        e.score = e.score or Score(len(e.text) / 10)
    batch = build_batch(episodes, regime, critics, model.loaded)
    if regime.estimator == "likelihood":
        return StepData(regime, batch, None, None, None)
    stats = compute_stats(model, batch, regime, sampling, max_tokens=max_tokens)
    advantages = compute_advantages(regime, batch, stats, AdvantageSettings(), AdvantageInputs(kl_coef))
    return StepData(regime, batch, stats, advantages, None, None, GuideTokens.of(regime, batch, advantages, age))


def update_settings(**changes: Any) -> UpdateSettings:
    given: dict[str, Any] = {
        "epochs": 1, "minibatch_size": 64, "accumulation": 1, "max_tokens": None, "clip_range": 0.2,
        "value_clip_range": 0.2, "value_coef": 0.5, "entropy_coef": 0.0, "reference_nll": 0.0, "max_grad_norm": 1.0,
    }  # fmt: skip
    return UpdateSettings(**{**given, **changes})


def coverage_score(batch: Sequence[Example], texts: Sequence[str]) -> list[Score]:
    """Share of the letters a to m: any text has one, and they differ."""
    return [Score(sum(c in "abcdefghijklm" for c in t.lower()) / max(1, len(t))) for t in texts]


def trainer_for(
    loaded: Loaded,
    algorithm: str,
    guide: Any = None,
    *,
    parameters: dict[str, Any] | None = None,
    kl_coef: float = 0.0,
    kl_where: Any = "loss",
    advantage: AdvantageSettings | None = None,
    learning_rate: float = 1e-2,
    episodes: int = 8,
    seed: int = 0,
    covered: frozenset[str] | None = None,
    scorer: Any = coverage_score,
    warmup: int = 0,
    **changes: Any,
) -> Trainer:
    """The training loop on a tiny model. ``changes``: fields of UpdateSettings."""
    spec = spec_of(algorithm, parameters)
    model = ActorCritic(loaded, spec.critics, mode="shared", with_ref_model=spec.has_policy_gradient)
    optimizer = make_optimizer(model.trainable(), learning_rate, 0.0)
    return Trainer(
        spec=spec,
        model=model,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        prompts=prompts_for(loaded, 12),
        generator=generator_for(loaded, guide, seed=seed, covered=covered),
        scorer=scorer,
        advantage=advantage or AdvantageSettings(),
        update=update_settings(**{"minibatch_size": 4, **changes}),
        kl=KLConfig(coef=kl_coef, where=kl_where),
        state=TrainerState(kl_coef=kl_coef, typical_length=6.0),
        seed=seed,
        episodes=episodes,
        missing_eos_penalty=0.0,
        critic=CriticSettings(warmup),
        eval_every=1,
    )


def configured_trainer(
    loaded: Loaded, prompts: Sequence[Encoded], scorer: Any, *, seed: int, sets: Sequence[str], guide: Any = None
) -> Trainer:
    """The loop as ``rlgf train`` makes it from its defaults and from ``sets``, which are as after --set."""
    flags = {"model": "start", "data": "none", "reward": "none", "output": "none", "seed": seed}
    config = resolve(TrainConfig, sets=sets, flags=flags).config
    trainer = make_trainer(
        config, loaded, prompts, SINGLE, guide=guide, covered=None, scorer=scorer, scorer_at=None, prefetch=None,
        evaluate=None, warn=lambda text: None,
    )  # fmt: skip
    trainer.probe = None
    return trainer


both = pytest.mark.parametrize("injected", [False, True], ids=["as_it_is", "with_the_mistake"])


@contextlib.contextmanager
def caught_if(injected: bool, *more: type[Exception]) -> Iterator[None]:
    """The check must fail where the mistake was injected, and pass where it was not."""
    if injected:
        with pytest.raises((AssertionError, *more)):
            yield
    else:
        yield


def guide() -> ScriptedGuide:
    """A guide that continues any prefix, with another text for every prompt."""
    return ScriptedGuide(lambda request: (f" {request.example.prompt} it .", "stop"))


def parameters_of(model: ActorCritic) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for _, parameter in model.trainable()])
