"""``rlgf sft``."""

from __future__ import annotations

from typing import Annotated

import typer

from rlgf_cli import console
from rlgf_cli.cli import options
from rlgf_cli.cli import supervised_options as shared
from rlgf_cli.cli.options import COMMON, MODEL, TEXT


def sft(
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
        str | None, typer.Option("--data", help="JSONL with prompt and references.", rich_help_panel=COMMON)
    ] = None,
    guide: Annotated[
        str | None,
        typer.Option("--guide", help="A guide.jsonl: its texts in place of references.", rich_help_panel=COMMON),
    ] = None,
    eval_data: shared.EvalData = None,
    output: options.Output = None,
    limit: options.Limit = None,
    config: options.Config = None,
    set_: options.Set = None,
    seed: options.Seed = None,
    epochs: shared.Epochs = None,
    max_steps: shared.MaxSteps = None,
    batch_size: shared.BatchSize = None,
    gradient_accumulation_steps: shared.Accumulation = None,
    gradient_checkpointing: shared.Checkpointing = None,
    learning_rate: shared.LearningRate = None,
    warmup_steps: shared.WarmupSteps = None,
    references: Annotated[
        str | None,
        typer.Option("--references", help="all, first or random; of --guide too.", rich_help_panel=shared.TRAINING),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option("--template", help="Prompt template; holds {prompt}.", rich_help_panel=TEXT),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Use the model's chat template.", rich_help_panel=TEXT),
    ] = None,
    response_prefix: Annotated[
        str | None,
        typer.Option("--response-prefix", help="Stands before every response, e.g. a space.", rich_help_panel=TEXT),
    ] = None,
    max_prompt_tokens: Annotated[
        int | None, typer.Option("--max-prompt-tokens", help="Longest prompt.", rich_help_panel=TEXT)
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", help="Longest response, EOS counted.", rich_help_panel=TEXT),
    ] = None,
    on_overlong: Annotated[
        str | None,
        typer.Option("--on-overlong", help="error, truncate or skip a prompt that does not fit.", rich_help_panel=TEXT),
    ] = None,
    use_peft: Annotated[
        bool | None, typer.Option("--use-peft/--no-use-peft", help="Train a LoRA.", rich_help_panel=MODEL)
    ] = None,
    lora_r: Annotated[int | None, typer.Option("--lora-r", help="Rank.", rich_help_panel=MODEL)] = None,
    lora_alpha: Annotated[int | None, typer.Option("--lora-alpha", help="Scale.", rich_help_panel=MODEL)] = None,
    load_in_4bit: Annotated[
        bool | None,
        typer.Option("--load-in-4bit/--no-load-in-4bit", help="bitsandbytes NF4.", rich_help_panel=MODEL),
    ] = None,
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
    """Fine-tune a model on prompts and references, or on a guide's texts.

    ```
    rlgf sft --model gpt2 --data train.jsonl -o runs/sft
    rlgf sft --model t5-small --data train.jsonl --max-steps 2000 -o runs/t5
    rlgf sft --model small.yaml --data train.jsonl --epochs 20 -o runs/tiny
    rlgf sft --model runs/sft --data train.jsonl --guide guide.jsonl -o runs/clone
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
            load_in_4bit=load_in_4bit,
            logging_steps=logging_steps,
            eval_steps=eval_steps,
            save_steps=save_steps,
            report_to=report_to,
            push_to_hub=push_to_hub,
        ),
        "guide": guide,
        "references": references,
        "text.template": template,
        "text.chat": chat,
        "text.response_prefix": response_prefix,
        "lengths.max_prompt_tokens": max_prompt_tokens,
        "lengths.max_new_tokens": max_new_tokens,
        "lengths.on_overlong": on_overlong,
        "lora.enabled": use_peft,
        "lora.r": lora_r,
        "lora.alpha": lora_alpha,
    }
    existing = options.existing(resume, overwrite)
    resolved = options.resolve("sft:SftConfig", config, set_, flags)
    if print_config:
        options.print_config(resolved)
        return
    from rlgf_cli.stages import sft as stage

    result = stage.run(resolved, existing=existing)
    if as_json:
        console.result_json({"path": str(result.folder), **result.summary})
    else:
        console.result(str(result.folder))
