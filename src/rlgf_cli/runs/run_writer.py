"""Writes a run's metrics rows, sample rollouts and checkpoints. One process writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rlgf_cli.artifacts import checkpoints
from rlgf_cli.artifacts.jsonl import Appender, read_objects, write_jsonl
from rlgf_cli.artifacts.rundir import RunDir
from rlgf_cli.config.train import TrainConfig
from rlgf_cli.runs import best
from rlgf_cli.runs.alarms import usable_texts
from rlgf_cli.runs.trackers import Track, Tracked
from rlgf_cli.training import checkpoint
from rlgf_cli.training.episodes import Episode
from rlgf_cli.training.loop import Trainer

WATCHED = "best_watched"
"""The folder of the policy with the best watched figure."""


class RunWriter:
    """The rows so far, and the run's files; a process without a folder writes nothing."""

    def __init__(self, folder: RunDir | None, config: TrainConfig, trainer: Trainer) -> None:
        self.folder, self.config, self.trainer = folder, config, trainer
        self.rows: list[dict[str, Any]] = []
        self._out: Appender | None = None
        self._track: Track = lambda row: None

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._out is not None:
            self._out.close()

    def begin(self, *, resumed: bool, track: Track) -> None:
        """Read the rows of the steps before the state's; later rows are written again."""
        if self.folder is None:
            return
        metrics = self.folder.file("metrics.jsonl")
        rows = [row for _, row in read_objects(metrics, torn_tail=True)] if resumed and metrics.is_file() else []
        state = self.trainer.state
        last = state.step if state.unevaluated is None else state.step - 1
        self.rows = [row for row in rows if row["step"] <= last]
        write_jsonl(metrics, self.rows)
        self._out, self._track = Appender(metrics), track
        if self.config.save_best and self.trainer.evaluate is not None:
            for name in ("best", WATCHED) if self.config.watch is not None else ("best",):
                best.finish_interrupted(self.folder.file(name), self.folder.file("checkpoints"))

    def row(self, row: dict[str, Any], episodes: Sequence[Episode]) -> None:
        """Write a step's row, and some of its episodes, where this session has them."""
        if self.folder is None or self._out is None:
            return
        self._out.write(row)
        self.rows.append(row)
        self._track(row)
        self.samples(row["step"], episodes)

    def samples(self, step: int, episodes: Sequence[Episode]) -> None:
        """Write some of a step's episodes."""
        if self.folder is not None and episodes and self.wants_samples(step):
            loaded = self.trainer.model.loaded
            samples = [e.to_record(loaded) for e in episodes[: self.config.rollout.save_count]]
            write_jsonl(self.folder.file("rollouts") / f"step_{step}.jsonl", samples)

    def wants_samples(self, step: int) -> bool:
        """Whether episodes of the step are saved and shown."""
        every = self.config.rollout.save_every
        return every > 0 and (step - 1) % every == 0

    def save_best(self) -> None:
        """Keep the policy of this step where it is the best one, by its score or by the watched figure. All processes
        come here, and one writes.

        It is written before the checkpoint: a state never names a best policy that is not on disk.
        """
        trainer, folder, state = self.trainer, self.folder, self.trainer.state
        candidates = {"best": (state.best_step, state.best_score), WATCHED: (state.watched.step, state.watched.best)}
        scores = {name: score for name, (at, score) in candidates.items() if at == state.step and score is not None}
        if not self.config.save_best or not scores:
            return
        loaded = trainer.model.loaded
        with trainer.clock.timed("save"):
            weights = trainer.processes.whole(loaded.model.state_dict()) if trainer.processes.lockstep else None

            def write() -> None:
                assert folder is not None
                workshop = folder.file("checkpoints")
                for name, score in scores.items():
                    best.save(
                        folder.file(name), loaded, step=state.step, score=score, workshop=workshop, weights=weights
                    )

            trainer.processes.on_main(write)

    def ends_early(self) -> bool:
        """Whether the run is to end at this step because its score rose while the watched figure fell."""
        return self.config.watch is not None and self.config.watch.stop and self.trainer.diverged

    def early_end(self) -> dict[str, Any]:
        """For the result of such a run: the step at which it diverged, and the step of its model."""
        if self.folder is None or not self.ends_early():
            return {}
        saved = best.read(self.folder.path / WATCHED)
        assert saved is not None
        return {"diverged_at": self.trainer.state.step, "model_step": saved["step"], "model_watched": saved["score"]}

    def checkpoint(self) -> None:
        """Save the state. All processes come here; one writes, and the others wait until it is on disk."""
        # the folder is made here and not earlier: an error before the first checkpoint leaves nothing behind
        trainer, folder = self.trainer, self.folder
        with trainer.clock.timed("save"):
            states = checkpoint.collect(trainer.model, trainer.optimizer, trainer.processes)

            def write() -> None:
                assert folder is not None
                target = folder.file("checkpoints") / f"step_{trainer.state.step}"
                if not checkpoints.is_complete(target):
                    checkpoint.save(target, trainer.model, trainer.optimizer, trainer.scheduler, trainer.state, states)
                    checkpoints.rotate(target.parent, self.config.save_total_limit)

            trainer.processes.on_main(write)

    def best(self) -> dict[str, Any]:
        """Step and score of the best policy: of the one on disk, or, where none is saved, of the one in the state.

        A run that was killed and resumed with another ``eval.every`` may have left a better one than it then saw.
        """
        state = self.trainer.state
        if self.folder is None or state.best_score is None:
            return {}
        saved = best.read(self.folder.path / "best") if self.config.save_best else None
        saved = saved or {"step": state.best_step, "score": state.best_score}
        return {"best_step": saved["step"], "best_score": saved["score"]}


def tracked(folder: RunDir | None, config: TrainConfig, step: int) -> Tracked | None:
    """The run as a tracker sees it, before the rows of steps that will be repeated are dropped; None in a process that
    does not write, and without a tracker.

    run.json holds the last step that each tracker received, which may be later than the rows of a later session.
    """
    name = config.report_to
    if folder is None or name == "none":
        return None
    if name == "tensorboard":
        folder.file("tensorboard")  # so that --overwrite removes it
    noted = dict(folder.manifest.data.get("trackers", {}))
    metrics = folder.path / "metrics.jsonl"
    rows = [row for _, row in read_objects(metrics, torn_tail=True)] if name in noted and metrics.is_file() else []
    noted[name] = max([noted.get(name, 0), *(row["step"] for row in rows)])
    folder.manifest.save(trackers=noted)
    return Tracked(folder.path, folder.manifest.data["run_id"], config.model_dump(mode="json"), step, noted[name])


def resume_from(root: Path, trainer: Trainer, *, log: Callable[[str], None], warn: Callable[[str], None]) -> bool:
    """Go on from the newest complete checkpoint; False (and step 0) where there is none yet."""

    def newest() -> tuple[Path | None, list[Path]]:
        checkpoints.rotate(root, None)
        return checkpoints.newest(root)

    processes = trainer.processes
    checkpoint_folder, damaged = processes.broadcast(processes.on_main(newest)) or (None, [])
    for folder in damaged:
        warn(f"{folder} is damaged (a file is missing or cut short) and is passed over")
    if checkpoint_folder is None:
        warn("there is no complete checkpoint yet; starting from the beginning")
        return False
    trainer.state = processes.raise_together(
        lambda: checkpoint.restore(checkpoint_folder, trainer.model, trainer.optimizer, trainer.scheduler, processes)
    )
    use, state = trainer.generator.use, trainer.state
    use.uses, use.texts = Counter(state.guide_uses), Counter(state.guide_texts)
    log(f"resuming from step {trainer.state.step}")
    return True


def note(row: dict[str, Any]) -> str:
    """The figures that the progress bar shows."""
    shown = {
        "score": "score/mean",
        "eval": "eval/score",
        "watch": "eval/watch",
        "kl": "kl/episode",
        "length": "length/mean",
    }
    return "  ".join(f"{label} {row[key]:.3f}" for label, key in shown.items() if key in row)


def summary_of(rows: Sequence[dict[str, Any]], trainer: Trainer, model_step: int | None = None) -> dict[str, Any]:
    """The summary in run.json and the model card: means over the last tenth of the rows, and the last held-out score;
    up to ``model_step``, where the model is that of an earlier step."""
    steps = trainer.state.step if model_step is None else model_step
    known = [row for row in rows if row["step"] <= steps]
    tail = known[-max(1, len(known) // 10) :]
    summary: dict[str, Any] = {"algorithm": trainer.spec.name, "steps": steps}
    for key in ("score/mean", "kl/episode", "length/mean"):
        if values := [row[key] for row in tail if key in row]:
            summary[key] = fmean(values)
    for key in ("eval/score", "eval/watch"):
        if held_out := [row[key] for row in known if key in row]:
            summary[key] = held_out[-1]
    summary["episodes"] = sum(row["episodes"] for row in rows)
    if trainer.generator.guide is not None:
        summary["guide/requests"] = sum(row.get("guide/requests", 0) for row in rows)
        summary["guide/usable"] = sum(map(usable_texts, rows))
    return summary
