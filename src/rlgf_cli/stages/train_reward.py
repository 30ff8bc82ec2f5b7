"""``rlgf train-reward``: a text classifier from labelled JSONL, to be used as ``--reward classifier:FOLDER``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import Trainer, TrainingArguments, set_seed

from rlgf_cli import console, noise
from rlgf_cli.artifacts import resume
from rlgf_cli.artifacts.jsonl import parse_record, read_objects
from rlgf_cli.artifacts.records import LabelledRecord
from rlgf_cli.artifacts.rundir import Existing, RunDir
from rlgf_cli.config.common import ModelConfig
from rlgf_cli.config.loader import Resolved
from rlgf_cli.config.scratch import is_scratch, read_scratch
from rlgf_cli.config.train_reward import TrainRewardConfig
from rlgf_cli.errors import UserError, did_you_mean
from rlgf_cli.models import hub, scratch
from rlgf_cli.models.card import write_card
from rlgf_cli.models.classification import load_classifier, set_labels, token_limit
from rlgf_cli.models.generate import pad_rows
from rlgf_cli.models.load import DTYPES, pick_device
from rlgf_cli.models.memory import keep_freed_memory
from rlgf_cli.training import supervised
from rlgf_cli.training.checkpoint import is_complete
from rlgf_cli.training.watch import Reporter, last_checkpoint, mark_complete

datasets.disable_progress_bars()


@dataclass(frozen=True)
class Labelled:
    """One text with its label's name, and where it was read."""

    text: str
    label: str
    where: str


@dataclass(frozen=True)
class TrainRewardResult:
    """Where the classifier is, and the summary that run.json holds."""

    folder: Path
    summary: dict[str, Any]


def run(resolved: Resolved[TrainRewardConfig], *, existing: Existing = "refuse") -> TrainRewardResult:
    """Train, score the held-out records, save the classifier at the run's root.

    All inputs are checked, the model loaded and the data tokenised before the output folder is touched.
    """
    config = resolved.config
    output = Path(config.output)
    resume.refuse_used(config.output, "train-reward", existing)
    resume.refuse_own_input(config.output, config.model.name, config.data, config.eval_data)
    if config.push_to_hub:
        hub.check(config.push_to_hub)
    if (done := resume.finished_result(config.output, existing)) is not None:
        console.log(f"{output} is done already")
        return _delivered(TrainRewardResult(output, done), config)
    if existing == "resume":
        resume.refuse_changed(config.output, resolved.to_json())
    device = pick_device(config.model.device)
    supervised.check_settings(config, device)
    train, held_out, labels = _read_data(config)
    checkpoints = output / "checkpoints"
    start = checkpoints / "start"
    model, tokenizer = _starting_model(config, [r.text for r in train], labels, start, existing)
    model.to(device)
    limit = _limit(config, model, tokenizer)
    rows, truncated = _encode(tokenizer, train, labels, limit, joined=len(config.text_key) > 1)
    eval_rows, eval_truncated = _encode(tokenizer, held_out, labels, limit, joined=len(config.text_key) > 1)
    if truncated + eval_truncated:
        console.warn(f"texts cut to {limit} tokens: {truncated + eval_truncated}")

    keep_freed_memory()
    claimed = RunDir.claim(output, "train-reward", existing=existing, seed=config.seed)
    with claimed.running() as run_dir:
        run_dir.write_config(resolved.to_json())
        for parent in (config.data, config.eval_data, config.model.name):
            run_dir.manifest.add_parent(parent)
        run_dir.manifest.save(device=str(device))
        run_dir.file("checkpoints").mkdir(exist_ok=True)
        if is_scratch(config.model.name) and not is_complete(start):
            _save(start, model, tokenizer)
            mark_complete(start)
        with supervised.use_cache_kept(model):
            fitted = supervised.fit(
                _trainer(config, model, tokenizer.pad_token_id, checkpoints, rows, eval_rows, device),
                metrics=run_dir.file("metrics.jsonl"),
                keep=config.save_total_limit,
                resume=last_checkpoint(checkpoints),
                reporter=Reporter("train-reward", console.progress, console.log),
            )
        summary = {
            "objective": config.objective,
            **fitted,
            "eval_majority": max(Counter(r.label for r in held_out).values()) / len(held_out),
            "examples": len(train),
            "eval_examples": len(held_out),
            "truncated": truncated + eval_truncated,
            "labels": labels,
        }
        run_dir.write_files(lambda folder: _save(folder, model, tokenizer))
        write_card(
            run_dir.file("README.md").parent,
            title=output.name,
            command="train-reward",
            base_model=config.model.name,
            data=[name for name in (config.data, config.eval_data) if name],
            metrics={**summary, "labels": ", ".join(labels)},
        )
        run_dir.manifest.save(result=summary)
    return _delivered(TrainRewardResult(output, summary), config)


def _delivered(result: TrainRewardResult, config: TrainRewardConfig) -> TrainRewardResult:
    if config.push_to_hub:
        console.log(f"pushed to {hub.push(result.folder, config.push_to_hub)}")
    return result


def _read_data(config: TrainRewardConfig) -> tuple[list[Labelled], list[Labelled], list[str]]:
    """Training records, held-out records and the labels' names in the order of their ids."""
    records = read_labelled(config.data, config)[: config.limit]
    labels = _labels(records, config)
    if config.eval_data is None:
        return *_split(records, config), labels
    held_out = read_labelled(config.eval_data, config)
    for record in held_out:
        if record.label not in labels:
            raise UserError(
                f"the label {record.label!r} is not in the training data",
                where=record.where,
                hint=did_you_mean(record.label, labels),
            )
    return records, held_out, labels


def read_labelled(path: str, config: TrainRewardConfig) -> list[Labelled]:
    """The texts and labels of a file, found under the config's dotted keys."""
    found = []
    for number, value in read_objects(path):
        where = f"{path}:{number}"
        text = ""
        for key in config.text_key:
            part = _dig(value, key, where)
            if not isinstance(part, str):
                raise UserError(f"{key!r} is {part!r}, not a text", where=where)
            seam = " " if text and part and not text[-1].isspace() and not part[0].isspace() else ""
            text += seam + part
        label = _dig(value, config.label_key, where)
        record = parse_record(LabelledRecord, {"text": text, "label": label}, where)
        name = str(record.label)
        found.append(Labelled(record.text, config.label_names.get(name, name), where))
    if not found:
        raise UserError("the file holds no records", where=path)
    return found


def _dig(record: Mapping[str, Any], dotted: str, where: str) -> Any:
    """``meta.label`` or ``references.0`` of a record."""
    value: Any = record
    for part in dotted.split("."):
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, Mapping) and part in value:
            value = value[part]
        else:
            raise UserError(
                f"the field {dotted!r} is missing",
                where=where,
                hint=f"this record has: {', '.join(record)}; --text-key and --label-key name other fields",
            )
    return value


def _labels(records: Sequence[Labelled], config: TrainRewardConfig) -> list[str]:
    """All label names, in the order of the raw labels: numbers by value, words by the alphabet."""
    if len(records) < 2:
        raise UserError(
            "one example is not enough to train a classifier", where=config.data, hint="every class needs examples"
        )
    names = sorted({record.label for record in records}, key=_order(config.label_names))
    if len(names) < 2:
        raise UserError(
            f"all {len(records)} examples have the label {names[0]!r}",
            where=config.data,
            hint="a classifier needs two classes or more; is --label-key right?",
        )
    unknown = sorted(set(config.label_names.values()) - set(names))
    if unknown:
        raise UserError(
            f"label_names gives the name {unknown[0]!r} to a label that no example has",
            hint=f"the data has: {', '.join(names)}",
        )
    return names


def _order(names: Mapping[str, str]) -> Any:
    raw = {name: label for label, name in names.items()}

    def key(name: str) -> tuple[int, int, str]:
        label = raw.get(name, name)
        number = label.lstrip("-").isdigit()
        return (0, int(label), "") if number else (1, 0, label)

    return key


def _split(records: list[Labelled], config: TrainRewardConfig) -> tuple[list[Labelled], list[Labelled]]:
    """Hold out ``eval_fraction`` of every class, at least one where it has two; the order of the rest is kept."""
    rng = noise.generator(config.seed, "held out")
    out: set[int] = set()
    for label in sorted({record.label for record in records}):
        members = [i for i, record in enumerate(records) if record.label == label]
        if len(members) > 1:
            count = min(max(1, round(config.eval_fraction * len(members))), len(members) - 1)
            out.update(int(i) for i in rng.choice(members, size=count, replace=False))
    if not out:
        raise UserError(
            "no class has a second example to hold out", where=config.data, hint="give --eval-data, or more examples"
        )
    train = [record for i, record in enumerate(records) if i not in out]
    return train, [records[i] for i in sorted(out)]


def _starting_model(
    config: TrainRewardConfig, texts: list[str], labels: list[str], start: Path, existing: Existing
) -> tuple[Any, Any]:
    set_seed(config.seed)
    if not is_scratch(config.model.name):
        return load_classifier(config.model, labels)
    described = read_scratch(config.model.name)
    if existing == "resume" and is_complete(start):
        return load_classifier(ModelConfig(name=str(start)), labels)
    model, tokenizer = scratch.build_classifier(
        described, name=config.model.name, texts=texts, labels=labels, seed=config.seed
    )
    set_labels(model.config, labels)
    return model, tokenizer


def _limit(config: TrainRewardConfig, model: Any, tokenizer: Any) -> int | None:
    most = token_limit(model, tokenizer)
    if config.max_tokens is None:
        return most
    if most is not None and config.max_tokens > most:
        raise UserError(f"max_tokens is {config.max_tokens}; the model reads {most}", hint="leave max_tokens out")
    return config.max_tokens


def _encode(
    tokenizer: Any, records: Sequence[Labelled], labels: Sequence[str], limit: int | None, *, joined: bool
) -> tuple[list[dict[str, Any]], int]:
    """Rows for the Trainer and how many were cut. Prompt and response lose their beginning, a text its end:
    what the ``classifier`` reward cuts too."""
    tokenizer.truncation_side = "left" if joined else "right"
    ids = {label: i for i, label in enumerate(labels)}
    rows, cut = [], 0
    for record in records:
        tokens = tokenizer(record.text)["input_ids"]
        if limit is not None and len(tokens) > limit:
            cut += 1
            tokens = tokenizer(record.text, truncation=True, max_length=limit)["input_ids"]
        if not tokens:
            raise UserError("this text has no tokens in the model's tokenizer", where=record.where)
        rows.append({"input_ids": tokens, "labels": ids[record.label]})
    return rows, cut


def _trainer(
    config: TrainRewardConfig,
    model: Any,
    pad_id: int,
    folder: Path,
    rows: list[dict[str, Any]],
    eval_rows: list[dict[str, Any]],
    device: torch.device,
) -> Trainer:
    arguments = supervised.training_arguments(
        TrainingArguments, config, folder, device=device, dtype=DTYPES[config.model.dtype],
        remove_unused_columns=False, label_names=["labels"],
    )  # fmt: skip
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list(eval_rows),
        data_collator=_Collator(pad_id),
        compute_loss_func=supervised.cross_entropy,
        compute_metrics=_accuracy,
    )


@dataclass(frozen=True)
class _Collator:
    pad_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids, mask = pad_rows([row["input_ids"] for row in rows], self.pad_id, left=False)
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["labels"] for row in rows])}


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def _save(folder: Path, model: Any, tokenizer: Any) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
