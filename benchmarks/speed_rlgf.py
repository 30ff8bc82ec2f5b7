"""One run of the speed benchmark's workload with rlgf: ``rlgf train`` itself, its iterations timed from outside."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

from speed_workload import EPOCHS, MINIBATCH, ROLLOUT_BATCH, Clock, read_case

from rlgf_cli.config.loader import resolve
from rlgf_cli.config.train import TrainConfig
from rlgf_cli.stages import train
from rlgf_cli.training import guide_writer, loop, timing

REWARD = """\
from speed_workload import coverage

def score(text, prompt):
    return coverage(prompt, text)
"""


def timed_training(clock: Clock, flags: dict[str, Any]) -> list[dict[str, Any]]:
    """``rlgf train`` with these keys; every iteration is a lap of the clock. Returns the rows of metrics.jsonl with the
    response tokens of each."""
    plain, rows = loop.Trainer.step, []

    def timed(trainer: loop.Trainer) -> Any:
        began = time.process_time()
        row, episodes = plain(trainer)
        clock.lap(time.process_time() - began)
        clock.parts[-1] = {name[5:]: seconds for name, seconds in row.items() if name.startswith("time/")}
        rows.append({**row, "tokens": sum(e.length for e in episodes)})
        return row, episodes

    loop.Trainer.step = timed  # type: ignore[method-assign]
    cpu: Any = SimpleNamespace(perf_counter=time.process_time)
    timing.time = guide_writer.time = cpu  # type: ignore[attr-defined]  # the split in CPU seconds as well
    given = {key: value for key, value in flags.items() if value is not None}
    train.run(resolve(TrainConfig, flags=given), existing="overwrite")
    return rows


def main() -> None:
    case, folder = read_case()
    clock = Clock()
    reward = folder / "reward.py"
    reward.write_text(REWARD)
    guides = {"ppo": None, "ppo++": str(folder / "guide.jsonl"), "aggrevated": f"hf:{folder / 'guide'}"}
    flags = {
        "model.name": str(folder / "policy"),
        "model.device": "cpu",
        "model.dtype": case.dtype,
        "data": str(folder / "train.jsonl"),
        "reward": f"{reward}:score",
        "algorithm.name": case.algorithm,
        "guide.name": guides[case.algorithm],
        "lengths.max_new_tokens": case.response,
        "lengths.min_new_tokens": case.response,  # EOS blocked
        "rollout.episodes": case.episodes,
        "rollout.batch_size": ROLLOUT_BATCH,
        "rollout.save_every": 0,
        "ppo.minibatch_size": MINIBATCH,
        "ppo.epochs": EPOCHS,
        "ppo.critic": case.critic,
        "max_steps": case.iterations + 1,
        "output": str(folder / "run"),
    }
    measured = timed_training(clock, flags)[1:]
    clock.report(
        episodes=case.episodes,
        tokens=sum(r["tokens"] for r in measured) / len(measured),
        learned=sum(r["tokens/learned"] for r in measured) / len(measured),
    )


if __name__ == "__main__":
    main()
