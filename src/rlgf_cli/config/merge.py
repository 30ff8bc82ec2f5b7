"""Config of ``rlgf merge``."""

from __future__ import annotations

from rlgf_cli.config.common import Dtype, StageConfig


class MergeConfig(StageConfig):
    """``model`` is a folder with a LoRA adapter, as ``sft`` and ``train`` leave it; ``dtype`` that of the product."""

    model: str
    dtype: Dtype = "float32"
    trust_remote_code: bool = False
