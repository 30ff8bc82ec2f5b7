"""``rlgf doctor``: checks before training, on the model, data, reward and guide that training would use.

The invariants of step 0 are those that ``rlgf train`` checks too (checks/invariants.py). The checks of prompts and
responses are in checks/text_checks.py, of the reward in checks/reward_probe.py, of the guide in checks/guide_checks.py.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from rlgf_cli import console
from rlgf_cli.algorithms.spec import AlgorithmSpec, Regime
from rlgf_cli.artifacts.jsonl import read_examples
from rlgf_cli.artifacts.records import SCHEMA_VERSION
from rlgf_cli.checks import policy_probe
from rlgf_cli.checks.guide_checks import CHECKS
from rlgf_cli.checks.guide_probe import GuideProbe
from rlgf_cli.checks.reward_probe import Texts, probe_reward
from rlgf_cli.checks.text_checks import cut_texts, ending, prompt_lengths, template
from rlgf_cli.config.doctor import DoctorConfig
from rlgf_cli.config.loader import Resolved
from rlgf_cli.errors import UserError
from rlgf_cli.guides.make import check_guide, closing_all, describe, make_guide
from rlgf_cli.ledger.spend import charge_guides
from rlgf_cli.models.actor_critic import ActorCritic
from rlgf_cli.models.load import add_lora, load
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.prompts import Encoded, encode_prompts
from rlgf_cli.protocols import Check, Completion, Example, Guide, GuideAbilities, GuideRequest, Score
from rlgf_cli.runs.build import needs_ref_model
from rlgf_cli.scorers.checked import score_or_skip
from rlgf_cli.scorers.weighted_sum import SumReward, make_reward
from rlgf_cli.training.advantages import AdvantageInputs, AdvantageSettings, compute_advantages, compute_stats
from rlgf_cli.training.episodes import Episode, build_batch, scored_texts
from rlgf_cli.training.minibatches import StepData
from rlgf_cli.training.rollout import RolloutGenerator, Sampling

_POLICY_ALONE = Regime()
"""Episodes that the policy writes from beginning to end."""


@dataclass(frozen=True)
class Diagnosis:
    """The checks, and the model, data and guide that were checked. ``guide`` is None where none was given; ``prompts``
    got a text each.
    """

    model: str
    guide: str | None
    data: str
    prompts: int
    checks: list[Check]

    @property
    def broken(self) -> list[str]:
        """The names of the checks that failed."""
        return [check.name for check in self.checks if check.status == "fail"]

    def to_json(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, "ok": not self.broken, **asdict(self)}


def run(resolved: Resolved[DoctorConfig]) -> Diagnosis:
    """Load what training would load, generate with the policy, ask the guide, score the texts.

    Nothing is learned, and nothing is written but the guide's cache.
    """
    config = resolved.config
    spec = config.algorithm.spec()
    examples = read_examples(config.data, limit=config.limit, need_references=config.aux.reference_nll > 0)
    few = examples[: config.prompts]
    if config.guide is not None:
        describe(config.guide)  # refuses a guide that cannot be made, before the policy is loaded
        if spec.needs_guide:
            check_guide(config.guide, spec)
    reward = make_reward(config.reward, device=config.model.device) if config.reward else None
    if reward is not None:
        reward.check(examples)
    torch.manual_seed(config.seed)
    loaded = add_lora(load(config.model, text=config.text, for_training=True, lora=config.lora.enabled), config.lora)
    account, judges = f"doctor {uuid.uuid4().hex}", list(reward.guides) if reward is not None else []
    with closing_all(judges):
        charge_guides(judges, account, config.budget)
        guide_probe = _probe_guide(config, few, loaded, account)
        checks = [prompt_lengths(config, loaded, examples), template(loaded), ending(loaded)]
        if encoded := _encode_fitting(config, loaded, few):
            checks += _check_policy(config, spec, loaded, encoded, reward, guide_probe)
    if guide_probe is not None:
        checks += [check for check_guide_texts in CHECKS if (check := check_guide_texts(guide_probe)) is not None]
    return Diagnosis(config.model.name, config.guide.name if config.guide else None, config.data, len(few), checks)


def _probe_guide(config: DoctorConfig, examples: Sequence[Example], loaded: Loaded, account: str) -> GuideProbe | None:
    """The guide's texts for the prompts: read from its file, or requested and charged to ``account``."""
    if config.guide is None:
        return None
    guide = make_guide(config.guide, seed=config.seed)
    limit = config.lengths.max_new_tokens
    probe = GuideProbe(examples, loaded, guide, limit, config.seed)
    if not guide.abilities.live:
        probe.read_texts(guide)
        return probe
    with contextlib.closing(guide):
        guide.notify = console.warn
        for line in guide.notes:
            console.log(line)
        guide.check(examples, limit)
        guide.charge_to(account, config.budget)
        calls = len(examples) * (2 if guide.abilities.continues else 1)
        console.log(f"at most {calls} requests to {guide.name} for {len(examples)} prompts")
        with console.progress("guide", calls) as bar:
            probe.on_answer = bar.update
            probe.request_texts(guide)
    return probe


def _encode_fitting(config: DoctorConfig, loaded: Loaded, examples: Sequence[Example]) -> list[Encoded]:
    """The prompts that fit the model, encoded; none where the lengths themselves are impossible."""
    on_overlong = "skip" if config.lengths.on_overlong == "error" else config.lengths.on_overlong
    try:
        return encode_prompts(loaded, examples, config.lengths.model_copy(update={"on_overlong": on_overlong}))[0]
    except UserError:  # the check data.prompts says why
        return []


class _ProbedTexts(Guide):
    """A guide that answers with the texts of the probe: the invariants concern a token's author, not the text."""

    def __init__(self, name: str, probe: GuideProbe) -> None:
        super().__init__(name, GuideAbilities(live=True, continues=True))
        self.texts = {text.example.id: text.completion for text in probe.nonempty}

    def complete(self, requests: Sequence[GuideRequest]) -> list[Completion]:
        return [self.texts[request.example.id] for request in requests]


def _check_policy(
    config: DoctorConfig,
    spec: AlgorithmSpec,
    loaded: Loaded,
    encoded: Sequence[Encoded],
    reward: SumReward | None,
    guide_probe: GuideProbe | None,
) -> list[Check]:
    """Generate episodes with every regime of the algorithm, and check the invariants of step 0 on them."""
    model = ActorCritic(loaded, spec.critics, mode=config.ppo.critic, with_ref_model=needs_ref_model(config))
    sampling = Sampling.of(config.rollout, config.lengths)
    guide = None
    if config.guide is not None and guide_probe is not None:
        guide = _ProbedTexts(config.guide.name, guide_probe)
    covered = frozenset(guide.texts) if guide is not None else None
    generator = RolloutGenerator(loaded, sampling, config.seed, guide=guide, covered=covered)
    rows = [row for row in encoded for _ in range(spec.group_size)]
    own = generator.generate(_POLICY_ALONE, encoded, 0, float(sampling.max_new_tokens))
    reward_checks = _check_reward(reward, own, encoded, guide_probe, config.rollout.episodes)
    sound = all(check.name != "reward.scores" or check.status == "ok" for check in reward_checks)
    invariant_checks = []
    for regime in dict.fromkeys(spec.regimes):
        episodes = generator.generate(regime, rows, 0, float(sampling.max_new_tokens), spec.group_size)
        _give_scores(episodes, reward if sound else None, config.rollout.missing_eos_penalty)
        batch = build_batch(episodes, regime, spec.critics, loaded)
        stats = advantages = None
        charged = config.kl.coef if config.kl.where == "reward" else 0.0
        if regime.estimator != "likelihood":
            stats = compute_stats(model, batch, regime, sampling, max_tokens=config.ppo.max_tokens_per_batch)
            advantages = compute_advantages(
                regime, batch, stats, AdvantageSettings.of(config.ppo), AdvantageInputs(charged)
            )
        checks = policy_probe.probe(
            model,
            episodes,
            StepData(regime, batch, stats, advantages, None),
            sampling,
            kl_coef=charged,
            seed=config.seed,
            step=0,
        )
        which = f"{regime.roll_in}>{regime.roll_out}: " if len(spec.regimes) > 1 else ""
        invariant_checks += [replace(check, finding=which + check.finding) for check in checks]
    return [*invariant_checks, cut_texts(config, own), *reward_checks]


def _give_scores(episodes: Sequence[Episode], reward: SumReward | None, penalty: float) -> None:
    """Set the scores as training would; without a sound reward, or a score of it, a different number for every text."""
    texts = list(scored_texts(episodes))
    if reward is None:
        scores = [Score(float(n)) for n in range(1, len(texts) + 1)]
    else:
        given = score_or_skip(reward, [example for example, _ in texts], [part.text for _, part in texts])
        scores = [score or Score(float(n)) for n, score in enumerate(given, 1)]
    for (_, part), score in zip(texts, scores, strict=True):
        part.score, part.penalty = score, 0.0 if part.finished else penalty


def _check_reward(
    reward: SumReward | None,
    episodes: Sequence[Episode],
    encoded: Sequence[Encoded],
    guide_probe: GuideProbe | None,
    per_step: int,
) -> list[Check]:
    if reward is None:
        return []
    examples = [row.example for row in encoded]
    texts: dict[str, Texts] = {"policy": [(e.example, e.text) for e in episodes]}
    if guide_probe is not None:
        texts["guide"] = [(text.example, text.completion.text) for text in guide_probe.nonempty]
    texts["reference"] = [(e, e.references[0]) for e in examples if e.references]
    texts["empty text"] = [(e, "") for e in examples]
    return probe_reward(reward, texts, per_step=per_step)
