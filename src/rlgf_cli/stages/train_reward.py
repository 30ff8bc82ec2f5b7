"""``rlgf train-reward``: a text classifier from labelled JSONL, or a reward model from pairs of texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import set_seed

from rlgf_cli import console
from rlgf_cli.artifacts.checkpoints import is_complete
from rlgf_cli.artifacts.jsonl import write_json
from rlgf_cli.artifacts.records import SCHEMA_VERSION
from rlgf_cli.artifacts.rundir import Existing
from rlgf_cli.config.common import ModelConfig
from rlgf_cli.config.loader import Resolved
from rlgf_cli.config.scratch import is_scratch, read_scratch
from rlgf_cli.config.train_reward import TrainRewardConfig
from rlgf_cli.models import classification, scratch
from rlgf_cli.models.device import pick_device
from rlgf_cli.models.memory import keep_freed_memory
from rlgf_cli.models.rendered import shown
from rlgf_cli.stages.session import FolderResult, StageSession, pushed
from rlgf_cli.supervised import labelled, reward_data, reward_plots, reward_report
from rlgf_cli.supervised import trainer as supervised
from rlgf_cli.supervised.callback import Reporter
from rlgf_cli.supervised.reward_data import RewardData, Sample
from rlgf_cli.supervised.reward_text import RewardText, Rows, reward_text

datasets.disable_progress_bars()


def run(resolved: Resolved[TrainRewardConfig], *, existing: Existing = "refuse") -> FolderResult:
    """Train, evaluate the model on the held-out records, save it at the run's root.

    All inputs are checked, the model loaded and the data tokenised before the output folder is touched.
    """
    config = resolved.config
    session = StageSession("train-reward", resolved, existing)
    inputs = (config.model.name, config.data, config.eval_data)
    if (finished := session.open(*inputs, push_to_hub=config.push_to_hub)) is not None:
        return pushed(finished, config.push_to_hub)
    device = pick_device(config.model.device)
    supervised.check_settings(config, device)
    data = reward_data.read(config)
    _report_data(data)
    checkpoints = session.output / "checkpoints"
    start = checkpoints / "start"
    model, tokenizer = _starting_model(config, data, start, existing)
    model.to(device)
    limit = classification.token_limit(model, tokenizer, config.max_tokens)
    text = reward_text(config.text, data, tokenizer, chat_default=session.chat_default)
    if text.chat:
        classification.store_chat(model.config, text.kwargs)
    # what the rewards cut too: prompt and response lose their beginning, a text its end
    tokenizer.truncation_side = "left" if data.joined else "right"
    rows, truncated = text.encode(tokenizer, data.train, limit)
    eval_rows, eval_truncated = text.encode(tokenizer, data.held_out, limit)
    truncated += eval_truncated
    _report_text(text, tokenizer, rows[0])
    same = sum(len(row) == 2 and row[0] == row[1] for row in rows + eval_rows)
    if truncated:
        console.warn(f"texts cut to {limit} tokens: {truncated}")
    if same:
        console.warn(f"pairs whose two texts are the same tokens to this model, and teach nothing: {same}")

    keep_freed_memory()
    parents = (config.data, config.eval_data, config.model.name)
    with session.running(*parents, device=str(device), text=text.to_json()) as run_dir:
        run_dir.file("checkpoints").mkdir(exist_ok=True)
        if is_scratch(config.model.name):
            supervised.save_start(start, lambda folder: _save(folder, model, tokenizer))
        fitted = supervised.fit(
            model,
            lambda: _trainer(config, model, tokenizer, checkpoints, data, rows, eval_rows, device),
            checkpoints,
            metrics=run_dir.file("metrics.jsonl"),
            keep=config.save_total_limit,
            reporter=Reporter("train-reward", console.progress, console.log),
        )
        report = _judge(config, model.eval(), data, eval_rows)
        reads = {"prompt": data.joined, "max_tokens": limit, "chat": text.chat}
        summary = {
            "objective": config.objective,
            **fitted,
            **_summary(report.figures),
            **({"eval_majority": _majority(data.held_out)} if data.labels else {}),
            "examples": len(data.train),
            "eval_examples": len(data.held_out),
            "passed_over": data.passed_over,
            "truncated": truncated,
            **({"labels": data.labels} if data.labels else {"same_tokens": same}),
        }
        run_dir.write_files(lambda folder: _save(folder, model, tokenizer))
        run_dir.write_files(lambda folder: _save_report(folder, config, report, reads))
        session.write_card(
            base_model=config.model.name,
            data=[name for name in (config.data, config.eval_data) if name],
            metrics={**summary, "labels": ", ".join(data.labels) or None},
        )
        summary["kinds"] = report.figures["kinds"]
        session.finish(summary)
    _show(report, session.output, data)
    return pushed(session.result(), config.push_to_hub)


def _report_data(data: RewardData) -> None:
    if data.passed_over:
        console.log(f"rows passed over because they are good texts alone: {data.passed_over}")
    if data.shared:
        some = f"{data.shared} of {len(data.held_out)}"
        console.warn(f"held-out records whose prompt (or text) is in the training data too: {some}")


def _report_text(text: RewardText, tokenizer: Any, row: Sequence[Sequence[int]]) -> None:
    """Say how the model reads the data, and show the first text, or the first pair, in its tokens."""
    console.log(text.describe())
    if text.ignored:
        console.warn("this model has a chat template, and --no-chat leaves it out: prompt and response are joined")
    console.log("an example as the model reads it:")
    for name, ids in zip(("chosen", "rejected") if len(row) > 1 else ("text",), row, strict=True):
        console.log(f"  {name:<8}  {shown(tokenizer, ids)}")


def _starting_model(config: TrainRewardConfig, data: RewardData, start: Path, existing: Existing) -> tuple[Any, Any]:
    labels = data.labels or ["reward"]
    set_seed(config.seed)
    if not is_scratch(config.model.name):
        return classification.load_classifier(config.model, labels)
    described = read_scratch(config.model.name)
    if existing == "resume" and is_complete(start):
        return classification.load_classifier(ModelConfig(name=str(start)), labels)
    texts = [text for sample in data.train for text in sample.texts]
    model, tokenizer = scratch.build_classifier(
        described, name=config.model.name, texts=texts, labels=labels, seed=config.seed
    )
    classification.set_labels(model.config, labels)
    return model, tokenizer


def _trainer(
    config: TrainRewardConfig,
    model: Any,
    tokenizer: Any,
    folder: Path,
    data: RewardData,
    rows: Rows,
    eval_rows: Rows,
    device: torch.device,
) -> Any:
    if not data.labels:
        from rlgf_cli.supervised import pairwise  # it imports TRL

        return pairwise.make_trainer(config, model, tokenizer, folder, rows, eval_rows, device)
    train, held_out = (
        [
            labelled.LabelledIds(ids, data.labels.index(sample.label))
            for sample, (ids,) in zip(samples, encoded, strict=True)
        ]
        for samples, encoded in ((data.train, rows), (data.held_out, eval_rows))
    )
    return labelled.make_trainer(config, model, tokenizer.pad_token_id, folder, train, held_out, device)


def _judge(config: TrainRewardConfig, model: Any, data: RewardData, rows: Rows) -> reward_report.Report:
    """The trained model on the held-out samples."""
    samples = data.held_out
    flat = [ids for row in rows for ids in row]
    logits = classification.logits(model, flat, config.batch_size).numpy()
    kinds = [sample.kind for sample in samples]
    if data.labels:
        labels = np.array([data.labels.index(sample.label) for sample in samples])
        return reward_report.of_classifier(logits, labels, data.labels, kinds, [s.words[0] for s in samples])
    chosen, rejected = logits.reshape(-1, 2).T
    chosen_words, rejected_words = zip(*(sample.words for sample in samples), strict=True)
    return reward_report.of_pairs(chosen, rejected, [s.texts[0] for s in samples], kinds, chosen_words, rejected_words)


def _summary(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures of all held-out samples as run.json names them."""
    names = ("accuracy", "auc", "length_matched_auc", "length_auc", "brier", "expected_calibration_error")
    flagging = ("good_flagged", "bad_flagged")
    return {f"eval_{name}": figures[name] for name in (*names, *flagging)}


def _majority(samples: Sequence[Sample]) -> float:
    return max(Counter(sample.label for sample in samples).values()) / len(samples)


def _save(folder: Path, model: Any, tokenizer: Any) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _save_report(folder: Path, config: TrainRewardConfig, report: reward_report.Report, reads: dict[str, Any]) -> None:
    """``reads``: the part of a record that the model scores (the threshold holds for this part alone)."""
    head = {"schema_version": SCHEMA_VERSION, "objective": config.objective, "reads": reads}
    write_json(folder / classification.EVALUATION, {**head, **report.figures})
    reward_plots.write(folder / "plots", report)


def _show(report: reward_report.Report, output: Path, data: RewardData) -> None:
    console.log(console.table(*reward_report.table(report.figures)))
    if warning := reward_report.length_warning(report.figures):
        console.warn(warning)
    alone = "" if data.joined else ", with include_prompt: false, as it read no prompts"
    console.log(f"as a reward: {'classifier' if data.labels else 'rm'}:{output}{alone}")
