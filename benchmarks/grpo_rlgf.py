"""One run of the GRPO benchmark's workload with rlgf: ``rlgf train`` itself, its iterations timed from outside."""

from __future__ import annotations

from grpo_workload import EPISODES, GROUP, KL, LEARNING_RATE, LORA_ALPHA, LORA_R, TEMPERATURE, read_grpo_case
from speed_rlgf import timed_training
from speed_workload import Clock

REWARD = """\
from grpo_workload import concepts_covered

def score(text, meta):
    return concepts_covered(meta["concepts"], text)
"""


def main() -> None:
    case, model, folder = read_grpo_case()
    clock = Clock()
    reward = folder / "reward.py"
    reward.write_text(REWARD)
    flags = {
        "model.name": model,
        "model.device": "cpu",
        "model.dtype": "bfloat16" if case.lora else "float32",
        "text.chat": True,
        "lora.enabled": case.lora,
        "lora.r": LORA_R,
        "lora.alpha": LORA_ALPHA,
        "lora.target_modules": "all-linear",
        "data": str(folder / "train.jsonl"),
        "reward": f"{reward}:score",
        "algorithm.name": "grpo",
        "algorithm.group_size": GROUP,
        "lengths.max_new_tokens": case.response,
        "lengths.min_new_tokens": 0 if case.eos else case.response,
        "rollout.episodes": EPISODES,
        "rollout.batch_size": EPISODES,
        "rollout.temperature": TEMPERATURE,
        "rollout.save_every": 0,
        "ppo.minibatch_size": EPISODES,
        "ppo.epochs": 1,
        "gradient_checkpointing": case.checkpointing,
        "kl.coef": KL,
        "optim.learning_rate": LEARNING_RATE,
        "max_steps": case.iterations + 1,
        "output": str(folder / "run"),
    }
    rows = timed_training(clock, flags)
    clock.report(
        tokens=sum(row["tokens"] for row in rows[1:]) / case.iterations,
        score=sum(row["score/mean"] for row in rows) / len(rows),
    )


if __name__ == "__main__":
    main()
