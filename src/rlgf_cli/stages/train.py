"""``rlgf train``: from a config to the objects of the training loop, and the loop's run on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlgf_cli import console
from rlgf_cli.algorithms.spec import AlgorithmSpec
from rlgf_cli.artifacts import resume
from rlgf_cli.artifacts.jsonl import read_examples, read_objects
from rlgf_cli.artifacts.rundir import Existing, RunDir
from rlgf_cli.config.common import DecodingConfig
from rlgf_cli.config.loader import Resolved
from rlgf_cli.config.train import FREE_ON_RESUME, TrainConfig
from rlgf_cli.errors import Interrupted, RlgfError, StoppedEarly, UserError
from rlgf_cli.guides.make import check_guide, closing_all, make_guide
from rlgf_cli.ledger.spend import charge_guides, record_spend
from rlgf_cli.models import hub
from rlgf_cli.models.card import write_card
from rlgf_cli.models.load import add_lora, load, save, set_generation_config
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.memory import keep_freed_memory
from rlgf_cli.models.prompts import Encoded, encode_prompts
from rlgf_cli.protocols import Example, Guide
from rlgf_cli.runs import best, trackers
from rlgf_cli.runs.alarms import Alarms
from rlgf_cli.runs.build import make_trainer
from rlgf_cli.runs.guide_costs import (
    covered_prompts,
    merge_spend,
    planned_calls,
    provenance,
    share_of,
    spend_row,
    training_estimate,
)
from rlgf_cli.runs.held_out import make_evaluator
from rlgf_cli.runs.run_writer import WATCHED, RunWriter, note, resume_from, summary_of, tracked
from rlgf_cli.scorers.checked import score_checked
from rlgf_cli.scorers.per_text import PerText, per_text
from rlgf_cli.scorers.weighted_sum import SumReward, make_reward, scorer_at
from rlgf_cli.training import timing
from rlgf_cli.training.divergence import FEWEST
from rlgf_cli.training.episodes import Episode, segment_texts
from rlgf_cli.training.loop import Trainer
from rlgf_cli.training.parallel.processes import SINGLE, Processes, join, shared

_EARLY = (
    "the run ended at step {diverged_at} of {max_steps}: the watched figure fell while the score rose. "
    "Its model is that of step {model_step}, which had the best watched figure ({model_watched:.4g})"
)


@dataclass(frozen=True)
class TrainResult:
    """Where the policy is, and the summary that run.json holds."""

    folder: Path
    summary: dict[str, Any]


def run(resolved: Resolved[TrainConfig], *, existing: Existing = "refuse", profile: bool = False) -> TrainResult:
    """Train, save the policy at the run's root, and say how it went; with ``profile`` also where the time went.

    All inputs are checked, and the guide's abilities held against the algorithm, before a model is loaded; models are
    loaded and prompts tokenised before the output folder is touched. Among several processes the main one does what
    has to do with the folder.
    """
    config = resolved.config
    processes = join(config.parallel, config.model.device)
    if not processes.main:
        console.mute()
    if (done := processes.broadcast(processes.on_main(lambda: _check(resolved, existing)))) is not None:
        console.log(f"{config.output} is done already")
        if "diverged_at" in done:
            console.log(_EARLY.format(**done, max_steps=config.max_steps))
        if profile and processes.main:
            rows = [row for _, row in read_objects(Path(config.output, "metrics.jsonl"))]
            _show_profile(rows, 0.0, config)
    else:
        done = _train(resolved, existing, processes, profile)
        if config.push_to_hub and processes.main:
            console.log(f"pushed to {hub.push(config.output, config.push_to_hub)}")
    processes.leave()
    return TrainResult(Path(config.output), done)


def _check(resolved: Resolved[TrainConfig], existing: Existing) -> dict[str, Any] | None:
    """Refuse what cannot be run, before anything is loaded; the result of a run that is done already."""
    config, spec = resolved.config, resolved.config.algorithm.spec()
    resume.refuse_used(config.output, "train", existing)
    if (done := resume.finished_result(config.output, existing)) is not None:
        return done
    if existing == "resume":
        # when it looked is part of what a watch saw
        free = FREE_ON_RESUME - ({"eval.every"} if config.watch is not None else set())
        resume.refuse_changed(config.output, resolved.to_json(), free=free)
    if config.guide is not None and spec.needs_guide:
        check_guide(config.guide, spec)
        if (each := max(regime.guide_calls for regime in spec.regimes)) > 1:
            calls = planned_calls(config)
            console.log(
                f"{spec.name} asks the guide for up to {each} texts an episode, {calls} in {config.max_steps} steps"
            )
    elif config.guide is not None:
        console.warn(f"{spec.name} asks no guide: {config.guide.name} is not used")
    if config.push_to_hub:
        hub.check(config.push_to_hub)
    trackers.check(config.report_to)
    return None


@dataclass(frozen=True)
class _Inputs:
    """What a run reads, loaded and tokenised. ``counts``: prompts that were left out or changed, by reason."""

    loaded: Loaded
    guide: Guide | None
    reward: SumReward | None
    prompts: list[Encoded]
    held_out: list[Encoded]
    watched: PerText | None
    covered: frozenset[str] | None
    counts: dict[str, int]


def _load(config: TrainConfig, spec: AlgorithmSpec, processes: int) -> _Inputs:
    examples = read_examples(config.data, limit=config.limit, need_references=config.aux.reference_nll > 0)
    held_out = read_examples(config.eval.data, limit=config.eval.limit) if config.eval.data else []
    reward = (
        make_reward(config.reward, device=config.model.device, workers=config.reward_workers) if config.reward else None
    )
    if reward is not None:
        reward.check(examples)
        reward.check(held_out)
        if reward.moves and any(regime.gate for regime in spec.regimes):
            raise UserError(
                "algorithm.gate compares scores of different iterations, and this reward moves",
                hint="leave gate out, or weight_steps and steps of the reward",
            )
    watched = _watched(config, held_out)
    keep_freed_memory()
    torch.manual_seed(config.seed)  # a fresh adapter is the one thing that starts at random
    loaded = add_lora(load(config.model, text=config.text, for_training=True), config.lora)
    set_generation_config(loaded, config.lengths)
    guide: Guide | None = None
    if config.guide is not None and spec.needs_guide:
        guide = make_guide(share_of(config.guide, processes), seed=config.seed)
    prompts, counts = encode_prompts(loaded, examples, config.lengths)
    prompts, covered = covered_prompts(prompts, guide, config.rollout.on_uncovered)
    counts["uncovered"] = sum(p.example.id not in covered for p in prompts) if covered is not None else 0
    counts["dropped"] = len(examples) - counts["skipped"] - len(prompts)
    if guide is not None:
        guide.check([p.example for p in prompts], config.lengths.max_new_tokens)
    for writer in _billed_guides(guide, reward):
        writer.notify = console.warn
        writer.check_budget(config.budget)
    held_out_prompts = encode_prompts(loaded, held_out, config.lengths)[0] if held_out else []
    return _Inputs(loaded, guide, reward, prompts, held_out_prompts, watched, covered, counts)


def _watched(config: TrainConfig, held_out: Sequence[Example]) -> PerText | None:
    """What scores the watched figure; checked on the held-out examples before anything is written."""
    watch = config.watch
    if watch is None:
        return None
    if len(held_out) < FEWEST:
        console.warn(f"{len(held_out)} held-out prompts are few: a watched figure that falls is hard to tell from luck")
    return per_text(watch.name, held_out, figure=watch.figure, params=watch.params, device=config.model.device)


def _train(resolved: Resolved[TrainConfig], existing: Existing, processes: Processes, profile: bool) -> dict[str, Any]:
    config, spec = resolved.config, resolved.config.algorithm.spec()
    inputs = processes.raise_together(lambda: _load(config, spec, processes.size))
    loaded, guide = inputs.loaded, inputs.guide
    if loaded.turn_end_problem:
        console.warn(loaded.turn_end_problem)
    _report(inputs.counts, config)

    def claim() -> RunDir:
        return RunDir.claim(config.output, "train", existing=existing, seed=config.seed)

    run_dir = processes.on_main(claim)
    billed = _billed_guides(guide, inputs.reward)
    with closing_all([guide, *billed]), run_dir.running() if run_dir is not None else nullcontext() as folder:

        def begin() -> tuple[str, dict[str, Any]]:
            assert folder is not None
            folder.write_config(resolved.to_json())
            guide_path = config.guide.name.removeprefix("hf:") if config.guide else None
            for parent in (config.model.name, config.data, guide_path, config.eval.data):
                folder.manifest.add_parent(parent)
            folder.manifest.save(device=str(loaded.device), processes=processes.size)
            return folder.manifest.data["run_id"], folder.manifest.data["spend"]

        account = processes.broadcast(processes.on_main(begin))
        if billed and account is not None:
            run_id, spend = account
            processes.raise_together(
                lambda: charge_guides(billed, run_id, config.budget, spend, shared=processes.size > 1)
            )
        trainer = _trainer(config, inputs, processes)
        summary = _loop(trainer, config, folder, existing, profile, billed)
        summary |= {k: n for k, n in inputs.counts.items() if n}
        weights = processes.whole(loaded.model.state_dict()) if processes.lockstep else None

        def finish() -> None:
            assert folder is not None
            if "diverged_at" in summary:
                folder.write_files(lambda target: best.copy(folder.path / WATCHED, target))
            else:
                folder.write_files(lambda target: save(target, loaded, weights=weights))
            use = trainer.generator.use
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

        processes.on_main(finish)
    return summary


def dry_run(resolved: Resolved[TrainConfig]) -> dict[str, Any]:
    """Check the inputs, and say how often the guide would be asked and what that costs; nothing is written."""
    config = resolved.config
    for path in filter(None, (config.data, config.eval.data)):
        read_examples(path, limit=config.limit, need_references=path == config.data and config.aux.reference_nll > 0)
    return training_estimate(config)


def _billed_guides(guide: Guide | None, reward: SumReward | None) -> list[Guide]:
    """All who write for the run and are paid: its guide, where that is a live one, and the judges of its reward."""
    judges = list(reward.guides) if reward is not None else []
    return [guide, *judges] if guide is not None and guide.abilities.live else judges


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


def _trainer(config: TrainConfig, inputs: _Inputs, processes: Processes) -> Trainer:
    """The loop's objects from the config."""
    reward, loaded = inputs.reward, inputs.loaded
    scorer = None if reward is None else partial(score_checked, reward)
    return make_trainer(
        config,
        loaded,
        inputs.prompts,
        processes,
        guide=inputs.guide,
        covered=inputs.covered,
        scorer=scorer,
        scorer_at=partial(scorer_at, reward) if reward is not None and reward.moves else None,
        prefetch=reward.prefetch if reward is not None and reward.prefetches else None,
        evaluate=make_evaluator(
            loaded,
            inputs.held_out,
            scorer,  # a reward that moves, as it ends: held-out scores of different steps are compared
            DecodingConfig(temperature=config.rollout.temperature, batch_size=config.rollout.batch_size),
            config.lengths,
            seed=config.seed,
            processes=processes,
            watched=inputs.watched,
        ),
        warn=console.warn,
    )


def _loop(
    trainer: Trainer,
    config: TrainConfig,
    folder: RunDir | None,
    existing: Existing,
    profile: bool,
    billed: Sequence[Guide],
) -> dict[str, Any]:
    """Run the steps, write rows, samples and checkpoints; Ctrl-C ends after the step it came in."""
    processes, output = trainer.processes, Path(config.output)
    resumed = existing == "resume" and resume_from(output / "checkpoints", trainer, log=console.log, warn=console.warn)
    alarms = Alarms(may_end=config.lengths.min_new_tokens < config.lengths.max_new_tokens)
    with (
        _recorded_spend(billed, trainer.generator.guide, folder, processes),
        RunWriter(folder, config, trainer) as run_writer,
        _profiled(run_writer, trainer, config) if profile else nullcontext(),
        console.interruptible("finishing this step and saving") as stop,
        trackers.tracker(config.report_to, tracked(folder, config, trainer.state.step)) as track,
        console.progress(trainer.spec.name, config.max_steps, done=trainer.state.step, milestones=20) as bar,
    ):
        processes.on_main(lambda: run_writer.begin(resumed=resumed, track=track))
        alarms.replay(run_writer.rows)
        while trainer.state.step < config.max_steps and not run_writer.ends_early():
            begun = trainer.state.step
            try:
                row, episodes = trainer.step()
            except StoppedEarly:
                if trainer.state.step == begun:  # else a judge stopped in the evaluation, and the step has no row yet
                    run_writer.checkpoint()
                raise
            row |= merge_spend(processes.gather(spend_row(billed)))
            processes.on_main(partial(run_writer.row, row, episodes))
            if run_writer.wants_samples(row["step"]):
                _show(row["step"], episodes[: config.rollout.show_count], trainer.model.loaded)
            for warning in alarms(row):
                console.warn(warning)
            run_writer.save_best()
            step = trainer.state.step
            interrupted = processes.any(stop.is_set())
            last = step == config.max_steps or run_writer.ends_early()
            if step % config.save_steps == 0 or last or interrupted:
                run_writer.checkpoint()
            if interrupted:
                stopped = f"stopped after step {step}; the state is saved"
                raise shared(Interrupted(stopped, hint="--resume goes on from there"))
            bar.update(1, note(row))
    if held := alarms.summary(trainer.state.step):
        console.warn(held)
    if folder is None:
        return {}
    early = run_writer.early_end()
    if early:
        console.warn(_EARLY.format(**early, max_steps=config.max_steps))
    warned = {f"warning/{name}": count for name, count in alarms.counts.items()}
    return summary_of(run_writer.rows, trainer, early.get("model_step")) | run_writer.best() | early | warned


def _show(step: int, episodes: Sequence[Episode], loaded: Loaded) -> None:
    """Some of a step's episodes, for the person who watches."""
    for e in episodes:
        said = f"score {e.value:.3f}" if e.score is not None else "no score"
        ending = "" if e.finished else ", cut at the limit"
        console.authored(f"step {step}: {e.example.prompt}", segment_texts(e, loaded), f"({said}{ending})")


@contextmanager
def _profiled(run_writer: RunWriter, trainer: Trainer, config: TrainConfig) -> Iterator[None]:
    """However the loop ends, say where the time went."""
    try:
        yield
    finally:
        _show_profile(run_writer.rows, trainer.clock.lap().get("time/save", 0.0), config)


def _show_profile(rows: Sequence[dict[str, Any]], last_save: float, config: TrainConfig) -> None:
    if rows:
        console.log(console.table(timing.HEADER, timing.profile(rows, last_save, epochs=config.ppo.epochs)))


@contextmanager
def _recorded_spend(
    billed: Sequence[Guide], guide: Guide | None, folder: RunDir | None, processes: Processes
) -> Iterator[None]:
    """However the loop ends, the manifest says whose texts were used, who judged, and what they cost."""
    together = False  # whether all processes end here, and can tell what theirs were
    try:
        yield
        together = True
    except RlgfError as error:
        together = error.shared
        raise
    finally:
        for writer in billed:
            for rank, cached, models in (processes if together else SINGLE).gather(
                (processes.rank, writer.spend()["cached"], writer.models)
            ):
                if rank != processes.rank:
                    writer.add_cached(cached)
                    writer.models.update(models)
        if billed and folder is not None:
            own = guide if guide is not None and guide.abilities.live else None
            record_spend(folder.manifest, guide=own, judges=[judge for judge in billed if judge is not guide])
