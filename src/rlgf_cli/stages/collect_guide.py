"""``rlgf collect-guide``: buy a guide's text once and keep it.

Prompts are streamed: memory does not grow with them. An answer is in the cache in the moment it is received and
on disk as a whole line before the next one is looked at, so a kill costs nothing that came whole. A resumed run
reads what is there and asks for the rest.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlgf_cli import console
from rlgf_cli.artifacts.collected import CollectedTexts
from rlgf_cli.artifacts.jsonl import Appender, example_records
from rlgf_cli.artifacts.records import prompt_hash
from rlgf_cli.artifacts.rundir import Existing, Manifest, claim_file, manifest_of
from rlgf_cli.config.collect_guide import CollectGuideConfig
from rlgf_cli.config.loader import Resolved
from rlgf_cli.errors import Interrupted, RlgfError, UserError
from rlgf_cli.guides.make import make_live_guide
from rlgf_cli.guides.openai.estimate import Plan, estimate, lines
from rlgf_cli.protocols import Answer, Completion, Example, Failure, Guide, GuideRequest

COMMAND = "collect-guide"
_SHOWN_PER_KIND = 3
_SECOND_TRY = 10_000
"""Failed requests that are remembered, to be asked once more at the end."""
_LOOKED_UP = 500
_AGAIN = "run the same command with --resume: it asks only for what is missing"


@dataclass(frozen=True)
class CollectResult:
    """Where the texts are, and what the manifest says of them."""

    path: Path
    summary: dict[str, Any]
    spend: dict[str, Any]


def run(resolved: Resolved[CollectGuideConfig], *, existing: Existing = "refuse") -> CollectResult:
    """Collect. Raises RlgfError (exit 1) where texts are still missing; what came is kept for --resume."""
    config = resolved.config
    path = _output(config)
    with contextlib.closing(CollectedTexts()) as collected, contextlib.closing(_guide(config)) as guide:
        for _ in collected.examples(config.data, limit=config.limit):
            pass  # all prompts are checked before the first one is paid for
        guide.check(_examples(config), config.max_new_tokens)
        guide.check_budget(config.budget)
        if config.batch:
            guide.check_batch()
        if existing == "overwrite" and (before := manifest_of(path)) is not None:
            guide.refuse_open_batches(before["run_id"])
        settings = {**guide.settings, "max_new_tokens": config.max_new_tokens}
        manifest = claim_file(path, COMMAND, existing=existing, seed=config.seed, can_resume=True)
        _same_settings(manifest, settings, path)
        guide.charge_to(manifest.data["run_id"], config.budget, manifest.data["spend"])
        manifest.data.update(settings=settings, config=resolved.to_json(), device=guide.device)
        try:
            with manifest.running():
                manifest.add_parent(config.data)
                manifest.add_parent(config.guide.name.partition(":")[2] if guide.device else None)
                return _Collection(config, collected, guide, manifest, path).run()
        except UserError:
            # nothing was bought: leave nothing behind
            if path.exists() and not path.stat().st_size and not guide.spend()["calls"]:
                path.unlink()
                manifest.path.unlink()
            raise


def dry_run(resolved: Resolved[CollectGuideConfig]) -> dict[str, Any]:
    """What the command would ask, and what that costs; nothing is written and nobody is asked."""
    config = resolved.config
    path = _output(config)
    quiet = config.model_copy(update={"guide": config.guide.model_copy(update={"mode": "replay"})})
    with contextlib.closing(CollectedTexts()) as collected, contextlib.closing(_guide(quiet)) as guide:
        for _ in collected.examples(config.data, limit=config.limit):
            pass
        guide.check(_examples(config), config.max_new_tokens)
        if path.is_file():
            collected.read(path)
        cache = (config.guide.mode or guide.default_mode) != "live"
        estimated = estimate(guide, _plan(config, collected, guide, cache=cache))
    for line in lines(estimated):
        console.log(line)
    return estimated


def _output(config: CollectGuideConfig) -> Path:
    path = Path(config.output)
    if path.suffix == ".gz":
        raise UserError("the output is appended to, so it cannot be .gz", where=str(path), hint="pack it afterwards")
    return path


def _guide(config: CollectGuideConfig) -> Guide:
    guide = make_live_guide(config.guide, seed=config.seed)
    guide.notify = console.warn
    return guide


def _examples(config: CollectGuideConfig) -> Iterator[Example]:
    return (record.to_example() for _, record in example_records(config.data, limit=config.limit))


def _missing(config: CollectGuideConfig, collected: CollectedTexts) -> Iterator[GuideRequest]:
    """What the file does not hold yet, in the order of the examples."""
    for example in _examples(config):
        for index in collected.missing(example, config.samples):
            yield GuideRequest(example, sample_index=index, max_new_tokens=config.max_new_tokens)


def _plan(config: CollectGuideConfig, collected: CollectedTexts, guide: Guide, *, cache: bool) -> Plan:
    """Count what is to be asked."""
    plan = Plan(requests=collected.count() * config.samples, batch=config.batch)
    missing = 0
    with collected.counting():
        requests = _missing(config, collected)
        while window := list(itertools.islice(requests, _LOOKED_UP)):
            missing += len(window)
            there = guide.cached(window) if cache else [False] * len(window)
            plan.cached += sum(there)
            for request, cached in zip(window, there, strict=True):
                if not cached:
                    plan.add(guide, request)
    plan.in_file = plan.requests - missing
    return plan


@dataclass
class _Collection:
    """One run over the prompts."""

    config: CollectGuideConfig
    collected: CollectedTexts
    guide: Guide
    manifest: Manifest
    path: Path
    new: int = 0
    skipped: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    mended: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def run(self) -> CollectResult:
        stopped: RlgfError | None = None
        # The appender comes first: it cuts a torn last line off, which must not count as something that is there.
        with Appender(self.path) as out:
            self.collected.read(self.path)
            before = self.guide.spend()
            expected = self._expect()
            try:
                self._collect(out)
            except KeyboardInterrupt:
                stopped = Interrupted("interrupted; every text that came is kept", where=str(self.path), hint=_AGAIN)
            except RlgfError as error:
                stopped = error
        wanted = self.collected.count() * self.config.samples
        still = wanted - self.skipped - self.new
        summary, spend = self._summary(), self.guide.spend()
        summary.update(new=self.new, missing=still, failed=dict(self.failed), mended=dict(self.guide.counts))
        if expected is not None:
            expected["actual"] = _since(before, spend)
        self.manifest.save(result=summary, spend=spend, estimate=expected, guide=self.guide.provenance())
        self._report(summary, spend)
        if stopped is not None:
            raise stopped
        if still:
            why = ", ".join(f"{kind}: {count}" for kind, count in self.failed.most_common())
            raise RlgfError(f"{still} of {wanted} texts are still missing ({why})", where=str(self.path), hint=_AGAIN)
        return CollectResult(self.path, summary, spend)

    def _expect(self) -> dict[str, Any] | None:
        """The estimate that the run is held against; None where nobody is to be asked."""
        if self.guide.mode == "replay" or not self.guide.abilities.remote:
            return None
        found = estimate(self.guide, _plan(self.config, self.collected, self.guide, cache=self.guide.mode != "live"))
        for line in lines(found):
            console.log(line)
        return found

    def _collect(self, out: Appender) -> None:
        with console.interruptible("waiting for the answers that are on their way") as stop:
            stopped: RlgfError | None = None
            if self.config.batch:
                try:
                    with self.collected.counting():
                        self.guide.run_batch(_missing(self.config, self.collected), stop)
                except Interrupted:
                    raise
                except RlgfError as error:
                    stopped = error  # what other batches brought is written first
            again: list[GuideRequest] = []
            with console.progress("guide", self.collected.count() * self.config.samples) as bar:
                watch = _Watch(self, bar)
                self._ask(self._wanted(stop, watch), out, again, watch)
                if again and not stop.is_set():
                    console.log(f"asking {len(again)} failed requests once more")
                    self._ask(iter(again), out, None, watch)
        if stopped is not None:
            raise stopped
        if stop.is_set():
            raise KeyboardInterrupt

    def _wanted(self, stop: threading.Event, watch: _Watch) -> Iterator[GuideRequest]:
        for example in _examples(self.config):
            indices = self.collected.missing(example, self.config.samples)
            here = self.config.samples - len(indices)
            self.skipped += here
            watch.done(here)
            for index in indices:
                if stop.is_set():
                    return
                yield GuideRequest(example, sample_index=index, max_new_tokens=self.config.max_new_tokens)

    def _ask(
        self, requests: Iterator[GuideRequest], out: Appender, again: list[GuideRequest] | None, watch: _Watch
    ) -> None:
        """Texts are written as they come; failures are counted, and those that may yet succeed kept in ``again``."""
        sampling = {**self.config.guide.sampling.model_dump(), "max_new_tokens": self.config.max_new_tokens}
        ask = self.guide.stored if self.config.batch else self.guide.stream
        with contextlib.closing(ask(requests)) as answers:
            for answer in answers:
                outcome = answer.outcome
                if isinstance(outcome, Failure):
                    if again is not None and not outcome.final and len(again) < _SECOND_TRY:
                        again.append(answer.request)
                        continue
                    self._note(answer, outcome)
                else:
                    record = record_of(answer.request, outcome, self.guide, sampling)
                    out.write(record)
                    self.collected.add(record)
                    self.new += 1
                    self._show(answer.request, outcome)
                watch.done(1)

    def _note(self, answer: Answer, failure: Failure) -> None:
        self.failed[failure.kind] += 1
        if self.failed[failure.kind] <= _SHOWN_PER_KIND:
            console.warn(f"no text for {answer.request.example.id!r}: {failure.message}")
        elif self.failed[failure.kind] == _SHOWN_PER_KIND + 1:
            console.warn(f"more failures of this kind ({failure.kind}) are counted and not shown")

    def _show(self, request: GuideRequest, text: Completion) -> None:
        """Keep a few of what was mended, for the end of the run."""
        for kind in text.repaired:
            shown = self.mended.setdefault(kind, [])
            if len(shown) < _SHOWN_PER_KIND and text.raw is not None:
                shown.append((text.raw, text.text))

    def _summary(self) -> dict[str, Any]:
        collected = self.collected
        prompts, same = collected.same_text()
        return {
            "records": collected.records,
            "prompts": prompts,
            "empty": collected.empty,
            "cut_at_length": collected.cut,
            "same_text": same,
            "models": dict(collected.models),
            "usage": dict(collected.usage),
            "cost_usd": round(collected.cost_usd, 8) if collected.records > collected.unpriced else None,
        }

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
            console.log(f"mended: {kind.replace('_', ' ')}: {count}")
            for raw, text in self.mended.get(kind, []):
                console.log(f"  {_short(raw)} -> {_short(text)}")
        if summary["empty"]:
            console.warn(f"{summary['empty']} texts are empty; they are kept and never used")
        # short texts coincide by chance: what a server does that ignores the temperature shows on most prompts
        temperature = self.config.guide.sampling.temperature
        if 2 * (summary["same_text"] or 0) > summary["prompts"] and temperature > 0:
            console.warn(
                f"for {summary['same_text']} prompts all samples are one text, though the temperature is "
                f"{temperature:g}; some servers ignore it"
            )


class _Watch:
    """The progress bar, told a few times a second: how much, and what it cost so far."""

    def __init__(self, collection: _Collection, bar: console.Progress) -> None:
        self._collection = collection
        self._bar = bar
        self._said = time.monotonic()
        self._steps = 0

    def done(self, steps: int) -> None:
        self._steps += steps
        now = time.monotonic()
        if now - self._said < 0.2:
            return
        self._bar.update(self._steps, self._note())
        self._steps, self._said = 0, now

    def _note(self) -> str:
        collection = self._collection
        parts = []
        spend, cap = collection.guide.spend(), collection.config.budget.max_cost_usd
        if spend["charged_usd"]:
            parts.append(f"${spend['charged_usd']:.4f}" + (f" of {cap:g}" if cap is not None else ""))
        if collection.failed:
            parts.append(f"{collection.failed.total()} failed")
        return ", ".join(parts)


def record_of(request: GuideRequest, text: Completion, guide: Guide, sampling: dict[str, Any]) -> dict[str, Any]:
    """The line that keeps an answer: a GuideRecord's fields."""
    return {
        "schema_version": 1,
        "id": request.example.id,
        "prompt": request.example.prompt,
        "prompt_sha256": prompt_hash(request.example.prompt),
        "prefix": request.prefix,
        "sample_index": request.sample_index,
        "completion": text.text,
        "finish_reason": text.finish_reason,
        "model": text.model,
        "guide": guide.name,
        "sampling": sampling,
        "usage": dict(text.usage),
        "cost_usd": text.cost_usd,
        "cached": text.cached,
        "created": text.created,
        "mended": list(text.repaired),
        "licence": guide.licence,
    }


def _since(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What this session was charged, in the estimate's terms."""
    usage = {name: after["usage"][name] - before["usage"][name] for name in after["usage"]}
    usd = (after["charged_usd"] or 0.0) - (before["charged_usd"] or 0.0)
    return {
        "calls": after["calls"] - before["calls"],
        "cached": after["cached"] - before["cached"],
        **usage,
        "usd": round(usd, 9) if after["charged_usd"] is not None else None,
    }


def _same_settings(manifest: Manifest, settings: dict[str, Any], path: Path) -> None:
    """Refuse to mix texts that were drawn in different ways in one file."""
    before = manifest.data.get("settings")
    if before is None or before == settings:
        return
    differ = [key for key in sorted({*before, *settings}) if before.get(key) != settings.get(key)]
    key = differ[0]
    raise UserError(
        f"the file was collected with other settings ({', '.join(differ)}); "
        f"{key} was {before.get(key)!r} and is now {settings.get(key)!r}",
        where=str(path),
        hint="use the old settings, --overwrite, or another -o",
    )


def _short(text: str) -> str:
    text = repr(text)
    return text if len(text) <= 70 else f"{text[:67]}..."
