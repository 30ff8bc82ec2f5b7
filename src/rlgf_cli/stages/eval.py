"""``rlgf eval``: texts to per-example scores, and means with intervals."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlgf_cli import console, registry
from rlgf_cli.artifacts import jsonl
from rlgf_cli.artifacts.predictions import Answer, answers_alone, answers_to
from rlgf_cli.artifacts.records import SCHEMA_VERSION, EvaluatedRecord
from rlgf_cli.artifacts.resume import refuse_own_input
from rlgf_cli.artifacts.rundir import Existing, RunDir, parent_of
from rlgf_cli.config.eval import FREE_ON_RESUME, EvalConfig, IntervalConfig
from rlgf_cli.config.loader import Resolved
from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.guides.make import closing_all
from rlgf_cli.ledger.spend import record_spend
from rlgf_cli.protocols import BoundedFigure, Example, Guide, Metric
from rlgf_cli.scorers.figures import Figure, compute_figures, make_metrics
from rlgf_cli.stages.session import StageSession, prepare_guides
from rlgf_cli.stats.bootstrap import Interval, interval

if TYPE_CHECKING:
    from rlgf_cli.models.loaded import Loaded
    from rlgf_cli.models.prompts import Encoded

PREDICTIONS, SCORES = "predictions.jsonl", "scores.json"


@dataclass(frozen=True)
class EvalResult:
    """The folder that was written and the content of its scores.json."""

    folder: Path
    scores: Mapping[str, Any]


def run(resolved: Resolved[EvalConfig], *, existing: Existing = "refuse") -> EvalResult:
    """Generate (or read) one text per example, score them, write predictions.jsonl and scores.json.

    No text is generated where no metric reads one. All inputs are checked before the output folder is claimed.
    Generated texts are written before they are scored: where a metric fails, or more metrics are wanted, ``resume``
    scores them again as they are.
    """
    config = resolved.config
    session = StageSession("eval", resolved, existing)
    refuse_own_input(config.output, config.predictions, config.data)
    session.open(free=FREE_ON_RESUME, reopen=True)
    model = _Model(config) if config.model is not None else None
    answers, counts = ([], {}) if model is not None else _given(config)
    examples = model.examples if model is not None else [answer.example for answer in answers]
    metrics = make_metrics(config.metrics, device=config.device)
    guides = [guide for metric in metrics for guide in metric.guides]
    with closing_all(guides):
        prepare_guides(guides, config.budget)
        for metric in metrics:
            if model is not None:
                metric.take_model(model.loaded, config.lengths)
            metric.check_set(examples)
        return _evaluate(session, config, model, answers, counts, metrics, guides)


def _evaluate(
    session: StageSession,
    config: EvalConfig,
    model: _Model | None,
    answers: list[Answer],
    counts: dict[str, int],
    metrics: Sequence[Metric],
    guides: Sequence[Guide],
) -> EvalResult:
    """Claim the output folder, and write what the checked inputs give. ``guides`` are those that judge."""
    parents = {
        "dataset": parent_of(config.data) if config.data else None,
        "model": (parent_of(config.model.name) or {"path": config.model.name}) if config.model else None,
        "predictions": parent_of(config.predictions) if config.predictions else None,
    }
    wanted = any(metric.reads_texts for metric in metrics)
    with session.claim().running() as run_dir:
        stored = _stored_answers(run_dir, model, parents["model"], wanted) if model is not None else None
        session.begin(parents=[parent for parent in parents.values() if parent and "sha256" in parent])
        if model is not None:
            run_dir.manifest.save(device=str(model.loaded.device))
            answers, counts = stored or (model.answer() if wanted else model.silence()), model.counts
            if stored is None and wanted:  # else they are there, with the scores that scores.json tells of
                jsonl.write_jsonl(run_dir.file(PREDICTIONS), _records(answers, {}))
        with _recorded_spend(guides, session):
            figures, noted = _score(metrics, answers)
        entries = {
            name: _entry(name, figure, config.interval, config.seed, len(answers)) for name, figure in figures.items()
        }
        scores = {
            "schema_version": SCHEMA_VERSION,
            "metrics": entries,
            "counts": {**counts, **_counts(answers), **noted},
            "decoding": model.decoding if model is not None and answers[0].written else None,
            "interval": {
                "method": "percentile bootstrap over prompts",
                "seed": config.seed,
                **config.interval.model_dump(),
            },
            **parents,
            **({"spend": run_dir.manifest.data["spend"]} if guides else {}),
        }
        jsonl.write_jsonl(run_dir.file(PREDICTIONS), _records(answers, figures))
        jsonl.write_json(run_dir.file(SCORES), scores)
        session.finish({name: entry["value"] for name, entry in entries.items()})
    return EvalResult(run_dir.path, scores)


class _Model:
    """A loaded policy with its tokenised prompts."""

    def __init__(self, config: EvalConfig) -> None:
        from rlgf_cli.models.load import load
        from rlgf_cli.models.prompts import encode_prompts

        assert config.model is not None and config.data is not None  # EvalConfig holds it
        self.config = config
        examples = jsonl.read_examples(config.data, limit=config.limit)
        self.loaded: Loaded = load(config.model, text=config.text)
        self.encoded: list[Encoded]
        self.encoded, self.counts = encode_prompts(self.loaded, examples, config.lengths)

    @property
    def examples(self) -> list[Example]:
        return [encoded.example for encoded in self.encoded]

    @property
    def decoding(self) -> dict[str, Any]:
        """All that decides which texts are written, for scores.json."""
        config = self.config
        return {
            **config.decoding.model_dump(),
            **config.lengths.model_dump(),
            "seed": config.seed,
            "dtype": str(self.loaded.dtype).removeprefix("torch."),
            "text": dataclasses.asdict(self.loaded.text),
        }

    def silence(self) -> list[Answer]:
        """The examples without texts, for metrics that read none."""
        return [Answer(example, "", written=False) for example in self.examples]

    def answer(self) -> list[Answer]:
        from rlgf_cli.models.completions import generate_texts

        config = self.config
        with console.progress("generating", len(self.encoded)) as bar:
            texts = generate_texts(
                self.loaded,
                self.encoded,
                config.decoding,
                config.lengths,
                seed=config.seed,
                on_rows=bar.update,
            )
        self.counts["control_tokens"] = sum(t.usage["control_tokens"] for t in texts)
        return [Answer(e, t.text, t.finish_reason) for e, t in zip(self.examples, texts, strict=True)]


def _given(config: EvalConfig) -> tuple[list[Answer], dict[str, int]]:
    """The texts of ``predictions``, joined to ``data`` where that is given."""
    assert config.predictions is not None  # EvalConfig holds it
    if config.data is not None:
        examples = jsonl.read_examples(config.data)
        answers, counts = answers_to(examples, config.predictions, on_missing=config.on_missing)
    else:
        answers, counts = answers_alone(config.predictions)
    return answers[: config.limit], counts


def _stored_answers(
    run_dir: RunDir, model: _Model, parent: Mapping[str, Any] | None, wanted: bool
) -> list[Answer] | None:
    """The texts that an earlier, otherwise equal, evaluation wrote whole; None where there are none.

    An evaluation whose metrics read no texts has records without any.
    """
    path = run_dir.path / PREDICTIONS
    if run_dir.fresh or not path.is_file():
        return None
    if parent and "sha256" in parent and parent not in run_dir.manifest.data["parents"]:
        raise UserError(
            "the model changed since its texts were written",
            where=str(path),
            hint="--overwrite writes new ones",
        )
    records = {record.id: record for record in jsonl.read_records(path, EvaluatedRecord)}
    if list(records) != [example.id for example in model.examples]:
        raise UserError("these texts are not for this data", where=str(path), hint="--overwrite writes new ones")
    texts = {name: record.prediction for name, record in records.items() if record.prediction is not None}
    if not texts:
        return None
    if lacking := len(records) - len(texts):
        raise UserError(
            f"{lacking} of {len(records)} texts are missing", where=str(path), hint="--overwrite writes new ones"
        )
    console.log(f"{len(texts)} texts are there already; they are scored as they are")
    return [Answer(e, texts[e.id], records[e.id].finish_reason) for e in model.examples]


def _score(metrics: Sequence[Metric], answers: Sequence[Answer]) -> tuple[dict[str, Figure], dict[str, int]]:
    # a text that was not written is empty here, and given to metrics that read none
    examples, texts = [a.example for a in answers], [a.text for a in answers]
    figures: dict[str, Figure] = {}
    noted: dict[str, int] = {}
    for metric in metrics:
        with _watched(metric, len(texts)):
            found, counts = compute_figures(metric, examples, texts)
        if clash := sorted(set(found) & set(figures)):
            raise UserError(f"two metrics give the figure {clash[0]!r}", hint="leave one of them out")
        figures.update(found)
        noted.update(counts)
    return figures, noted


@contextlib.contextmanager
def _watched(metric: Metric, texts: int) -> Iterator[None]:
    """Say what is done, show how far it is where the metric tells, and let judges end at Ctrl-C with what they have."""
    console.log(f"scoring {texts} {'texts' if metric.reads_texts else 'examples'}: {metric.name}")
    with contextlib.ExitStack() as stack:
        if metric.reports_rows:
            metric.on_rows = stack.enter_context(console.progress(f"scoring: {metric.name}", texts)).update
        if metric.guides:
            stop = stack.enter_context(console.interruptible("waiting for the answers that are on their way"))
            metric.stop_when(stop.is_set)
        yield


@contextlib.contextmanager
def _recorded_spend(guides: Sequence[Guide], session: StageSession) -> Iterator[None]:
    """Let the judges charge the run, and record their spend in run.json however the scoring ends."""
    if not guides:
        yield
        return
    session.charge(guides)
    try:
        yield
    finally:
        spend = record_spend(session.run.manifest, judges=guides)
        cost = "" if spend["charged_usd"] is None else f", {spend['charged_usd']:.4f} USD charged"
        console.log(f"judges: {spend['calls']} calls, {spend['cached']} answers from the cache{cost}")


def _entry(name: str, figure: Figure, config: IntervalConfig, seed: int, texts: int) -> dict[str, Any]:
    """A figure as scores.json has it. A figure of the set as one has an interval only where it brings it."""
    about = {"aggregate": figure.aggregate, "signature": figure.signature}
    if isinstance(figure.whole, BoundedFigure):
        whole = figure.whole
        found = _finite(name, Interval(whole.value, *whole.bounds(config.level)))
        return {**found._asdict(), "n": whole.n, "n_skipped": texts - whole.n, **about, "method": whole.method}
    if figure.whole is not None:
        return {**Interval(figure.whole, None, None)._asdict(), "n": texts, "n_skipped": 0, **about}
    assert figure.aggregate is not None  # it has rows
    scored = [row for row in figure.rows if row is not None]
    aggregate = registry.load("aggregates", figure.aggregate)
    rows = np.asarray(scored, dtype=np.float64)
    with np.errstate(all="ignore"):  # what is not finite is refused below
        found = _finite(name, interval(rows, aggregate, level=config.level, resamples=config.resamples, seed=seed))
    return {**found._asdict(), "n": len(scored), "n_skipped": texts - len(scored), **about}


def _finite(name: str, found: Interval) -> Interval:
    if not all(math.isfinite(bound) for bound in found if bound is not None):
        raise RlgfError(
            f"the figure {name} is not finite, or its interval is not: {list(found)}", hint="leave this metric out"
        )
    return found


def _counts(answers: Sequence[Answer]) -> dict[str, int]:
    return {
        "texts": sum(answer.written for answer in answers),
        "empty": sum(answer.written and not answer.text.strip() for answer in answers),
        "cut": sum(answer.finish_reason == "length" for answer in answers),
    }


def _records(answers: Sequence[Answer], figures: Mapping[str, Figure]) -> list[EvaluatedRecord]:
    return [
        EvaluatedRecord(
            id=answer.example.id,
            prompt=answer.example.prompt,
            prediction=answer.text if answer.written else None,
            references=list(answer.example.references),
            finish_reason=answer.finish_reason,
            scores={name: figure.values[i] for name, figure in figures.items() if figure.values is not None},
            statistics={name: figure.corpus.rows[i] for name, figure in figures.items() if figure.corpus is not None},
        )
        for i, answer in enumerate(answers)
    ]
