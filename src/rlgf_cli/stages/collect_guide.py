"""``rlgf collect-guide``: ask a guide for texts, and write them to a guide file.

Prompts are streamed, so that memory does not grow with them. Each answer is stored in the cache when it is received and
appended to the file as a whole line before the next one is read: a kill loses no complete answer. A resumed run reads
the file and requests the missing texts.

With a reward, texts wait to be scored until as many have arrived as the guide writes at once, and are appended then, to
the output or to the file of dropped texts. In that time the cache alone holds those that cost money, so a guide that
has one must use it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rlgf_cli import console, signals
from rlgf_cli.artifacts import resume
from rlgf_cli.artifacts.collected import CollectedTexts
from rlgf_cli.artifacts.guide_files import GuideFiles
from rlgf_cli.artifacts.jsonl import example_records
from rlgf_cli.artifacts.records import GuideRecord
from rlgf_cli.artifacts.rundir import Existing, Manifest
from rlgf_cli.artifacts.runfile import manifest_of
from rlgf_cli.config.collect_guide import CollectGuideConfig
from rlgf_cli.config.loader import Resolved
from rlgf_cli.errors import Interrupted, RlgfError, UserError
from rlgf_cli.guides.make import make_live_guide
from rlgf_cli.guides.openai.estimate import Plan, estimate, lines
from rlgf_cli.guides.recorded import guide_record
from rlgf_cli.guides.stream import in_groups
from rlgf_cli.ledger.spend import save_spend
from rlgf_cli.protocols import Answer, Completion, Example, Failure, Guide, GuideRequest
from rlgf_cli.scorers.text_filter import SETTINGS, TextFilter
from rlgf_cli.stages.session import FileResult, StageSession

COMMAND = "collect-guide"
_SHOWN_PER_KIND = 3
"""Failures, and repaired texts, of one kind that are printed."""
_MOST_RETRIES = 10_000
"""Failed requests that are kept, to be sent once more at the end."""
Write = Callable[[GuideRecord, bool], None]
"""``write(record, keep)``: append a text to the output, or to the file of dropped ones."""
_HINT = "run the same command with --resume: it requests only the missing texts"


def run(resolved: Resolved[CollectGuideConfig], *, existing: Existing = "refuse") -> FileResult:
    """Collect the texts that the output does not hold yet.

    Raises RlgfError (exit 1) where texts are still missing at the end; the received ones are kept for --resume.
    """
    config = resolved.config
    session = StageSession(COMMAND, resolved, existing)
    files = GuideFiles.of(config.output, drops=config.keep_above is not None)
    for file in (files.path, files.beside):
        resume.refuse_own_input(str(file), config.data)
    text_filter = _text_filter(config)
    with contextlib.closing(CollectedTexts()) as collected, contextlib.closing(_guide(config)) as guide:
        _check(config, collected, guide, text_filter)
        if config.batch:
            guide.check_batch()
        if existing == "overwrite" and (before := manifest_of(files.path)) is not None:
            guide.refuse_open_batches(before["run_id"])
        settings = {**guide.settings, "max_new_tokens": config.max_new_tokens}
        if text_filter is not None:
            settings |= text_filter.settings
        manifest = session.claim_file(seed=config.seed, beside=[files.dropped] if files.dropped else [])
        # before there is a text, another reward or threshold mixes nothing: a reward may have failed at once
        free = () if GuideFiles(files.path, drops=True).hold_texts() else SETTINGS
        resume.refuse_other_settings(manifest, settings, files.path, free=free)
        session.charge([guide])
        manifest.data.update(settings=settings, config=resolved.to_json(), device=guide.device)
        try:
            with manifest.running():
                manifest.add_parent(config.data)
                manifest.add_parent(config.guide.name.partition(":")[2] if guide.device else None)
                return _Collection(config, collected, guide, text_filter, manifest, files).run()
        except UserError:
            # no text was bought: leave no file behind
            if files.path.exists() and not files.hold_texts() and not guide.spend()["calls"]:
                files.remove()
                manifest.path.unlink()
            raise


def dry_run(resolved: Resolved[CollectGuideConfig]) -> dict[str, Any]:
    """The requests that the command would send, and their cost; nothing is written and no request is sent."""
    config = resolved.config
    files = GuideFiles.of(config.output, drops=config.keep_above is not None)
    offline = config.model_copy(update={"guide": config.guide.model_copy(update={"mode": "replay"})})
    text_filter = _text_filter(config)
    with contextlib.closing(CollectedTexts()) as collected, contextlib.closing(_guide(offline)) as guide:
        _check(config, collected, guide, text_filter)
        collected.read(files.path, files.dropped)
        cache = (config.guide.mode or guide.default_mode) != "live"
        estimated = estimate(guide, _plan(config, collected, guide, cache=cache))
    for line in lines(estimated):
        console.log(line)
    if config.keep_above is not None:
        console.log(
            f"texts that score below {config.keep_above:g} will be in {files.dropped}; the estimate is of all "
            f"{config.samples} texts of a prompt"
        )
    return estimated


def _guide(config: CollectGuideConfig) -> Guide:
    guide = make_live_guide(config.guide, seed=config.seed)
    guide.notify = console.warn
    for line in guide.notes:
        console.log(line)
    return guide


def _examples(config: CollectGuideConfig) -> Iterator[Example]:
    return (record.to_example() for _, record in example_records(config.data, limit=config.limit))


def _text_filter(config: CollectGuideConfig) -> TextFilter | None:
    return TextFilter.make(config.reward, config.keep_above, device=config.guide.device)


def _check(config: CollectGuideConfig, collected: CollectedTexts, guide: Guide, text_filter: TextFilter | None) -> None:
    """Read and check all prompts and the cap, before the first request is paid for. With a filter, refuse examples that
    the reward cannot score, and bought texts that would be in memory alone meanwhile."""
    for _ in collected.examples(config.data, limit=config.limit):
        pass
    guide.check(_examples(config), config.max_new_tokens)
    guide.check_budget(config.budget)
    if text_filter is None:
        return
    if config.guide.mode == "live" and guide.default_mode != "live":
        raise UserError(
            "a text waits in the cache until the reward has scored it, and guide.mode live stores none there",
            hint="--guide-mode record (the default of this guide); another --seed requests other texts",
        )
    text_filter.check(_examples(config))


def _missing(config: CollectGuideConfig, collected: CollectedTexts) -> Iterator[GuideRequest]:
    """Requests for the texts that the file does not hold, in the order of the examples."""
    for example in _examples(config):
        for index in collected.missing(example, config.samples):
            yield GuideRequest(example, sample_index=index, max_new_tokens=config.max_new_tokens)


def _plan(config: CollectGuideConfig, collected: CollectedTexts, guide: Guide, *, cache: bool) -> Plan:
    """Count the requests that neither the files nor the cache answer."""
    with collected.counting():
        wanted = collected.count() * config.samples
        return Plan.of(guide, _missing(config, collected), wanted, cache=cache, batch=config.batch)


@dataclass
class _Collection:
    """One session over the prompts. ``new`` and ``skipped`` count texts, ``failed`` requests by kind of failure.

    ``repaired`` holds a few texts per kind of repair, as ``(raw, text)``.
    """

    config: CollectGuideConfig
    collected: CollectedTexts
    guide: Guide
    text_filter: TextFilter | None
    manifest: Manifest
    files: GuideFiles
    new: int = 0
    skipped: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    repaired: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def run(self) -> FileResult:
        path = self.files.path
        stopped: RlgfError | None = None
        # The files are opened first: that cuts off a torn last line, which must not count as a text.
        with self.files.appending() as write:
            self.collected.read(self.files.path, self.files.dropped)
            if self.collected.records:
                self.guide.has_texts()
            before = self.guide.spend()
            estimated = self._log_estimate()
            try:
                self._collect(write)
            except KeyboardInterrupt as interrupt:
                stopped = signals.error_of(interrupt, _HINT)
            except RlgfError as error:
                stopped = error
        wanted = self.collected.count() * self.config.samples
        missing = wanted - self.skipped - self.new
        summary, spend = self.collected.summary(), self.guide.spend()
        summary.update(new=self.new, missing=missing, failed=dict(self.failed), mended=dict(self.guide.counts))
        if self.text_filter is not None:
            summary |= self.collected.score_summary()
        if estimated is not None:
            estimated["actual"] = _difference(before, spend)
        save_spend(self.manifest, spend, result=summary, estimate=estimated, guide=self.guide.provenance())
        self._report(summary, spend)
        if self.text_filter is not None and summary["records"]:
            for line in self.text_filter.lines(summary, self.files):
                console.log(line)
            if stopped is None and (warning := self.text_filter.warning(summary, self.files)):
                console.warn(warning)
        if stopped is not None:
            raise stopped
        if missing:
            why = ", ".join(f"{kind}: {count}" for kind, count in self.failed.most_common())
            raise RlgfError(f"{missing} of {wanted} texts are still missing ({why})", where=str(path), hint=_HINT)
        return FileResult(path, summary, spend)

    def _log_estimate(self) -> dict[str, Any] | None:
        """Log the estimate of the run, and return it; None where no endpoint will be asked."""
        if self.guide.mode == "replay" or not self.guide.abilities.remote:
            return None
        estimated = estimate(
            self.guide, _plan(self.config, self.collected, self.guide, cache=self.guide.mode != "live")
        )
        for line in lines(estimated):
            console.log(line)
        return estimated

    def _collect(self, write: Write) -> None:
        with console.interruptible("waiting for the answers to the requests in flight") as stop:
            stopped: RlgfError | None = None
            if self.config.batch:
                try:
                    with self.collected.counting():
                        self.guide.run_batch(_missing(self.config, self.collected), stop)
                except Interrupted:
                    raise
                except RlgfError as error:
                    stopped = error  # the texts of other batches are written first
            retries: list[GuideRequest] = []
            with console.progress("guide", self.collected.count() * self.config.samples) as bar:
                progress = _Progress(self, bar)
                self._ask(self._requests(stop, progress), write, retries, progress, stop)
                if retries and not stop.is_set():
                    console.log(f"sending {len(retries)} failed requests once more")
                    again = (request for request in retries if not stop.is_set())
                    self._ask(again, write, None, progress, stop)
            if stopped is not None:
                raise stopped
            if stop.is_set():
                raise Interrupted("every received text is kept", where=str(self.files.path), hint=_HINT)

    def _requests(self, stop: threading.Event, progress: _Progress) -> Iterator[GuideRequest]:
        """Requests for the missing texts, until ``stop`` is set; texts of the file are counted as skipped."""
        for example in _examples(self.config):
            indices = self.collected.missing(example, self.config.samples)
            in_file = self.config.samples - len(indices)
            self.skipped += in_file
            progress.done(in_file)
            for index in indices:
                if stop.is_set():
                    return
                yield GuideRequest(example, sample_index=index, max_new_tokens=self.config.max_new_tokens)

    def _ask(
        self,
        requests: Iterator[GuideRequest],
        write: Write,
        retries: list[GuideRequest] | None,
        progress: _Progress,
        stop: threading.Event,
    ) -> None:
        """Write texts as they arrive. A failure that is not final goes into ``retries``; any other one is counted.

        Where the reward fails, the texts in flight are awaited, because they are paid for: the cache keeps them.
        """
        ask = self.guide.stored if self.config.batch else self.guide.stream
        broken: RlgfError | None = None
        with contextlib.closing(ask(requests)) as answers:
            for group in in_groups(answers, self.guide.abilities.at_once if self.text_filter else 1):
                texts: list[tuple[GuideRequest, Completion]] = []
                for answer in group:
                    if isinstance(answer.outcome, Completion):
                        texts.append((answer.request, answer.outcome))
                    elif retries is not None and not answer.outcome.final and len(retries) < _MOST_RETRIES:
                        retries.append(answer.request)
                    else:
                        self._count_failure(answer, answer.outcome)
                        progress.done(1)
                if broken is None:
                    try:
                        self._write(texts, write)
                        progress.done(len(texts))
                    except RlgfError as error:
                        broken = error
                        stop.set()
        if broken is not None:
            raise broken

    def _write(self, texts: list[tuple[GuideRequest, Completion]], write: Write) -> None:
        """Score texts, and append each to the output or to the file of dropped ones."""
        scores: list[float | None] = [None] * len(texts)
        if self.text_filter is not None:
            given = [request.example for request, _ in texts]
            scores = [*self.text_filter.scores(given, [text.text for _, text in texts])]
        sampling = {**self.config.guide.sampling.model_dump(), "max_new_tokens": self.config.max_new_tokens}
        for (request, text), score in zip(texts, scores, strict=True):
            record = guide_record(request, text, self.guide, sampling, score)
            keep = self.text_filter is None or score is None or self.text_filter.keeps(text.text, score)
            write(record, keep)
            self.collected.add(record, dropped=not keep)
            self.new += 1
            self._keep_repaired(text)

    def _count_failure(self, answer: Answer, failure: Failure) -> None:
        self.failed[failure.kind] += 1
        if self.failed[failure.kind] <= _SHOWN_PER_KIND:
            console.warn(f"no text for {answer.request.example.id!r}: {failure.message}")
        elif self.failed[failure.kind] == _SHOWN_PER_KIND + 1:
            console.warn(f"more failures of this kind ({failure.kind}) are counted and not shown")

    def _keep_repaired(self, text: Completion) -> None:
        """Keep a few repaired texts, to be printed at the end of the run."""
        for kind in text.repaired:
            shown = self.repaired.setdefault(kind, [])
            if len(shown) < _SHOWN_PER_KIND and text.raw is not None:
                shown.append((text.raw, text.text))

    def _report(self, summary: dict[str, Any], spend: dict[str, Any]) -> None:
        if not summary["records"]:
            return
        charged = f", {spend['charged_usd']:.4f} USD charged" if spend["charged_usd"] else ""
        unknown = f" ({spend['unknown_outcome']} calls of unknown outcome in it)" if spend["unknown_outcome"] else ""
        console.log(
            f"{summary['records']} texts for {summary['prompts']} prompts ({summary['new']} new, "
            f"{spend['cached']} of them from the cache; {summary['empty']} empty, "
            f"{summary['cut_at_length']} cut at {self.config.max_new_tokens}); "
            f"{sum(summary['usage'].values())} tokens{charged}{unknown}"
        )
        for kind, count in sorted(self.guide.counts.items()):
            console.log(f"repaired: {kind.replace('_', ' ')}: {count}")
            for raw, text in self.repaired.get(kind, []):
                console.log(f"  {_short(raw)} -> {_short(text)}")
        if summary["empty"]:
            which = "dropped" if self.files.drops else "kept and never used"
            console.warn(f"{summary['empty']} texts are empty; they are {which}")
        # short samples are equal by chance on some prompts; where a server ignores the temperature, on most of them
        temperature = self.config.guide.sampling.temperature
        if 2 * (summary["same_text"] or 0) > summary["prompts"] and (temperature or 0) > 0:
            console.warn(
                f"for {summary['same_text']} prompts all samples are one text, though the temperature is "
                f"{temperature:g}; some servers ignore it"
            )


class _Progress:
    """Updates the progress bar a few times a second, with the cost so far."""

    def __init__(self, collection: _Collection, bar: console.Progress) -> None:
        self._collection = collection
        self._bar = bar
        self._updated = time.monotonic()
        self._steps = 0

    def done(self, steps: int) -> None:
        self._steps += steps
        now = time.monotonic()
        if now - self._updated < 0.2:
            return
        self._bar.update(self._steps, self._note())
        self._steps, self._updated = 0, now

    def _note(self) -> str:
        collection = self._collection
        parts = []
        if collection.files.drops:
            received = collection.collected.records
            parts.append(f"{received - collection.collected.dropped} of {received} kept")
        spend, cap = collection.guide.spend(), collection.config.budget.max_cost_usd
        if spend["charged_usd"]:
            parts.append(f"${spend['charged_usd']:.4f}" + (f" of {cap:g}" if cap is not None else ""))
        if collection.failed:
            parts.append(f"{collection.failed.total()} failed")
        return ", ".join(parts)


def _difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The spend of this session, with the keys of the estimate."""
    usage = {name: after["usage"][name] - before["usage"][name] for name in after["usage"]}
    usd = (after["charged_usd"] or 0.0) - (before["charged_usd"] or 0.0)
    return {
        "calls": after["calls"] - before["calls"],
        "cached": after["cached"] - before["cached"],
        **usage,
        "usd": round(usd, 9) if after["charged_usd"] is not None else None,
    }


def _short(text: str) -> str:
    text = repr(text)
    return text if len(text) <= 70 else f"{text[:67]}..."
