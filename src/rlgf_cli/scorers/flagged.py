"""The share of texts that a trained reward model calls bad.

The threshold is the model's own: ``rlgf train-reward`` writes to evaluation.json the threshold at which its held-out
good and bad texts are separated with equal error, and the share of either below it. A text is flagged where its score
lies below it: the number r of a ``pairwise`` model, the probability of the good label of a ``classification`` model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from rlgf_cli.artifacts.jsonl import read_json
from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.models.classification import EVALUATION
from rlgf_cli.protocols import Example, Metric, MetricResult
from rlgf_cli.scorers.base import counted_since, signature
from rlgf_cli.scorers.classifier import ClassifierReward, RewardModelReward
from rlgf_cli.stats import ranking

_ANY = "any"


class _Reads(BaseModel):
    prompt: bool
    max_tokens: int | None
    chat: bool = False


class _Evaluation(BaseModel):
    """The part of evaluation.json that is read."""

    objective: Literal["classification", "pairwise"]
    reads: _Reads
    threshold: FiniteFloat | None
    good_flagged: FiniteFloat | None


class FlaggedMetric(Metric):
    """``flagged:PATH``, a folder of ``rlgf train-reward``: the share of texts that lie below its threshold.

    With more labels than two it is ``flagged.any``, and ``flagged.LABEL`` for each label but the good one: a text that
    is flagged is taken for the most probable of them. Prompt and length are read as in training. The signature has
    the threshold and the share of good held-out texts below it.
    """

    name = "flagged"
    reports_rows = True

    def __init__(
        self, path: str | None = None, *, batch_size: Annotated[int, Field(ge=1)] = 32, device: str = "auto"
    ) -> None:
        if path is None:
            raise UserError(f"{self.name!r} needs a reward model", hint=f"write {self.name}:PATH")
        known, self.threshold = _read(path)
        reads: dict[str, Any] = {
            "include_prompt": known.reads.prompt,
            "max_tokens": known.reads.max_tokens,
            "chat": known.reads.chat,
        }
        made = RewardModelReward if known.objective == "pairwise" else ClassifierReward
        self._scorer = made(path, **reads, batch_size=batch_size, device=device)
        self.labels = self._bad_labels(path)
        self._settings = f"rule=1,{self._scorer.signature},threshold={self.threshold!r},good={known.good_flagged:.4g}"

    def _bad_labels(self, path: str) -> list[str]:
        """The labels that a text can be taken for; none where there is good and bad alone."""
        config = self._scorer.model.config
        names = [str(config.id2label[i]) for i in range(config.num_labels - 1)]
        if len(names) < 2:
            return []
        if taken := [name for name in names if name in (_ANY, "score")]:  # the key score is shown as the name alone
            raise UserError(
                f"a label of this classifier is {taken[0]!r}, which would be read as the figure of them all",
                where=path,
                hint=f"train it with another name: --set 'label_names={{{taken[0]}: ...}}'",
            )
        return names

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        before = dict(self._scorer.counts)
        self._scorer.on_rows = self.on_rows
        logits = self._scorer.logits(examples, texts).double().numpy()
        self._refuse_no_numbers(examples, logits)
        values: dict[str, list[float | None]] = {}
        if self.labels:
            taken = ranking.predicted_labels(logits, self.threshold)
            values[_ANY] = (taken < len(self.labels)).astype(float).tolist()
            values |= {name: (taken == i).astype(float).tolist() for i, name in enumerate(self.labels)}
        else:
            scores = logits[:, 0] if logits.shape[1] == 1 else ranking.good_probability(logits)
            values["score"] = (scores < self.threshold).astype(float).tolist()
        counts = counted_since(before, self._scorer.counts)
        return MetricResult(values, signature(self.name, self._settings, examples), counts)

    def _refuse_no_numbers(self, examples: Sequence[Example], logits: np.ndarray) -> None:
        """NaN lies below no threshold, and its text would count as good."""
        if (broken := np.flatnonzero(~np.isfinite(logits).all(axis=1))).size:
            raise RlgfError(
                f"the reward model gives {logits[broken[0]].tolist()} for the text of example "
                f"{examples[broken[0]].id!r}, which is not finite",
                where=self._scorer.path,
                hint="its weights are damaged, or its training diverged: train it again",
            )


def _read(path: str) -> tuple[_Evaluation, float]:
    """The model's evaluation.json, and its threshold."""
    file = Path(path) / EVALUATION
    if not file.is_file():
        raise UserError(
            f"there is no {EVALUATION} beside this model, and so no threshold below which a text is bad",
            where=path,
            hint="a folder that `rlgf train-reward` wrote is needed; reward:rm:PATH gives the mean score of any model",
        )
    again = "train the reward model again"
    try:
        known = _Evaluation.model_validate(read_json(file))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"it holds no threshold that can be read: {place}: {first['msg'].lower()}",
            where=str(file),
            hint=f"{again}: an earlier version of rlgf may have written it",
        ) from None
    except RlgfError as error:  # torn
        raise UserError(error.message, where=error.where, hint=again) from None
    if known.threshold is None or known.good_flagged is None:
        raise UserError(
            "this model has no threshold: its held-out texts were all good, all bad, or all of one score",
            where=str(file),
            hint="train it with good and bad texts to hold out (--eval-data, --eval-fraction)",
        )
    return known, known.threshold
