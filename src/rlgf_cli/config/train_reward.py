"""The config of ``rlgf train-reward``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from rlgf_cli.config.common import COMMON, MODEL, RUN, TEXT, ChatConfig, as_names
from rlgf_cli.config.supervised import SupervisedConfig
from rlgf_cli.section import Flag, Refused

_BELONGS = {
    "classification": ("text_key", "label_key", "label_names", "good_label"),
    "pairwise": ("prompt_key", "chosen_key", "rejected_key", "center_rewards_coefficient"),
}
"""Keys that one objective reads and the other does not."""


class TrainRewardConfig(SupervisedConfig):
    """A text classifier from labelled JSONL, or (``objective: pairwise``) a reward model from pairs of texts.

    Every ``*_key`` is a dotted path into each record (``meta.label``, ``references.0``). Classification: several
    text keys are joined as the ``classifier`` reward joins prompt and response, by a space where neither side
    has white space; ``label_names`` renames labels (``{"1": positive}``). Pairwise: records hold a prompt (or none),
    a chosen and a rejected text; rows of ``rlgf make-negatives`` are read too, as pairs of reference and text.
    Messages are read too: prompts, pairs, and as a labelled text a whole conversation. ``text.chat`` null: prompt and
    text are a conversation in the chat template, where the tokenizer has one and every record has a prompt.
    Without ``eval_data``, about the share ``eval_fraction`` of every class is held out, all records of one prompt
    (``group_key``) on one side. ``max_tokens`` null: as many as the model reads.
    """

    panels: ClassVar[Mapping[str, str]] = {
        COMMON: "objective model data eval_data output limit --config --set seed",
        TEXT: (
            "text_key label_key good_label prompt_key chosen_key rejected_key kind_key max_tokens eval_fraction "
            "text.chat"
        ),
        "Training options": (
            "epochs max_steps batch_size gradient_accumulation_steps gradient_checkpointing optim.learning_rate "
            "optim.warmup_steps"
        ),
        MODEL: "model.device model.dtype model.revision model.trust_remote_code",
        RUN: ("logging_steps eval_steps save_steps report_to push_to_hub --resume --overwrite --print-config --json"),
    }
    flags: ClassVar[Mapping[str, Flag]] = {
        "data": Flag("JSONL with text and label, or with chosen and rejected."),
    }
    objective: Annotated[Literal["classification", "pairwise"], Flag("classification or pairwise.")] = "classification"
    text_key: Annotated[
        list[str], BeforeValidator(as_names), Flag("Dotted field of the text; several with commas.")
    ] = Field(default=["text"], min_length=1)
    label_key: Annotated[str, Flag("Dotted field of the label.")] = "label"
    label_names: dict[str, str] = Field(default_factory=dict)
    good_label: Annotated[str | None, Flag("Of good texts. Default: reference, else the last.")] = None
    """The label of good texts, by its name; it comes last. null: ``reference`` where there is such a label, else the
    last one (numbers by value, words by the alphabet)."""
    prompt_key: Annotated[str | None, Flag("Dotted field of a pair's prompt.")] = "prompt"
    """null: the texts alone are read. The default may be missing from the records."""
    chosen_key: Annotated[str, Flag("Dotted field of a pair's better text.")] = "chosen"
    rejected_key: Annotated[str, Flag("Dotted field of a pair's worse text.")] = "rejected"
    center_rewards_coefficient: float = Field(0.0, ge=0)
    """Pulls the sum of a pair's two scores to 0, so that scores lie around 0; 0.01 is usual."""
    kind_key: Annotated[str | None, Flag("Dotted field of the kind of text, for the figures.")] = "kind"
    """The kind of text in a record: the held-out figures are given for each kind. The default may be missing from the
    records; null: the label.
    """
    group_key: str | None = None
    """The field whose values must lie on one side of the split. null: the prompt, or the text where there is none."""
    eval_fraction: Annotated[float, Flag("Held out where there is no --eval-data.")] = Field(0.1, gt=0, lt=1)
    max_tokens: Annotated[int | None, Flag("Longer texts are cut.")] = Field(None, ge=1)
    text: ChatConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> TrainRewardConfig:
        (other,) = set(_BELONGS) - {self.objective}
        for key in _BELONGS[other]:
            field = type(self).model_fields[key]
            if getattr(self, key) != field.get_default(call_default_factory=True):
                raise Refused(
                    f"{key} is not read with objective {self.objective}",
                    hint=f"leave it out, or give objective: {other}",
                )
        return self
