"""The config of ``rlgf merge``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from rlgf_cli.config.common import COMMON, MODEL, RUN, Dtype, StageConfig
from rlgf_cli.section import Flag


class MergeConfig(StageConfig):
    """``model`` is a folder with a LoRA adapter, as ``sft`` and ``train`` leave it; ``dtype`` that of the product.

    The merge is made, and its logits compared with the adapter's, in float32 on the base's own weights, before the
    product is cast to ``dtype`` and written.
    """

    panels: ClassVar[Mapping[str, str]] = {
        COMMON: "model output --config --set",
        MODEL: "dtype trust_remote_code",
        RUN: "--overwrite --print-config",
    }
    model: Annotated[str, Flag("Folder with a LoRA adapter.")]
    dtype: Dtype = "float32"
    trust_remote_code: Annotated[bool, Flag("Run code that comes with a hub model.")] = False
