"""RecordedGuide: the texts of a guide in a guide.jsonl."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rlgf_cli.artifacts.jsonl import read_records
from rlgf_cli.artifacts.records import GuideRecord, prompt_hash
from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.ledger.meter import usd
from rlgf_cli.protocols import Completion, Example, Guide, GuideAbilities, GuideRequest


class RecordedGuide(Guide):
    """The whole texts of a guide.jsonl (``.gz`` too), joined to prompts.

    An example gets the texts under its id where their prompt is its own; else those of any record with the same prompt.
    An id with another prompt is a mismatch: counted, not used. Empty texts are counted and not used, so a prompt that
    has only empty ones is not covered. Records that continue a prefix are not whole texts and are not used.

    ``counts`` has ``empty``, ``with_prefix`` and, for the examples that were looked up, ``id_mismatch``.
    """

    abilities = GuideAbilities(live=False, continues=False)

    def __init__(self, path: str | Path) -> None:
        super().__init__(str(path), RecordedGuide.abilities)
        self._by_id: dict[str, set[str]] = {}  # id -> hashes of the prompts that it stands for
        self._by_prompt: dict[str, list[tuple[int, str, Completion]]] = {}  # hash -> (sample index, id, text)
        self._mismatched: set[str] = set()
        records = 0
        for record in read_records(path, GuideRecord, torn_tail=True):
            records += 1
            self._add(record)
        if not records:
            raise UserError("the guide file holds no records", where=self.name)
        for texts in self._by_prompt.values():
            texts.sort(key=lambda entry: entry[0])  # stable: the file's order decides among equal indices

    def _add(self, record: GuideRecord) -> None:
        if record.prefix:
            self.counts["with_prefix"] += 1
            return
        key = prompt_hash(record.prompt)
        if record.id:
            self._by_id.setdefault(record.id, set()).add(key)
        if not record.completion.strip():
            self.counts["empty"] += 1
            return
        # a text that is read from a file costs nothing
        text = Completion(record.completion, record.finish_reason, record.model, record.usage, nano_usd=0)
        self._by_prompt.setdefault(key, []).append((record.sample_index, record.id, text))

    def samples(self, example: Example) -> list[Completion]:
        """The guide's texts for an example, by sample index; none where it has none."""
        key = prompt_hash(example.given)
        prompts_of_id = self._by_id.get(example.id, set())
        if prompts_of_id and key not in prompts_of_id:
            self._mismatched.add(example.id)
            self.counts["id_mismatch"] = len(self._mismatched)
        texts = self._by_prompt.get(key, [])
        own = [text for _, id_, text in texts if id_ == example.id]
        return own or [text for _, _, text in texts]

    def coverage(self, examples: Iterable[Example]) -> tuple[int, list[str]]:
        """The number of examples with a text, and the ids of those without."""
        covered, missing = 0, []
        for example in examples:
            if self.samples(example):
                covered += 1
            else:
                missing.append(example.id)
        return covered, missing

    def unmatched(self, examples: Iterable[Example]) -> int:
        """The number of texts that belong to none of the examples; equal ones count apart."""
        used = {id(text) for example in examples for text in self.samples(example)}
        return sum(map(len, self._by_prompt.values())) - len(used)

    def complete(self, requests: Sequence[GuideRequest]) -> list[Completion]:
        """Sample ``sample_index`` modulo the number of texts that the prompt has."""
        completions = []
        for request in requests:
            if request.prefix:
                raise UserError(
                    "a recorded guide cannot go on from a prefix",
                    where=self.name,
                    hint="where the guide rolls out, it must be live: hf:PATH, openai:MODEL or an alias",
                )
            texts = self.samples(request.example)
            if not texts:
                raise RlgfError(f"the guide has no text for the prompt {request.example.id!r}", where=self.name)
            completions.append(texts[request.sample_index % len(texts)])
        return completions


def guide_record(
    request: GuideRequest, text: Completion, guide: Guide, sampling: dict[str, Any], score: float | None
) -> GuideRecord:
    """The line of a guide file for a completion. ``score``: None where there is no reward."""
    return GuideRecord(
        id=request.example.id,
        prompt=request.example.given,
        prompt_sha256=prompt_hash(request.example.given),
        prefix=request.prefix,
        sample_index=request.sample_index,
        completion=text.text,
        finish_reason=text.finish_reason,
        model=text.model,
        guide=guide.name,
        sampling=sampling,
        usage=dict(text.usage),
        cost_usd=usd(text.nano_usd),
        cached=text.cached,
        created=text.created,
        mended=list(text.repaired),
        licence=guide.licence,
        score=score,
    )
