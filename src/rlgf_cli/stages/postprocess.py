"""``rlgf postprocess``: clean the texts of a predictions file by rules, into another one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from rlgf_cli.artifacts.jsonl import write_jsonl
from rlgf_cli.artifacts.predictions import read_predictions
from rlgf_cli.artifacts.records import PredictionRecord
from rlgf_cli.artifacts.resume import refuse_own_input
from rlgf_cli.artifacts.rundir import Existing
from rlgf_cli.config.loader import Resolved
from rlgf_cli.config.postprocess import PostprocessConfig
from rlgf_cli.failures.repair import repair
from rlgf_cli.stages.session import FileResult, StageSession

COMMAND = "postprocess"


def run(resolved: Resolved[PostprocessConfig], *, existing: Existing = "refuse") -> FileResult:
    """Clean every text and write the records without their scores, which belong to the original texts."""
    config = resolved.config
    path = Path(config.output)
    refuse_own_input(config.output, config.predictions)
    read, counts = read_predictions(config.predictions)
    changed: Counter[str] = Counter()
    texts = 0
    records: list[PredictionRecord] = []
    for _, record in read:
        text, applied = repair(record.prediction, config.rules, config.max_words or 0)
        changed.update(applied)
        texts += bool(applied)
        # the end of a cleaned text is the rules': the finish reason of the original does not hold for it
        finish_reason = None if applied else record.finish_reason
        update: dict[str, Any] = {"prediction": text, "finish_reason": finish_reason, "scores": {}, "statistics": {}}
        records.append(record.model_copy(update=update))
    session = StageSession(COMMAND, resolved, existing, can_resume=False)
    with session.writing_file(config.predictions):
        write_jsonl(path, records)
        summary = {
            "records": len(records),
            "changed": texts,
            "rules": {name: changed[name] for name in config.rules},
            **{key: n for key, n in counts.items() if n},
        }
        session.finish(summary)
    return FileResult(path, summary)
