"""The config of ``rlgf evolve generate``."""

from __future__ import annotations

from pydantic import Field, model_validator

from rlgf_cli.config.evolve import EvolveConfig
from rlgf_cli.section import Strict


class MinHashConfig(Strict):
    """What counts as a near copy: texts whose sets of three words in a row have a Jaccard similarity of ``threshold``
    or more. ``permutations``: more of them miss fewer.
    """

    threshold: float = Field(0.8, ge=0.1, le=1)
    permutations: int = Field(128, ge=16, le=1024)


class EvolveGenerateConfig(EvolveConfig):
    """``policy`` leads the guide: ``random``, ``round-robin``, ``paper``, or the folder of ``rlgf evolve train``. Every
    seed is visited ``passes`` times. ``answers``: the guide is asked to answer what was kept, in ``max_answer_tokens``
    at most; ``answer_template`` holds ``{instruction}`` (null: the instruction as it is). ``minhash`` says what a near
    copy is.
    """

    policy: str = "random"
    passes: int = Field(1, ge=1)
    answers: bool = True
    max_answer_tokens: int = Field(1024, ge=1)
    answer_template: str | None = None
    minhash: MinHashConfig = Field(default_factory=MinHashConfig)

    @model_validator(mode="after")
    def _check(self) -> EvolveGenerateConfig:
        if self.answer_template is not None and "{instruction}" not in self.answer_template:
            raise ValueError("answer_template must hold {instruction}")
        return self
