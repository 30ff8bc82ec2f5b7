"""What sft and train-reward share: the loss, the settings, checkpoints, Ctrl-C, and the checks before resuming."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from rlgf_cli.artifacts import checkpoints, resume
from rlgf_cli.artifacts.rundir import RunDir
from rlgf_cli.config.loader import resolve
from rlgf_cli.config.sft import SftConfig
from rlgf_cli.errors import UserError
from rlgf_cli.supervised import callback
from rlgf_cli.supervised import trainer as supervised

CPU = torch.device("cpu")


def config(**flags: Any) -> SftConfig:
    dotted = {key.replace("__", "."): value for key, value in flags.items()}
    return resolve(SftConfig, flags={"model": "m", "data": "d", "output": "runs/x", **dotted}).config


def arguments(tmp_path: Path, **flags: Any) -> Any:
    return supervised.training_arguments(TrainingArguments, config(**flags), tmp_path, device=CPU, dtype=torch.float32)


def test_cross_entropy_is_the_mean_over_labels_or_over_the_given_count() -> None:
    logits = torch.randn(2, 3, 5)
    labels = torch.tensor([[1, 2, -100], [4, -100, -100]])
    by_hand = -sum(float(logits[i, j].log_softmax(-1)[labels[i, j]]) for i, j in ((0, 0), (0, 1), (1, 0)))
    outputs = SimpleNamespace(logits=logits)
    assert float(supervised.cross_entropy(outputs, labels)) == pytest.approx(by_hand / 3, rel=1e-5)
    assert float(supervised.cross_entropy(outputs, labels, torch.tensor(12))) == pytest.approx(by_hand / 12, rel=1e-5)
    classes = SimpleNamespace(logits=logits[:, 0])
    expected = -sum(float(logits[i, 0].log_softmax(-1)[i]) for i in range(2)) / 2
    assert float(supervised.cross_entropy(classes, torch.tensor([0, 1]))) == pytest.approx(expected, rel=1e-5)


def test_the_config_reaches_the_trainer(tmp_path: Path) -> None:
    given = arguments(
        tmp_path, batch_size=3, gradient_accumulation_steps=5, gradient_checkpointing=True, epochs=1.5, seed=7,
        optim__learning_rate=3e-4, optim__schedule="cosine", optim__warmup_steps=9, optim__weight_decay=0.1,
        optim__max_grad_norm=0.5, logging_steps=4, eval_steps=6, save_steps=8,
    )  # fmt: skip
    assert (given.per_device_train_batch_size, given.gradient_accumulation_steps) == (3, 5)
    assert given.gradient_checkpointing and given.num_train_epochs == 1.5 and given.max_steps == -1
    assert (given.learning_rate, given.lr_scheduler_type.value, given.warmup_steps) == (3e-4, "cosine", 9)
    assert (given.weight_decay, given.max_grad_norm) == (0.1, 0.5)
    assert (given.logging_steps, given.eval_steps, given.save_steps) == (4, 6, 8)
    assert (given.seed, given.data_seed, given.report_to, given.use_cpu) == (7, 7, [], True)
    assert given.logging_nan_inf_filter is False


def test_what_is_off_is_off(tmp_path: Path) -> None:
    off = config(max_steps=3).model_copy(update={"save_steps": None})
    given = supervised.training_arguments(TrainingArguments, off, tmp_path, device=CPU, dtype=torch.float32)
    assert (given.save_strategy.value, given.eval_strategy.value, given.max_steps) == ("no", "no", 3)
    assert not given.gradient_checkpointing


def test_a_constant_schedule_keeps_its_warmup(tmp_path: Path) -> None:
    """transformers' "constant" ignores warmup_steps."""
    warm = arguments(tmp_path, optim__schedule="constant", optim__warmup_steps=5)
    assert warm.lr_scheduler_type.value == "constant_with_warmup"
    assert arguments(tmp_path, optim__schedule="constant").lr_scheduler_type.value == "constant"


def test_settings_that_would_go_wrong_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    supervised.check_settings(config(), CPU)
    supervised.check_settings(config(), torch.device("cuda:0"))
    supervised.check_settings(config(model__load_in_4bit=True, lora__enabled=True), CPU)
    with pytest.raises(UserError, match="first visible GPU") as caught:
        supervised.check_settings(config(), torch.device("cuda:1"))
    assert "CUDA_VISIBLE_DEVICES=1" in str(caught.value.hint)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        supervised.check_settings(config(), CPU)


def test_only_whole_checkpoints_exist(tmp_path: Path) -> None:
    assert callback.last_checkpoint(tmp_path / "none") is None
    for step in (2, 9, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/weights").write_text("x" * step)
        if step != 11:
            checkpoints.mark_complete(tmp_path / f"checkpoint-{step}")
    assert callback.last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-10/weights").write_text("x")
    assert callback.last_checkpoint(tmp_path) == tmp_path / "checkpoint-9"


def test_the_mean_loss_weighs_rows_by_their_steps() -> None:
    rows = [{"step": 10, "loss": 4.0}, {"step": 10, "eval_loss": 9.0}, {"step": 13, "loss": 2.0}]
    assert callback.mean_loss(rows) == pytest.approx((40 + 6) / 13)


def test_lines_where_there_is_no_terminal() -> None:
    said: list[str] = []

    class Bar:
        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None: ...

        def update(self, steps: int = 1, note: str = "") -> None: ...

    with callback.Reporter("sft", lambda label, total, done: Bar(), said.append) as reporter:
        reporter.start(0, 1000)
        for step in range(1, 1001):
            reporter.row({"step": step, "loss": 1.0})
        reporter.row({"step": 1000, "eval_loss": 2.0})
    assert len(said) == 22
    assert said[-1] == "sft: step 1000/1000  eval_loss 2"


def claimed(tmp_path: Path, **flags: Any) -> tuple[str, dict[str, Any]]:
    """A run folder that began with these settings, on a data file."""
    data = tmp_path / "d.jsonl"
    data.write_text("{}\n")
    output = str(tmp_path / "run")
    values = resolve(SftConfig, flags={"model": "m", "data": str(data), "output": output, **flags}).to_json()
    run = RunDir.claim(output, "sft")
    with run.running():
        run.write_config(values)
        run.manifest.add_parent(data)
    return output, values


def test_resuming_needs_the_same_settings_and_data(tmp_path: Path) -> None:
    output, values = claimed(tmp_path)
    resume.refuse_changed(output, values)
    values["values"]["save_steps"] = 3
    values["values"]["push_to_hub"] = "a/b"
    resume.refuse_changed(output, values)
    values["values"]["optim"]["weight_decay"] = 0.5
    with pytest.raises(UserError, match=r"optim.weight_decay is 0.5; the run began with 0.0"):
        resume.refuse_changed(output, values)
    for free in ("optim.weight_decay", "optim"):
        resume.refuse_changed(output, values, free=[free])
    (tmp_path / "d.jsonl").write_text("{}\n{}\n")
    with pytest.raises(UserError, match="changed since the run began"):
        resume.refuse_changed(output, values, free=["optim.weight_decay"])


def test_a_key_that_the_run_did_not_know_yet_is_resumed_at_its_default_alone(tmp_path: Path) -> None:
    output, values = claimed(tmp_path)
    stored = tmp_path / "run" / "config.resolved.json"
    content = json.loads(stored.read_text())
    del content["values"]["optim"]["max_grad_norm"]
    stored.write_text(json.dumps(content))
    resume.refuse_changed(output, values)
    values["origins"]["optim.max_grad_norm"] = "--set"
    with pytest.raises(UserError, match=r"optim.max_grad_norm is 1.0; the run began with None"):
        resume.refuse_changed(output, values)


def test_nothing_to_compare_with_before_the_first_run(tmp_path: Path) -> None:
    resume.refuse_changed(str(tmp_path / "none"), {"values": {}})
    resume.refuse_used(str(tmp_path / "none"), "sft", "refuse")
    assert resume.finished_result(str(tmp_path / "none"), "resume") is None
    assert not (tmp_path / "none").exists()


def test_used_folders_and_finished_runs(tmp_path: Path) -> None:
    output, _ = claimed(tmp_path)
    manifest = Path(output) / "run.json"
    before = manifest.read_text()
    with pytest.raises(UserError, match="already holds a run"):
        resume.refuse_used(output, "sft", "refuse")
    resume.refuse_used(output, "sft", "resume")
    resume.refuse_used(output, "sft", "overwrite")
    assert manifest.read_text() == before
    manifest.write_text(before.replace('"result": {}', '"result": {"steps": 3}'))
    assert resume.finished_result(output, "resume") == {"steps": 3}
    assert resume.finished_result(output, "overwrite") is None
    data = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**data, "status": "interrupted"}))
    assert resume.finished_result(output, "resume") is None
