"""The config of ``rlgf doctor``."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from rlgf_cli.config.train import TrainConfig


class DoctorConfig(TrainConfig):
    """Examine what `rlgf train` would use: every key of a training recipe is taken, and those below.

    ``prompts``: how many prompts the policy writes for and a live guide is asked about (one text each and, where it
    can continue, one continuation; ``budget`` caps that). ``reward`` and ``guide`` may be left out where the algorithm
    needs none; ``output`` is not used, for nothing is written.
    """

    reward_needed: ClassVar[bool] = False
    output: str = ""
    prompts: int = Field(20, ge=1)

    @model_validator(mode="after")
    def _check_cuts(self) -> DoctorConfig:
        if self.guide is not None and self.lengths.max_new_tokens < 2:
            raise ValueError("lengths.max_new_tokens is 1: a guide's text of one token has no place to be cut")
        return self
