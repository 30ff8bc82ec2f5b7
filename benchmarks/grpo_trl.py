"""One run of the GRPO benchmark's workload with TRL's GRPOTrainer, as released; CPU time is read around its parts.

It is given what makes it fast at this size: no logging, one generation for each optimizer step, so that it computes no
log-probabilities of the old policy, and gradient checkpointing (its default) only where the case says so.
"""

from __future__ import annotations

import json
from typing import Any

from grpo_workload import (
    EPISODES,
    GROUP,
    KL,
    LEARNING_RATE,
    LORA_ALPHA,
    LORA_R,
    TEMPERATURE,
    concepts_covered,
    read_grpo_case,
)
from speed_workload import Clock, step_laps


def main() -> None:
    case, model, folder = read_grpo_case()
    clock = Clock()
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    data = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": row["prompt"]}], "concepts": row["meta"]["concepts"]} for row in rows]
    )
    tokens: list[int] = []
    scores: list[float] = []

    def reward(completions: list[Any], completion_ids: list[Any], concepts: list[Any], **_: Any) -> list[float]:
        tokens.append(sum(map(len, completion_ids)))
        texts = [completion[0]["content"] for completion in completions]
        found = [concepts_covered(words, text) for words, text in zip(concepts, texts, strict=True)]
        scores.extend(found)
        return found

    class Timed(GRPOTrainer):
        """Writes and scores as parts of the clock: what is left of an iteration is the update."""

        _generate = clock.part("rollout", GRPOTrainer._generate)
        _generate_and_score_completions = clock.part("rollout and scoring", GRPOTrainer._generate_and_score_completions)

    config = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=EPISODES,
        generation_batch_size=EPISODES,
        num_generations=GROUP,
        max_completion_length=case.response,
        generation_kwargs=None if case.eos else {"min_new_tokens": case.response},
        temperature=TEMPERATURE,
        beta=KL,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_steps=case.iterations + 1,
        gradient_checkpointing=case.checkpointing,
        use_cpu=True,
        bf16=case.lora,
        model_init_kwargs={"dtype": "bfloat16" if case.lora else "float32"},
        logging_steps=1000,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    lora = LoraConfig(r=LORA_R, lora_alpha=LORA_ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = Timed(
        model=model,
        args=config,
        train_dataset=data,
        reward_funcs=reward,
        peft_config=lora if case.lora else None,
        callbacks=[step_laps(clock)],
    )
    trainer.train()
    clock.report(tokens=sum(tokens[1:]) / case.iterations, score=sum(scores) / len(scores))


if __name__ == "__main__":
    main()
