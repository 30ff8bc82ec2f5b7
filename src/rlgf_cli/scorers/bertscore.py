"""BERTScore (Zhang et al. 2020) with the ``bert-score`` package's numbers.

Precision, recall and F1; with several references the best one, for each by itself (the package's rule). Model, layer,
idf weighting and rescaling are in the signature. A text without tokens scores 0, rescaled or not (the package itself
fails on one). References without tokens do not count as references. Texts longer than the model's positions are cut by
the package's tokeniser.

The package encodes and matches. This module decides the order of texts: each unique text is encoded once, among texts
of like length, in an order that depends on the texts alone. (The package goes through a Python set: its last digits
change from process to process, and a resumed training would not repeat itself.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
from bert_score import utils
from pydantic import Field
from torch.nn.utils.rnn import pad_sequence

from rlgf_cli.artifacts.jsonl import read_examples
from rlgf_cli.artifacts.rundir import file_sha256, model_signature
from rlgf_cli.errors import UserError
from rlgf_cli.models.classification import position_limit
from rlgf_cli.models.device import pick_device
from rlgf_cli.models.load import check_checkpoint_name
from rlgf_cli.protocols import Example, MetricResult, Score
from rlgf_cli.scorers.base import ReferenceScorer, signature

DEFAULT_MODEL = "roberta-large"  # what bert-score itself takes for English
_NO_LIMIT = 1_000_000
_FIGURES = ("precision", "recall", "f1")

Idf = Mapping[int, float]
"""The weight of each token id; also of ids that are in no text."""


class BertScore(ReferenceScorer):
    """``bertscore`` or ``bertscore:MODEL``, a hub name or a folder with an encoder: F1, precision and recall.

    ``num_layers``: the layer whose output is compared; known for bert-score's own list of models, needed for others.
    ``rescale`` needs ``lang`` and a baseline that the package ships for the model. Tokens weigh the same, or by their
    rarity in references: those of the evaluated set for a metric (``idf``), those of a JSONL data file for a reward
    (``idf_references``), for a text's score must not depend on the texts beside it. Texts without tokens are counted
    (``empty_texts``).
    """

    name = "bertscore"
    reward_only, metric_only = frozenset({"idf_references"}), frozenset({"idf"})

    def __init__(
        self,
        model: str | None = None,
        *,
        num_layers: Annotated[int, Field(ge=0)] | None = None,
        idf: bool = False,
        idf_references: str | None = None,
        rescale: bool = False,
        lang: str | None = None,
        batch_size: Annotated[int, Field(ge=1)] = 64,
        device: str = "auto",
    ) -> None:
        weighing = _references_of(idf_references) if idf_references is not None else None
        name = model or DEFAULT_MODEL
        layers = _layers(name, num_layers)
        if rescale:
            _check_baseline(name, lang)
        scorer = _scorer(
            name, num_layers=layers, rescale_with_baseline=rescale, lang=lang, device=str(pick_device(device))
        )
        self.model, self.tokenizer, self.batch_size = scorer._model, scorer._tokenizer, batch_size
        self.baseline: torch.Tensor | None = scorer.baseline_vals if rescale else None
        self.of_set = idf
        self._idf = self.idf(weighing) if weighing is not None else None
        self._idf_name = f"file,sha256={file_sha256(Path(idf_references))[:12]}" if idf_references is not None else "no"
        self.settings = (
            f"bert-score={version('bert-score')},transformers={version('transformers')}"
            f",{model_signature(name)},layers={layers},rescale={lang if rescale else 'no'},references=max,empty=0"
        )
        self.signature = f"{self.name},{self.settings},idf={self._idf_name}"
        self.counts: dict[str, int] = {"empty_texts": 0}

    def check(self, examples: Sequence[Example]) -> None:
        super().check(examples)
        for example in examples:
            if not any(map(self.has_tokens, example.references)):
                raise UserError(
                    f"the reward {self.name!r} needs references, and those of example {example.id!r} have no tokens",
                    hint="leave the example out, or choose a reward that needs none",
                )

    def score(self, examples: Sequence[Example], texts: Sequence[str]) -> list[Score]:
        self.check(examples)
        self.counts["empty_texts"] += sum(not self.has_tokens(text) for text in texts)
        rows = self.rows(texts, [example.references for example in examples], self._idf)
        return [Score(row[2], {"precision": row[0], "recall": row[1]}) for row in rows if row is not None]

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        references = [example.references for example in examples]
        idf = self.idf([r for group in references for r in group if self.has_tokens(r)]) if self.of_set else self._idf
        rows = self.rows(texts, references, idf)
        empty = sum(not self.has_tokens(text) for text in texts)
        idf_name = "references" if self.of_set else self._idf_name
        return MetricResult(
            {key: [None if row is None else row[k] for row in rows] for k, key in enumerate(_FIGURES)},
            signature(self.name, f"{self.settings},idf={idf_name}", examples),
            {"empty_texts": empty} if empty else {},
        )

    def has_tokens(self, text: str) -> bool:
        return bool(self.tokenizer(text.strip(), add_special_tokens=False, truncation=True)["input_ids"])

    def idf(self, references: Sequence[str]) -> Idf:
        """log((N + 1) / (n + 1)) for a token that n of the N references hold."""
        return utils.get_idf_dict(references, self.tokenizer, nthreads=0)  # in this process: it would fork four

    def rows(
        self, texts: Sequence[str], references: Sequence[Sequence[str]], idf: Idf | None = None
    ) -> list[list[float] | None]:
        """``[precision, recall, F1]`` of each text; None where it has no reference with tokens."""
        usable = [[r for r in group if self.has_tokens(r)] for group in references]
        rows: list[list[float] | None] = [[0.0, 0.0, 0.0] if group else None for group in usable]
        scored = [i for i, text in enumerate(texts) if usable[i] and self.has_tokens(text)]
        pairs = [(texts[i], reference) for i in scored for reference in usable[i]]
        if not pairs:
            return rows
        weights = idf if idf is not None else self._equal_weights()
        known = self._encode((text for pair in pairs for text in pair), weights)
        batches = (pairs[at : at + self.batch_size] for at in range(0, len(pairs), self.batch_size))
        scores = torch.cat([self._match(batch, known) for batch in batches])  # [pairs, 3]
        best = torch.stack([group.amax(0) for group in scores.split([len(usable[i]) for i in scored])])
        if self.baseline is not None:
            best = (best - self.baseline) / (1 - self.baseline)
        for i, row in zip(scored, best.tolist(), strict=True):
            rows[i] = row
        return rows

    def _equal_weights(self) -> Idf:
        weights: defaultdict[int, float] = defaultdict(lambda: 1.0)
        weights[self.tokenizer.sep_token_id] = weights[self.tokenizer.cls_token_id] = 0.0
        return weights

    def _encode(self, texts: Iterable[str], idf: Idf) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Each text's token embeddings [T, d] and weights [T], on the CPU. Equal texts are encoded once, the longest
        first."""
        ids = {text: utils.sent_encode(self.tokenizer, text) for text in dict.fromkeys(texts)}
        order = sorted(ids, key=lambda text: (-len(ids[text]), text))
        known = {}
        for at in range(0, len(order), self.batch_size):
            batch = order[at : at + self.batch_size]
            padded, _, mask = utils.padding([ids[text] for text in batch], self.tokenizer.pad_token_id)
            device = self.model.device
            out = utils.bert_encode(self.model, padded.to(device), mask.to(device)).cpu()  # [batch, T, d]
            for text, embedding in zip(batch, out, strict=True):
                weights = torch.tensor([idf[token] for token in ids[text]], dtype=torch.float)
                known[text] = embedding[: len(ids[text])].clone(), weights
        return known

    @torch.no_grad()
    def _match(
        self, pairs: Sequence[tuple[str, str]], known: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> torch.Tensor:
        """Greedy matching of (text, reference) pairs: precision, recall and F1, [pairs, 3]."""

        def stacked(texts: Iterable[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            embeddings, weights = zip(*(known[text] for text in texts), strict=True)
            mask = pad_sequence([torch.ones(len(w), dtype=torch.bool) for w in weights], batch_first=True)
            # padding of 2, as the package has it: a vector of zeros has no direction
            padded = pad_sequence(list(embeddings), batch_first=True, padding_value=2.0)
            device = self.model.device
            return padded.to(device), mask.to(device), pad_sequence(list(weights), batch_first=True).to(device)

        ours, theirs = zip(*pairs, strict=True)
        return torch.stack(utils.greedy_cos_idf(*stacked(theirs), *stacked(ours)), dim=-1).cpu()


def _references_of(path: str) -> list[str]:
    references = [reference for example in read_examples(path) for reference in example.references]
    if not references:
        raise UserError("no example has a reference to count tokens in", where=path, hint="choose another data file")
    return references


def _layers(name: str, given: int | None) -> int:
    if given is not None:
        return given
    if name not in utils.model2layers:
        raise UserError(
            f"bertscore does not know which layer of {name!r} to use",
            hint=f'give num_layers: {{name: "bertscore:{name}", params: {{num_layers: N}}}}',
        )
    return int(utils.model2layers[name])


def _check_baseline(name: str, lang: str | None) -> None:
    if lang is None:
        raise UserError("bertscore: rescale needs the language of the texts", hint="params: {rescale: true, lang: en}")
    shipped = Path(utils.__file__).parent / "rescale_baseline" / lang
    if not (shipped / f"{name}.tsv").is_file():
        raise UserError(f"bert-score has no baseline for {name!r} in the language {lang!r}", hint="leave rescale out")


def _scorer(name: str, **settings: Any) -> Any:
    """A BERTScorer. What its library raises becomes a UserError."""
    from bert_score import BERTScorer
    from transformers import AutoConfig

    check_checkpoint_name(name)
    try:
        config = AutoConfig.from_pretrained(name)
        # bert-score decides by names: it loads anything with "t5" in its path as a T5 encoder, with fresh
        # weights where it is none, and fetches names in "scibert" by a shell command
        if ("t5" in name and "t5" not in config.model_type) or name.startswith("scibert"):
            raise UserError(
                "bert-score takes a model for what its name says (t5, scibert), which is wrong here",
                where=name,
                hint="move the folder to a path without 't5' and 'scibert' in it",
            )
        scorer = BERTScorer(model_type=name, **settings)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"bertscore cannot load its model {name!r}: {reason}",
            hint="name a folder with an encoder (bertscore:PATH, num_layers), or fetch the model first",
        ) from None
    except AssertionError as error:  # how bert-score refuses a layer
        raise UserError(f"bertscore: {error}") from None
    room = position_limit(scorer._model) or _NO_LIMIT
    # a tokenizer that states no limit says 1e30, at which truncation overflows
    scorer._tokenizer.model_max_length = min(scorer._tokenizer.model_max_length, room)
    return scorer
