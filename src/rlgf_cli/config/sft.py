"""Config of ``rlgf sft``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlgf_cli.config.common import LengthConfig, LoraConfig, TextConfig
from rlgf_cli.config.supervised import SupervisedConfig


class SftConfig(SupervisedConfig):
    """Prompt/references JSONL to a starting policy; with ``guide``, prompts and a guide's recorded texts.

    ``references``: one training pair per reference (``all``), the first only, or one at random.
    ``guide`` is a ``FILE.jsonl`` of ``rlgf collect-guide``: its texts of the prompts in ``data`` stand in the place of
    references (also for ``references``, by sample index). One that the guide did not end gets no EOS.
    ``lengths.max_new_tokens`` bounds the response, EOS counted; a longer one is cut and gets no EOS.
    """

    text: TextConfig | None = None
    lengths: LengthConfig = Field(default_factory=LengthConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    guide: str | None = None
    references: Literal["all", "first", "random"] = "all"

    @property
    def trains_adapter(self) -> bool:
        return self.lora.enabled
