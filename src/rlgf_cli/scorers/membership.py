"""Membership inference: how well a model's likelihoods tell its training texts from others.

The evaluated model scores its training examples (the members) and the held-out examples (the non-members): the
log-probabilities of the reference given the prompt, EOS included, exactly as ``rlgf sft`` trains on it. Two scores
say how much an example looks like a member:

    loss    mean log-probability of its tokens (Yeom et al. 2018, "Privacy Risk in Machine Learning")
    min_k   mean of the k % least likely of them (Shi et al. 2023, "Detecting Pretraining Data from Large Language
            Models", eq. 1; as in its code floor(k % of n) tokens, but at least one)

An example with several references has the mean over them. ``membership.loss`` and ``membership.min_k`` are the AUC:
the probability that a member scores above a non-member. ``membership.loss_tpr`` and ``membership.min_k_tpr`` are the
share of members that are found where 1 % of the non-members are taken for members (Carlini et al. 2022, "Membership
Inference Attacks From First Principles"). Both sides are samples, and the intervals are of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from rlgf_cli import noise
from rlgf_cli.artifacts.jsonl import read_examples
from rlgf_cli.artifacts.rundir import file_sha256
from rlgf_cli.errors import RlgfError, UserError
from rlgf_cli.protocols import BoundedFigure, Example, MetricResult, Prompt
from rlgf_cli.scorers.base import ReferenceMetric, signature
from rlgf_cli.stats import ranking

if TYPE_CHECKING:
    from rlgf_cli.config.common import LengthConfig
    from rlgf_cli.models.loaded import Loaded
    from rlgf_cli.models.prompts import Encoded

FALSE_POSITIVE_RATE = 0.01
FEWEST = 2
"""Examples of each side that an interval needs."""


class MembershipMetric(ReferenceMetric):
    """``membership:FILE``, or the parameter ``members``: what the model was trained on.

    Of it ``limit`` examples are drawn with ``seed`` (null: all of them). ``references: first`` leaves the others out,
    for a model that was trained on the first alone.
    """

    name = "membership"
    reports_rows = True
    reads_texts = False

    def __init__(
        self,
        target: str | None = None,
        *,
        members: str | None = None,
        k: Annotated[float, Field(gt=0, le=100)] = 20,
        limit: Annotated[int, Field(ge=FEWEST)] | None = 1000,
        seed: Annotated[int, Field(ge=0)] = 0,
        references: Literal["all", "first"] = "all",
        batch_size: Annotated[int, Field(ge=1)] = 16,
    ) -> None:
        if (target is None) == (members is None):
            raise UserError(
                f"the metric {self.name!r} needs one file of training examples, the members",
                hint="write membership:TRAIN.jsonl, or give members among its params",
            )
        self.path = str(target or members)
        examples = read_examples(self.path, need_references=True)
        if len(examples) < FEWEST:
            hint = "it should hold what the model was trained on"
            raise UserError(f"{FEWEST} members are needed, and the file holds one", where=self.path, hint=hint)
        self._pairs = {pair for example in examples for pair in _pairs(example)}
        self._texts = {text for _, text in self._pairs}
        self.k, self.references, self.batch_size = k, references, batch_size
        self.members = _drawn(examples, limit, seed)
        self._model: Loaded | None = None
        self._settings = (
            f"members=sha256:{file_sha256(Path(self.path))[:12]},drawn={len(self.members)} of {len(examples)}"
            f",seed={seed},references={references},k={k:g},eos=yes,rule=1"
        )

    def take_model(self, loaded: Loaded, lengths: LengthConfig) -> None:
        """The model that is tested, and the lengths that it was trained with. Members are tokenised now: one that is
        too long must be refused before anything is written.
        """
        from rlgf_cli.models.likelihood import check_likelihood
        from rlgf_cli.models.prompts import encode_prompts

        check_likelihood(loaded)
        self._model, self._lengths = loaded, lengths
        try:
            self._encoded, self._lost = encode_prompts(loaded, self.members, lengths)
        except UserError as error:
            raise UserError(error.message, where=self.path, hint=error.hint) from None
        if len(self._encoded) < FEWEST:
            hint = "--on-overlong truncate, or a smaller max_new_tokens"
            raise UserError("fewer than two members have a prompt that is short enough", where=self.path, hint=hint)

    def check_set(self, examples: Sequence[Example]) -> None:
        if self._model is None:
            raise UserError(
                f"the metric {self.name!r} tests a model, and texts alone do not say how likely they were",
                hint="rlgf eval --model FOLDER instead of --predictions",
            )
        super().check_set(examples)
        others, overlap = self._non_members(examples)
        if len(others) < FEWEST:
            raise UserError(
                f"{len(others)} of {len(examples)} held-out examples have references and are no members ({overlap} "
                "stand in the members' file)",
                where=self.path,
                hint="--data must be texts that the model was not trained on",
            )

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        from rlgf_cli.models.prompts import encode_prompts

        assert self._model is not None  # check holds it
        others, overlap = self._non_members(examples)
        encoded = encode_prompts(self._model, others, self._lengths)[0]
        scores, cut = self._score([*self._encoded, *encoded], len(texts))
        count = len(self._encoded)
        whole: dict[str, BoundedFigure] = {}
        for key, column in scores.items():
            whole |= _figures(key, column[:count], column[count:])
        counts = {
            "members": count,
            "non_members": len(encoded),
            "overlap": overlap,
            "shared_references": sum(not self._texts.isdisjoint(item.example.references) for item in encoded),
            "without_references": len(examples) - len(others) - overlap,
            "members_cut": sum(cut[:count]),
            "non_members_cut": sum(cut[count:]),
            "members_truncated": self._lost["truncated"],
            "members_skipped": self._lost["skipped"],
        }
        dtype = str(self._model.dtype).removeprefix("torch.")
        settings = f"{self._settings},max_new_tokens={self._lengths.max_new_tokens},dtype={dtype}"
        if self._lengths.max_prompt_tokens is not None:
            settings += f",max_prompt_tokens={self._lengths.max_prompt_tokens}"
        return MetricResult(
            {},
            signature(self.name, settings, examples),
            {key: n for key, n in counts.items() if n or key in ("members", "non_members")},
            whole=whole,
        )

    def _non_members(self, examples: Sequence[Example]) -> tuple[list[Example], int]:
        """The examples with references of which none stands with this prompt among the members; how many do stand."""
        referenced = [example for example in examples if example.references]
        others = [example for example in referenced if self._pairs.isdisjoint(_pairs(example))]
        return others, len(referenced) - len(others)

    def _score(self, encoded: Sequence[Encoded], total: int) -> tuple[dict[str, np.ndarray], list[bool]]:
        """Both scores of each example, and whether one of its texts was cut. Progress counts up to ``total``."""
        from rlgf_cli.models.likelihood import token_logprobs
        from rlgf_cli.models.prompts import encode_target

        assert self._model is not None
        rows, owners, cut = [], [], [False] * len(encoded)
        for i, item in enumerate(encoded):
            for text in item.example.references[: 1 if self.references == "first" else None]:
                ids, too_long = encode_target(self._model, text, self._lengths.max_new_tokens)
                rows.append((item.ids, ids))
                owners.append(i)
                cut[i] = cut[i] or too_long
        done = 0

        def on_rows(n: int) -> None:
            nonlocal done
            before, done = done, done + n
            self.on_rows(done * total // len(rows) - before * total // len(rows))

        logprobs = token_logprobs(self._model, rows, batch_size=self.batch_size, on_rows=on_rows)
        for i, values in zip(owners, logprobs, strict=True):
            if not np.isfinite(values).all():  # NaN would be ranked like a number
                raise RlgfError(
                    f"the log-probability of a token of {encoded[i].example.id!r} is "
                    f"{values[~np.isfinite(values)][0]}, which is not finite",
                    where=self._model.name,
                    hint="its weights are damaged, or its training diverged: train it again",
                )
        texts = np.bincount(owners)
        return {
            "loss": np.bincount(owners, [float(values.mean()) for values in logprobs]) / texts,
            "min_k": np.bincount(owners, [min_k(values, self.k) for values in logprobs]) / texts,
        }, cut


def min_k(logprobs: np.ndarray, k: float) -> float:
    """The mean of the ``k`` percent smallest of ``logprobs`` [T], T at least 1; at least one of them."""
    taken = int(len(logprobs) * k / 100 + 1e-9)  # 500 * 64.6 / 100 is a little below 323
    return float(np.sort(logprobs)[: max(1, taken)].mean())


def _figures(key: str, members: np.ndarray, others: np.ndarray) -> dict[str, BoundedFigure]:
    area = ranking.auc(members, others)
    assert area is not None  # neither is empty
    rate = ranking.true_positive_rate(members, others, FALSE_POSITIVE_RATE)
    return {
        key: BoundedFigure(
            area,
            partial(ranking.auc_interval, members, others),
            "Wilson's, with DeLong's variance over members and non-members",
            len(others),
        ),
        f"{key}_tpr": BoundedFigure(
            rate,
            partial(ranking.true_positive_rate_interval, members, others, FALSE_POSITIVE_RATE),
            "exact (binomial) over members and non-members",
            len(others),
        ),
    }


def _pairs(example: Example) -> set[tuple[Prompt, str]]:
    return {(example.given, reference) for reference in example.references}


def _drawn(examples: Sequence[Example], limit: int | None, seed: int) -> list[Example]:
    """``limit`` of the examples, in their order."""
    if limit is None or limit >= len(examples):
        return list(examples)
    chosen = noise.generator(seed, "members").choice(len(examples), limit, replace=False)
    return [examples[i] for i in sorted(chosen)]
