"""The commands and their modules, which are imported when a command is called: ``rlgf --help`` imports none of them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from rlgf_cli import signals
from rlgf_cli.errors import RlgfError


class Target(NamedTuple):
    """The place of a command: its function (``module:function`` below ``rlgf_cli.cli``), its first sentence, and the
    class of its config (``module:Class`` below ``rlgf_cli.config``), whose fields declare its flags.
    """

    path: str
    summary: str
    config: str | None = None


COMMANDS: dict[str, Target] = {
    "prepare": Target(
        "prepare:prepare", "Turn a hub dataset or local files into checked JSONL splits.", "prepare:PrepareConfig"
    ),
    "sft": Target("sft:sft", "Fine-tune a model on prompts and references, or on a guide's texts.", "sft:SftConfig"),
    "collect-guide": Target(
        "collect_guide:collect_guide",
        "Buy a guide's text once and keep it: prompts in, one JSONL line per text out.",
        "collect_guide:CollectGuideConfig",
    ),
    "doctor": Target(
        "doctor:doctor", "Check what you would train with: model, data, reward and guide.", "doctor:DoctorConfig"
    ),
    "make-negatives": Target(
        "make_negatives:make_negatives",
        "Make bad texts of many kinds from good ones, to train a reward model on.",
        "make_negatives:MakeNegativesConfig",
    ),
    "train-reward": Target(
        "train_reward:train_reward", "Train a classifier or a reward model.", "train_reward:TrainRewardConfig"
    ),
    "train": Target(
        "train:train", "Train a policy with reinforcement learning, alone or with a guide.", "train:TrainConfig"
    ),
    "eval": Target("eval:evaluate", "Score a model or predictions.", "eval:EvalConfig"),
    "postprocess": Target(
        "postprocess:postprocess",
        "Repair texts by rules: cut loops, unfinished sentences and what follows an end mark.",
        "postprocess:PostprocessConfig",
    ),
    "compare": Target("compare:compare", "Compare evaluations.", "compare:CompareConfig"),
    "report": Target("report:report", "Show runs and evaluations on one HTML page.", "report:ReportConfig"),
    "sweep": Target("sweep:sweep", "Train a grid of runs and compare them.", "sweep:SweepConfig"),
    "evolve stats": Target(
        "evolve_stats:evolve_stats", "Measure a set of instructions, or compare two.", "evolve_stats:EvolveStatsConfig"
    ),
    "generate": Target("generate:generate", "Generate text from a checkpoint.", "generate:GenerateConfig"),
    "evolve train": Target(
        "evolve_train:evolve_train",
        "Learn which operation to evolve an instruction by next.",
        "evolve_train:EvolveTrainConfig",
    ),
    "evolve generate": Target(
        "evolve_generate:evolve_generate",
        "Evolve seed instructions into a new set, with the guide's answers.",
        "evolve_generate:EvolveGenerateConfig",
    ),
    "merge": Target("merge:merge", "Merge LoRA into plain weights.", "merge:MergeConfig"),
    "cache": Target("cache:cache", "Show, export, import or prune the cache of guide texts."),
    "ls": Target("ls:ls", "List what rlgf knows by name."),
    "env": Target("env:env", "Print versions and devices."),
}
"""In the order of ``rlgf --help``. A test compares every summary with the first line of the command's own help. A name
of two words is a command of a family.
"""

FAMILIES = {"evolve": "Let a policy and a guide evolve instruction data."}
"""The first words that several commands share, with a summary of those commands."""


SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda token: token.replace("_", "-"),  # --learning_rate is --learning-rate
}
"""Settings of ``rlgf`` and of every command."""


class Command(TyperCommand):
    """A command that raises interruptions to its caller.

    Typer handles both itself: it ends on Ctrl-C without a message, and takes every broken pipe for a closed stdout.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise signals.error_of(interrupt) from None
        except BrokenPipeError as error:
            raise RlgfError(f"a pipe or connection was closed from the other end: {error}") from error


def load(name: str) -> Any:
    """A command, built from its function."""
    path, _, config = COMMANDS[name]
    module, _, function = path.partition(":")
    single = typer.Typer(
        add_completion=False,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings=SETTINGS,
    )
    command = getattr(importlib.import_module(f"rlgf_cli.cli.{module}"), function)
    if config is not None:
        from rlgf_cli.cli.invocation import with_flags

        command = with_flags(name, config, command)
    single.command(name, cls=Command)(command)
    return get_command(single)


class LazyGroup(TyperGroup):
    """A group that lists its commands with their summaries and imports only the one that is called."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, target in COMMANDS.items():
            word, _, member = name.rpartition(" ")
            if word == self.family:
                self.add_command(TyperCommand(name=member, help=target.summary), member)
            elif not self.family and word not in self.commands:
                self.add_command(family(word), word)

    family = ""
    """The word before its commands' names."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if (name := f"{self.family} {spelled(args[0])}".strip()) in COMMANDS:
            self.add_command(load(name), spelled(args[0]))
        return super().resolve_command(ctx, args)


def family(word: str) -> LazyGroup:
    """The group of the commands that begin with ``word``, such as ``rlgf evolve``."""
    kind = type("Family", (LazyGroup,), {"family": word})
    more = f"rlgf {word} COMMAND --help lists a command's flags and shows examples."
    return kind(name=word, help=FAMILIES[word], epilog=more, no_args_is_help=True, context_settings=SETTINGS)


def called(arguments: Sequence[str]) -> str | None:
    """The command that a command line begins with, of one word or two."""
    first = [spelled(argument) for argument in arguments[:2]]
    return next((name for name in (" ".join(first), *first[:1]) if name in COMMANDS), None)


def spelled(name: str) -> str:
    """``collect_guide`` is ``collect-guide``."""
    return name.replace("_", "-")
