"""``rlgf eval``: texts to per-example scores, and means with intervals."""

from __future__ import annotations

import contextlib
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
from rlgf_cli.config.eval import FREE_ON_RESUME, EvalConfig
from rlgf_cli.config.loader import Resolved
from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.guides.make import closing_all
from rlgf_cli.ledger.spend import record_spend
from rlgf_cli.protocols import BoundedFigure, Example, Guide, Metric
from rlgf_cli.scorers.figures import Figure, compute_figures, make_metrics
from rlgf_cli.stages.session import StageSession, prepare_guides, report_text
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
    scores the stored texts.
    """
    config = resolved.config
    session = StageSession("eval", resolved, existing)
    refuse_own_input(config.output, config.predictions, config.data)
    session.open(free=FREE_ON_RESUME, reopen=True)
    source = _FileTexts(config) if config.model is None else _ModelTexts(config)
    metrics = make_metrics(config.metrics, device=config.device)
    judges = [guide for metric in metrics for guide in metric.guides]
    with closing_all(judges):
        prepare_guides(judges, config.budget)
        for metric in metrics:
            source.give_model(metric)
            metric.check_set(source.examples)
        inputs = _inputs(config)
        with session.claim().running() as run_dir:
            source.read_stored(run_dir, inputs["model"], need_tokens=any(metric.reads_tokens for metric in metrics))
            session.begin(parents=[parent for parent in inputs.values() if parent and "sha256" in parent])
            answers = source.answers(run_dir, generate=any(metric.reads_texts for metric in metrics))
            source.give_tokens(metrics, answers)
            with _recorded_spend(judges, session):
                figures, counts = _score(metrics, answers)
            entries = {name: _entry(name, figure, config, len(answers)) for name, figure in figures.items()}
            scores = {
                "schema_version": SCHEMA_VERSION,
                "metrics": entries,
                "counts": {**source.counts, **_counts(answers), **counts},
                "decoding": source.decoding if answers[0].written else None,
                "interval": {
                    "method": "percentile bootstrap over prompts",
                    "seed": config.seed,
                    **config.interval.model_dump(),
                },
                **inputs,
                **({"spend": run_dir.manifest.data["spend"]} if judges else {}),
            }
            jsonl.write_jsonl(run_dir.file(PREDICTIONS), _records(answers, figures))
            jsonl.write_json(run_dir.file(SCORES), scores)
            session.finish({name: entry["value"] for name, entry in entries.items()})
    return EvalResult(run_dir.path, scores)


def _inputs(config: EvalConfig) -> dict[str, dict[str, Any] | None]:
    """Path and hash of dataset, model and predictions, as scores.json names them."""
    return {
        "dataset": parent_of(config.data) if config.data else None,
        "model": (parent_of(config.model.name) or {"path": config.model.name}) if config.model else None,
        "predictions": parent_of(config.predictions) if config.predictions else None,
    }


class _FileTexts:
    """The texts of ``predictions``, joined to ``data`` where that is given."""

    decoding: dict[str, Any] | None = None

    def __init__(self, config: EvalConfig) -> None:
        assert config.predictions is not None  # EvalConfig holds it
        if config.data is not None:
            examples = jsonl.read_examples(config.data)
            self._answers, self.counts = answers_to(
                examples, config.predictions, on_missing=config.on_missing, limit=config.limit
            )
        else:
            answers, self.counts = answers_alone(config.predictions)
            self._answers = answers[: config.limit]

    @property
    def examples(self) -> list[Example]:
        return [answer.example for answer in self._answers]

    def give_model(self, metric: Metric) -> None:
        """Do nothing: texts of a file come without a model."""

    def read_stored(self, run_dir: RunDir, model: Mapping[str, Any] | None, *, need_tokens: bool) -> None:
        """Do nothing: the texts are in a file of their own, and no earlier session stored any."""

    def give_tokens(self, metrics: Sequence[Metric], answers: Sequence[Answer]) -> None:
        """Do nothing: a metric that reads tokens needs a model, and has refused."""

    def answers(self, run_dir: RunDir, *, generate: bool) -> list[Answer]:
        return self._answers


class _ModelTexts:
    """The texts that a model generates for tokenised prompts, or that an earlier session stored."""

    def __init__(self, config: EvalConfig) -> None:
        from rlgf_cli.models.load import load
        from rlgf_cli.models.prompts import encode_prompts

        assert config.model is not None and config.data is not None  # EvalConfig holds it
        self.config = config
        examples = jsonl.read_examples(config.data, limit=config.limit)
        self.loaded: Loaded = load(config.model, text=config.text)
        report_text(self.loaded)
        self.encoded: list[Encoded]
        self.encoded, self.counts = encode_prompts(self.loaded, examples, config.lengths)
        self._stored: list[Answer] | None = None

    @property
    def examples(self) -> list[Example]:
        return [encoded.example for encoded in self.encoded]

    @property
    def decoding(self) -> dict[str, Any]:
        """The settings that decide which texts are generated, for scores.json."""
        config = self.config
        return {
            **config.decoding.model_dump(),
            **config.lengths.model_dump(),
            "seed": config.seed,
            "dtype": str(self.loaded.dtype).removeprefix("torch."),
            "text": self.loaded.text.to_json(),
        }

    def give_model(self, metric: Metric) -> None:
        """Let a metric use the model and its length limits, where it can with this decoding."""
        metric.take_decoding(self.config.decoding)
        metric.take_model(self.loaded, self.config.lengths)

    def give_tokens(self, metrics: Sequence[Metric], answers: Sequence[Answer]) -> None:
        """Give the tokens of prompts and texts to the metrics that read them."""
        for metric in metrics:
            if metric.reads_tokens:
                metric.take_tokens([e.ids for e in self.encoded], [a.token_ids or () for a in answers])

    def read_stored(self, run_dir: RunDir, model: Mapping[str, Any] | None, *, need_tokens: bool) -> None:
        """Read the texts of an earlier session with equal settings, if there are any; ``model`` is the model's input.

        An evaluation whose metrics read no texts has stored records without any.
        """
        path = run_dir.path / PREDICTIONS
        if run_dir.fresh or not path.is_file():
            return
        hint = "--overwrite generates new texts"
        if model and "sha256" in model and model not in run_dir.manifest.data["parents"]:
            raise UserError("the model changed since its texts were written", where=str(path), hint=hint)
        records = {record.id: record for record in jsonl.read_records(path, EvaluatedRecord)}
        if list(records) != [example.id for example in self.examples]:
            raise UserError("these texts are not for this data", where=str(path), hint=hint)
        texts = {name: record.prediction for name, record in records.items() if record.prediction is not None}
        if not texts:
            return
        if lacking := len(records) - len(texts):
            raise UserError(f"{lacking} of {len(records)} texts are missing", where=str(path), hint=hint)
        if need_tokens and any(record.token_ids is None for record in records.values()):
            # the text's tokens need not be those that were sampled
            raise UserError("these texts were stored without their tokens", where=str(path), hint=hint)
        console.log(f"{len(texts)} texts are there already; they are scored as they are")
        self._stored = [
            Answer(e, texts[e.id], records[e.id].finish_reason, token_ids=records[e.id].token_ids)
            for e in self.examples
        ]

    def answers(self, run_dir: RunDir, *, generate: bool) -> list[Answer]:
        """The stored texts, else newly generated ones; with ``generate`` False the examples without texts."""
        run_dir.manifest.save(device=str(self.loaded.device))
        if self._stored is not None:
            return self._stored
        if not generate:
            return [Answer(example, "", written=False) for example in self.examples]
        answers = self._generate()
        jsonl.write_jsonl(run_dir.file(PREDICTIONS), _records(answers, {}))
        return answers

    def _generate(self) -> list[Answer]:
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
        return [
            Answer(e, t.text, t.finish_reason, token_ids=t.token_ids) for e, t in zip(self.examples, texts, strict=True)
        ]


def _score(metrics: Sequence[Metric], answers: Sequence[Answer]) -> tuple[dict[str, Figure], dict[str, int]]:
    """The figures of all metrics, and the counts that they add to scores.json."""
    # a text that was not generated is empty here, and only metrics that read no texts get it
    examples, texts = [a.example for a in answers], [a.text for a in answers]
    figures: dict[str, Figure] = {}
    all_counts: dict[str, int] = {}
    for metric in metrics:
        with _progress(metric, len(texts)):
            own, counts = compute_figures(metric, examples, texts)
        if clash := sorted(set(own) & set(figures)):
            raise UserError(f"two metrics give the figure {clash[0]!r}", hint="leave one of them out")
        figures.update(own)
        all_counts.update(counts)
    return figures, all_counts


@contextlib.contextmanager
def _progress(metric: Metric, texts: int) -> Iterator[None]:
    """Log and show the progress of a metric, where it reports rows; on Ctrl-C its judges send no further request."""
    console.log(f"scoring {texts} {'texts' if metric.reads_texts else 'examples'}: {metric.name}")
    with contextlib.ExitStack() as stack:
        if metric.reports_rows:
            metric.on_rows = stack.enter_context(console.progress(f"scoring: {metric.name}", texts)).update
        if metric.guides:
            stop = stack.enter_context(console.interruptible("waiting for the answers to the requests in flight"))
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
        spend = record_spend(session.manifest, judges=guides)
        cost = "" if spend["charged_usd"] is None else f", {spend['charged_usd']:.4f} USD charged"
        console.log(f"judges: {spend['calls']} calls, {spend['cached']} answers from the cache{cost}")


def _entry(name: str, figure: Figure, config: EvalConfig, texts: int) -> dict[str, Any]:
    """The entry of a figure in scores.json. One of the whole set has an interval only where its metric gives one."""
    about = {"aggregate": figure.aggregate, "signature": figure.signature}
    if isinstance(figure.whole, BoundedFigure):
        whole = figure.whole
        bounds = _finite(name, Interval(whole.value, *whole.bounds(config.interval.level)))
        return {**bounds._asdict(), "n": whole.n, "n_skipped": texts - whole.n, **about, "method": whole.method}
    if figure.whole is not None:
        return {**Interval(figure.whole, None, None)._asdict(), "n": texts, "n_skipped": 0, **about}
    assert figure.aggregate is not None  # it has rows
    scored = [row for row in figure.rows if row is not None]
    aggregate = registry.load("aggregates", figure.aggregate)
    rows = np.asarray(scored, dtype=np.float64)
    with np.errstate(all="ignore"):  # what is not finite is refused below
        bounds = _finite(name, interval(rows, aggregate, **config.interval.model_dump(), seed=config.seed))
    return {**bounds._asdict(), "n": len(scored), "n_skipped": texts - len(scored), **about}


def _finite(name: str, values: Interval) -> Interval:
    if not all(math.isfinite(bound) for bound in values if bound is not None):
        raise RlgfError(
            f"the figure {name} is not finite, or its interval is not: {list(values)}", hint="leave this metric out"
        )
    return values


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
            prompt=answer.example.given,
            prediction=answer.text if answer.written else None,
            references=list(answer.example.references),
            finish_reason=answer.finish_reason,
            token_ids=None if answer.token_ids is None else list(answer.token_ids),
            scores={name: figure.values[i] for name, figure in figures.items() if figure.values is not None},
            statistics={name: figure.corpus.rows[i] for name, figure in figures.items() if figure.corpus is not None},
        )
        for i, answer in enumerate(answers)
    ]
