"""``rlgf train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlgf_cli import console
from rlgf_cli.cli import options
from rlgf_cli.cli.options import COMMON, MODEL, RUN

ALGORITHM, ROLLOUT = "Algorithm options", "Rollout and update options"


def train(
    algorithm: Annotated[
        str | None,
        typer.Option("--alg", "--algorithm", help="`rlgf ls algorithms` lists them.", rich_help_panel=COMMON),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "--model-name-or-path", help="The policy to start from.", rich_help_panel=COMMON),
    ] = None,
    guide: Annotated[
        str | None,
        typer.Option("--guide", help="FILE.jsonl, hf:PATH, openai:MODEL or an alias.", rich_help_panel=COMMON),
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="Prompts (JSONL).", rich_help_panel=COMMON)] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            "--reward",
            help="Names from `rlgf ls rewards`, file.py:function; several with commas.",
            rich_help_panel=COMMON,
        ),
    ] = None,
    eval_data: Annotated[
        str | None,
        typer.Option("--eval-data", help="Held-out prompts, scored along the way.", rich_help_panel=COMMON),
    ] = None,
    watch: Annotated[
        str | None,
        typer.Option(
            "--watch", help="A figure of the held-out texts to hold against the score.", rich_help_panel=COMMON
        ),
    ] = None,
    stop_on_divergence: Annotated[
        bool | None,
        typer.Option(
            "--stop-on-divergence/--no-stop-on-divergence",
            help="End where the score rises and --watch falls; keep the best model by --watch.",
            rich_help_panel=COMMON,
        ),
    ] = None,
    output: options.Output = None,
    config: options.Config = None,
    set_: options.Set = None,
    seed: options.Seed = None,
    limit: options.Limit = None,
    max_steps: Annotated[int | None, typer.Option("--max-steps", help="Iterations.", rich_help_panel=COMMON)] = None,
    rollin_prob: Annotated[
        float | None,
        typer.Option("--rollin-prob", help="Share of episodes with a roll-in.", rich_help_panel=ALGORITHM),
    ] = None,
    p_ppo_pp: Annotated[
        float | None,
        typer.Option("--p-ppo-pp", help="lols: share of PPO++ iterations.", rich_help_panel=ALGORITHM),
    ] = None,
    switch_step: Annotated[
        int | None,
        typer.Option("--switch-step", help="d2lols: iterations of AggreVaTeD.", rich_help_panel=ALGORITHM),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size",
            "--num-generations",
            help="grpo, rloo: episodes per prompt.",
            rich_help_panel=ALGORITHM,
        ),
    ] = None,
    cut: Annotated[
        str | None, typer.Option("--cut", help="aggrevated: first or inner.", rich_help_panel=ALGORITHM)
    ] = None,
    credit: Annotated[
        str | None, typer.Option("--credit", help="aggrevated: prefix or cut.", rich_help_panel=ALGORITHM)
    ] = None,
    restart: Annotated[
        str | None,
        typer.Option("--restart", help="ppo++: cuts uniform, backward or uncertain.", rich_help_panel=ALGORITHM),
    ] = None,
    restart_steps: Annotated[
        int | None,
        typer.Option("--restart-steps", help="backward: iterations until uniform.", rich_help_panel=ALGORITHM),
    ] = None,
    gate: Annotated[
        bool | None,
        typer.Option("--gate/--no-gate", help="ppo++: only texts above the policy's own.", rich_help_panel=ALGORITHM),
    ] = None,
    advantage: Annotated[
        str | None,
        typer.Option("--advantage", help="aggrevated: gae, or guide_mc (no critic).", rich_help_panel=ALGORITHM),
    ] = None,
    mc_samples: Annotated[
        int | None,
        typer.Option("--mc-samples", help="guide_mc: texts on each side of an action.", rich_help_panel=ALGORITHM),
    ] = None,
    base_url: options.BaseUrl = None,
    max_cost_usd: options.MaxCost = None,
    max_calls: options.MaxCalls = None,
    guide_mode: options.GuideMode = None,
    on_uncovered: Annotated[
        str | None,
        typer.Option("--on-uncovered", help="Prompts without guide text: unguided or drop.", rich_help_panel=ALGORITHM),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", "--lr", help="AdamW's.", rich_help_panel=ROLLOUT)
    ] = None,
    kl_coef: Annotated[
        float | None,
        typer.Option("--kl-coef", help="Weight of the KL to the reference (kl.where).", rich_help_panel=ROLLOUT),
    ] = None,
    episodes: Annotated[
        int | None, typer.Option("--episodes", help="Episodes per iteration.", rich_help_panel=ROLLOUT)
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", "--minibatch-size", help="Episodes per optimizer step.", rich_help_panel=ROLLOUT),
    ] = None,
    gradient_accumulation_steps: Annotated[
        int | None,
        typer.Option("--gradient-accumulation-steps", help="Parts of a minibatch.", rich_help_panel=ROLLOUT),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            "--epochs",
            "--num-ppo-epochs",
            help="Passes over an iteration's episodes.",
            rich_help_panel=ROLLOUT,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", "--max-completion-length", help="Longest response.", rich_help_panel=ROLLOUT),
    ] = None,
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option("--max-prompt-tokens", "--max-prompt-length", help="Longest prompt.", rich_help_panel=ROLLOUT),
    ] = None,
    on_overlong: Annotated[
        str | None,
        typer.Option("--on-overlong", help="Longer prompts: error, truncate or skip.", rich_help_panel=ROLLOUT),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Of the rollouts.", rich_help_panel=ROLLOUT)
    ] = None,
    reward_workers: Annotated[
        int | None,
        typer.Option(
            "--reward-workers", help="Processes for a Python reward that takes long.", rich_help_panel=ROLLOUT
        ),
    ] = None,
    vllm_server: Annotated[
        str | None,
        typer.Option(
            "--vllm-server-base-url", help="A vLLM server that writes for the policy.", rich_help_panel=ROLLOUT
        ),
    ] = None,
    use_peft: Annotated[
        bool | None, typer.Option("--use-peft", help="Train a LoRA adapter.", rich_help_panel=MODEL)
    ] = None,
    lora_r: Annotated[int | None, typer.Option("--lora-r", help="Rank.", rich_help_panel=MODEL)] = None,
    lora_alpha: Annotated[int | None, typer.Option("--lora-alpha", help="Scale.", rich_help_panel=MODEL)] = None,
    load_in_4bit: Annotated[
        bool | None,
        typer.Option("--load-in-4bit", help="Quantise the base (needs bitsandbytes).", rich_help_panel=MODEL),
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option("--gradient-checkpointing", help="Less memory, more time.", rich_help_panel=MODEL),
    ] = None,
    device: options.Device = None,
    dtype: options.DType = None,
    trust_remote_code: options.TrustRemoteCode = None,
    num_processes: Annotated[
        int | None,
        typer.Option("--num-processes", help="Processes, one per device; started here.", rich_help_panel=RUN),
    ] = None,
    accelerate_config: Annotated[
        Path | None,
        typer.Option("--accelerate-config", help="Start them with accelerate and this file.", rich_help_panel=RUN),
    ] = None,
    save_steps: Annotated[
        int | None, typer.Option("--save-steps", help="Iterations between checkpoints.", rich_help_panel=RUN)
    ] = None,
    save_total_limit: Annotated[
        int | None, typer.Option("--save-total-limit", help="Checkpoints to keep.", rich_help_panel=RUN)
    ] = None,
    report_to: Annotated[
        str | None,
        typer.Option("--report-to", help="none, tensorboard, wandb or trackio.", rich_help_panel=RUN),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option("--push-to-hub", help="Repository to upload the result to.", rich_help_panel=RUN),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Say at the end where the time went.", rich_help_panel=RUN)
    ] = False,
    dry_run: options.DryRun = False,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    print_config: options.PrintConfig = False,
    as_json: options.AsJson = False,
) -> None:
    """Train a policy with reinforcement learning, alone or with a guide.

    Examples:

    ```
    rlgf train --alg ppo --model runs/sft --data train.jsonl --reward rouge -o runs/ppo
    rlgf train --alg ppo++ --model runs/sft --guide runs/guide.jsonl --data train.jsonl --reward rouge -o runs/ppopp
    rlgf train -c recipes/demo/train.yaml --alg aggrevated --guide hf:runs/guide --seed 1 -o runs/aggrevated
    ```
    """
    given = {
        "algorithm.name": algorithm,
        "algorithm.rollin_prob": rollin_prob,
        "algorithm.p_ppo_pp": p_ppo_pp,
        "algorithm.switch_step": switch_step,
        "algorithm.group_size": group_size,
        "algorithm.cut": cut,
        "algorithm.credit": credit,
        "algorithm.advantage": advantage,
        "algorithm.mc_samples": mc_samples,
        "algorithm.restart": restart,
        "algorithm.restart_steps": restart_steps,
        "algorithm.gate": gate,
        "model.name": model,
        "model.device": device,
        "model.dtype": dtype,
        "model.trust_remote_code": trust_remote_code,
        "model.load_in_4bit": load_in_4bit,
        "guide.name": guide,
        "guide.base_url": base_url,
        "guide.mode": guide_mode,
        "budget.max_cost_usd": max_cost_usd,
        "budget.max_calls": max_calls,
        "data": data,
        "eval.data": eval_data,
        "watch.name": watch,
        "watch.stop": stop_on_divergence,
        "reward": reward,
        "output": output,
        "seed": seed,
        "limit": limit,
        "max_steps": max_steps,
        "rollout.on_uncovered": on_uncovered,
        "rollout.episodes": episodes,
        "rollout.temperature": temperature,
        "rollout.vllm.url": vllm_server,
        "reward_workers": reward_workers,
        "optim.learning_rate": learning_rate,
        "kl.coef": kl_coef,
        "ppo.minibatch_size": batch_size,
        "ppo.gradient_accumulation_steps": gradient_accumulation_steps,
        "ppo.epochs": epochs,
        "lengths.max_new_tokens": max_new_tokens,
        "lengths.max_prompt_tokens": max_prompt_tokens,
        "lengths.on_overlong": on_overlong,
        "lora.enabled": use_peft,
        "lora.r": lora_r,
        "lora.alpha": lora_alpha,
        "gradient_checkpointing": gradient_checkpointing,
        "parallel.num_processes": num_processes,
        "save_steps": save_steps,
        "save_total_limit": save_total_limit,
        "report_to": report_to,
        "push_to_hub": push_to_hub,
    }
    resolved = options.resolve("train:TrainConfig", config, set_, given)
    if print_config:
        options.print_config(resolved)
        return
    existing = options.existing(resume, overwrite)
    from rlgf_cli.cli import launch

    if not dry_run and launch.wanted(resolved.config.parallel.num_processes, accelerate_config):
        raise typer.Exit(launch.launch(resolved.config.parallel.num_processes, accelerate_config))
    from rlgf_cli.stages import train as stage

    if dry_run:
        options.print_estimate(stage.dry_run(resolved), as_json)
        return
    done = stage.run(resolved, existing=existing, profile=profile)
    if as_json:
        console.result_json({"output": str(done.folder), **done.summary})
    else:
        console.result(str(done.folder))
