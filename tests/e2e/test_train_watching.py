"""What a person sees of a run: the profile, samples on stderr, the best policy, trackers."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import Result, toy_examples, write_rows
from rlgf_cli.runs import best, trackers
from rlgf_cli.stages import train as stage
from rlgf_cli.training.divergence import HeldOutResult
from rlgf_cli.training.loop import Trainer
from rlgf_cli.training.timing import ALWAYS
from runs import assert_figures, rows_of

Train = Callable[..., Result]
STEPS = 6


@pytest.fixture
def train(run_cli: Train, tmp_path: Path, tiny_gpt2: Path) -> Train:
    data = write_rows(tmp_path / "train.jsonl", toy_examples(12))
    (tmp_path / "reward.py").write_text("def letters(text):\n    return sum(c in 'abcdefghi' for c in text) / 9\n")

    def run(*more: object, alg: str = "ppo", folder: str = "run") -> Result:
        guide = ["--guide", f"hf:{tiny_gpt2}"] if alg != "ppo" else []
        return run_cli(
            "train", "--alg", alg, "--model", tiny_gpt2, "--data", data, "--device", "cpu", "--lr", "1e-3",
            "--reward", f"{tmp_path / 'reward.py'}:letters", "--episodes", 8, "--batch-size", 8, "--epochs", 2,
            "--max-new-tokens", 8, "--max-steps", STEPS, "--save-steps", 2, *guide, *more, "-o", tmp_path / folder,
        )  # fmt: skip

    return run


@pytest.fixture
def dies(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """``dies(5)``: runs die when five steps are done; ``dies(None)``: no more."""
    step = Trainer.step

    def at(when: int | None) -> None:
        def stops(self: Trainer) -> Any:
            if self.state.step == when:
                raise RuntimeError("the machine went away")
            return step(self)

        monkeypatch.setattr(Trainer, "step", stops)

    return at


def manifest(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


# --- where the time went


def table(result: Result) -> dict[str, list[str]]:
    lines = [line for line in result.stderr.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert not lines or cells[0] == ["part", "steps", "mean s", "median s", "share", "tokens/s"]
    return {row[0]: row[1:] for row in cells[1:]}


def test_every_row_says_where_its_time_went_and_the_profile_is_made_of_them(train: Train, tmp_path: Path) -> None:
    plain = train("--max-steps", 1, folder="plain")
    assert plain.exit_code == 0 and not table(plain)
    held_out = ["--eval-data", tmp_path / "train.jsonl", "--set", "eval.every=3"]
    done = train("--profile", *held_out, alg="ppo++")
    assert done.exit_code == 0 and done.stdout == f"{tmp_path / 'run'}\n"
    rows = rows_of(tmp_path / "run", without=())
    assert all(f"time/{part}" in row for row in rows for part in (*ALWAYS, "other"))
    assert [("time/save" in row, "time/eval" in row) for row in rows] == [
        (False, True), (False, False), (True, True), (True, False), (True, False), (False, True),
    ]  # fmt: skip
    shown = table(done)
    assert set(shown) == {*ALWAYS, "eval", "check", "save", "other", "all"}
    for part in ("rollout", "guide", "update"):
        seconds = [row[f"time/{part}"] for row in rows]
        assert float(shown[part][1]) == pytest.approx(sum(seconds) / STEPS, abs=1e-4)
        assert float(shown[part][4]) > 0
    assert shown["save"][0] == "4"  # the last one comes after the last row
    assert sum(float(line[3].rstrip("%")) for name, line in shown.items() if name != "all") == pytest.approx(100, abs=1)
    again = train(
        "--profile", "--resume", "--eval-data", tmp_path / "train.jsonl", "--set", "eval.every=3", alg="ppo++"
    )
    assert "is done already" in again.stderr and table(again)["update"][:3] == shown["update"][:3]
    assert all(row["time/guide"] == 0 for row in rows_of(tmp_path / "plain", without=()))


def test_the_profile_of_a_run_that_ends_early_or_goes_on(train: Train, tmp_path: Path, dies: Any) -> None:
    dies(5)
    stopped = train("--profile")
    assert stopped.exit_code == 1 and table(stopped)["all"][0] == "5"
    dies(None)
    done = train("--profile", "--resume")
    assert done.exit_code == 0 and table(done)["all"][0] == str(STEPS)  # one step was done again, and counts once


# --- samples


def test_samples_are_shown_with_their_authors(train: Train, tmp_path: Path) -> None:
    shown = train("--rollin-prob", 1, "--set", "rollout.save_every=2", "--set", "rollout.show_count=2", alg="ppo++")
    lines = shown.stderr.splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith("step ") and ": " in line]
    assert len(heads) == 2 * 3
    episodes = [json.loads(line) for line in (tmp_path / "run/rollouts/step_3.jsonl").read_text().splitlines()]
    assert lines[heads[2]] == f"step 3: {episodes[0]['prompt']}"
    text = lines[heads[2] + 1]
    assert text.startswith("  [guide]") and text.count("[policy]") == 1
    assert f"(score {episodes[0]['score']:.3f}" in text
    assert ("cut at the limit" in text) == (not episodes[0]["finished"])
    assert shown.stdout == f"{tmp_path / 'run'}\n"


@pytest.mark.parametrize("quiet", ["rollout.show_count=0", "rollout.save_every=0"])
def test_samples_are_not_shown_to_who_does_not_want_them(train: Train, quiet: str) -> None:
    shown = train("--set", quiet)
    assert shown.exit_code == 0 and "[policy]" not in shown.stderr
    assert "[policy]" in train(folder="other").stderr


# --- the best policy on held-out prompts


def scripted(monkeypatch: pytest.MonkeyPatch, scores: list[float]) -> None:
    """Held-out scores as they are given, one evaluation after the other; the start's is above them all."""
    left = [9.0, *scores]
    figures = {"eval/score_error": 0.1}
    monkeypatch.setattr(
        stage, "make_evaluator", lambda *_, **__: lambda: HeldOutResult({**figures, "eval/score": left.pop(0)}, {})
    )


@pytest.mark.parametrize(
    ("scores", "step", "score"), [([0.1, 0.5, 0.5, 0.3, 0.5, 0.2], 2, 0.5), ([-3, -4, -5, -6, -2, -9], 5, -2)]
)
def test_the_best_policy_is_kept(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scores: list[float], step: int, score: float
) -> None:
    """Of equal ones the first; rotation does not touch it."""
    scripted(monkeypatch, scores)
    held_out = ["--eval-data", tmp_path / "train.jsonl", "--set", "eval.every=1", "--save-steps", 1]
    assert train(*held_out, "--set", "save_total_limit=null").exit_code == 0
    run = tmp_path / "run"
    assert best.read(run / "best") == {"schema_version": 1, "step": step, "score": score}
    result = manifest(run)["result"]
    assert (result["best_step"], result["best_score"]) == (step, score)
    kept, then = (
        load_file(run / "best/model.safetensors"),
        load_file(run / f"checkpoints/step_{step}/model.safetensors"),
    )
    assert all((kept[name] == tensor).all() for name, tensor in then.items())
    assert any((tensor != load_file(run / "model.safetensors")[name]).any() for name, tensor in kept.items())
    scripted(monkeypatch, scores)
    assert train(*held_out, "--save-total-limit", 1, folder="rotated").exit_code == 0
    assert best.read(tmp_path / "rotated/best") == best.read(run / "best")
    assert "best" in manifest(run)["wrote"]


def test_the_best_policy_is_a_checkpoint_like_any_other(train: Train, run_cli: Train, tmp_path: Path) -> None:
    """from_pretrained and `rlgf eval` load it; evaluated as in training it has the score that was noted."""
    data = tmp_path / "train.jsonl"
    assert train("--eval-data", data, "--set", "eval.every=1").exit_code == 0
    kept = tmp_path / "run" / "best"
    AutoModelForCausalLM.from_pretrained(kept)
    rows = rows_of(tmp_path / "run")
    noted = best.read(kept)
    assert noted is not None and noted["score"] == max(row["eval/score"] for row in rows)
    scored = run_cli(
        "eval", "--model", kept, "--data", data, "--metrics", f"reward:{tmp_path / 'reward.py'}:letters",
        "--temperature", 1, "--max-new-tokens", 8, "--device", "cpu", "-o", tmp_path / "eval",
    )  # fmt: skip
    assert scored.exit_code == 0, scored.stderr
    means = manifest(tmp_path / "eval")["result"]
    assert next(iter(means.values())) == pytest.approx(noted["score"], abs=1e-9)


def test_the_best_adapter_is_kept(train: Train, tmp_path: Path) -> None:
    lora = ["--use-peft", "--lora-r", 4, "--eval-data", tmp_path / "train.jsonl", "--set", "eval.every=2"]
    assert train(*lora).exit_code == 0
    assert (tmp_path / "run/best/adapter_model.safetensors").is_file()
    assert not (tmp_path / "run/best/model.safetensors").exists()
    assert train(*lora, "--set", "model.name=" + str(tmp_path / "run/best"), folder="on").exit_code == 0


def test_no_best_policy_without_held_out_prompts_or_where_it_is_not_wanted(train: Train, tmp_path: Path) -> None:
    assert train().exit_code == 0
    assert not (tmp_path / "run/best").exists() and "best_step" not in manifest(tmp_path / "run")["result"]
    held_out = ["--eval-data", tmp_path / "train.jsonl", "--set", "eval.every=2"]
    assert train(*held_out, "--set", "save_best=false", folder="without").exit_code == 0
    assert train(*held_out, folder="with").exit_code == 0
    assert not (tmp_path / "without/best").exists()
    kept, result = best.read(tmp_path / "with/best"), manifest(tmp_path / "without")["result"]
    assert kept is not None and result["best_step"] == kept["step"]
    assert_figures(rows_of(tmp_path / "with"), rows_of(tmp_path / "without"))


def test_overwriting_a_run_that_was_killed_takes_its_best_policy_along(train: Train, tmp_path: Path) -> None:
    held_out = ["--eval-data", tmp_path / "train.jsonl", "--set", "eval.every=2"]
    assert train(*held_out).exit_code == 0
    put_away = best._old(tmp_path / "run/best", tmp_path / "run/checkpoints")
    (tmp_path / "run/best").rename(put_away)  # killed between the renames
    assert train("--overwrite").exit_code == 0
    assert not (tmp_path / "run/best").exists() and not put_away.exists()


# --- trackers

FAKE = """
import json, pathlib
FILE = pathlib.Path({file!r})

def _note(**what):
    with FILE.open("a") as stream:
        stream.write(json.dumps(what) + "\\n")

class _Run:
    def log(self, values, step=None):
        _note(event="log", step=step, values=values)
    def finish(self):
        _note(event="finish")

def init(**given):
    print("a greeting")
    _note(event="init", **{{k: v for k, v in given.items() if k != "config"}}, seed=given["config"]["seed"])
    return _Run()
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """``fake("wandb")`` puts a module of that name in the way; returns the file of what it was told."""

    def make(name: str) -> Path:
        told = tmp_path / f"{name}.jsonl"
        (tmp_path / "modules" / name).mkdir(parents=True)
        (tmp_path / "modules" / name / "__init__.py").write_text(FAKE.format(file=str(told)))
        monkeypatch.syspath_prepend(tmp_path / "modules")
        before[name] = sys.modules.pop(name, None)
        return told

    before: dict[str, Any] = {}
    yield make
    for name, module in before.items():
        sys.modules.pop(name, None)
        sys.modules.update({name: module} if module is not None else {})


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_goes_on_in_the_trackers_run(
    train: Train, tmp_path: Path, fake: Any, dies: Any, name: str
) -> None:
    """The same run, every step once, also that which is done again; stdout holds the result alone."""
    told = fake(name)
    dies(5)  # after the checkpoint of step 4
    assert train("--report-to", name).exit_code == 1
    dies(None)
    done = train("--report-to", name, "--resume")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'run'}\n" and "a greeting" in done.stderr
    events = [json.loads(line) for line in told.read_text().splitlines()]
    first, second = (e for e in events if e["event"] == "init")
    assert first == second and first["resume"] == "allow" and first["project"] == "rlgf" and first["seed"] == 0
    run_id = manifest(tmp_path / "run")["run_id"]
    assert (first["id"], first["name"]) == (run_id, "run") if name == "wandb" else first["name"] == f"run-{run_id}"
    logged = [e for e in events if e["event"] == "log"]
    assert [e["step"] for e in logged] == list(range(1, STEPS + 1))
    rows = rows_of(tmp_path / "run")
    assert [e["values"]["score/mean"] for e in logged] == [row["score/mean"] for row in rows]
    assert sum(e["event"] == "finish" for e in events) == 2


def test_a_tracker_is_told_of_every_step_once_whatever_sessions_there_were(
    train: Train, tmp_path: Path, fake: Any, dies: Any
) -> None:
    """One without a tracker; one that went far; one that ended where the one before had been already."""
    told = fake("wandb")
    for steps, name in ((3, "none"), (5, "wandb"), (2, "wandb"), (None, "wandb")):
        dies(steps)
        ended = train("--report-to", name, "--save-steps", 100, *(["--resume"] if name == "wandb" else []))
        assert ended.exit_code == (0 if steps is None else 1), ended.stderr
    events = [json.loads(line) for line in told.read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "log"] == list(range(1, STEPS + 1))
    assert len({e["id"] for e in events if e["event"] == "init"}) == 1


def test_another_run_is_another_one_for_the_tracker(train: Train, tmp_path: Path, fake: Any) -> None:
    told = fake("wandb")
    assert train("--report-to", "wandb", "--max-steps", 1).exit_code == 0
    assert train("--report-to", "wandb", "--max-steps", 1, "--overwrite").exit_code == 0
    first, second = (e["id"] for e in map(json.loads, told.read_text().splitlines()) if e["event"] == "init")
    assert first != second


def test_tensorboard_hides_what_is_done_again(
    train: Train, tmp_path: Path, fake: Any, dies: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("tensorboard")
    made: list[tuple[str, int | None]] = []
    steps: list[int] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int | None = None) -> None:
            made.append((folder, purge_step))
            Path(folder).mkdir(exist_ok=True)

        def add_scalar(self, name: str, value: float, global_step: int) -> None:
            if name == "score/mean":
                steps.append(global_step)

        def flush(self) -> None: ...

        def close(self) -> None: ...

    stand_in = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)  # type: ignore[arg-type]
    dies(5)
    assert train("--report-to", "tensorboard").exit_code == 1
    dies(None)
    assert train("--report-to", "tensorboard", "--resume").exit_code == 0
    assert made == [(str(tmp_path / "run/tensorboard"), None), (str(tmp_path / "run/tensorboard"), 5)]
    assert steps == [1, 2, 3, 4, 5, 5, 6]
    assert "tensorboard" in manifest(tmp_path / "run")["wrote"]  # --overwrite removes it


def test_what_tensorboard_shows_of_a_resumed_run(train: Train, tmp_path: Path, dies: Any) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (pip install 'rlgf-cli[trackers]')")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    dies(5)
    assert train("--report-to", "tensorboard").exit_code == 1
    dies(None)
    assert train("--report-to", "tensorboard", "--resume").exit_code == 0
    seen = EventAccumulator(str(tmp_path / "run/tensorboard"))
    seen.Reload()
    assert [event.step for event in seen.Scalars("score/mean")] == list(range(1, STEPS + 1))


def test_a_tracker_that_is_missing_is_said_before_a_model_is_loaded(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(stage, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    missing = train("--report-to", "trackio")
    assert missing.exit_code == 2 and "trackio is not installed" in missing.stderr
    assert not (tmp_path / "run").exists()
