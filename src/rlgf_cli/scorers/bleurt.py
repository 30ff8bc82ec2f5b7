"""BLEURT (Sellam, Das and Parikh 2020): a regression model that was trained on people's ratings of translations.

The model reads the pair (reference, text), in this order, and gives one number: about 0 for unlike and 1 for like, and
neither is a bound. Its checkpoints in PyTorch are BERT with a head of one output, which transformers loads by itself.
Those of the type ``bleurt`` (BLEURT-20 among them) need classes that do not import with transformers 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from transformers import PretrainedConfig

from rlgf_cli.artifacts.rundir import model_signature
from rlgf_cli.errors import UserError
from rlgf_cli.models import classification
from rlgf_cli.models.device import pick_device
from rlgf_cli.models.load import check_checkpoint_name
from rlgf_cli.protocols import Example, MetricResult
from rlgf_cli.scorers.base import ReferenceMetric, nonblank_references, signature
from rlgf_cli.scorers.classifier import load_scorer

Pair = tuple[str, str]
"""A reference and a text."""

_WANTED = "for example bleurt:Elron/bleurt-base-512, or the folder of such a checkpoint"


class BleurtMetric(ReferenceMetric):
    """``bleurt:PATH``, a hub name or a folder with a sequence classifier of one output; of several references the best.

    What is longer than ``max_tokens`` (by default what the checkpoint allows) loses the end of the longer of the two,
    token by token, and is counted (``truncated``). An empty text has the model's own number.
    """

    name = "bleurt"
    reports_rows = True

    def __init__(
        self,
        path: str | None = None,
        *,
        batch_size: Annotated[int, Field(ge=1)] = 32,
        max_tokens: Annotated[int, Field(ge=8)] | None = None,
        device: str = "auto",
    ) -> None:
        if path is None:
            raise UserError(f"{self.name!r} needs a checkpoint", hint=_WANTED)
        _refuse_own_type(path)
        self.model, self.tokenizer = load_scorer(path, no_head=_WANTED, dtype="float32")
        if (labels := self.model.config.num_labels) != 1:
            raise UserError(f"this checkpoint has {labels} labels; BLEURT has one output", where=path, hint=_WANTED)
        self.model.to(pick_device(device)).eval()
        self.batch_size = batch_size
        self.max_tokens = classification.token_limit(self.model, self.tokenizer, max_tokens)
        self._settings = (
            f"transformers={version('transformers')},{model_signature(path)},max_tokens={self.max_tokens}"
            ",input=reference+text,references=max"
        )

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        groups, counts = nonblank_references(examples)
        pairs = dict.fromkeys((r, text) for group, text in zip(groups, texts, strict=True) for r in group)
        scores, truncated = self._scores(list(pairs))
        values = [
            float(np.max([scores[r, text] for r in group])) if group else None  # unlike max, it keeps NaN
            for group, text in zip(groups, texts, strict=True)
        ]
        self.on_rows(len(texts))
        if truncated:
            counts["truncated"] = truncated
        return MetricResult({"score": values}, signature(self.name, self._settings, examples), counts)

    @torch.no_grad()
    def _scores(self, pairs: Sequence[Pair]) -> tuple[dict[Pair, float], int]:
        """Each pair's number, in batches of similar length, and how many pairs were cut."""
        lengths = {pair: len(self.tokenizer(*pair)["input_ids"]) for pair in pairs}
        order = sorted(pairs, key=lambda pair: (lengths[pair], pair))
        scores: dict[Pair, float] = {}
        for at in range(0, len(order), self.batch_size):
            batch = order[at : at + self.batch_size]
            references, texts = map(list, zip(*batch, strict=True))
            encoded = self.tokenizer(
                references,
                texts,
                padding=True,
                truncation=self.max_tokens is not None,
                max_length=self.max_tokens,
                return_tensors="pt",
            )
            out = self.model(**encoded.to(self.model.device)).logits[:, 0].float().tolist()
            scores.update(zip(batch, out, strict=True))
        return scores, sum(self.max_tokens is not None and n > self.max_tokens for n in lengths.values())


def _refuse_own_type(path: str) -> None:
    """Raise UserError for a checkpoint that transformers has no classes for; loading refuses unreadable ones."""
    check_checkpoint_name(path)
    try:
        described, _ = PretrainedConfig.get_config_dict(path)
    except OSError:
        return
    if described.get("model_type") == "bleurt":
        raise UserError(
            "this checkpoint is of the type 'bleurt', and the package with its classes (bleurt-pytorch) does not work "
            "with transformers 5",
            where=path,
            hint=f"take a checkpoint of BERT: {_WANTED}",
        )
