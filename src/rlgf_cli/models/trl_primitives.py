"""The only file that imports from TRL's internals. Tested with TRL 1.13 to 1.16."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from trl.trainer.utils import disable_dropout_in_model, entropy_from_logits, selective_log_softmax

__all__ = ["disable_dropout_in_model", "entropy_from_logits", "selective_log_softmax", "vllm_client"]


def vllm_client(url: str, group_port: int, timeout: float) -> Any:
    """TRL's client of a vLLM server, connected; needs the extra ``vllm`` (TRL 1.16, whose server is ``vllm serve``)."""
    from trl.generation.vllm_client import VLLMClient

    return VLLMClient(base_url=url, group_port=group_port, connection_timeout=timeout)
