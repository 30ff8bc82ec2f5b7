"""Config of ``rlgf merge``."""

from __future__ import annotations

from rlgf_cli.config.common import Dtype, StageConfig


class MergeConfig(StageConfig):
    """``model`` is a folder with a LoRA adapter, as ``sft`` and ``train`` leave it; ``dtype`` that of the product.

    The merge is made, and its logits held against the adapter's, in float32 on the base's own weights, before the
    product is cast to ``dtype`` and written.
    """

    model: str
    dtype: Dtype = "float32"
    trust_remote_code: bool = False
