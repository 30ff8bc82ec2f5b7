"""``rlgf prepare``: checked JSONL splits of prompts and references, from rows of files or of the hub."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlgf_cli import console, registry
from rlgf_cli.artifacts.jsonl import write_jsonl
from rlgf_cli.artifacts.rundir import Existing
from rlgf_cli.config.loader import Resolved
from rlgf_cli.config.prepare import PrepareConfig
from rlgf_cli.errors import UserError, did_you_mean
from rlgf_cli.protocols import ColumnMap, Prompt, Task
from rlgf_cli.protocols.messages import prompt_key
from rlgf_cli.stages.session import StageSession
from rlgf_cli.tasks.mapping import Draft, draft, lookup
from rlgf_cli.tasks.sources import Row, Rows, hub_splits, is_local, local_splits

_ROWS_PER_UPDATE = 1000
"""Rows between two updates of the progress bar."""


@dataclass
class Split:
    """The examples of one split, and counts of the rows that were left out."""

    drafts: list[Draft] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def summary(self) -> dict[str, int]:
        references = sum(len(made.references) for made in self.drafts)
        return {"examples": len(self.drafts), "references": references, **self.counts}


@dataclass
class Prepared:
    """The written splits with their counts, and the number of prompts that two splits share."""

    path: Path
    splits: dict[str, dict[str, int]]
    shared_prompts: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return {"path": str(self.path), "splits": self.splits, "shared_prompts": self.shared_prompts}


def run(resolved: Resolved[PrepareConfig], *, existing: Existing = "refuse") -> Prepared:
    """Read, map, check, split and write. Nothing is written unless every split holds examples."""
    config = resolved.config
    task: Task | None = registry.load("tasks", config.task) if config.task else None
    sources, files = _open(config, task)
    splits = {name: _read(name, rows, config, task) for name, rows in sources.items()}
    if config.split_from:
        _split(splits, config.split_from, config.fractions, config.seed)
    for name, split in splits.items():
        if config.sample is not None:
            split.drafts = _sample(name, split.drafts, config.sample, config.seed)
        split.drafts = split.drafts[: config.limit]
    result = Prepared(Path(config.output), {n: s.summary() for n, s in splits.items()}, _shared_prompts(splits))
    session = StageSession("prepare", resolved, existing, can_resume=False)
    with session.running(*files) as folder:
        for name, split in splits.items():
            write_jsonl(folder.file(f"{name}.jsonl"), (made.to_json() for made in split.drafts))
        session.finish(result.to_json())
    for pair, count in result.shared_prompts.items():
        console.warn(f"{pair} share {count} of their prompts: scores on the latter would be too good")
    return result


def _open(config: PrepareConfig, task: Task | None) -> tuple[dict[str, Rows], list[Path]]:
    """The splits to read, and the local files that they come from."""
    dataset = config.dataset or (task.dataset if task and not config.splits else None)
    if dataset is None or is_local(dataset):
        for name in ("subset", "revision"):
            if getattr(config, name):
                raise UserError(f"{name} is for datasets of the hub, and this is a local one", where=dataset)
        return local_splits(dataset, config.splits)
    return hub_splits(dataset, subset=config.subset, revision=config.revision, splits=config.splits), []


def _columns(config: PrepareConfig, task: Task | None) -> ColumnMap:
    """The mapping: what the config gives, else what the task says, else columns of the same names."""
    columns = task.columns if task else ColumnMap()
    given = config.map
    return ColumnMap(
        prompt=columns.prompt if given.prompt is None else given.prompt,
        references=columns.references if given.references is None else given.references,
        id=columns.id if given.id is None else given.id,
        meta={**(columns.meta or {}), **given.meta} or None,
    )


def _read(name: str, rows: Rows, config: PrepareConfig, task: Task | None) -> Split:
    """All rows of a split as examples: mapped, grouped, without duplicates, ids filled in."""
    split = Split()
    reader = _RowReader(name, config, task)
    groups: dict[str, Draft] = {}
    seen: dict[tuple[Prompt, ...], str] = {}
    ids: dict[str, str] = {}
    first_error: UserError | None = None
    for number, row in enumerate(_counted(rows(), f"reading {name}")):
        split.counts["rows"] += 1
        try:
            made = reader.read(row)
            if made is None:
                split.counts["skipped"] += 1
                continue
            key = reader.group(row)
            key = f"row {number}" if key is None else json.dumps(key, default=str)
            if key in groups:
                _join(groups[key], made, split.counts)
                continue
            made.id = made.id or f"{reader.id_prefix}{name}-{number}"
            if made.id in ids:
                hint = "map another column to the id, or none: --map id="
                raise UserError(
                    f"the id {made.id!r} is here twice (first: {ids[made.id]})", where=made.where, hint=hint
                )
        except UserError as error:
            if not config.drop_bad:
                raise
            split.counts["bad"] += 1
            first_error = first_error or error
            continue
        ids[made.id] = made.where
        groups[key] = made
    for made in groups.values():
        if (content := (made.prompt, *made.references)) in seen:
            split.counts["duplicates"] += 1
        else:
            seen[content] = made.where
            split.drafts.append(made)
    if not split.drafts:
        raise first_error or UserError(f"the split {name!r} holds no examples", hint=_why_empty(split.counts, task))
    return split


def _counted(rows: Iterable[Row], label: str) -> Iterator[Row]:
    """The rows, with a progress bar. Their number is unknown; the bar is updated rarely, because a row is quick."""
    with console.progress(label, None) as bar:
        for number, row in enumerate(rows, 1):
            yield row
            if number % _ROWS_PER_UPDATE == 0:
                bar.update(_ROWS_PER_UPDATE)


def _why_empty(counts: Mapping[str, int], task: Task | None) -> str | None:
    return f"all {counts['skipped']} rows were {task.skips}" if task and counts["skipped"] else None


def _join(first: Draft, second: Draft, counts: Counter[str]) -> None:
    """Add a row of the same group: its references join those that are there."""
    new = [text for text in second.references if text not in first.references]
    counts["duplicates"] += len(second.references) - len(new)
    if first.prompt != second.prompt:
        message = f"its group has another prompt at {first.where}"
        raise UserError(message, where=second.where, hint="group by a column that goes with the prompt")
    first.references += new


class _RowReader:
    """Maps the rows of one split to examples; its first row decides whether the task's mapping is needed."""

    def __init__(self, split: str, config: PrepareConfig, task: Task | None) -> None:
        self.config = config
        self.task = task
        self.columns = _columns(config, task)
        self.need_references = not (config.allow_no_references or (task and split in task.no_references))
        self.group_by = config.group_by or (task.group_by if task else None)
        self.id_prefix = f"{task.name}-" if task else ""
        self.settled = False

    def group(self, row: Row) -> Any:
        """The value that the rows of one example share; ``None`` where every row is an example."""
        return lookup(row, self.group_by) if self.group_by else None

    def read(self, row: Row) -> Draft | None:
        """The example in a row; ``None`` where the task skips it. Raises UserError for a bad row."""
        if row.error is not None:
            raise row.error
        if not self.settled:
            self._settle(row)
        if self.task and self.task.preprocess:
            for name in self.task.needs:
                lookup(row, name)
            values = self.task.preprocess(row.values)
            if values is None:
                return None
            row = Row(row.where, values)
        return draft(row, self.columns, need_references=self.need_references)

    def _settle(self, row: Row) -> None:
        """Drop the task's mapping for a file that has prompts and references already."""
        self.settled = True
        if self.task and "prompt" in row.values and isinstance(row.values.get("references"), list):
            self.task, self.columns, self.group_by = None, _columns(self.config, None), self.config.group_by


def _share(seed: int, text: str) -> float:
    """A number in [0, 1) that depends on nothing but the seed and the text."""
    digest = hashlib.sha256(f"{seed}:{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _split(splits: dict[str, Split], source: str, fractions: Mapping[str, float], seed: int) -> None:
    """Move shares of one split to new ones, by a hash of the prompt: equal prompts stay together."""
    if source not in splits:
        raise UserError(f"there is no split {source!r} to take from", hint=did_you_mean(source, splits))
    for name in fractions:
        if name in splits:
            raise UserError(f"the split {name!r} is there already", hint="leave it out of the fractions")
    for name in fractions:
        splits[name] = Split()
    drafts, splits[source].drafts = splits[source].drafts, []
    for made in drafts:
        share, into = _share(seed, prompt_key(made.prompt)), source
        for name, fraction in fractions.items():
            if share < fraction:
                into = name
                break
            share -= fraction
        splits[into].drafts.append(made)
    for name in (source, *fractions):
        if not splits[name].drafts:
            raise UserError(f"no example fell to the split {name!r}", hint="give it a larger fraction")


def _sample(name: str, drafts: Sequence[Draft], count: int, seed: int) -> list[Draft]:
    """``count`` examples drawn by a hash of their ids, in their old order."""
    if count > len(drafts):
        message = f"the split {name!r} has {len(drafts)} examples: {count} cannot be drawn"
        raise UserError(message, hint="--limit takes as many as there are")
    chosen = {made.id for made in sorted(drafts, key=lambda made: _share(seed, made.id))[:count]}
    return [made for made in drafts if made.id in chosen]


def _shared_prompts(splits: Mapping[str, Split]) -> dict[str, int]:
    """The number of different prompts that two splits share, by pair."""
    prompts = {name: {made.prompt for made in split.drafts} for name, split in splits.items()}
    names = list(prompts)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    return {f"{a} and {b}": len(both) for a, b in pairs if (both := prompts[a] & prompts[b])}
