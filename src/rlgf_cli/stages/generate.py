"""``rlgf generate``: sample texts for prompts from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlgf_cli import console
from rlgf_cli.artifacts import resume
from rlgf_cli.artifacts.jsonl import read_examples, write_jsonl
from rlgf_cli.artifacts.records import GeneratedRecord
from rlgf_cli.artifacts.rundir import Existing
from rlgf_cli.artifacts.runfile import refuse_used_file
from rlgf_cli.config.generate import GenerateConfig
from rlgf_cli.config.loader import Resolved
from rlgf_cli.models.completions import generate_texts
from rlgf_cli.models.load import load
from rlgf_cli.models.prompts import encode_prompts
from rlgf_cli.protocols import Example
from rlgf_cli.stages.session import StageSession, report_text


@dataclass(frozen=True)
class GenerateResult:
    """The texts, and the file that holds them (None: they were only returned)."""

    path: Path | None
    records: list[GeneratedRecord]


def run(resolved: Resolved[GenerateConfig], *, existing: Existing = "refuse") -> GenerateResult:
    """Write ``samples`` texts per prompt. Inputs are checked and the model loaded before the file is claimed."""
    config = resolved.config
    if config.prompt is not None:
        examples = [Example("prompt", config.prompt)]
    else:
        assert config.data is not None  # the config requires one of the two
        examples = read_examples(config.data, limit=config.limit)
    if config.output is None:
        return GenerateResult(None, _texts(config, examples))
    refuse_used_file(config.output, existing)
    resume.refuse_own_input(config.output, config.data)
    records = _texts(config, examples)
    session = StageSession("generate", resolved, existing, can_resume=False)
    with session.writing_file(config.model.name, config.data, seed=config.seed):
        write_jsonl(config.output, records)
        unfinished = sum(record.finish_reason == "length" for record in records)
        session.finish({"records": len(records), "unfinished": unfinished})
    return GenerateResult(Path(config.output), records)


def _texts(config: GenerateConfig, examples: list[Example]) -> list[GeneratedRecord]:
    loaded = load(config.model, text=config.text)
    report_text(loaded)
    encoded, counts = encode_prompts(loaded, examples, config.lengths)
    for what in ("truncated", "skipped"):
        if counts[what]:
            console.warn(f"prompts too long and {what}: {counts[what]}")
    rows = [item for item in encoded for _ in range(config.samples)]
    indices = [index for _ in encoded for index in range(config.samples)]
    with console.progress("generate", len(rows)) as bar:
        completions = generate_texts(
            loaded,
            rows,
            config.decoding,
            config.lengths,
            seed=config.seed,
            sample_index=indices,
            on_rows=bar.update,
        )
    if hidden := sum(completion.usage["control_tokens"] for completion in completions):
        console.warn(f"special tokens that the model wrote and the texts do not show: {hidden}")
    return [
        GeneratedRecord(
            id=row.example.id,
            prompt=row.example.given,
            prediction=completion.text,
            references=list(row.example.references),
            finish_reason=completion.finish_reason,
            token_ids=list(completion.token_ids),
            sample_index=index,
        )
        for row, index, completion in zip(rows, indices, completions, strict=True)
    ]
