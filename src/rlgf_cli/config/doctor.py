"""The config of ``rlgf doctor``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from rlgf_cli.config.common import COMMON, GUIDE, MODEL, PRICE, RUN, SPEND
from rlgf_cli.config.train import TrainConfig
from rlgf_cli.section import Flag


class DoctorConfig(TrainConfig):
    """Check what `rlgf train` would use: every key of a training recipe is taken, and those below.

    ``prompts``: for how many prompts the policy and a live guide write (the guide one text each and, where it can
    continue, one continuation; ``budget`` caps that). ``reward`` and ``guide`` may be left out where the algorithm
    needs none; ``output`` is not used, for nothing is written.
    """

    reward_needed: ClassVar[bool] = False
    panels: ClassVar[Mapping[str, str]] = {
        "": (
            "model data reward guide algorithm prompts lengths.max_new_tokens rollout.temperature lengths.on_overlong "
            "text.chat"
        ),
        MODEL: "lora.enabled model.device model.dtype model.trust_remote_code",
        COMMON: "--config --set seed",
        GUIDE: (
            "guide.base_url guide.api_key_env guide.api guide.system guide.prompt_template guide.sampling.temperature"
        ),
        SPEND: f"budget.max_cost_usd budget.max_calls {PRICE} guide.mode",
        RUN: "--print-config --json",
    }
    flags: ClassVar[Mapping[str, Flag]] = {
        "lengths.max_new_tokens": Flag("The limit that training will have. Default: {default}."),
        "lengths.on_overlong": Flag("Longer prompts: error, truncate or skip."),
        "lora.enabled": Flag("With a fresh LoRA adapter.", "--use-peft"),
        "guide.sampling.temperature": Flag("The guide's; 0 is greedy.", "--guide-temperature"),
        "model": Flag("The policy: a checkpoint folder or hub name.", "--model", "--model-name-or-path"),
        "data": Flag("JSONL file with the prompts."),
        "reward": Flag("Names from `rlgf ls rewards`, file.py:function; several by commas."),
        "guide": Flag("FILE.jsonl, hf:PATH, openai:MODEL, or an alias."),
        "algorithm": Flag("As training will have it. Default: {default}.", "--alg", "--algorithm"),
    }
    output: str = ""
    prompts: Annotated[int, Flag("Write and ask for the first N prompts. Default: {default}.", "--limit", "-L")] = (
        Field(20, ge=1)
    )

    @model_validator(mode="after")
    def _check_cuts(self) -> DoctorConfig:
        if self.guide is not None and self.lengths.max_new_tokens < 2:
            raise ValueError("lengths.max_new_tokens is 1: a guide's text of one token has no place to be cut")
        return self
