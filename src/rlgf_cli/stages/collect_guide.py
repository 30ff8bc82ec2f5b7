"""``rlgf collect-guide``: buy a guide's text once and keep it.

Every answer is on disk as a whole line before the next one is looked at, so a kill costs at most the line
that was being written. A resumed run reads what is there and asks for the rest.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlgf_cli import console
from rlgf_cli.artifacts.jsonl import Appender, read_examples, read_records
from rlgf_cli.artifacts.records import GuideRecord, prompt_hash
from rlgf_cli.artifacts.rundir import Existing, Manifest, claim_file
from rlgf_cli.config.collect_guide import CollectGuideConfig
from rlgf_cli.config.loader import Resolved
from rlgf_cli.errors import Interrupted, RlgfError, UserError
from rlgf_cli.guides.base import Answer, Failure, LiveGuide
from rlgf_cli.guides.make import make_live_guide
from rlgf_cli.protocols import Completion, Example, GuideRequest

COMMAND = "collect-guide"
GIVE_UP_AFTER = 20
"""Failures in a row, with their retries, after which no more is asked: the endpoint is down or refuses us."""
_SHOWN_PER_KIND = 3
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
    path = Path(config.output)
    if path.suffix == ".gz":
        raise UserError("the output is appended to, so it cannot be .gz", where=str(path), hint="pack it afterwards")
    examples = read_examples(config.data, limit=config.limit)
    with contextlib.closing(make_live_guide(config.guide, seed=config.seed)) as guide:
        guide.check(examples, config.max_new_tokens)
        settings = {**guide.settings, "max_new_tokens": config.max_new_tokens}
        manifest = claim_file(path, COMMAND, existing=existing, seed=config.seed)
        _same_settings(manifest, settings, path)
        manifest.data.update(settings=settings, config=resolved.to_json(), device=guide.device)
        try:
            with manifest.running():
                manifest.add_parent(config.data)
                manifest.add_parent(config.guide.name[3:] if config.guide.name.startswith("hf:") else None)
                return _collect(config, examples, guide, manifest, path)
        except UserError:
            if path.exists() and not path.stat().st_size:  # nothing was bought: leave nothing behind
                path.unlink()
                manifest.path.unlink()
            raise


def _collect(
    config: CollectGuideConfig, examples: list[Example], guide: LiveGuide, manifest: Manifest, path: Path
) -> CollectResult:
    wanted = len(examples) * config.samples
    stopped: RlgfError | None = None
    # The appender comes first: it cuts a torn last line off, which must not count as something that is there.
    with Appender(path) as out:
        missing = list(pending(path, examples, config.samples, config.max_new_tokens))
        if len(missing) < wanted:
            console.log(f"{wanted - len(missing)} texts are there already; {len(missing)} are missing")
        failed: Counter[str] = Counter()
        try:
            _ask(guide, missing, out, config, failed)
        except KeyboardInterrupt:
            stopped = Interrupted("interrupted; every text that came is kept", where=str(path), hint=_AGAIN)
        except RlgfError as error:
            stopped = error
    still = sum(1 for _ in pending(path, examples, config.samples, config.max_new_tokens))
    summary, spend = summarise(path)
    summary.update(new=len(missing) - still, missing=still, failed=dict(failed), mended=dict(guide.counts))
    manifest.save(result=summary, spend=spend)
    if summary["records"]:
        _report(summary, spend, config)
    if stopped is not None:
        raise stopped
    if still:
        why = ", ".join(f"{kind}: {count}" for kind, count in failed.most_common())
        raise RlgfError(f"{still} of {wanted} texts are still missing ({why})", where=str(path), hint=_AGAIN)
    return CollectResult(path, summary, spend)


def _ask(
    guide: LiveGuide,
    missing: list[GuideRequest],
    out: Appender,
    config: CollectGuideConfig,
    failed: Counter[str],
) -> None:
    """Ask for all that is missing; texts are written as they come, failures are counted in ``failed``."""
    sampling = {**config.guide.sampling.model_dump(), "max_new_tokens": config.max_new_tokens}
    in_a_row = 0
    with (
        contextlib.closing(guide.stream(missing)) as answers,
        console.progress("guide", len(missing)) as bar,
    ):
        for answer in answers:
            if isinstance(answer.outcome, Failure):
                _note(answer, answer.outcome, failed)
                in_a_row += 1
            else:
                out.write(record_of(answer.request, answer.outcome, guide.name, sampling))
                in_a_row = 0
            bar.update(1, f"{failed.total()} failed" if failed else "")
            if in_a_row >= GIVE_UP_AFTER:
                console.warn(f"{in_a_row} failures in a row: no more is asked")
                return


def pending(path: Path, examples: Sequence[Example], samples: int, max_new_tokens: int) -> Iterator[GuideRequest]:
    """What the file does not hold yet, in the order of the examples.

    A text counts for the example with its id and prompt. Where ids have changed, because lines were moved or
    the data has none, a text that belongs to no example of its own counts for any with the same prompt: what
    was paid for is not bought twice.
    """
    prompts = {example.id: prompt_hash(example.prompt) for example in examples}
    own: set[tuple[str, int]] = set()
    spare: Counter[tuple[str, int]] = Counter()
    for record in read_records(path, GuideRecord, torn_tail=True):
        key = prompt_hash(record.prompt)
        if record.prefix:
            continue
        if prompts.get(record.id) == key and (record.id, record.sample_index) not in own:
            own.add((record.id, record.sample_index))
        else:
            spare[key, record.sample_index] += 1
    for example in examples:
        for index in range(samples):
            if (example.id, index) in own:
                continue
            if spare[prompts[example.id], index] > 0:
                spare[prompts[example.id], index] -= 1
                continue
            yield GuideRequest(example, sample_index=index, max_new_tokens=max_new_tokens)


def record_of(request: GuideRequest, text: Completion, guide: str, sampling: dict[str, Any]) -> GuideRecord:
    """The line that keeps an answer."""
    return GuideRecord(
        id=request.example.id,
        prompt=request.example.prompt,
        prompt_sha256=prompt_hash(request.example.prompt),
        prefix=request.prefix,
        sample_index=request.sample_index,
        completion=text.text,
        finish_reason=text.finish_reason,
        model=text.model,
        guide=guide,
        sampling=sampling,
        usage=dict(text.usage),
        cost_usd=text.cost_usd,
    )


def summarise(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a guide file holds and what it cost, read back from the disk: ``(result, spend)``.

    ``same_text`` counts the prompts with several samples that are all one text. ``unpriced`` counts texts
    whose price is not known; they are not in ``cost_usd``, which is null where no price is known at all.
    """
    records = empty = cut = unpriced = 0
    cost = 0.0
    usage: Counter[str] = Counter()
    models: Counter[str] = Counter()
    texts: dict[str, tuple[int, int]] = {}  # prompt hash -> (samples, hash of the text; 0 where texts differ)
    for record in read_records(path, GuideRecord):
        records += 1
        empty += not record.completion.strip()
        cut += record.finish_reason == "length"
        usage.update(record.usage)
        models[record.model] += 1
        if record.cost_usd is None:
            unpriced += 1
        else:
            cost += record.cost_usd
        key, fingerprint = prompt_hash(record.prompt), hash(record.completion) or 1
        count, before = texts.get(key, (0, fingerprint))
        texts[key] = (count + 1, before if before == fingerprint else 0)
    same = sum(1 for count, fingerprint in texts.values() if count > 1 and fingerprint)
    result = {
        "records": records,
        "prompts": len(texts),
        "empty": empty,
        "cut_at_length": cut,
        "same_text": same,
        "models": dict(models),
    }
    known = round(cost, 8) if records > unpriced else None
    return result, {"calls": records, "usage": dict(usage), "cost_usd": known, "unpriced": unpriced}


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


def _note(answer: Answer, failure: Failure, failed: Counter[str]) -> None:
    failed[failure.kind] += 1
    if failed[failure.kind] <= _SHOWN_PER_KIND:
        console.warn(f"no text for {answer.request.example.id!r}: {failure.message}")
    elif failed[failure.kind] == _SHOWN_PER_KIND + 1:
        console.warn(f"more failures of this kind ({failure.kind}) are counted and not shown")


def _report(summary: dict[str, Any], spend: dict[str, Any], config: CollectGuideConfig) -> None:
    cost = f", {spend['cost_usd']:.4f} USD" if spend["cost_usd"] is not None else ""
    tokens = f"{sum(spend['usage'].values())} tokens"
    console.log(
        f"{summary['records']} texts for {summary['prompts']} prompts ({summary['new']} new, "
        f"{summary['empty']} empty, {summary['cut_at_length']} cut at {config.max_new_tokens}); {tokens}{cost}"
    )
    if summary["empty"]:
        console.warn(f"{summary['empty']} texts are empty; they are kept and never used")
    # short texts coincide by chance: what a server does that ignores the temperature shows on most prompts
    if 2 * summary["same_text"] > summary["prompts"] and config.guide.sampling.temperature > 0:
        console.warn(
            f"for {summary['same_text']} prompts all samples are one text, though the temperature is "
            f"{config.guide.sampling.temperature:g}; some servers ignore it"
        )
