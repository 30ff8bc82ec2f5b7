"""Pydantic models of the JSONL records, one per kind. Readers ignore unknown keys; ``schema_version`` counts up."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    StringConstraints,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticKnownError

from rlgf_cli.artifacts.conversations import example_fields, read_prompt, read_reply
from rlgf_cli.protocols import Example, FinishReason, Prompt
from rlgf_cli.protocols.messages import prompt_key, to_json

SCHEMA_VERSION = 1

Id = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
"""The name of an example; many data sets number theirs."""


def _reply(value: Any, info: ValidationInfo) -> Any:
    return read_reply(value, info.field_name or "response")


def _prompt(value: Any) -> Prompt:
    if isinstance(value, list | tuple):
        return read_prompt(value, "prompt")
    if not isinstance(value, str):
        raise PydanticKnownError("string_type")
    return value


def _given_prompt(value: Any) -> Prompt:
    if isinstance(value, str) and not value.strip():
        raise PydanticKnownError("string_too_short", {"min_length": 1})
    return _prompt(value)


Reply = Annotated[str, BeforeValidator(_reply)]
"""A response: a text, or a message of the assistant (alone or in a list), which becomes its text."""
NonEmptyText = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]
NonEmptyReply = Annotated[NonEmptyText, BeforeValidator(_reply)]
AnyPrompt = Annotated[Prompt, PlainValidator(_prompt), PlainSerializer(to_json)]
"""A text, or a conversation as a list of ``{role, content}``; in a file, what the data gave."""
GivenPrompt = Annotated[Prompt, PlainValidator(_given_prompt), PlainSerializer(to_json)]
"""As :data:`AnyPrompt`, not empty."""


class Record(BaseModel):
    """A JSONL line. Input files may carry keys of their own, which are ignored."""

    model_config = ConfigDict(extra="ignore")


class ExampleRecord(Record):
    """A prompt with its references: the input of every stage. Without an ``id``, the line number is used.

    The formats of TRL and of chat APIs become these fields (:func:`.conversations.example_fields`).
    """

    id: Id = ""
    prompt: GivenPrompt
    references: list[NonEmptyReply] = Field(default_factory=list)
    meta: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _formats(cls, value: Any) -> Any:
        return example_fields(value) if isinstance(value, Mapping) else value

    def to_example(self) -> Example:
        return Example.of(self.id, self.prompt, self.references, self.meta)


class LabelledRecord(Record):
    """A text with its class, for ``rlgf train-reward --objective classification``."""

    text: NonEmptyText
    label: int | str


class FailureRecord(Record):
    """A line of ``rlgf make-negatives``: a bad text of a kind, or a good one (kind ``reference``).

    ``reference`` is the good text that the bad one was made from; ``rules`` are those that an on-policy text broke.
    """

    schema_version: int = SCHEMA_VERSION
    id: str
    prompt: AnyPrompt
    text: str
    label: Literal["good", "bad"]
    kind: str
    reference: str
    rules: list[str] = Field(default_factory=list)


class GuideRecord(Record):
    """One completion by a guide. Files made elsewhere need ``prompt`` and ``completion`` only.

    ``cost_usd`` is the price when the text was bought; ``cached``: it was bought before this collection. ``score`` is
    that of the collection's reward; None: it had none.
    """

    schema_version: int = SCHEMA_VERSION
    id: Id = ""
    prompt: AnyPrompt
    prompt_sha256: str = ""
    prefix: str = ""
    sample_index: int = 0
    completion: Reply
    finish_reason: FinishReason = "stop"
    model: str = ""
    guide: str = ""
    sampling: dict[str, Any] = Field(default_factory=dict)
    usage: dict[str, int] = Field(default_factory=dict)
    cost_usd: float | None = None
    cached: bool = False
    created: str = ""
    mended: list[str] = Field(default_factory=list)
    licence: str | None = None
    score: float | None = None


class CachedTextRecord(Record):
    """A line of ``rlgf cache export``: a guide's answer as received, under the hash of the request that decides it."""

    schema_version: int = SCHEMA_VERSION
    key: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    guide: str
    request: dict[str, Any]
    text: str
    finish_reason: FinishReason
    model: str
    prompt_bytes: int = Field(ge=0)
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    nano_usd: int | None = None
    seconds: float | None = None
    created: int = Field(ge=0)


class EvaluatedRecord(Record):
    """A line of ``rlgf eval``. ``prediction`` is null where no metric needed a text.

    ``token_ids`` are those that the model generated, its EOS included; null for a text made elsewhere. ``scores`` are
    the values whose mean is a figure; ``statistics`` the rows whose sum makes one (BLEU).
    """

    schema_version: int = SCHEMA_VERSION
    id: Id = ""
    prompt: AnyPrompt = ""
    prediction: str | None
    references: list[Reply] = Field(default_factory=list)
    finish_reason: FinishReason | None = None
    token_ids: list[int] | None = None
    scores: dict[str, float | None] = Field(default_factory=dict)
    statistics: dict[str, list[float] | None] = Field(default_factory=dict)


class PredictionRecord(EvaluatedRecord):
    """One text, scored or not: a line of a ``--predictions`` file (a guide.jsonl is read too)."""

    prediction: Reply


class GeneratedRecord(PredictionRecord):
    """A line of ``rlgf generate``: a prediction, and its index among the samples of its prompt."""

    sample_index: int = 0


def prompt_hash(prompt: Prompt) -> str:
    """SHA-256 of the raw prompt: joins guide records to prompts when ids differ."""
    return hashlib.sha256(prompt_key(prompt).encode()).hexdigest()


class StepRecord(Record):
    """A line of ``steps.jsonl``: one step of a chain, kept or not. ``queries`` are those of this step; ``iteration`` is
    that of ``rlgf evolve train``.
    """

    schema_version: int = SCHEMA_VERSION
    iteration: int | None = None
    seed_id: Id
    visit: int
    step: int
    operation: str
    instruction: str
    text: str
    outcome: str
    novelty: float | None
    different: bool | None
    reward: float | None
    queries: int
    cost_usd: float | None


class AnsweredStepRecord(StepRecord):
    """A step of ``rlgf evolve generate``. ``answer`` is ``kept`` or the rule that the answer broke, ``answer_text``
    its text in that case; both are null where no answer was requested. ``queries`` includes those of the answer.
    """

    answer: str | None = None
    answer_text: str | None = None
    answer_cost_usd: float | None = None


class EvolvedRecord(ExampleRecord):
    """An instruction of ``rlgf evolve generate`` with its answer and its origin.

    ``operations`` are those that were applied from the seed on; ``meta.chain`` has their input texts, the seed first.
    ``parent`` is the id of the last input. ``step`` counts from 1, ``visit`` a seed's chains from 0. ``queries`` are
    those of the chain so far, rejected rewrites and answers included; ``cost_usd`` is the price of this text and its
    answer when they were bought.
    """

    schema_version: int = SCHEMA_VERSION
    seed_id: Id
    visit: int
    step: int
    operation: str
    operations: list[str]
    parent: str
    novelty: float | None
    different: bool | None
    queries: int
    cost_usd: float | None
