"""The only file that imports from TRL's internals, in its functions (TRL takes 90 MB). Tested with TRL 1.13 to 1.16."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch


def entropy_from_logits(logits: torch.Tensor) -> torch.Tensor:
    """The entropy of softmax(logits [N, V]), in nats. [N]"""
    from trl.trainer.utils import entropy_from_logits as entropy

    return entropy(logits)


def selective_log_softmax(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """log softmax(logits [N, V]) at index [N]; with a kernel for GPUs. [N]"""
    from trl.trainer.utils import selective_log_softmax as selected

    return selected(logits, index)


def vllm_client(url: str, group_port: int, timeout: float) -> Any:
    """TRL's client of a vLLM server, connected; needs the extra ``vllm`` (TRL 1.16, whose server is ``vllm serve``)."""
    from trl.generation.vllm_client import VLLMClient

    return VLLMClient(base_url=url, group_port=group_port, connection_timeout=timeout)
