"""Flags that ``sft`` and ``train-reward`` share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rlgf_cli.cli.options import COMMON, MODEL, RUN

TRAINING = "Training options"

EvalData = Annotated[
    str | None, typer.Option("--eval-data", help="Held-out JSONL, scored at the end.", rich_help_panel=COMMON)
]
Epochs = Annotated[
    float | None,
    typer.Option("--epochs", "--num-train-epochs", help="Passes over the data.", rich_help_panel=TRAINING),
]
MaxSteps = Annotated[
    int | None,
    typer.Option("--max-steps", help="Optimizer steps; wins over epochs.", rich_help_panel=TRAINING),
]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", "--per-device-train-batch-size", help="Examples at once.", rich_help_panel=TRAINING),
]
Accumulation = Annotated[
    int | None,
    typer.Option("--gradient-accumulation-steps", help="Batches per step.", rich_help_panel=TRAINING),
]
Checkpointing = Annotated[
    bool | None,
    typer.Option(
        "--gradient-checkpointing/--no-gradient-checkpointing",
        help="Less memory, more time.",
        rich_help_panel=TRAINING,
    ),
]
LearningRate = Annotated[
    float | None, typer.Option("--learning-rate", help="Peak learning rate.", rich_help_panel=TRAINING)
]
WarmupSteps = Annotated[
    int | None, typer.Option("--warmup-steps", help="Steps up to the peak.", rich_help_panel=TRAINING)
]
LoggingSteps = Annotated[
    int | None, typer.Option("--logging-steps", help="Steps per row of metrics.jsonl.", rich_help_panel=RUN)
]
EvalSteps = Annotated[
    int | None, typer.Option("--eval-steps", help="Score the held-out data this often.", rich_help_panel=RUN)
]
SaveSteps = Annotated[int | None, typer.Option("--save-steps", help="Steps between checkpoints.", rich_help_panel=RUN)]
ReportTo = Annotated[
    str | None,
    typer.Option("--report-to", help="none, tensorboard, wandb or trackio.", rich_help_panel=RUN),
]
PushToHub = Annotated[
    str | None,
    typer.Option("--push-to-hub", help="Upload the result to this repository.", rich_help_panel=RUN),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", help="Branch, tag or commit of a hub model.", rich_help_panel=MODEL),
]


def flags(**given: Any) -> dict[str, Any]:
    """Config keys of the flags above; optimizer and model flags lie in their sections."""
    sections = {
        "learning_rate": "optim",
        "warmup_steps": "optim",
        "device": "model",
        "dtype": "model",
        "revision": "model",
        "trust_remote_code": "model",
        "load_in_4bit": "model",
    }
    return {f"{sections[k]}.{k}" if k in sections else k: value for k, value in given.items()}
