"""``rlgf train``: load the inputs, build the trainer, run its loop and write the run folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlgf_cli import console
from rlgf_cli.artifacts.jsonl import read_examples, read_objects
from rlgf_cli.artifacts.rundir import Existing, RunDir
from rlgf_cli.config.common import DecodingConfig
from rlgf_cli.config.loader import Resolved
from rlgf_cli.config.train import FREE_ON_RESUME, TrainConfig
from rlgf_cli.errors import Interrupted, StoppedEarly, UserError
from rlgf_cli.guides.make import check_guide, closing_all, make_guide
from rlgf_cli.models import hub
from rlgf_cli.models.device import pick_device
from rlgf_cli.models.load import add_lora, load, save, set_generation_config
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.memory import keep_freed_memory
from rlgf_cli.models.prompts import Encoded, encode_prompts
from rlgf_cli.models.rendered import first_example, without_weights
from rlgf_cli.protocols import Example, Guide
from rlgf_cli.runs import best, trackers
from rlgf_cli.runs.alarms import Alarms
from rlgf_cli.runs.build import make_trainer
from rlgf_cli.runs.guide_costs import (
    covered_prompts,
    is_unguided,
    merge_spend,
    planned_calls,
    provenance,
    recorded_spend,
    refuse_unguided,
    share_of,
    spend_row,
    training_estimate,
)
from rlgf_cli.runs.held_out import make_evaluator
from rlgf_cli.runs.memory import PeakMemory, gigabytes, recorded_peak, training_memory
from rlgf_cli.runs.run_writer import WATCHED, RunWriter, note, resume_from, summary_of, tracked
from rlgf_cli.scorers.checked import score_or_skip
from rlgf_cli.scorers.judge_guide import refuse_judges_without_price
from rlgf_cli.scorers.per_text import PerText, per_text
from rlgf_cli.scorers.weighted_sum import SumReward, make_reward, scorer_at
from rlgf_cli.stages.session import Account, FolderResult, StageSession, prepare_guides, pushed, report_text
from rlgf_cli.training import timing
from rlgf_cli.training.divergence import FEWEST
from rlgf_cli.training.episodes import Episode, segment_texts
from rlgf_cli.training.loop import Trainer
from rlgf_cli.training.parallel.join import join
from rlgf_cli.training.parallel.processes import Processes, raised_by_all

_EARLY = (
    "the run ended at step {diverged_at} of {max_steps}: the watched figure fell while the score rose. "
    "Its model is that of step {model_step}, which had the best watched figure ({model_watched:.4g})"
)


def run(resolved: Resolved[TrainConfig], *, existing: Existing = "refuse", profile: bool = False) -> FolderResult:
    """Train, save the policy at the run's root, and return the summary; ``profile`` prints where the time went.

    The inputs are checked, and the guide's abilities compared with the algorithm, before a model is loaded; models are
    loaded and prompts tokenised before the output folder is touched. With several processes, the main one alone works
    on the folder.
    """
    config = resolved.config
    session = StageSession("train", resolved, existing)
    processes = join(config.parallel, config.model.device)
    if not processes.main:
        console.mute()
    finished = processes.broadcast(processes.on_main(lambda: _check(session, config)))
    if finished is not None:
        result = finished
        _report_finished(result, config, profile=profile and processes.main)
    else:
        result = FolderResult(session.output, _train(session, config, processes, profile=profile))
        if processes.main:
            pushed(result, config.push_to_hub)
    processes.leave()
    return result


def dry_run(resolved: Resolved[TrainConfig]) -> dict[str, Any]:
    """Check the inputs, show an example, and estimate guide texts, their cost and the memory; nothing is written."""
    config = resolved.config
    examples = read_examples(config.data, limit=config.limit, need_references=config.aux.reference_nll > 0)
    if config.eval.data:
        read_examples(config.eval.data, limit=config.limit)
    loaded = without_weights(config.model, config.text)
    prompts, _ = encode_prompts(loaded, examples, config.lengths)
    report_text(loaded, first_example(loaded, prompts, config.lengths))
    _warn_of_schedule(config)
    refuse_judges_without_price(config.reward, config.budget)
    memory = training_memory(config, prompts, config.parallel.num_processes or 1, log=console.warn)
    return {**training_estimate(config), "memory_gb_per_device": gigabytes(memory)}


def _check(session: StageSession, config: TrainConfig) -> FolderResult | None:
    """Refuse settings that cannot work, before anything is loaded; the result of a run that is done already."""
    spec = config.algorithm.spec()
    # with --watch, the steps of the evaluations decide when a run counts as diverged
    free = FREE_ON_RESUME - ({"eval.every"} if config.watch is not None else set())
    if (finished := session.open(free=free)) is not None:
        return finished
    if config.guide is not None and spec.needs_guide:
        check_guide(config.guide, spec)
        if (each := max(regime.guide_calls for regime in spec.regimes)) > 1:
            calls = planned_calls(config)
            console.log(
                f"{spec.name} asks the guide for up to {each} texts an episode, {calls} in {config.max_steps} steps"
            )
    elif config.guide is not None:
        console.warn(f"{spec.name} asks no guide: {config.guide.name} is not used")
    _warn_of_schedule(config)
    if config.push_to_hub:
        hub.check(config.push_to_hub)
    trackers.check(config.report_to)
    return None


def _warn_of_schedule(config: TrainConfig) -> None:
    """Warn of an algorithm whose second part would never begin."""
    spec = config.algorithm.spec()
    if (switch := spec.schedule.switch_step) is not None and switch >= config.max_steps:
        console.warn(
            f"{spec.name} would never switch to its second part: switch_step is {switch}, and max_steps "
            f"{config.max_steps}"
        )


def _report_finished(result: FolderResult, config: TrainConfig, *, profile: bool) -> None:
    if "diverged_at" in result.summary:
        console.log(_EARLY.format(**result.summary, max_steps=config.max_steps))
    if profile:
        _print_profile([row for _, row in read_objects(result.folder / "metrics.jsonl")], 0.0, config)


def _train(session: StageSession, config: TrainConfig, processes: Processes, *, profile: bool) -> dict[str, Any]:
    """Load, claim the folder, run the loop and save the model; the summary (empty in a process that writes nothing)."""
    inputs = processes.raise_together(lambda: _load(config, processes.size, chat_default=session.chat_default))
    _warn(inputs, config)
    folder = processes.on_main(session.claim)
    with closing_all([inputs.guide, *inputs.billed]), folder.running() if folder is not None else nullcontext():
        account = processes.broadcast(processes.on_main(lambda: _begin(session, config, inputs, processes)))
        if inputs.billed:
            processes.raise_together(lambda: session.charge(inputs.billed, account, shared=processes.size > 1))
        memory = processes.on_main(lambda: training_memory(config, inputs.prompts, processes.size, log=console.log))
        trainer = _make_trainer(config, inputs, processes)
        with recorded_peak(inputs.peak, memory, folder, processes), closing(trainer.generator.sampler):
            summary = _loop(
                trainer, config, folder, inputs.billed, resume=session.existing == "resume", profile=profile
            )
        summary |= {name: count for name, count in inputs.counts.items() if count}
        weights = processes.whole(inputs.loaded.model.state_dict()) if processes.lockstep else None
        processes.on_main(lambda: _finish(session, config, inputs, trainer, summary, weights))
    return summary


@dataclass(frozen=True)
class _Inputs:
    """The inputs of a run, loaded and tokenised.

    ``watched`` gives the figure of ``--watch`` per text; ``covered`` has the ids of prompts with a guide text (None:
    all); ``counts`` are prompts that were left out or changed, by reason; ``peak`` measures from before the model was
    loaded.
    """

    loaded: Loaded
    guide: Guide | None
    reward: SumReward | None
    prompts: list[Encoded]
    held_out: list[Encoded]
    watched: PerText | None
    covered: frozenset[str] | None
    counts: dict[str, int]
    peak: PeakMemory

    @property
    def billed(self) -> list[Guide]:
        """The guides that the run pays: its own, where that is a live one, and the judges of its reward."""
        return _billed_guides(self.guide, self.reward)


def _load(config: TrainConfig, processes: int, *, chat_default: bool) -> _Inputs:
    spec = config.algorithm.spec()
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
    peak = PeakMemory(pick_device(config.model.device))
    torch.manual_seed(config.seed)  # a fresh adapter is the one thing that starts at random
    lora = config.lora.enabled
    loaded = load(config.model, text=config.text, for_training=True, lora=lora, chat_default=chat_default)
    loaded = add_lora(loaded, config.lora)
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
    prepare_guides(_billed_guides(guide, reward), config.budget)
    held_out_prompts = encode_prompts(loaded, held_out, config.lengths)[0] if held_out else []
    return _Inputs(loaded, guide, reward, prompts, held_out_prompts, watched, covered, counts, peak)


def _billed_guides(guide: Guide | None, reward: SumReward | None) -> list[Guide]:
    judges = list(reward.guides) if reward is not None else []
    return [guide, *judges] if guide is not None and guide.abilities.live else judges


def _watched(config: TrainConfig, held_out: Sequence[Example]) -> PerText | None:
    """The figure of ``--watch``, checked on the held-out examples before anything is written."""
    watch = config.watch
    if watch is None:
        return None
    if len(held_out) < FEWEST:
        console.warn(f"{len(held_out)} held-out prompts are few: a watched figure that falls is hard to tell from luck")
    return per_text(watch.name, held_out, figure=watch.figure, params=watch.params, device=config.model.device)


def _begin(session: StageSession, config: TrainConfig, inputs: _Inputs, processes: Processes) -> Account:
    guide_path = config.guide.name.removeprefix("hf:") if config.guide else None
    parents = (config.model.name, config.data, guide_path, config.eval.data)
    facts = {"device": str(inputs.loaded.device), "text": inputs.loaded.text.to_json(), "processes": processes.size}
    return session.begin(*parents, **facts)


def _finish(
    session: StageSession,
    config: TrainConfig,
    inputs: _Inputs,
    trainer: Trainer,
    summary: dict[str, Any],
    weights: dict[str, torch.Tensor] | None,
) -> None:
    """Save the policy and its card, and record the summary. ``weights`` are those of all processes, put together."""
    folder, guide, use = session.run, inputs.guide, trainer.generator.use
    if "diverged_at" in summary:
        folder.write_files(lambda target: best.copy(folder.path / WATCHED, target))
    else:
        folder.write_files(lambda target: save(target, inputs.loaded, weights=weights))
    requests, unguided = sum(use.uses.values()), is_unguided(summary)
    shown_guide = provenance(guide, requests, len(use.texts), unguided=unguided) if guide is not None else None
    session.write_card(base_model=config.model.name, data=[config.data], metrics=summary, guide=shown_guide)
    session.finish(summary)
    refuse_unguided(summary, guide, folder.path)


def _warn(inputs: _Inputs, config: TrainConfig) -> None:
    """Warn of prompts that were changed or left out, and of settings that bias the update."""
    report_text(inputs.loaded, first_example(inputs.loaded, inputs.prompts, config.lengths))
    for name, text in (
        ("truncated", "prompts were truncated"),
        ("skipped", "prompts were too long and are left out"),
        ("uncovered", "prompts have no guide text and run unguided"),
        ("dropped", "prompts have no guide text and are left out"),
    ):
        if inputs.counts[name]:
            console.warn(f"{inputs.counts[name]} {text}")
    if config.sampler.engine == "vllm":
        console.log("starting vLLM in this process")
    if config.rollout.top_k or config.rollout.top_p < 1:
        console.warn(
            "rollouts are cut to top_k/top_p, but probabilities are those of the full distribution: ratios and KL are "
            "taken under a distribution that is not quite the one that sampled"
        )


def _make_trainer(config: TrainConfig, inputs: _Inputs, processes: Processes) -> Trainer:
    """The loop's objects from the config."""
    reward, loaded = inputs.reward, inputs.loaded
    scorer = None if reward is None else partial(score_or_skip, reward)
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
            scorer,  # a scheduled reward with its last weights, so that held-out scores of all steps compare
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
    billed: Sequence[Guide],
    *,
    resume: bool,
    profile: bool,
) -> dict[str, Any]:
    """Run the steps, write rows, samples and checkpoints; after a signal, finish the step and save."""
    processes, checkpoints = trainer.processes, Path(config.output) / "checkpoints"
    resumed = resume and resume_from(checkpoints, trainer, log=console.log, warn=console.warn)
    alarms = Alarms(may_end=config.lengths.min_new_tokens < config.lengths.max_new_tokens)
    with (
        recorded_spend(billed, trainer.generator.guide, folder, processes),
        RunWriter(folder, config, trainer) as run_writer,
        _profiled(run_writer, trainer, config) if profile else nullcontext(),
        console.interruptible("finishing this step and saving") as stop,
        trackers.tracker(config.report_to, tracked(folder, config, trainer.state.step)) as track,
        console.progress(trainer.spec.name, config.max_steps, done=trainer.state.step, milestones=20) as bar,
    ):
        processes.on_main(lambda: run_writer.begin(resumed=resumed, track=track))
        alarms.replay(run_writer.rows)
        while trainer.state.unevaluated is not None or (
            trainer.state.step < config.max_steps and not run_writer.ends_early()
        ):
            try:
                row, episodes = trainer.step()
            except (StoppedEarly, Interrupted):
                # in the rollouts: the state is that before the step; in the evaluation: it has the step's row
                stop.note(processes.first(stop.received))
                if trainer.state.unevaluated is not None:
                    processes.on_main(partial(run_writer.samples, trainer.state.step, trainer.last_episodes))
                run_writer.checkpoint()
                raise
            row |= merge_spend(processes.gather(spend_row(billed)))
            processes.on_main(partial(run_writer.row, row, episodes))
            if run_writer.wants_samples(row["step"]):
                _print_episodes(row["step"], episodes[: config.rollout.show_count], trainer.model.loaded)
            for warning in alarms(row):
                console.warn(warning)
            run_writer.save_best()
            step = trainer.state.step
            interrupted = stop.note(processes.first(stop.received))
            last = step == config.max_steps or run_writer.ends_early()
            if step % config.save_steps == 0 or last or interrupted:
                run_writer.checkpoint()
            if interrupted:
                stopped = f"stopped after step {step}; the state is saved"
                raise raised_by_all(Interrupted(stopped, hint="--resume goes on from there"))
            bar.update(1, note(row))
    if alarm_counts := alarms.summary(trainer.state.step):
        console.warn(alarm_counts)
    if folder is None:
        return {}
    early = run_writer.early_end()
    if early:
        console.warn(_EARLY.format(**early, max_steps=config.max_steps))
    warnings = {f"warning/{name}": count for name, count in alarms.counts.items()}
    return summary_of(run_writer.rows, trainer, early.get("model_step")) | run_writer.best() | early | warnings


def _print_episodes(step: int, episodes: Sequence[Episode], loaded: Loaded) -> None:
    for e in episodes:
        score = f"score {e.value:.3f}" if e.score is not None else "no score"
        ending = "" if e.finished else ", cut at the limit"
        console.authored(f"step {step}: {e.example.prompt}", segment_texts(e, loaded), f"({score}{ending})")


@contextmanager
def _profiled(run_writer: RunWriter, trainer: Trainer, config: TrainConfig) -> Iterator[None]:
    """Print where the time went, however the loop ends."""
    try:
        yield
    finally:
        _print_profile(run_writer.rows, trainer.clock.lap().get("time/save", 0.0), config)


def _print_profile(rows: Sequence[dict[str, Any]], last_save: float, config: TrainConfig) -> None:
    if rows:
        console.log(console.table(timing.HEADER, timing.profile(rows, last_save, epochs=config.ppo.epochs)))
