"""``rlgf evolve train``: train a policy that chooses the next operation, or run a baseline in the same environment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rlgf_cli import console
from rlgf_cli.artifacts import checkpoints
from rlgf_cli.artifacts.disk import os_errors, save_torch
from rlgf_cli.artifacts.jsonl import Appender, read_examples, read_json, read_objects, write_json, write_jsonl
from rlgf_cli.artifacts.rundir import Existing, RunDir
from rlgf_cli.config.evolve_train import FREE_ON_RESUME, EvolveTrainConfig
from rlgf_cli.config.loader import Resolved
from rlgf_cli.errors import Interrupted, RlgfError, StoppedEarly, UserError
from rlgf_cli.evolve import plots, ppo
from rlgf_cli.evolve.cost_estimate import cost_estimate
from rlgf_cli.evolve.environment import Environment, RewardWeights
from rlgf_cli.evolve.features import feature_names
from rlgf_cli.evolve.iterations import chains_of, operations_table, records_of, refuse_barren, row_of, summary_of
from rlgf_cli.evolve.learned import LearnedPolicy, PolicyNet, load_policy
from rlgf_cli.evolve.make import billed_guides, make_environment, refuse_recorded_guides
from rlgf_cli.evolve.operations import Operation, read_operations
from rlgf_cli.evolve.policies import Policy, rollout
from rlgf_cli.guides.make import closing_all
from rlgf_cli.ledger.spend import record_spend
from rlgf_cli.protocols import Example
from rlgf_cli.stages.session import FolderResult, StageSession, prepare_guides

COMMAND = "evolve train"


def run(resolved: Resolved[EvolveTrainConfig], *, existing: Existing = "refuse") -> FolderResult:
    """Train the policy that chooses operations. All inputs are checked before the output folder is touched."""
    config = resolved.config
    session = StageSession(COMMAND, resolved, existing)
    inputs = (config.data, config.operations, config.novelty.encoder)
    weights = (config.novelty.encoder,)
    if (finished := session.open(*inputs, free=FREE_ON_RESUME, weights=weights)) is not None:
        return finished
    operations, seeds, environment = _load(config)
    billed = list(billed_guides(environment).values())
    with closing_all(billed):
        environment.guide.check(
            (Example(s.id, o.prompt_for(s.prompt)) for s in seeds for o in operations), config.max_new_tokens
        )
        prepare_guides(billed, config.budget)
        with session.running(*inputs, guides=billed) as folder:
            training = _Training(config, environment, seeds, folder)
            with _recorded_spend(training):
                _loop(training, resumed=existing == "resume")
    result = session.result()
    _report(training.rows, result)
    return result


def dry_run(resolved: Resolved[EvolveTrainConfig]) -> dict[str, Any]:
    """Check the inputs, and estimate the requests to guide and reviewer and their cost; nothing is written."""
    config = resolved.config
    operations, seeds = _inputs(config)
    return cost_estimate(config, operations, seeds, rewrites=config.iterations * config.batch_size * config.steps)


def _inputs(config: EvolveTrainConfig) -> tuple[list[Operation], list[Example]]:
    operations = read_operations(config.operations)
    if config.policy != "learned":
        load_policy(config.policy, operations)  # refuses what the baseline cannot work with
    refuse_recorded_guides(config)
    return operations, read_examples(config.data, limit=config.limit, references=False, conversations=False)


def _load(config: EvolveTrainConfig) -> tuple[list[Operation], list[Example], Environment]:
    operations, seeds = _inputs(config)
    weights = RewardWeights(config.reward.novelty, config.reward.different, config.reward.penalty)
    if config.reward.different and config.reviewer is None:
        hint = "give --reviewer, or leave reward.different out"
        raise UserError("reward.different needs a reviewer's verdict, and no reviewer is given", hint=hint)
    return operations, seeds, make_environment(config, operations, seeds, weights=weights, capacity=config.memory)


@dataclass
class _Training:
    """The state of a run: environment, policy, and the content of a checkpoint. ``memory`` [kept, d] has the vectors
    that novelty was measured against at the end of the last iteration, the oldest first.
    """

    config: EvolveTrainConfig
    environment: Environment
    seeds: Sequence[Example]
    folder: RunDir
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        config, operations = self.config, self.environment.operations
        self.iteration = 0
        self.memory = self.environment.collection.recent()
        self.learned: LearnedPolicy | None = None
        if config.policy == "learned":
            net = PolicyNet(len(feature_names(operations)), len(operations), config.ppo.hidden, config.seed)
            self.learned = LearnedPolicy(net, operations, config.steps, self.environment.space.signature)
            self.optimizer = torch.optim.Adam(net.parameters(), lr=config.ppo.learning_rate)
        self.policy: Policy = self.learned or load_policy(config.policy, operations)

    def iterate(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Roll out the chains and update the policy: the row of the iteration, and the records of its steps.

        The state changes at the end alone: where the guide stops in between, it is that of the iteration before.
        """
        config, iteration = self.config, self.iteration + 1
        # rebuilt, because the order of its vectors decides the last bit of a novelty, and a resumed run has this order
        self.environment.collection = self.environment.collection.holding(self.memory)
        chains = chains_of(iteration, self.seeds, config.batch_size, config.seed)
        rollout(self.environment, chains, self.policy, config.steps, config.seed)
        self.memory = self.environment.collection.recent()
        row = row_of(iteration, chains, self.environment.operations, len(self.memory))
        if self.learned is not None:
            key = (config.seed, "update", iteration)
            row |= ppo.update(
                self.learned.net, self.optimizer, ppo.trajectories(self.learned, chains), config.ppo, key=key
            )
        self.iteration = iteration
        self.rows.append(row)
        return row, list(records_of(iteration, chains))

    def save(self) -> None:
        """Write a checkpoint, whole or not at all."""
        target = self.folder.file("checkpoints") / f"step_{self.iteration}"
        if checkpoints.is_complete(target):
            return
        with checkpoints.written_whole(target) as new:
            write_json(new / "state.json", {"iteration": self.iteration})
            with os_errors(new):
                save_file({"memory": torch.from_numpy(self.memory)}, new / "memory.safetensors")
            if self.learned is not None:
                self.learned.save(new)
                save_torch(new / "optimizer.pt", self.optimizer.state_dict())
        checkpoints.rotate(target.parent, self.config.save_total_limit)

    def restore(self) -> None:
        """Load the newest complete checkpoint, where there is one."""
        root = self.folder.file("checkpoints")
        checkpoints.rotate(root, None)
        latest, damaged = checkpoints.newest(root)
        for folder in damaged:
            console.warn(f"{folder} is damaged (a file is missing or cut short) and is passed over")
        if latest is None:
            console.warn("there is no complete checkpoint yet; starting from the beginning")
            return
        self.iteration = read_json(latest / "state.json")["iteration"]
        self.memory = load_file(latest / "memory.safetensors")["memory"].numpy()
        if self.learned is not None:
            saved = load_policy(str(latest), self.environment.operations)
            assert isinstance(saved, LearnedPolicy)
            self.learned.net.load_state_dict(saved.net.state_dict())
            self.optimizer.load_state_dict(torch.load(latest / "optimizer.pt", weights_only=True))
        console.log(f"resuming from iteration {self.iteration}")


def _loop(training: _Training, *, resumed: bool) -> None:
    """Iterate, write rows, steps and checkpoints; after Ctrl-C, finish the iteration and save."""
    config, folder = training.config, training.folder
    if resumed:
        training.restore()
    metrics, steps = folder.file("metrics.jsonl"), folder.file("steps.jsonl")
    for path in (metrics, steps):
        _cut_back(path, training.iteration)
    training.rows += [row for _, row in read_objects(metrics)] if metrics.is_file() else []
    with (
        Appender(metrics) as rows_out,
        Appender(steps) as steps_out,
        console.interruptible("finishing this iteration and saving") as stop,
        console.progress(COMMAND, config.iterations, done=training.iteration, milestones=20) as bar,
    ):
        while training.iteration < config.iterations:
            row, records = training.iterate()
            for record in records:
                steps_out.write(record)
            rows_out.write(row)
            last = training.iteration == config.iterations
            if training.iteration % config.save_every == 0 or last or stop.is_set():
                training.save()
            refuse_barren(training.rows, last=last)
            if stop.is_set() and not last:
                stopped = f"stopped after iteration {training.iteration}; the state is saved"
                raise Interrupted(stopped, hint="--resume goes on from there")
            bar.update(1, _note(row))


def _cut_back(path: Path, iteration: int) -> None:
    """Keep the lines up to the restored iteration; later iterations are run again."""
    if path.is_file():
        lines = (row for _, row in read_objects(path, torn_tail=True))
        write_jsonl(path, (row for row in lines if row["iteration"] <= iteration))


@contextmanager
def _recorded_spend(training: _Training) -> Iterator[None]:
    """Save state, policy and plots where the loop ends well or in a known error; record the spend however it ends."""
    try:
        yield
        _finish(training)
    except RlgfError as error:
        if training.iteration or isinstance(error, StoppedEarly | Interrupted):
            training.save()
        if training.iteration:
            _finish(training)
        raise
    finally:
        record_spend(training.folder.manifest, **billed_guides(training.environment))


def _finish(training: _Training) -> None:
    folder, rows = training.folder, training.rows
    folder.manifest.save(result=summary_of(rows, training.config.policy))
    folder.write_files(lambda target: plots.write(target / "plots", rows))
    if training.learned is not None:
        folder.write_files(training.learned.save)


def _report(rows: Sequence[dict[str, Any]], result: FolderResult) -> None:
    """Log the shares of the operations over training, the outcomes of the rewrites, and their cost."""
    summary, spend = result.summary, result.spend
    console.log(console.table(*operations_table(rows)))
    outcomes = ", ".join(f"{name} {count}" for name, count in summary["outcomes"].items())
    charged = "" if spend["charged_usd"] is None else f"; {spend['charged_usd']:.4f} USD charged"
    console.log(f"{summary['rewrites']} rewrites, {summary['queries']} queries: {outcomes}{charged}")


def _note(row: dict[str, Any]) -> str:
    """The figures that the progress bar shows."""
    return "  ".join(f"{name} {row[name]:.3f}" for name in ("reward", "kept", "novelty", "ppo/entropy") if name in row)
