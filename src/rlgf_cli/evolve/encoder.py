"""The vector space of a local text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from rlgf_cli.artifacts.rundir import parent_of
from rlgf_cli.evolve.novelty import unit
from rlgf_cli.models.classification import position_limit
from rlgf_cli.models.device import pick_device
from rlgf_cli.models.load import check_checkpoint_name


class EncoderSpace:
    """The mean of the last layer's token vectors, of length one, as sentence encoders such as MiniLM are trained
    (Reimers and Gurevych 2019). Texts are cut at ``max_tokens``, or at the encoder's number of positions.
    ``batch_size`` None: 64, and 8 on a CPU, where padding costs more than more calls.
    """

    def __init__(
        self, name: str, *, device: str = "auto", batch_size: int | None = None, max_tokens: int = 256
    ) -> None:
        check_checkpoint_name(name)
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.model = AutoModel.from_pretrained(name).eval().to(pick_device(device))
        self.batch_size = batch_size or (8 if self.model.device.type == "cpu" else 64)
        self.max_tokens = max_tokens = min(max_tokens, position_limit(self.model) or max_tokens)
        weights = (parent_of(name) or {}).get("sha256")
        self.signature = f"encoder={f'sha256:{weights[:12]}' if weights else Path(name).name},tokens={max_tokens}"

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, float32, [texts, d]. Texts of like length are encoded together."""
        if not texts:
            return np.zeros((0, self.model.config.hidden_size), dtype=np.float32)
        ids = self.tokenizer(list(texts), truncation=True, max_length=self.max_tokens)["input_ids"]
        rows = np.zeros((len(texts), self.model.config.hidden_size), dtype=np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(ids[i]))
        for at in range(0, len(order), self.batch_size):
            batch = order[at : at + self.batch_size]
            padded = self.tokenizer.pad({"input_ids": [ids[i] for i in batch]}, return_tensors="pt")
            padded = padded.to(self.model.device)
            hidden = self.model(**padded).last_hidden_state  # [batch, T, d]
            mask = padded["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            rows[batch] = ((hidden * mask).sum(1) / mask.sum(1)).float().cpu().numpy()
        return unit(rows)
