"""``rlgf doctor``: what must be true before training, looked at on the model, data, reward and guide that it would use.

The truths of step 0 are those that ``rlgf train`` holds too (checks/invariants.py); what is said of a reward is in
checks/reward_probe.py, what is said of a guide in checks/guide_checks.py.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import torch

from rlgf_cli import console
from rlgf_cli.algorithms.spec import AlgorithmSpec, Regime
from rlgf_cli.artifacts.jsonl import read_examples
from rlgf_cli.artifacts.records import SCHEMA_VERSION
from rlgf_cli.checks import policy_probe
from rlgf_cli.checks.guide_checks import CHECKS
from rlgf_cli.checks.guide_probe import Exam
from rlgf_cli.checks.reward_probe import Texts, examine_reward
from rlgf_cli.config.doctor import DoctorConfig
from rlgf_cli.config.loader import Resolved
from rlgf_cli.errors import UserError
from rlgf_cli.guides.make import check_guide, closing_all, describe, make_guide
from rlgf_cli.ledger.spend import charge_guides
from rlgf_cli.models.actor_critic import ActorCritic
from rlgf_cli.models.load import add_lora, load
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.prompts import Encoded, encode_prompts, prompt_limit
from rlgf_cli.protocols import Check, Completion, Example, Guide, GuideAbilities, GuideRequest, Score
from rlgf_cli.runs.build import needs_ref_model
from rlgf_cli.scorers.checked import score_checked
from rlgf_cli.scorers.weighted_sum import SumReward, make_reward
from rlgf_cli.training.advantages import AdvantageSettings, Standing, compute_advantages, compute_stats
from rlgf_cli.training.episodes import Episode, build_batch, scored_texts
from rlgf_cli.training.rollout import RolloutGenerator, Sampling

_LOOKED_AT = 5000
"""Prompts whose length is looked at."""
_ALONE = Regime()


@dataclass(frozen=True)
class Diagnosis:
    """All checks of an examination. ``guide`` is None where none was given; ``prompts`` that were written for."""

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
    """Load what training would load, let the policy write, ask the guide, score: nothing is written but the guide's
    cache, and nothing is learned."""
    config = resolved.config
    spec = config.algorithm.spec()
    examples = read_examples(config.data, limit=config.limit, need_references=config.aux.reference_nll > 0)
    few = examples[: config.prompts]
    if config.guide is not None:
        describe(config.guide)  # refuses a guide that cannot be before the policy is loaded
        if spec.needs_guide:
            check_guide(config.guide, spec)
    reward = make_reward(config.reward, device=config.model.device) if config.reward else None
    if reward is not None:
        reward.check(examples)
    torch.manual_seed(config.seed)
    loaded = add_lora(load(config.model, text=config.text, for_training=True), config.lora)
    account, judges = f"doctor {uuid.uuid4().hex}", list(reward.guides) if reward is not None else []
    with closing_all(judges):
        charge_guides(judges, account, config.budget)
        exam = _exam(config, few, loaded, account)
        checks = [prompts(config, loaded, examples), ending(loaded)]
        if encoded := _fitting(config, loaded, few):
            checks += _policy(config, spec, loaded, encoded, reward, exam)
    if exam is not None:
        checks += [check for look in CHECKS if (check := look(exam)) is not None]
    return Diagnosis(config.model.name, config.guide.name if config.guide else None, config.data, len(few), checks)


def _exam(config: DoctorConfig, examples: Sequence[Example], loaded: Loaded, account: str) -> Exam | None:
    """The guide's texts for the prompts: read, or asked for and charged to ``account``."""
    if config.guide is None:
        return None
    guide = make_guide(config.guide, seed=config.seed)
    limit = config.lengths.max_new_tokens
    exam = Exam(examples, loaded, guide, limit, config.seed)
    if not guide.abilities.live:
        exam.read(guide)
        return exam
    with contextlib.closing(guide):
        guide.notify = console.warn
        guide.check(examples, limit)
        guide.charge_to(account, config.budget)
        calls = len(examples) * (2 if guide.abilities.continues else 1)
        console.log(f"asking {guide.name} at most {calls} times for {len(examples)} prompts")
        with console.progress("guide", calls) as bar:
            exam.on_answer = bar.update
            exam.ask(guide)
    return exam


def prompts(config: DoctorConfig, loaded: Loaded, examples: Sequence[Example]) -> Check:
    """Prompts that are too long for the model or for ``max_prompt_tokens``."""
    name, lengths = "data.prompts", config.lengths
    explanation = "prompt and response share the model's positions; what does not fit is refused, cut or left out"
    try:
        limit = prompt_limit(loaded, lengths)
    except UserError as error:
        return Check(name, "fail", error.message, explanation, error.hint or "a model with more positions")
    seen = examples[:_LOOKED_AT]
    encoder = loaded.encoder_decoder
    sizes = [len(loaded.text.encode_prompt(loaded.tokenizer, e.prompt, encoder)) for e in seen]
    over = sum(size > limit for size in sizes) if limit is not None else 0
    if over and limit is not None and lengths.on_overlong == "truncate":
        try:  # the template is the same for all prompts: one tells whether it fits
            loaded.text.cut_prompt(loaded.tokenizer, seen[sizes.index(max(sizes))].prompt, encoder, limit)
        except UserError as error:
            return Check(name, "fail", error.message, explanation, error.hint or "")
    finding = f"{min(sizes)} to {max(sizes)} tokens in {len(seen)} of {len(examples)} prompts"
    finding += f", room for {limit}; {over} are longer" if limit is not None else "; any number fits"
    return Check(
        name,
        "ok" if not over else "fail" if lengths.on_overlong == "error" else "warn",
        finding + (f" (on_overlong: {lengths.on_overlong})" if over else ""),
        explanation,
        "--on-overlong truncate or skip, a larger max_prompt_tokens, or a smaller max_new_tokens" if over else "",
        {"longest": max(sizes), "room": limit, "over": over, "looked_at": len(seen)},
    )


def ending(loaded: Loaded) -> Check:
    """What ends a response, and whether template, tokenizer and generation_config agree on it."""
    end, tokenizer, configured = loaded.turn_end, loaded.tokenizer, loaded.original_eos_ids
    numbers: dict[str, Any] = {
        "used": loaded.eos_id, "template": end.id if end is not None else None,
        "tokenizer": int(tokenizer.eos_token_id), "generation_config": configured,
    }  # fmt: skip
    said = [f"tokenizer.eos_token is {tokenizer.eos_token!r}"]
    if end is not None:
        said.insert(0, end.problem or f"the chat template ends a turn with {end.token!r}")
    if configured:
        names = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(configured)))
        said.append(f"generation_config.eos_token_id is {names}")
    used = tokenizer.convert_ids_to_tokens(loaded.eos_id)
    same = {loaded.eos_id, numbers["tokenizer"], *configured} == {loaded.eos_id}
    finding = f"{'; '.join(said)}: " + ("they agree" if same else f"they differ, and a response ends with {used!r}")
    unknown = bool(configured) and loaded.eos_id not in configured
    remedy = ""
    if loaded.turn_end_problem:
        remedy = "a chat template that ends a turn with a token of the tokenizer, or text.template"
    elif unknown:
        remedy = "rlgf sft teaches the ending; without it, see that the model's own ending is the one that is used"
    return Check(
        "text.ending",
        "warn" if remedy else "ok",
        finding,
        "sft, cloning and reference_nll teach one token as the end; sampling stops at each of them",
        remedy,
        numbers,
    )


def _fitting(config: DoctorConfig, loaded: Loaded, examples: Sequence[Example]) -> list[Encoded]:
    """The prompts that can be written for; none where the lengths themselves are impossible."""
    keep = "skip" if config.lengths.on_overlong == "error" else config.lengths.on_overlong
    try:
        return encode_prompts(loaded, examples, config.lengths.model_copy(update={"on_overlong": keep}))[0]
    except UserError:  # data.prompts has said why
        return []


class _Known(Guide):
    """The texts of the exam, handed out again in the place of the guide: who wrote what is looked at, not what."""

    def __init__(self, name: str, exam: Exam) -> None:
        super().__init__(name, GuideAbilities(live=True, continues=True))
        self.texts = {text.example.id: text.completion for text in exam.written}

    def complete(self, requests: Sequence[GuideRequest]) -> list[Completion]:
        return [self.texts[request.example.id] for request in requests]


def _policy(
    config: DoctorConfig,
    spec: AlgorithmSpec,
    loaded: Loaded,
    encoded: Sequence[Encoded],
    reward: SumReward | None,
    exam: Exam | None,
) -> list[Check]:
    """Let the policy write for every regime of the algorithm, and hold the truths of step 0 against what it wrote."""
    model = ActorCritic(loaded, spec.critics, mode=config.ppo.critic, with_ref_model=needs_ref_model(config))
    sampling = Sampling.of(config.rollout, config.lengths)
    guide = _Known(config.guide.name, exam) if config.guide is not None and exam is not None else None
    covered = frozenset(guide.texts) if guide is not None else None
    generator = RolloutGenerator(loaded, sampling, config.seed, guide=guide, covered=covered)
    rows = [row for row in encoded for _ in range(spec.group_size)]
    own = generator.generate(_ALONE, encoded, 0, float(sampling.max_new_tokens))
    scored = _scored(reward, own, encoded, exam, config.rollout.episodes)
    sound = all(check.name != "reward.scores" or check.status == "ok" for check in scored)
    found = []
    for regime in dict.fromkeys(spec.regimes):
        episodes = generator.generate(regime, rows, 0, float(sampling.max_new_tokens), spec.group_size)
        _give_scores(episodes, reward if sound else None, config.rollout.missing_eos_penalty)
        batch = build_batch(episodes, regime, spec.critics, loaded)
        stats = advantages = None
        charged = config.kl.coef if config.kl.where == "reward" else 0.0
        if regime.estimator != "likelihood":
            stats = compute_stats(model, batch, regime, sampling, rows_at_once=sampling.batch_size)
            advantages = compute_advantages(regime, batch, stats, AdvantageSettings.of(config.ppo), Standing(charged))
        checks = policy_probe.probe(
            model, regime, episodes, batch, stats, advantages, sampling, kl_coef=charged, seed=config.seed, step=0
        )
        which = f"{regime.roll_in}>{regime.roll_out}: " if len(spec.regimes) > 1 else ""
        found += [replace(check, finding=which + check.finding) for check in checks]
    return [*found, endings(config, own), *scored]


def _give_scores(episodes: Sequence[Episode], reward: SumReward | None, penalty: float) -> None:
    """Scores as training would give them; without a (sound) reward, a different number for every text."""
    texts = list(scored_texts(episodes))
    if reward is None:
        scores = [Score(float(n)) for n in range(1, len(texts) + 1)]
    else:
        scores = score_checked(reward, [example for example, _ in texts], [part.text for _, part in texts])
    for (_, part), score in zip(texts, scores, strict=True):
        part.score, part.penalty = score, 0.0 if part.finished else penalty


def endings(config: DoctorConfig, episodes: Sequence[Episode]) -> Check:
    """The share of the policy's own texts that end at the limit, without EOS."""
    share = fmean(not e.finished for e in episodes)
    may_end = config.lengths.min_new_tokens < config.lengths.max_new_tokens
    much = may_end and share > 0.5
    limit = config.lengths.max_new_tokens
    finding = f"{100 * share:.3g}% of the policy's {len(episodes)} texts ended at the limit of {limit} tokens"
    return Check(
        "policy.endings",
        "warn" if much else "ok",
        finding + ("" if may_end else ", as min_new_tokens wants it"),
        "a text that is cut has no EOS: its score is that of half a text, and nothing is learned about ending",
        "a higher max_new_tokens, a start that learned to end (sft), or rollout.missing_eos_penalty" if much else "",
        {"truncated": share, "mean_length": fmean(e.length for e in episodes)},
    )


def _scored(
    reward: SumReward | None,
    episodes: Sequence[Episode],
    encoded: Sequence[Encoded],
    exam: Exam | None,
    per_step: int,
) -> list[Check]:
    if reward is None:
        return []
    examples = [row.example for row in encoded]
    texts: dict[str, Texts] = {"policy": [(e.example, e.text) for e in episodes]}
    if exam is not None:
        texts["guide"] = [(text.example, text.completion.text) for text in exam.written]
    texts["reference"] = [(e, e.references[0]) for e in examples if e.references]
    texts["empty text"] = [(e, "") for e in examples]
    return examine_reward(reward, texts, per_step=per_step)
