"""Config of ``rlgf train-reward``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from rlgf_cli.config.supervised import SupervisedConfig
from rlgf_cli.section import Refused

_BELONGS = {
    "classification": ("text_key", "label_key", "label_names", "good_label"),
    "pairwise": ("prompt_key", "chosen_key", "rejected_key", "center_rewards_coefficient"),
}
"""Keys that one objective reads and the other does not."""


def _as_list(value: object) -> object:
    return [key.strip() for key in value.split(",")] if isinstance(value, str) else value


class TrainRewardConfig(SupervisedConfig):
    """A text classifier from labelled JSONL, or (``objective: pairwise``) a reward model from pairs of texts.

    Every ``*_key`` is a dotted path into each record (``meta.label``, ``references.0``). Classification: several
    text keys are joined as the ``classifier`` reward joins prompt and response, by a space where neither side
    has white space; ``label_names`` renames labels (``{"1": positive}``). Pairwise: records hold a prompt (or none),
    a chosen and a rejected text; rows of ``rlgf make-negatives`` are read too, as pairs of reference and text.
    Without ``eval_data``, about the share ``eval_fraction`` of every class is held out, all records of one prompt
    (``group_key``) on one side. ``max_tokens`` null: as many as the model reads.
    """

    objective: Literal["classification", "pairwise"] = "classification"
    text_key: Annotated[list[str], BeforeValidator(_as_list)] = Field(default=["text"], min_length=1)
    label_key: str = "label"
    label_names: dict[str, str] = Field(default_factory=dict)
    good_label: str | None = None
    """The label of good texts, by its name; it comes last. null: ``reference`` where there is such a label, else the
    last one (numbers by value, words by the alphabet)."""
    prompt_key: str | None = "prompt"
    """null: the texts alone are read. The default may be missing from the records."""
    chosen_key: str = "chosen"
    rejected_key: str = "rejected"
    center_rewards_coefficient: float = Field(0.0, ge=0)
    """Pulls the sum of a pair's two scores to 0, so that scores lie around 0; 0.01 is usual."""
    kind_key: str | None = "kind"
    """What sort of text a record holds: the held-out figures are given for each. The default may be missing from the
    records; null: the label."""
    group_key: str | None = None
    """What must not lie on both sides of the split. null: the prompt, or the text where there is none."""
    eval_fraction: float = Field(0.1, gt=0, lt=1)
    max_tokens: int | None = Field(None, ge=1)

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
