"""The only file that imports from TRL's internals. Tested with TRL 1.13 to 1.16."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from trl.trainer.utils import disable_dropout_in_model, entropy_from_logits, selective_log_softmax

__all__ = ["disable_dropout_in_model", "entropy_from_logits", "selective_log_softmax"]
