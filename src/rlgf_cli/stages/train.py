"""``rlgf train``: from a config to the objects of the training loop, and the loop's run on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import get_scheduler

from rlgf_cli import console
from rlgf_cli.algorithms.spec import AlgorithmSpec, Regime
from rlgf_cli.artifacts import resume
from rlgf_cli.artifacts.jsonl import Appender, read_examples, read_objects, write_jsonl
from rlgf_cli.artifacts.rundir import Existing, RunDir
from rlgf_cli.config.common import DecodingConfig
from rlgf_cli.config.guide import TRANSPORT
from rlgf_cli.config.loader import Resolved
from rlgf_cli.config.train import TrainConfig
from rlgf_cli.errors import Interrupted, StoppedEarly, UserError
from rlgf_cli.guides.base import LiveGuide
from rlgf_cli.guides.in_training import (
    check_guide,
    covered_prompts,
    provenance,
    spend_row,
    training_estimate,
)
from rlgf_cli.guides.make import make_guide
from rlgf_cli.models import hub
from rlgf_cli.models.actor_critic import ActorCritic
from rlgf_cli.models.card import write_card
from rlgf_cli.models.generate import generate_texts
from rlgf_cli.models.load import Loaded, add_lora, load, save
from rlgf_cli.models.prompts import Encoded, encode_prompts
from rlgf_cli.models.seams import same_tokens
from rlgf_cli.protocols import Guide
from rlgf_cli.rewards.base import check_examples
from rlgf_cli.rewards.checked import score_checked
from rlgf_cli.rewards.make import SumReward, make_reward
from rlgf_cli.training import checkpoint, probe
from rlgf_cli.training.alarms import Alarms
from rlgf_cli.training.checkpoint import TrainerState
from rlgf_cli.training.credit import Credit, CreditSettings, Notes
from rlgf_cli.training.episodes import Episode, EpisodeBatch
from rlgf_cli.training.loop import Examine, KLSettings, Trainer
from rlgf_cli.training.rollout import GuideUse, Roller, Sampling
from rlgf_cli.training.trackers import tracker
from rlgf_cli.training.update import UpdateSettings, make_optimizer


@dataclass(frozen=True)
class TrainResult:
    """Where the policy is, and the summary that run.json holds."""

    folder: Path
    summary: dict[str, Any]


def run(resolved: Resolved[TrainConfig], *, existing: Existing = "refuse") -> TrainResult:
    """Train, save the policy at the run's root, and say how it went.

    All inputs are checked, and the guide's abilities held against the algorithm, before a model is loaded; models are
    loaded and prompts tokenised before the output folder is touched.
    """
    config = resolved.config
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("this stage runs in one process", hint="start it without torchrun or accelerate launch")
    spec = config.algorithm.spec()
    resume.refuse_used(config.output, "train", existing)
    if (done := resume.finished_result(config.output, existing)) is not None:
        console.log(f"{config.output} is done already")
        return TrainResult(Path(config.output), done)
    if existing == "resume":
        free = {"step0", "eval.every", "rollout.save_every", "budget.max_cost_usd", "budget.max_calls"}
        free |= {f"guide.{key}" for key in TRANSPORT}
        resume.refuse_changed(config.output, resolved.to_json(), free=free)
    if config.guide is not None and spec.needs_guide:
        check_guide(config.guide, spec)
    elif config.guide is not None:
        console.warn(f"{spec.name} asks no guide: {config.guide.name} is not used")
    if config.push_to_hub:
        hub.check(config.push_to_hub)
    examples = read_examples(config.data, limit=config.limit, need_references=config.aux.reference_nll > 0)
    held_out = read_examples(config.eval.data, limit=config.eval.limit) if config.eval.data else []
    reward = make_reward(config.reward, device=config.model.device) if config.reward else None
    if reward is not None:
        check_examples(reward, examples)
        check_examples(reward, held_out)
    torch.manual_seed(config.seed)  # a fresh adapter is the one thing that starts at random
    loaded = add_lora(load(config.model, text=config.text, for_training=True), config.lora)
    guide = make_guide(config.guide, seed=config.seed) if config.guide is not None and spec.needs_guide else None
    prompts, counts = encode_prompts(loaded, examples, config.lengths)
    prompts, covered = covered_prompts(prompts, guide, config.rollout.on_uncovered)
    counts["uncovered"] = sum(p.example.id not in covered for p in prompts) if covered is not None else 0
    counts["dropped"] = len(examples) - counts["skipped"] - len(prompts)
    if (check := getattr(guide, "check", None)) is not None:
        check([p.example for p in prompts], config.lengths.max_new_tokens)
    if isinstance(guide, LiveGuide):
        guide.check_budget(config.budget)
    held_out_prompts = encode_prompts(loaded, held_out, config.lengths)[0] if held_out else []
    _report(counts, config)

    run_dir = RunDir.claim(config.output, "train", existing=existing, seed=config.seed)
    with _closing(guide), run_dir.running() as folder:
        folder.write_config(resolved.to_json())
        guide_path = config.guide.name.removeprefix("hf:") if config.guide else None
        for parent in (config.model.name, config.data, guide_path, config.eval.data):
            folder.manifest.add_parent(parent)
        folder.manifest.save(device=str(loaded.device))
        if isinstance(guide, LiveGuide):
            guide.notify = console.warn
            guide.charge_to(folder.manifest.data["run_id"], config.budget, folder.manifest.data["spend"])
        trainer = _trainer(config, spec, loaded, prompts, held_out_prompts, reward, guide, covered)
        summary = {**_loop(trainer, config, folder, existing), **{k: n for k, n in counts.items() if n}}
        folder.write_files(lambda target: save(target, loaded))
        use = trainer.roller.use
        write_card(
            folder.file("README.md").parent,
            title=folder.path.name,
            command="train",
            base_model=config.model.name,
            data=[config.data],
            metrics=summary,
            guide=provenance(guide, sum(use.uses.values()), len(use.texts)) if guide is not None else None,
        )
        folder.manifest.save(result=summary)
    if config.push_to_hub:
        console.log(f"pushed to {hub.push(config.output, config.push_to_hub)}")
    return TrainResult(Path(config.output), summary)


def dry_run(resolved: Resolved[TrainConfig]) -> dict[str, Any]:
    """Check the inputs, and say how often the guide would be asked and what that costs; nothing is written."""
    config = resolved.config
    for path in filter(None, (config.data, config.eval.data)):
        read_examples(path, limit=config.limit, need_references=path == config.data and config.aux.reference_nll > 0)
    return training_estimate(config)


@contextmanager
def _closing(guide: Guide | None) -> Iterator[None]:
    """Let a guide give back its connections at the end, however that comes."""
    try:
        yield
    finally:
        if (close := getattr(guide, "close", None)) is not None:
            close()


def _report(counts: dict[str, int], config: TrainConfig) -> None:
    for name, text in (
        ("truncated", "prompts were truncated"),
        ("skipped", "prompts were too long and are left out"),
        ("uncovered", "prompts have no guide text and run unguided"),
        ("dropped", "prompts have no guide text and are left out"),
    ):
        if counts[name]:
            console.warn(f"{counts[name]} {text}")
    if config.rollout.top_k or config.rollout.top_p < 1:
        console.warn(
            "rollouts are cut to top_k/top_p, but probabilities are those of the full distribution: ratios and KL are "
            "taken under a distribution that is not quite the one that sampled"
        )


def _trainer(
    config: TrainConfig,
    spec: AlgorithmSpec,
    loaded: Loaded,
    prompts: Sequence[Encoded],
    held_out: Sequence[Encoded],
    reward: SumReward | None,
    guide: Guide | None,
    covered: frozenset[str] | None,
) -> Trainer:
    """The loop's objects from the config."""
    model = ActorCritic(loaded, spec.critics, mode=config.ppo.critic, with_reference=spec.uses_reference)
    if config.gradient_checkpointing:
        model.enable_checkpointing()
    optimizer = make_optimizer(model.trainable(), config.optim.learning_rate, config.optim.weight_decay)
    # transformers' "constant" ignores the warmup
    constant = config.optim.schedule == "constant"
    scheduler = get_scheduler(
        "constant_with_warmup" if constant else config.optim.schedule,
        optimizer,
        num_warmup_steps=config.optim.warmup_steps,
        num_training_steps=config.max_steps,
    )
    sampling = Sampling.of(config.rollout, config.lengths)
    roller = Roller(
        loaded,
        sampling,
        config.seed,
        guide=guide,
        covered=covered,
        whole_words=guide is not None and not same_tokens(getattr(guide, "tokenizer", None), loaded.tokenizer),
    )
    ppo = config.ppo
    return Trainer(
        spec=spec,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        prompts=prompts,
        roller=roller,
        scorer=None if reward is None else lambda examples, texts: score_checked(reward, examples, texts),
        credit=CreditSettings.of(ppo),
        update=UpdateSettings(
            epochs=ppo.epochs,
            minibatch_size=ppo.minibatch_size,
            accumulation=ppo.gradient_accumulation_steps,
            clip_range=ppo.clip_range,
            value_clip_range=ppo.value_clip_range if ppo.value_clip_range is not None else float("inf"),
            value_coef=ppo.value_coef,
            entropy_coef=ppo.entropy_coef,
            reference_nll=config.aux.reference_nll,
            max_grad_norm=config.optim.max_grad_norm,
        ),
        kl=KLSettings(config.kl.in_reward, config.kl.adaptive, config.kl.target, config.kl.horizon),
        state=TrainerState(kl_coef=config.kl.coef, horizon=_first_horizon(loaded, prompts, sampling.max_new_tokens)),
        seed=config.seed,
        episodes=config.rollout.episodes,
        missing_eos_penalty=config.rollout.missing_eos_penalty,
        critic_warmup_steps=ppo.critic_warmup_steps,
        eval_every=config.eval.every,
        evaluate=_evaluator(config, loaded, held_out, reward),
        examine=_examiner(config, model, sampling),
    )


def _examiner(config: TrainConfig, model: ActorCritic, sampling: Sampling) -> Examine:
    """Hold the truths of step 0 against the first episodes: the first one that is broken stops the run."""

    def examine(
        regime: Regime,
        episodes: Sequence[Episode],
        batch: EpisodeBatch,
        notes: Notes | None,
        credit: Credit | None,
        kl_coef: float,
    ) -> None:
        found = probe.examine(
            model, regime, episodes, batch, notes, credit, sampling, kl_coef=kl_coef, seed=config.seed, step=0
        )
        for check in found:
            if check.status == "fail" and config.step0 == "stop":
                raise probe.letter(check)
            if check.status == "fail":
                console.warn(str(probe.letter(check)))

    return examine


def _first_horizon(loaded: Loaded, prompts: Sequence[Encoded], limit: int) -> float:
    """Before the first episode: the mean length of references, EOS included; the limit where there are none."""
    references = [text for p in prompts[:500] for text in p.example.references[:1]]
    if not references:
        return float(limit)
    return fmean(min(limit, len(loaded.text.encode_response(loaded.tokenizer, t)) + 1) for t in references)


def _evaluator(config: TrainConfig, loaded: Loaded, held_out: Sequence[Encoded], reward: SumReward | None) -> Any:
    """Score the policy alone, sampled with a fixed seed, on held-out prompts; None where there are none."""
    if not held_out or reward is None:
        return None
    decoding = DecodingConfig(temperature=config.rollout.temperature, batch_size=config.rollout.batch_size)
    examples = [p.example for p in held_out]

    def evaluate() -> dict[str, float]:
        texts = [c.text for c in generate_texts(loaded, held_out, decoding, config.lengths, seed=config.seed)]
        scores = score_checked(reward, examples, texts)
        return {
            "eval/score": fmean(s.value for s in scores),
            "eval/length": fmean(len(t.split()) for t in texts),
        }

    return evaluate


def _loop(trainer: Trainer, config: TrainConfig, folder: RunDir, existing: Existing) -> dict[str, Any]:
    """Run the steps, write rows, samples and checkpoints; Ctrl-C ends after the step it came in."""
    checkpoints = folder.path / "checkpoints"
    metrics = folder.file("metrics.jsonl")
    start = _resume(trainer, checkpoints) if existing == "resume" else None
    rows = [row for _, row in read_objects(metrics, torn_tail=True)] if start and metrics.is_file() else []
    rows = [row for row in rows if row["step"] <= trainer.state.step]
    write_jsonl(metrics, rows)
    samples = folder.file("rollouts") if config.rollout.save_every else None
    alarms = Alarms(may_end=config.lengths.min_new_tokens < config.lengths.max_new_tokens)
    alarms.replay(rows)

    def keep() -> None:
        # not before: what fails while there is nothing to resume from leaves nothing behind
        target = folder.file("checkpoints") / f"step_{trainer.state.step}"
        if not checkpoint.is_complete(target):
            checkpoint.save(target, trainer.model, trainer.optimizer, trainer.scheduler, trainer.state)
            checkpoint.rotate(checkpoints, config.save_total_limit)

    with (
        _books(trainer.roller.guide, folder),
        Appender(metrics) as out,
        console.interruptible("finishing this step and saving") as stop,
        tracker(config.report_to, folder.path, config.model_dump(mode="json")) as track,
        console.progress(trainer.spec.name, config.max_steps) as bar,
    ):
        bar.update(trainer.state.step)
        while trainer.state.step < config.max_steps:
            try:
                row, episodes = trainer.step()
            except StoppedEarly:  # the step was not begun, as far as the state goes
                keep()
                raise
            row |= spend_row(trainer.roller.guide)
            out.write(row)
            rows.append(row)
            track(row)
            for warning in alarms(row):
                console.warn(warning)
            step = trainer.state.step
            if samples is not None and (step - 1) % config.rollout.save_every == 0:
                write_jsonl(
                    samples / f"step_{step}.jsonl", [e.to_record() for e in episodes[: config.rollout.save_count]]
                )
            if step % config.save_steps == 0 or step == config.max_steps:
                keep()
            if stop.is_set():
                keep()
                raise Interrupted(f"stopped after step {step}; the state is saved", hint="--resume goes on from there")
            bar.update(1, _note(row))
            if step % max(1, config.max_steps // 20) == 0:
                console.log_plain(f"step {step}/{config.max_steps}  {_note(row)}")
    if held := alarms.summary(trainer.state.step):
        console.warn(held)
    return _summary(rows, trainer) | {f"warning/{name}": count for name, count in alarms.counts.items()}


@contextmanager
def _books(guide: Guide | None, folder: RunDir) -> Iterator[None]:
    """However the loop ends, the manifest says whose texts were used and what they cost."""
    try:
        yield
    finally:
        if isinstance(guide, LiveGuide):
            folder.manifest.save(spend=guide.meter.to_json(), guide=guide.provenance())


def _resume(trainer: Trainer, checkpoints: Path) -> Path | None:
    """Go on from the newest complete checkpoint; None (and step 0) where there is none yet."""
    checkpoint.rotate(checkpoints, None)
    complete = checkpoint.complete_checkpoints(checkpoints)
    if not complete:
        console.warn("there is no complete checkpoint yet; starting from the beginning")
        return None
    trainer.state = checkpoint.restore(complete[-1], trainer.model, trainer.optimizer, trainer.scheduler)
    trainer.roller.use = GuideUse()
    trainer.roller.use.uses.update(trainer.state.guide_uses)
    trainer.roller.use.texts.update(trainer.state.guide_texts)
    console.log(f"resuming from step {trainer.state.step}")
    return complete[-1]


def _note(row: dict[str, Any]) -> str:
    """The few figures that a person watches."""
    shown = {"score": "score/mean", "eval": "eval/score", "kl": "kl/episode", "length": "length/mean"}
    return "  ".join(f"{label} {row[key]:.3f}" for label, key in shown.items() if key in row)


def _summary(rows: Sequence[dict[str, Any]], trainer: Trainer) -> dict[str, Any]:
    """What run.json and the model card say of the run: its last tenth, and the held-out score where it was taken."""
    tail = rows[-max(1, len(rows) // 10) :]
    found: dict[str, Any] = {"algorithm": trainer.spec.name, "steps": trainer.state.step}
    for key in ("score/mean", "kl/episode", "length/mean"):
        if values := [row[key] for row in tail if key in row]:
            found[key] = fmean(values)
    if held_out := [row["eval/score"] for row in rows if "eval/score" in row]:
        found["eval/score"] = held_out[-1]
    found["episodes"] = sum(row["episodes"] for row in rows)
    if trainer.roller.guide is not None:
        found["guide/requests"] = sum(row.get("guide/requests", 0) for row in rows)
    return found
