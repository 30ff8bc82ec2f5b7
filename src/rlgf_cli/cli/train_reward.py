"""``rlgf train-reward``."""

from __future__ import annotations

from typing import Annotated

import typer

from rlgf_cli import console
from rlgf_cli.cli import options
from rlgf_cli.cli import supervised_options as shared
from rlgf_cli.cli.options import COMMON, TEXT


def train_reward(
    objective: Annotated[
        str | None, typer.Option("--objective", help="classification or pairwise.", rich_help_panel=COMMON)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "--model-name-or-path",
            help="Folder, hub name, or a .yaml that describes a small model from scratch.",
            rich_help_panel=COMMON,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="JSONL with text and label, or with chosen and rejected.", rich_help_panel=COMMON),
    ] = None,
    eval_data: shared.EvalData = None,
    output: options.Output = None,
    limit: options.Limit = None,
    config: options.Config = None,
    set_: options.Set = None,
    seed: options.Seed = None,
    text_key: Annotated[
        str | None,
        typer.Option("--text-key", help="Dotted field of the text; several with commas.", rich_help_panel=TEXT),
    ] = None,
    label_key: Annotated[
        str | None, typer.Option("--label-key", help="Dotted field of the label.", rich_help_panel=TEXT)
    ] = None,
    good_label: Annotated[
        str | None,
        typer.Option("--good-label", help="Of good texts. Default: reference, else the last.", rich_help_panel=TEXT),
    ] = None,
    prompt_key: Annotated[
        str | None, typer.Option("--prompt-key", help="Dotted field of a pair's prompt.", rich_help_panel=TEXT)
    ] = None,
    chosen_key: Annotated[
        str | None, typer.Option("--chosen-key", help="Dotted field of a pair's better text.", rich_help_panel=TEXT)
    ] = None,
    rejected_key: Annotated[
        str | None, typer.Option("--rejected-key", help="Dotted field of a pair's worse text.", rich_help_panel=TEXT)
    ] = None,
    kind_key: Annotated[
        str | None,
        typer.Option("--kind-key", help="Dotted field of the kind of text, for the figures.", rich_help_panel=TEXT),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Longer texts are cut.", rich_help_panel=TEXT)
    ] = None,
    eval_fraction: Annotated[
        float | None,
        typer.Option("--eval-fraction", help="Held out where there is no --eval-data.", rich_help_panel=TEXT),
    ] = None,
    epochs: shared.Epochs = None,
    max_steps: shared.MaxSteps = None,
    batch_size: shared.BatchSize = None,
    gradient_accumulation_steps: shared.Accumulation = None,
    gradient_checkpointing: shared.Checkpointing = None,
    learning_rate: shared.LearningRate = None,
    warmup_steps: shared.WarmupSteps = None,
    device: options.Device = None,
    dtype: options.DType = None,
    revision: shared.Revision = None,
    trust_remote_code: options.TrustRemoteCode = None,
    logging_steps: shared.LoggingSteps = None,
    eval_steps: shared.EvalSteps = None,
    save_steps: shared.SaveSteps = None,
    report_to: shared.ReportTo = None,
    push_to_hub: shared.PushToHub = None,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    print_config: options.PrintConfig = False,
    as_json: options.AsJson = False,
) -> None:
    """Train a classifier or a reward model.

    ```
    rlgf train-reward --model gpt2 --data labelled.jsonl -o runs/clf
    rlgf train-reward --model small.yaml --data a.jsonl --label-key meta.label -o clf
    rlgf train-reward --objective pairwise --model gpt2 --data pairs.jsonl -o runs/rm
    ```
    """
    flags = {
        **shared.flags(
            model=model,
            data=data,
            eval_data=eval_data,
            output=output,
            limit=limit,
            seed=seed,
            epochs=epochs,
            max_steps=max_steps,
            batch_size=batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            gradient_checkpointing=gradient_checkpointing,
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            device=device,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            logging_steps=logging_steps,
            eval_steps=eval_steps,
            save_steps=save_steps,
            report_to=report_to,
            push_to_hub=push_to_hub,
        ),
        "objective": objective,
        "text_key": text_key,
        "label_key": label_key,
        "good_label": good_label,
        "prompt_key": prompt_key,
        "chosen_key": chosen_key,
        "rejected_key": rejected_key,
        "kind_key": kind_key,
        "max_tokens": max_tokens,
        "eval_fraction": eval_fraction,
    }
    existing = options.existing(resume, overwrite)
    resolved = options.resolve("train_reward:TrainRewardConfig", config, set_, flags)
    if print_config:
        options.print_config(resolved)
        return
    from rlgf_cli.stages import train_reward as stage

    result = stage.run(resolved, existing=existing)
    if as_json:
        console.result_json({"path": str(result.folder), **result.summary})
    else:
        console.result(str(result.folder))
