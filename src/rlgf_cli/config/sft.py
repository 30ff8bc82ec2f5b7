"""The config of ``rlgf sft``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rlgf_cli.config.common import COMMON, MODEL, RUN, TEXT, LengthConfig, LoraConfig, TextConfig
from rlgf_cli.config.supervised import SupervisedConfig
from rlgf_cli.section import Flag


class SftConfig(SupervisedConfig):
    """Prompt/references JSONL to a starting policy; with ``guide``, prompts and a guide's recorded texts.

    ``references``: one training pair per reference (``all``), the first only, or one at random.
    ``guide`` is a ``FILE.jsonl`` of ``rlgf collect-guide``: its texts of the prompts in ``data`` stand in the place of
    references (also for ``references``, by sample index). One that the guide did not end gets no EOS.
    ``lengths.max_new_tokens`` bounds the response, EOS counted; a longer one is cut and gets no EOS.
    """

    panels: ClassVar[Mapping[str, str]] = {
        COMMON: "model data guide eval_data output limit --config --set seed",
        "Training options": (
            "epochs max_steps batch_size gradient_accumulation_steps gradient_checkpointing optim.learning_rate "
            "optim.warmup_steps references"
        ),
        TEXT: (
            "text.template text.chat text.response_prefix lengths.max_prompt_tokens lengths.max_new_tokens "
            "lengths.on_overlong"
        ),
        MODEL: (
            "lora.enabled lora.r lora.alpha lora.target_modules model.load_in_4bit model.device model.dtype "
            "model.revision model.trust_remote_code"
        ),
        RUN: ("logging_steps eval_steps save_steps report_to push_to_hub --resume --overwrite --print-config --json"),
    }
    text: TextConfig | None = None
    lengths: LengthConfig = Field(default_factory=LengthConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    guide: Annotated[str | None, Flag("A guide.jsonl: its texts in place of references.")] = None
    references: Annotated[Literal["all", "first", "random"], Flag("all, first or random; of --guide too.")] = "all"

    @property
    def trains_adapter(self) -> bool:
        return self.lora.enabled
