"""``rlgf sft``: prompt/references JSONL, or prompts and a guide's recorded texts, to a starting policy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reads it when it is imported

import datasets
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, set_seed
from trl import SFTConfig as TrlSftConfig
from trl import SFTTrainer

from rlgf_cli import console, noise
from rlgf_cli.artifacts import resume
from rlgf_cli.artifacts.checkpoints import is_complete, mark_complete
from rlgf_cli.artifacts.jsonl import read_examples
from rlgf_cli.artifacts.rundir import Existing, RunDir
from rlgf_cli.config.common import ModelConfig
from rlgf_cli.config.loader import Resolved
from rlgf_cli.config.scratch import is_scratch, read_scratch
from rlgf_cli.config.sft import SftConfig
from rlgf_cli.errors import UserError
from rlgf_cli.guides.make import RECORDED, kind_of
from rlgf_cli.guides.recorded import RecordedGuide
from rlgf_cli.models import hub, scratch
from rlgf_cli.models.card import write_card
from rlgf_cli.models.device import pick_device
from rlgf_cli.models.generate import decoder_start_id, pad_rows
from rlgf_cli.models.load import add_lora, load, save, set_generation_config
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.memory import keep_freed_memory
from rlgf_cli.models.prompts import encode_prompts, encode_target
from rlgf_cli.models.text import TextFormat
from rlgf_cli.protocols import Example, FinishReason
from rlgf_cli.runs.guide_costs import covered_prompts, provenance
from rlgf_cli.supervised import trainer as supervised
from rlgf_cli.supervised.callback import Reporter, last_checkpoint

datasets.disable_progress_bars()


@dataclass(frozen=True)
class Pair:
    """One training pair, tokenised apart: ``response`` ends with EOS unless it was cut."""

    prompt: list[int]
    response: list[int]


@dataclass(frozen=True)
class SftResult:
    """Where the policy is, and the summary that run.json holds."""

    folder: Path
    summary: dict[str, Any]


def run(resolved: Resolved[SftConfig], *, existing: Existing = "refuse") -> SftResult:
    """Train, save the policy at the run's root, and say how it went.

    All inputs are checked, the model loaded and the data tokenised before the output folder is touched.
    """
    config = resolved.config
    output = Path(config.output)
    resume.refuse_used(config.output, "sft", existing)
    resume.refuse_own_input(config.output, config.model.name, config.data, config.eval_data, config.guide)
    if config.push_to_hub:
        hub.check(config.push_to_hub)
    if (done := resume.finished_result(config.output, existing)) is not None:
        console.log(f"{output} is done already")
        return _delivered(SftResult(output, done), config)
    if existing == "resume":
        resume.refuse_changed(config.output, resolved.to_json())
    supervised.check_settings(config, pick_device(config.model.device))
    examples = read_examples(config.data, limit=config.limit, need_references=config.guide is None)
    guide = _guide(config.guide) if config.guide else None
    held_out = read_examples(config.eval_data, need_references=True) if config.eval_data else []
    checkpoints = output / "checkpoints"
    loaded = _starting_model(config, examples, guide, checkpoints / "start" if existing == "resume" else None)
    _refuse_head(loaded)
    set_generation_config(loaded, config.lengths)
    if loaded.turn_end_problem:
        console.warn(loaded.turn_end_problem)
    pairs, counts = make_pairs(loaded, examples, config, guide)
    eval_pairs = make_pairs(loaded, held_out, config)[0] if held_out else []
    _report_counts(counts)
    if guide is not None:
        console.log(f"{len(pairs)} texts of {guide.name} are cloned")

    keep_freed_memory()
    claimed = RunDir.claim(output, "sft", existing=existing, seed=config.seed)
    with claimed.running() as run:
        run.write_config(resolved.to_json())
        for parent in (config.data, config.eval_data, config.guide, config.model.name):
            run.manifest.add_parent(parent)
        run.manifest.save(device=str(loaded.device))
        run.file("checkpoints").mkdir(exist_ok=True)
        if is_scratch(config.model.name):
            _keep_start(checkpoints / "start", loaded)
        with supervised.use_cache_kept(loaded.model):
            fitted = supervised.fit(
                make_trainer(loaded, config, checkpoints, pairs, eval_pairs),
                metrics=run.file("metrics.jsonl"),
                keep=config.save_total_limit,
                resume=last_checkpoint(checkpoints),
                reporter=Reporter("sft", console.progress, console.log),
            )
        summary = {**fitted, "examples": len(examples), "pairs": len(pairs), **counts}
        run.write_files(lambda folder: save(folder, loaded))
        write_card(
            run.file("README.md").parent,
            title=output.name,
            command="sft",
            base_model=config.model.name,
            data=[config.data],
            metrics=summary,
            guide=provenance(guide, 0, counts["guide_texts"]) if guide is not None else None,
        )
        run.manifest.save(result=summary)
    return _delivered(SftResult(output, summary), config)


def _delivered(result: SftResult, config: SftConfig) -> SftResult:
    if config.push_to_hub:
        console.log(f"pushed to {hub.push(result.folder, config.push_to_hub)}")
    return result


def _guide(name: str) -> RecordedGuide:
    """The guide's file, read. Raises UserError for a guide that would have to be asked."""
    if kind_of(name) != RECORDED:
        raise UserError(
            "sft clones texts that a guide has written, and this one has to be asked",
            where=name,
            hint=f"rlgf collect-guide --guide {name} -o guide.jsonl, then --guide guide.jsonl",
        )
    return RecordedGuide(name)


def _starting_model(
    config: SftConfig, examples: Sequence[Example], guide: RecordedGuide | None, start: Path | None
) -> Loaded:
    """The model that training begins with: a checkpoint, or random weights (``start``: kept for resuming)."""
    set_seed(config.seed)
    if not is_scratch(config.model.name):
        loaded = load(config.model, text=config.text, for_training=True)
        return add_lora(loaded, config.lora)
    described = read_scratch(config.model.name)
    if config.lora.enabled:
        raise UserError(
            "LoRA needs trained weights to sit on",
            where=config.model.name,
            hint="leave lora out, or use a checkpoint",
        )
    if start is not None and is_complete(start):
        stored = ModelConfig(**{**config.model.model_dump(), "name": str(start)})
        return load(stored, for_training=True)
    return scratch.build(
        described,
        model=config.model,
        prompts=[e.prompt for e in examples],
        responses=[text for e in examples for text, _ in _targets(e, guide)],
        text=TextFormat.from_config(config.text, TextFormat()),
        seed=config.seed,
    )


def _refuse_head(loaded: Loaded) -> None:
    """TRL's loss of a decoder is computed from the head's plain weights, and refuses an adapter on them."""
    if not loaded.encoder_decoder and isinstance(loaded.model.get_output_embeddings(), BaseTunerLayer):
        raise UserError(
            "sft cannot train LoRA on the output head of a decoder",
            where=loaded.name,
            hint="leave lm_head out of lora.target_modules (rlgf train can have it, where the embeddings are not tied)",
        )


def _keep_start(folder: Path, loaded: Loaded) -> None:
    """Random weights and a trained tokenizer are kept: a resumed run must not depend on making them again."""
    if not is_complete(folder):
        save(folder, loaded)
        mark_complete(folder)


def make_pairs(
    loaded: Loaded, examples: Sequence[Example], config: SftConfig, guide: RecordedGuide | None = None
) -> tuple[list[Pair], dict[str, int]]:
    """Prompts and responses to ids, each tokenised by itself, so that SFT and RL see the same seam.

    Counts: ``truncated`` and ``skipped`` prompts, ``truncated_responses`` (cut at the limit: no EOS) and
    ``spelled_endings`` (responses that spelled EOS or the end of a turn at their end, which is left out). With a guide
    also ``dropped`` (prompts that it has no text for), ``unfinished`` (texts that it did not end, and that were not
    cut: no EOS), ``guide_texts`` (different ones among the pairs), and what was not used of its file, as ``guide_*``.
    """
    encoded, counts = encode_prompts(loaded, examples, config.lengths)
    prompts, _ = covered_prompts(encoded, guide, "drop")
    limit = config.lengths.max_new_tokens
    pairs: list[Pair] = []
    counts |= {"truncated_responses": 0, "spelled_endings": 0}
    unfinished = 0
    used: set[tuple[str, str]] = set()
    for item in prompts:
        for text, finish_reason in _chosen(_targets(item.example, guide), item.example.id, config):
            ids, too_long = encode_target(loaded, text, limit, finish_reason)
            spelled = loaded.text.without_ending(loaded.tokenizer, text) != text
            counts["truncated_responses"] += too_long
            counts["spelled_endings"] += spelled
            unfinished += finish_reason == "length" and not too_long and not spelled
            used.add((item.example.id, text))
            pairs.append(Pair(item.ids, ids))
    if guide is not None:
        counts |= {"dropped": len(encoded) - len(prompts), "unfinished": unfinished, "guide_texts": len(used)}
        counts["guide_unmatched"] = guide.unmatched(examples)
        counts |= {f"guide_{name}": count for name, count in guide.counts.items()}
    return pairs, counts


_Target = tuple[str, FinishReason]


def _targets(example: Example, guide: RecordedGuide | None) -> list[_Target]:
    """What an example's response may be: its references, or the guide's texts by sample index."""
    if guide is None:
        return [(text, "stop") for text in example.references]
    return [(text.text, text.finish_reason) for text in guide.samples(example)]


def _chosen(targets: list[_Target], example_id: str, config: SftConfig) -> list[_Target]:
    if config.references == "random":
        at = noise.generator(config.seed, "reference", example_id).integers(len(targets))
        return [targets[at]]
    return targets[:1] if config.references == "first" else targets


def _report_counts(counts: dict[str, int]) -> None:
    for name, what in (
        ("truncated", "prompts cut to fit"),
        ("skipped", "prompts too long and left out"),
        ("truncated_responses", "responses cut at max_new_tokens, which teach no ending"),
        ("unfinished", "texts that the guide did not end, which teach no ending"),
        ("dropped", "prompts without a text of the guide, left out"),
        ("guide_unmatched", "texts of the guide that belong to no prompt that was read"),
        ("guide_id_mismatch", "prompts whose id is another prompt's in the guide's file"),
        ("guide_empty", "empty texts of the guide, left out"),
        ("guide_with_prefix", "texts of the guide that go on from a prefix, left out"),
        ("spelled_endings", "responses that spelled EOS or the end of a turn at their end, which is left out"),
    ):
        if counts.get(name):
            console.warn(f"{what}: {counts[name]}")


def make_trainer(
    loaded: Loaded, config: SftConfig, folder: Path, pairs: Sequence[Pair], eval_pairs: Sequence[Pair]
) -> Any:
    """TRL's trainer for a decoder, transformers' for an encoder-decoder; checkpoints go below ``folder``."""
    common: dict[str, Any] = {"device": loaded.device, "dtype": loaded.dtype, "prediction_loss_only": True}
    if loaded.encoder_decoder:
        arguments = supervised.training_arguments(
            Seq2SeqTrainingArguments, config, folder, remove_unused_columns=False, **common
        )
        return Seq2SeqTrainer(
            model=loaded.model,
            args=arguments,
            train_dataset=_seq2seq_rows(pairs),
            eval_dataset=_seq2seq_rows(eval_pairs) if eval_pairs else None,
            data_collator=_Collator(decoder_start_id(loaded.model), loaded.pad_id),
            compute_loss_func=supervised.cross_entropy,
        )
    arguments = supervised.training_arguments(
        # max_length: nothing is cut here, the lengths were settled before
        TrlSftConfig, config, folder, completion_only_loss=True, max_length=None, **common
    )  # fmt: skip
    return _SFTTrainer(
        model=loaded.model,
        args=arguments,
        train_dataset=_decoder_rows(pairs),
        eval_dataset=_decoder_rows(eval_pairs) if eval_pairs else None,
        processing_class=loaded.tokenizer,
    )


class _SFTTrainer(SFTTrainer):
    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL writes a card of its own beside every checkpoint; the run has one at its root."""


def _decoder_rows(pairs: Sequence[Pair]) -> datasets.Dataset:
    """``input_ids`` = prompt + response; ``completion_mask`` is 1 on the response, from lengths alone."""
    return datasets.Dataset.from_dict(
        {
            "input_ids": [p.prompt + p.response for p in pairs],
            "completion_mask": [[0] * len(p.prompt) + [1] * len(p.response) for p in pairs],
        }
    )


def _seq2seq_rows(pairs: Sequence[Pair]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"input_ids": [p.prompt for p in pairs], "labels": [p.response for p in pairs]})


@dataclass(frozen=True)
class _Collator:
    """Rows to a batch for an encoder-decoder; masks and -100 come from lengths, never from ids."""

    start_id: int
    pad_id: int

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        ids, mask = pad_rows([row["input_ids"] for row in rows], self.pad_id, left=False)
        labels, real = pad_rows([row["labels"] for row in rows], self.pad_id, left=False)
        shifted = [[self.start_id, *row["labels"][:-1]] for row in rows]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "decoder_input_ids": pad_rows(shifted, self.pad_id, left=False)[0],
            "decoder_attention_mask": real,
            "labels": labels.masked_fill(real == 0, -100),
        }
