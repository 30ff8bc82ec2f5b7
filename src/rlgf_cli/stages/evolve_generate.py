"""``rlgf evolve generate``: new instructions with answers, which a guide rewrites from seeds as a policy chooses."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlgf_cli import console
from rlgf_cli.artifacts.jsonl import read_examples
from rlgf_cli.artifacts.records import AnsweredStepRecord
from rlgf_cli.artifacts.rundir import Existing, RunDir
from rlgf_cli.config.evolve import FREE_WHILE_EVOLVING
from rlgf_cli.config.evolve_generate import EvolveGenerateConfig
from rlgf_cli.config.loader import Resolved
from rlgf_cli.errors import Interrupted, RlgfError, UserError
from rlgf_cli.evolve.answers import InstructionAnswer, answer, answer_requests
from rlgf_cli.evolve.card import write_data_card
from rlgf_cli.evolve.cost_estimate import cost_estimate
from rlgf_cli.evolve.dataset import INSTRUCTIONS, STEPS, Rows, StepIndex, Tally, blocks, kept_instructions
from rlgf_cli.evolve.duplicates import Duplicates
from rlgf_cli.evolve.environment import KEPT, Chain, Environment, RewardWeights
from rlgf_cli.evolve.make import billed_guides, make_environment, refuse_recorded_guides
from rlgf_cli.evolve.operations import Operation, read_operations
from rlgf_cli.evolve.policies import BASELINES, Policy, rollout
from rlgf_cli.guides.make import closing_all
from rlgf_cli.ledger.spend import record_spend
from rlgf_cli.protocols import Example
from rlgf_cli.stages.session import FolderResult, StageSession, prepare_guides

COMMAND = "evolve generate"
_PATIENCE = 200
"""Rewrites, in whole blocks, after which at least one must have been kept."""
_AGAIN = "--resume goes on from there; the guide's later texts are in the cache, unless guide.mode is live"


def run(resolved: Resolved[EvolveGenerateConfig], *, existing: Existing = "refuse") -> FolderResult:
    """Make the set. All inputs are checked before the output folder is touched; finished blocks always stay."""
    config = resolved.config
    session = StageSession(COMMAND, resolved, existing)
    inputs = (config.data, config.operations, config.policy, config.novelty.encoder)
    weights = (config.policy, config.novelty.encoder)
    if (finished := session.open(*inputs, free=FREE_WHILE_EVOLVING, weights=weights)) is not None:
        return finished
    operations, policy, seeds = _inputs(config)
    duplicates = Duplicates(config.minhash.threshold, config.minhash.permutations)
    for seed in seeds:
        duplicates.add(seed.prompt)
    environment = make_environment(
        config, operations, seeds, weights=RewardWeights(), find_copy=duplicates.find_copy, on_kept=duplicates.add
    )
    if policy.space not in (None, environment.space.signature):
        console.warn(
            f"the policy learned with novelty measured by {policy.space}; here it is {environment.space.signature}"
        )
    billed = list(billed_guides(environment).values())
    with closing_all(billed):
        environment.guide.check(
            (Example(s.id, o.prompt_for(s.prompt)) for s in seeds for o in operations), config.max_new_tokens
        )
        if config.answers:
            _check_answers(config, environment, seeds)
        prepare_guides(billed, config.budget)
        learned = None if config.policy in BASELINES else config.policy
        parents = (config.data, config.operations, learned, config.novelty.encoder)
        with session.running(*parents, guides=billed) as folder:
            _Generation(config, environment, policy, seeds, folder).run()
    return session.result()


def dry_run(resolved: Resolved[EvolveGenerateConfig]) -> dict[str, Any]:
    """Check the inputs, and estimate the requests to guide and reviewer and their cost; nothing is written."""
    config = resolved.config
    operations, _, seeds = _inputs(config)
    rewrites = len(seeds) * config.passes * config.steps
    answer_tokens = config.max_answer_tokens if config.answers else None
    return cost_estimate(config, operations, seeds, rewrites=rewrites, answer_tokens=answer_tokens)


def _inputs(config: EvolveGenerateConfig) -> tuple[list[Operation], Policy, list[Example]]:
    refuse_recorded_guides(config)
    operations = read_operations(config.operations)
    return (
        operations,
        _policy(config.policy, operations),
        read_examples(config.data, limit=config.limit, references=False, conversations=False),
    )


def _check_answers(config: EvolveGenerateConfig, environment: Environment, seeds: Sequence[Example]) -> None:
    """Refuse settings under which the seeds could not be answered, before rewrites without answers are paid for."""
    try:
        environment.guide.check(answer_requests(seeds, config.answer_template), config.max_answer_tokens)
    except UserError as error:
        hint = "lower --max-answer-tokens, or leave answers out with --no-answers"
        raise UserError(f"answers: {error.message}", where=error.where, hint=hint) from None


def _policy(name: str, operations: Sequence[Operation]) -> Policy:
    if name in BASELINES:
        return BASELINES[name](operations)
    from rlgf_cli.evolve.learned import load_policy  # imports torch, which nothing else here needs

    return load_policy(name, operations)


@dataclass
class _Generation:
    """One session of a run. ``behind``: the tally still lacks blocks of an earlier session."""

    config: EvolveGenerateConfig
    environment: Environment
    policy: Policy
    seeds: Sequence[Example]
    folder: RunDir
    tally: Tally = field(default_factory=Tally)
    behind: bool = True

    def run(self) -> None:
        """Generate all blocks. Raises RlgfError where no rewrite is kept, and the error that stopped the session."""
        config = self.config
        rows = Rows(self.folder.file(INSTRUCTIONS), self.folder.file(STEPS))
        chains = len(self.seeds) * config.passes
        try:
            with (
                console.interruptible("waiting for the answers to the requests in flight") as stop,
                console.progress(COMMAND, chains, milestones=20) as bar,
            ):
                for block in blocks(self.seeds, config.passes, config.batch_size):
                    if (finished := rows.finished(block, config.steps)) is not None:
                        self._recall(finished)
                    else:
                        self.behind = False
                        finished = rows.append(block, self._evolve(block, stop))
                    self.folder.resumable = True
                    self.tally.add(finished)
                    self._refuse_barren(last=False)
                    bar.update(len(block), self._note())
            self.behind = False
            self._refuse_barren(last=True)
        finally:
            self._finish()

    def _evolve(self, block: list[Chain], stop: threading.Event) -> dict[StepIndex, InstructionAnswer]:
        """All steps of a block's chains, then the answers to its kept instructions."""
        config, environment = self.config, self.environment
        for _ in range(config.steps):
            _raise_if_set(stop)
            rollout(environment, block, self.policy, 1, config.seed)
        _raise_if_set(stop)
        if not config.answers:
            return {}
        instructions = kept_instructions(block)
        answers = answer(
            environment.guide,
            list(instructions.values()),
            template=config.answer_template,
            max_new_tokens=config.max_answer_tokens,
            limits=environment.limits,
        )
        return dict(zip(instructions, answers, strict=True))

    def _recall(self, rows: Sequence[AnsweredStepRecord]) -> None:
        """Give the environment the kept instructions of an earlier session, in the order of their steps."""
        for step in range(self.config.steps):
            sound = [row for row in rows[step :: self.config.steps] if row.novelty is not None]
            self.environment.recall([row.text for row in sound], [row.outcome == KEPT for row in sound])

    def _refuse_barren(self, *, last: bool) -> None:
        """Raise RlgfError where no rewrite so far is in the set."""
        counts = self.tally.summary(self.environment.operations)
        if counts["instructions"] or not (last or counts["rewrites"] >= _PATIENCE):
            return
        why = [f"{name}: {count}" for name, count in counts["rejected"].items()]
        why += [f"answers, {name}: {count}" for name, count in counts["answers_rejected"].items()]
        raise RlgfError(
            f"nothing was kept of the {counts['rewrites']} rewrites that were asked for ({', '.join(why)})",
            where=str(self.folder.path),
            hint=f"{STEPS} holds what the guide wrote; {_remedy(counts['rejected'])}",
        )

    def _finish(self) -> None:
        """Record the spend, the summary and the data card, however the session ends. Where blocks of an earlier session
        were not read, its summary and card stay.
        """
        summary = {
            "seeds": len(self.seeds),
            "policy": self.config.policy,
            **self.tally.summary(self.environment.operations),
        }
        manifest = self.folder.manifest
        record_spend(manifest, **billed_guides(self.environment))
        if self.behind:
            return
        manifest.save(result=summary)
        if summary["instructions"]:
            write_data_card(self.folder.file("README.md"), self.config, manifest.data)
        else:
            (self.folder.path / INSTRUCTIONS).unlink(missing_ok=True)

    def _note(self) -> str:
        counts = self.tally.summary(self.environment.operations)
        cost = "" if counts["cost_usd"] is None else f"  ${counts['cost_usd']:.4f}"
        return f"{counts['instructions']} of {counts['rewrites']} in the set{cost}"


def _raise_if_set(stop: threading.Event) -> None:
    if stop.is_set():
        raise Interrupted("the blocks that were finished are kept", hint=_AGAIN)


def _remedy(rejected: dict[str, int]) -> str:
    """A hint for the rule that most rewrites broke."""
    first = next(iter(rejected), "")
    return {
        "chatter": "guide.clean: all removes a chat model's remarks around a text",
        "cut": "a larger max_new_tokens lets it end",
        "too_long": "limits.max_words says how long a rewrite may be",
        "template": "a base model goes on where the prompt ends: take one that follows instructions, or api: chat",
    }.get(first, "look at the guide, its api and the operations")
