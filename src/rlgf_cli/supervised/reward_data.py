"""The data of ``rlgf train-reward``: labelled texts or pairs of texts, split into training and held-out samples."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from rlgf_cli import noise
from rlgf_cli.artifacts.conversations import is_messages, located, read_prompt, read_reply, split_last, split_pair
from rlgf_cli.artifacts.jsonl import parse_record, read_objects
from rlgf_cli.artifacts.records import LabelledRecord
from rlgf_cli.config.train_reward import TrainRewardConfig
from rlgf_cli.errors import UserError, did_you_mean
from rlgf_cli.models.classification import join
from rlgf_cli.protocols import Prompt
from rlgf_cli.protocols.messages import prompt_key, transcript

PAIR = "pair"
"""The one class that all pairs belong to."""
_REFERENCE = "reference"
"""The kind of a good text in the output of ``rlgf make-negatives``."""


@dataclass(frozen=True)
class Sample:
    """One response with its label's name, or a chosen and a rejected one (label ``pair``), and their prompt.

    Samples with the same ``split_key`` are held out together. ``joined``: there is a prompt before the responses.
    """

    prompt: Prompt
    responses: tuple[str, ...]
    label: str
    kind: str
    split_key: str
    joined: bool
    where: str

    @property
    def texts(self) -> tuple[str, ...]:
        """Each response behind the prompt as plain text."""
        return tuple(join(transcript(self.prompt), response) for response in self.responses)

    @property
    def words(self) -> tuple[int, ...]:
        """The number of words of each response."""
        return tuple(len(response.split()) for response in self.responses)


@dataclass(frozen=True)
class RewardData:
    """Training and held-out samples, and the labels in the order of their ids (none: pairs).

    ``passed_over`` counts rows that hold no pair; ``shared`` counts held-out samples whose split_key is in the training
    data too.
    """

    train: list[Sample]
    held_out: list[Sample]
    labels: list[str]
    passed_over: int
    shared: int

    @property
    def joined(self) -> bool:
        return any(sample.joined for sample in self.train)


def read(config: TrainRewardConfig) -> RewardData:
    """Read and check all records, and split them. Raises UserError with the line of what cannot be learned from."""
    pairwise = config.objective == "pairwise"
    read_file = read_pairs if pairwise else read_labelled
    samples, passed_over = read_file(config.data, config)
    samples = samples[: config.limit]
    if len(samples) < 2:
        raise UserError(
            f"one {PAIR} is not enough to train a reward model"
            if pairwise
            else "one example is not enough to train a classifier",
            where=config.data,
            hint="one part is for training and another one is held out" if pairwise else "every class needs examples",
        )
    labels = [] if pairwise else _labels(samples, config)
    if config.eval_data is None:
        return RewardData(*split(samples, config), labels, passed_over, 0)
    held_out, more = read_file(config.eval_data, config)
    for sample in held_out:
        if labels and sample.label not in labels:
            raise UserError(
                f"the label {sample.label!r} is not in the training data",
                where=sample.where,
                hint=did_you_mean(sample.label, labels),
            )
    split_keys = {sample.split_key for sample in samples}
    return RewardData(samples, held_out, labels, passed_over + more, sum(s.split_key in split_keys for s in held_out))


def read_labelled(path: str, config: TrainRewardConfig) -> tuple[list[Sample], int]:
    """The texts and labels of a file, found under the config's dotted keys; none is passed over."""
    samples = []
    for number, value in read_objects(path):
        where = f"{path}:{number}"
        with located(where):
            prompt, response = _labelled_text(value, config.text_key, where)
        text = join(transcript(prompt), response)
        record = parse_record(LabelledRecord, {"text": text, "label": _field(value, config.label_key, where)}, where)
        label = config.label_names.get(str(record.label), str(record.label))
        kind = _kind(value, config, where, label)
        joined = len(config.text_key) > 1 or not isinstance(prompt, str)
        first = _field(value, config.text_key[0], where)
        split_key = _split_key(value, config, where, first if isinstance(first, str) else prompt_key(prompt))
        samples.append(Sample(prompt, (response,), label, kind, split_key, joined, where))
    if not samples:
        raise UserError("the file holds no records", where=path)
    return samples, 0


def _labelled_text(value: Mapping[str, Any], keys: Sequence[str], where: str) -> tuple[Prompt, str]:
    """The text fields as prompt and response: texts are joined up to the last one, which is the response.

    Of messages one field holds a whole conversation, or the first of two the prompt.
    """
    fields = [_field(value, key, where) for key in keys]
    if not any(map(is_messages, fields)):
        *before, response = [_text(value, key, where) for key in keys]
        return reduce(join, before, ""), response
    if len(fields) == 1:
        prompt, answer = split_last(fields[0], keys[0])
        if answer is None:
            raise UserError(f"the field {keys[0]!r}: it ends with a message of the user", hint="an answer is judged")
        return prompt, answer
    if len(fields) > 2:
        raise UserError("text_key names more than a prompt and a response, and one of them is a conversation")
    prompt_field, response = fields[0], read_reply(fields[1], keys[1])
    if not isinstance(response, str):
        raise UserError(f"{keys[1]!r} is {response!r}, not a text")
    return read_prompt(prompt_field, keys[0]) if is_messages(prompt_field) else _text(value, keys[0], where), response


def read_pairs(path: str, config: TrainRewardConfig) -> tuple[list[Sample], int]:
    """The pairs of a file, and how many rows hold none. Messages are read as :func:`.conversations.split_pair` does.

    A row with ``label``, ``text`` and ``reference`` instead of a chosen text is one of ``rlgf make-negatives``: where
    its label is ``bad`` the reference was chosen and the text rejected; a ``good`` one alone is no pair.
    """
    samples, passed_over = [], 0
    for number, value in read_objects(path):
        where = f"{path}:{number}"
        if not _has(value, config.chosen_key) and "label" in value:
            if value["label"] not in ("good", "bad"):
                raise UserError(
                    f"the label {value['label']!r} is neither good nor bad, and there is no {config.chosen_key!r}",
                    where=where,
                    hint="pairs have chosen and rejected; --objective classification learns labels",
                )
            if value["label"] == "good":
                passed_over += 1
                continue
            chosen_key, rejected_key = "reference", "text"
        else:
            chosen_key, rejected_key = config.chosen_key, config.rejected_key
        with located(where):
            prompt, chosen, rejected = _pair(value, config, chosen_key, rejected_key, where)
        if not chosen.strip():
            raise UserError(f"the field {chosen_key!r} is empty", where=where, hint="drop the record or fill the field")
        if chosen == rejected:
            raise UserError(
                f"{chosen_key!r} and {rejected_key!r} are the same text",
                where=where,
                hint="drop the record: nothing can be learned from it",
            )
        kind = _kind(value, config, where, "rejected")
        split_key = _split_key(value, config, where, prompt_key(prompt) or chosen)
        samples.append(Sample(prompt, (chosen, rejected), PAIR, kind, split_key, bool(prompt), where))
    if not samples:
        raise UserError(
            f"the file holds no pairs: all {passed_over} rows are good" if passed_over else "the file holds no records",
            where=path,
            hint="a pair has a chosen and a rejected text; of rlgf make-negatives, a row with the label bad",
        )
    return samples, passed_over


def _pair(
    value: Mapping[str, Any], config: TrainRewardConfig, chosen_key: str, rejected_key: str, where: str
) -> tuple[Prompt, str, str]:
    """Prompt, chosen and rejected text of a row."""
    prompt: Prompt = ""
    if (key := _key(value, config.prompt_key, "prompt_key")) is not None:
        given = _field(value, key, where)
        prompt = read_prompt(given, key) if is_messages(given) else _text(value, key, where)
    chosen, rejected = _field(value, chosen_key, where), _field(value, rejected_key, where)
    if is_messages(chosen) or is_messages(rejected):
        both, first, second = split_pair(prompt or None, chosen, rejected, (chosen_key, rejected_key))
        return both if config.prompt_key is not None else "", first, second
    return prompt, _text(value, chosen_key, where), _text(value, rejected_key, where)


def _has(record: Mapping[str, Any], dotted: str) -> bool:
    try:
        _field(record, dotted, "")
    except UserError:
        return False
    return True


def _field(record: Mapping[str, Any], dotted: str, where: str) -> Any:
    """``meta.label`` or ``references.0`` of a record."""
    value: Any = record
    for part in dotted.split("."):
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, Mapping) and part in value:
            value = value[part]
        else:
            pairs = {"chosen", "rejected"} <= set(record) and dotted in ("text", "label")
            others = "--text-key, --label-key, --chosen-key, --rejected-key ... name other fields"
            raise UserError(
                f"the field {dotted!r} is missing",
                where=where,
                hint=f"this record has: {', '.join(record)}; "
                + ("--objective pairwise reads pairs" if pairs else others),
            )
    return value


def _text(record: Mapping[str, Any], dotted: str, where: str) -> str:
    value = _field(record, dotted, where)
    if not isinstance(value, str):
        raise UserError(f"{dotted!r} is {value!r}, not a text", where=where)
    return value


def _key(record: Mapping[str, Any], key: str | None, name: str) -> str | None:
    """The field that the config key ``name`` gives; None where that is null, or a default that this record lacks."""
    default = TrainRewardConfig.model_fields[name].default
    return None if key is None or (key == default and not _has(record, key)) else key


def _kind(record: Mapping[str, Any], config: TrainRewardConfig, where: str, otherwise: str) -> str:
    key = _key(record, config.kind_key, "kind_key")
    return otherwise if key is None else str(_field(record, key, where))


def _split_key(record: Mapping[str, Any], config: TrainRewardConfig, where: str, otherwise: str) -> str:
    """The key that lies on one side of the split only: the named field, else the prompt, else the text."""
    if config.group_key is not None:
        return json.dumps(_field(record, config.group_key, where))
    prompt = record.get("prompt")
    return prompt if isinstance(prompt, str) and prompt else otherwise


def _labels(samples: Sequence[Sample], config: TrainRewardConfig) -> list[str]:
    """All label names, in the order of the raw labels: numbers by value, words by the alphabet; the good one last."""
    names = sorted({sample.label for sample in samples}, key=_order(config.label_names))
    if len(names) < 2:
        raise UserError(
            f"all {len(samples)} examples have the label {names[0]!r}",
            where=config.data,
            hint="a classifier needs two classes or more; is --label-key right?",
        )
    unknown = sorted(set(config.label_names.values()) - set(names))
    if unknown:
        raise UserError(
            f"label_names gives the name {unknown[0]!r} to a label that no example has",
            hint=f"the data has: {', '.join(names)}",
        )
    good = config.good_label or (_REFERENCE if _REFERENCE in names else names[-1])
    if good not in names:
        raise UserError(f"no example has the good label {good!r}", where=config.data, hint=did_you_mean(good, names))
    return [*(name for name in names if name != good), good]


def _order(names: Mapping[str, str]) -> Any:
    raw = {name: label for label, name in names.items()}

    def key(name: str) -> tuple[int, int, str]:
        label = raw.get(name, name)
        number = re.fullmatch(r"-?[0-9]+", label)
        return (0, int(label), "") if number else (1, 0, label)

    return key


def split(samples: list[Sample], config: TrainRewardConfig) -> tuple[list[Sample], list[Sample]]:
    """Hold out about ``eval_fraction`` of every class, at least one where it has two; the order is kept.

    All samples of a split_key are held out together, in random order, while one of their classes has too few: no key
    lies on both sides, and no class loses its last training sample.
    """
    left = Counter(sample.label for sample in samples)
    wanted = {label: min(max(1, round(config.eval_fraction * n)), n - 1) for label, n in left.items()}
    if not any(wanted.values()):
        raise UserError(
            "no class has a second example to hold out", where=config.data, hint="give --eval-data, or more examples"
        )
    by_key: dict[str, list[Sample]] = {}
    for sample in samples:
        by_key.setdefault(sample.split_key, []).append(sample)
    keys, out = list(by_key), set()
    for i in noise.generator(config.seed, "held out").permutation(len(keys)):
        inside = Counter(sample.label for sample in by_key[keys[i]])
        if any(wanted[label] > 0 for label in inside) and all(left[label] > n for label, n in inside.items()):
            out.add(keys[i])
            left.subtract(inside)
            for label, n in inside.items():
                wanted[label] -= n
    if not out:
        raise UserError(
            "no example can be held out: those with the same prompt (or text) stay together",
            where=config.data,
            hint="give --eval-data, or name a field that tells the examples apart: --set group_key=id",
        )
    return [s for s in samples if s.split_key not in out], [s for s in samples if s.split_key in out]
