"""The config of ``rlgf evolve generate``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from rlgf_cli.config.common import COMMON, GUIDE, MODEL, PRICE, RUN, SPEND
from rlgf_cli.config.evolve import EvolveConfig
from rlgf_cli.section import Flag, Strict


class MinHashConfig(Strict):
    """The definition of a near copy: texts whose sets of three words in a row have a Jaccard similarity of
    ``threshold`` or more. ``permutations``: more of them miss fewer.
    """

    threshold: float = Field(0.8, ge=0.1, le=1)
    permutations: int = Field(128, ge=16, le=1024)


class EvolveGenerateConfig(EvolveConfig):
    """``policy`` chooses the operations: ``random``, ``round-robin``, ``paper``, or the folder of ``rlgf evolve
    train``. Every seed is visited ``passes`` times. ``answers``: the guide answers the rewrites that were kept, in
    ``max_answer_tokens`` at most; ``answer_template`` holds ``{instruction}`` (null: the instruction as it is).
    ``minhash`` says what a near copy is.
    """

    panels: ClassVar[Mapping[str, str]] = {
        COMMON: "guide data output limit --config --set seed",
        "Evolving options": (
            "policy operations steps passes batch_size answers novelty.encoder reviewer max_new_tokens "
            "max_answer_tokens"
        ),
        GUIDE: "guide.base_url guide.api_key_env guide.api",
        MODEL: "device",
        SPEND: f"budget.max_cost_usd budget.max_calls {PRICE} guide.mode",
        RUN: "--dry-run --resume --overwrite --print-config --json",
    }
    policy: Annotated[str, Flag("random, round-robin, paper, or the folder of rlgf evolve train.")] = "random"
    passes: Annotated[int, Flag("Chains of each seed. Default: {default}.")] = Field(1, ge=1)
    answers: Annotated[bool, Flag("Ask the guide for answers, or not.", "--answers/--no-answers")] = True
    max_answer_tokens: Annotated[int, Flag("Longest answer, in tokens.")] = Field(1024, ge=1)
    answer_template: str | None = None
    minhash: MinHashConfig = Field(default_factory=MinHashConfig)

    @model_validator(mode="after")
    def _check(self) -> EvolveGenerateConfig:
        if self.answer_template is not None and "{instruction}" not in self.answer_template:
            raise ValueError("answer_template must hold {instruction}")
        return self
