"""One run of the speed benchmark's workload with TRL 1.12.0's experimental PPOTrainer, in an environment of its own.

The trainer is used as released, but for three things. Its accumulation is 1, so that it steps after every minibatch:
``gradient_accumulation_steps`` is the only way to a batch larger than what is run at once, and by itself would leave
one step of four. Its call of the reward model is answered by the Python reward of the other side. And CPU time is read
around its parts.
"""

from __future__ import annotations

from typing import Any

from speed_workload import EPOCHS, MINIBATCH, PAD, ROLLOUT_BATCH, Clock, coverage, read_case, step_laps


def main() -> None:
    case, folder = read_case()
    clock = Clock()
    import torch
    from datasets import load_dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy")
    reference = AutoModelForCausalLM.from_pretrained(folder / "policy")
    critic = AutoModelForSequenceClassification.from_pretrained(folder / "policy", num_labels=1)
    judge = torch.nn.Identity()
    plain_reward = ppo_trainer.get_reward

    def reward(model: Any, ids: Any, pad: int, context: int) -> Any:
        if model is not judge:
            return plain_reward(model, ids, pad, context)
        prompts = tokenizer.batch_decode(ids[:, :context], skip_special_tokens=True)
        texts = tokenizer.batch_decode(ids[:, context:], skip_special_tokens=True)
        return None, torch.tensor([coverage(p, t) for p, t in zip(prompts, texts, strict=True)]), None

    tokens = []
    write = clock.part("rollout", ppo_trainer.batch_generation)

    def counted(model: Any, queries: Any, *args: Any) -> Any:
        found = write(model, queries, *args)
        tokens.append(found[0].numel() - queries.numel())
        return found

    ppo_trainer.get_reward, ppo_trainer.batch_generation = reward, counted

    data = load_dataset("json", data_files=str(folder / "train.jsonl"), split="train", cache_dir=str(folder / "hf"))
    data = data.map(lambda row: {"input_ids": tokenizer(row["prompt"])["input_ids"]}, remove_columns=data.column_names)
    config = PPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=MINIBATCH,
        gradient_accumulation_steps=case.episodes // MINIBATCH,
        num_mini_batches=case.episodes // MINIBATCH,
        num_ppo_epochs=EPOCHS,
        local_rollout_forward_batch_size=ROLLOUT_BATCH,
        total_episodes=case.episodes * (case.iterations + 1),
        response_length=case.response,
        temperature=1.0,
        num_sample_generations=0,
        learning_rate=1e-5,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=judge,
        train_dataset=data,
        eval_dataset=data,
        value_model=critic,
        callbacks=[step_laps(clock)],
    )
    trainer.accelerator.gradient_accumulation_steps = 1
    assert tokenizer.pad_token_id == PAD
    trainer.train()
    measured = tokens[1:]
    clock.report(episodes=case.episodes, tokens=sum(measured) / len(measured), learned=sum(measured) / len(measured))


if __name__ == "__main__":
    main()
