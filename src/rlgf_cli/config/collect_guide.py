"""The config of ``rlgf collect-guide``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from rlgf_cli.config.common import COMMON, GUIDE, MODEL, PRICE, RUN, SPEND, Limit, Parts, StageConfig
from rlgf_cli.config.guide import BudgetConfig, GuideConfig
from rlgf_cli.section import Flag, Refused


class CollectGuideConfig(StageConfig):
    """Ask ``guide`` for ``samples`` texts of at most ``max_new_tokens`` tokens for every prompt in ``data``.

    ``output`` is a JSONL file; ``limit`` takes the first prompts only. ``budget`` caps what the file may cost over
    all its resumptions. ``batch`` asks through the endpoint's batch API, at its lower price: answers come within
    hours. ``reward`` scores the texts; those that score below ``keep_above``, and empty ones, go to a file beside
    ``output`` instead.
    """

    panels: ClassVar[Mapping[str, str]] = {
        "": "guide data samples max_new_tokens reward keep_above",
        COMMON: "output limit --config --set seed",
        GUIDE: (
            "guide.base_url guide.api_key_env guide.api guide.system guide.prompt_template guide.sampling.temperature "
            "guide.sampling.top_p guide.sampling.top_k guide.sampling.num_beams guide.reasoning_effort "
            "guide.reasoning_tokens guide.concurrency guide.timeout_s guide.max_retries guide.batch_size "
            "guide.on_overlong"
        ),
        MODEL: "guide.device guide.dtype",
        SPEND: (
            f"budget.max_cost_usd budget.max_calls {PRICE} "
            "guide.mode guide.requests_per_minute guide.tokens_per_minute batch"
        ),
        RUN: "--dry-run --resume --overwrite --print-config --json",
    }
    data: Annotated[str, Flag("JSONL file with the prompts.")]
    guide: Annotated[GuideConfig, Flag("hf:PATH, openai:MODEL, or an alias (rlgf ls guides).")]
    samples: Annotated[int, Flag("Texts per prompt.", "--samples", "-k")] = Field(1, ge=1)
    max_new_tokens: Annotated[int, Flag("Longest text, in tokens.")] = Field(64, ge=1)
    reward: Annotated[Parts, Flag("Score the texts: names from `rlgf ls rewards`, file.py:function.")] = Field(
        default_factory=list
    )
    keep_above: Annotated[float | None, Flag("Keep texts with at least this score; others go to *.dropped.jsonl.")] = (
        Field(None, allow_inf_nan=False)
    )
    limit: Limit = None
    budget: BudgetConfig = BudgetConfig()
    batch: Annotated[bool, Flag("The batch API: cheaper, within a day.")] = False

    @model_validator(mode="after")
    def _check(self) -> CollectGuideConfig:
        if self.keep_above is not None and not self.reward:
            raise Refused("keep_above is a score, and there is no reward that gives one", "add --reward NAME")
        return self
