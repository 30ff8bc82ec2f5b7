"""``rlgf make-negatives``: make labelled failures from prompts and references."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rlgf_cli import console, registry
from rlgf_cli.artifacts.jsonl import read_examples, read_records, write_jsonl
from rlgf_cli.artifacts.records import FailureRecord, GeneratedRecord
from rlgf_cli.artifacts.resume import refuse_own_input
from rlgf_cli.artifacts.rundir import Existing
from rlgf_cli.config.loader import Resolved
from rlgf_cli.config.make_negatives import KindConfig, MakeNegativesConfig
from rlgf_cli.errors import UserError
from rlgf_cli.failures.make import GOOD, ON_POLICY, Tally, WeightedKind, make_failures
from rlgf_cli.failures.rules import Response, flags
from rlgf_cli.failures.sentences import words
from rlgf_cli.protocols import Example
from rlgf_cli.stages.session import FileResult, StageSession

COMMAND = "make-negatives"


def run(resolved: Resolved[MakeNegativesConfig], *, existing: Existing = "refuse") -> FileResult:
    """Write the labelled texts, whole or not at all. All inputs are read and checked before the file is claimed."""
    config = resolved.config
    path = Path(config.output)
    refuse_own_input(config.output, config.data, config.samples)
    examples = read_examples(config.data, limit=config.limit)
    kinds = _kinds(config.kinds)
    bare = sum(not example.references for example in examples)
    if bare == len(examples):
        raise UserError(
            "no example has a reference", where=config.data, hint='failures are made from "references": [...]'
        )
    if len(examples) < 2:
        raise UserError(
            "one example is not enough", where=config.data, hint="several kinds need the texts of other examples"
        )
    samples = _samples(config, examples) if config.samples else {}
    tally = Tally()
    policy: Counter[str] = Counter()
    session = StageSession(COMMAND, resolved, existing, can_resume=False)
    with session.writing_file(config.data, config.samples, seed=config.seed):
        rows = write_jsonl(path, _records(config, examples, kinds, samples, tally, policy))
        if not tally.made and not policy["made"]:
            path.unlink()
            raise UserError("no kind of failure could be made of this data", where=config.data)
        summary = {
            "rows": rows,
            "good": rows - sum(tally.made.values()) - policy["made"],
            "without_references": bare,
            **tally.to_json(),
        }
        if config.samples:
            summary["on_policy"] = {key: policy[key] for key in ("made", "empty", "no_rule_broken", "left_over")}
        session.finish(summary)
    return FileResult(path, summary)


def _kinds(kinds: Sequence[KindConfig]) -> list[WeightedKind]:
    """The kinds of failures, with unique names: the kind in a row tells whether its text is good."""
    weighted = [_weighted_kind(kind) for kind in kinds]
    taken = [GOOD, ON_POLICY]
    for kind in weighted:
        if kind.name in taken:
            raise UserError(f"another kind is called {kind.name!r}", hint="give the function another name")
        taken.append(kind.name)
    return weighted


def _weighted_kind(kind: KindConfig) -> WeightedKind:
    if registry.is_python_target(kind.name):
        made, name = registry.load_python_target(kind.name), kind.name.rpartition(":")[2]
    else:
        made, name = registry.load("failures", kind.name), kind.name
    return WeightedKind(name, made, kind.weight, (kind.severity[0], kind.severity[1]))


def _records(
    config: MakeNegativesConfig,
    examples: Sequence[Example],
    kinds: Sequence[WeightedKind],
    samples: Mapping[str, Sequence[GeneratedRecord]],
    tally: Tally,
    policy: Counter[str],
) -> Iterator[FailureRecord]:
    """The rows in the data's order: of each reference the good text, then its failures; then the policy's own."""
    made = make_failures(examples, kinds, per_reference=config.per_reference, seed=config.seed, tally=tally)
    following = next(made, None)
    with console.progress("make-negatives", len(examples)) as bar:
        for example in examples:
            for k, good in enumerate(example.references):
                if config.good:
                    yield _record(example, k, good, GOOD, good)
                while following is not None and following.example is example and following.reference_index == k:
                    yield _record(example, k, good, following.kind, following.text)
                    following = next(made, None)
            if example.references:
                yield from _own_failures(config, example, samples.get(example.id, ()), policy)
            bar.update()


def _record(example: Example, k: int, good: str, kind: str, text: str) -> FailureRecord:
    return FailureRecord(
        id=f"{example.id}/{kind}/{k}",
        prompt=example.given,
        text=text,
        label="good" if kind == GOOD else "bad",
        kind=kind,
        reference=good,
    )


def _own_failures(
    config: MakeNegativesConfig, example: Example, samples: Sequence[GeneratedRecord], policy: Counter[str]
) -> Iterator[FailureRecord]:
    longest = max(len(words(reference)) for reference in example.references)
    taken = 0
    for sample in samples:
        broken = flags(Response(example.prompt, sample.prediction, longest, sample.finish_reason))
        if not sample.prediction.strip():  # an empty text is recognised by its length alone
            policy["empty"] += 1
        elif not broken:
            policy["no_rule_broken"] += 1
        elif taken == config.samples_per_prompt:
            policy["left_over"] += 1
        else:
            record = _record(example, sample.sample_index, example.references[0], ON_POLICY, sample.prediction)
            record.rules = broken
            policy["made"] += 1
            taken += 1
            yield record


def _samples(config: MakeNegativesConfig, examples: Sequence[Example]) -> dict[str, list[GeneratedRecord]]:
    """The policy's texts by the id of their example."""
    assert config.samples is not None
    prompts = {example.id: example.given for example in examples}
    by_example: dict[str, list[GeneratedRecord]] = {}
    unknown = 0
    for record in read_records(config.samples, GeneratedRecord):
        if prompts.get(record.id) != record.prompt:
            unknown += 1
        else:
            by_example.setdefault(record.id, []).append(record)
    if not by_example:
        raise UserError(
            "none of these texts answers a prompt of the data",
            where=config.samples,
            hint=f"rlgf generate --data {config.data} makes them",
        )
    if unknown:
        console.warn(f"{config.samples}: {unknown} texts answer no prompt of the data and are passed over")
    return by_example
