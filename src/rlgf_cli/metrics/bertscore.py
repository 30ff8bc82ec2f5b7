"""BERTScore (Zhang et al. 2020) with the ``bert-score`` package's numbers.

Figures: precision, recall and F1. Multi-reference rule: the best reference, for each figure by itself (the
package's). Model, layer, idf weighting and rescaling are explicit and stand in the signature. A text
without tokens is a legal prediction: it scores 0 on each figure, rescaled or not, and is counted
(``empty_texts``; the package itself fails on one). References without tokens do not count as references;
an example without any is skipped. Texts longer than the model's positions are cut by the package's
tokeniser.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from rlgf_cli.artifacts.rundir import parent_of
from rlgf_cli.errors import UserError
from rlgf_cli.metrics.base import require_some_references, signature
from rlgf_cli.models.load import check_checkpoint_name, pick_device
from rlgf_cli.protocols import Example, MetricResult

DEFAULT_MODEL = "roberta-large"  # what bert-score itself takes for English
_NO_LIMIT = 1_000_000
_FIGURES = ("precision", "recall", "f1")


class BertScoreMetric:
    """``bertscore`` or ``bertscore:MODEL``, a hub name or a folder with an encoder.

    ``num_layers``: the layer whose output is compared; known for bert-score's own list of models, needed for
    others. ``idf`` weights tokens by their rarity in the references of the set. ``rescale`` needs ``lang``
    and a baseline that the package ships for the model.
    """

    name = "bertscore"

    def __init__(
        self,
        model: str | None = None,
        *,
        num_layers: Annotated[int, Field(ge=0)] | None = None,
        idf: bool = False,
        rescale: bool = False,
        lang: str | None = None,
        batch_size: Annotated[int, Field(ge=1)] = 64,
        device: str = "auto",
    ) -> None:
        name = model or DEFAULT_MODEL
        layers = _layers(name, num_layers)
        if rescale:
            _check_baseline(name, lang)
        self.idf, self.batch_size = idf, batch_size
        self._scorer = _scorer(
            name,
            num_layers=layers,
            idf=idf,
            rescale_with_baseline=rescale,
            lang=lang,
            device=str(pick_device(device)),
            nthreads=0,  # idf counting in this process: bert-score would fork four
        )
        weights = (parent_of(name) or {}).get("sha256")
        self._settings = (
            f"bert-score={version('bert-score')},transformers={version('transformers')}"
            f",model={Path(name).name if weights else name}{',sha256=' + weights[:12] if weights else ''}"
            f",layers={layers},idf={'references' if idf else 'no'},rescale={lang if rescale else 'no'}"
            ",references=max,empty=0"
        )

    def check(self, examples: Sequence[Example]) -> None:
        require_some_references(self.name, examples)

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        references = [[r for r in example.references if self._has_tokens(r)] for example in examples]
        rows: list[list[float] | None] = [None if not group else [0.0, 0.0, 0.0] for group in references]
        written = [i for i, text in enumerate(texts) if self._has_tokens(text)]
        scored = [i for i in written if references[i]]
        if scored:
            if self.idf:
                self._scorer._idf_dict = None  # of the last set
                self._scorer.compute_idf([r for group in references for r in group])
            found = self._scorer.score(
                [texts[i] for i in scored], [references[i] for i in scored], batch_size=self.batch_size
            )
            for i, *row in zip(scored, *(column.tolist() for column in found), strict=True):
                rows[i] = row
        empty = len(texts) - len(written)
        return MetricResult(
            {key: [None if row is None else row[k] for row in rows] for k, key in enumerate(_FIGURES)},
            signature(self.name, self._settings, examples),
            {"empty_texts": empty} if empty else {},
        )

    def _has_tokens(self, text: str) -> bool:
        tokens = self._scorer._tokenizer(text.strip(), add_special_tokens=False, truncation=True)
        return bool(tokens["input_ids"])


def _layers(name: str, given: int | None) -> int:
    from bert_score.utils import model2layers

    if given is not None:
        return given
    if name not in model2layers:
        raise UserError(
            f"bertscore does not know which layer of {name!r} to use",
            hint=f"--set 'metrics=[{{name: \"bertscore:{name}\", params: {{num_layers: N}}}}]'",
        )
    return model2layers[name]


def _check_baseline(name: str, lang: str | None) -> None:
    import bert_score

    if lang is None:
        raise UserError("bertscore: rescale needs the language of the texts", hint="params: {rescale: true, lang: en}")
    shipped = Path(bert_score.__file__).parent / "rescale_baseline" / lang
    if not (shipped / f"{name}.tsv").is_file():
        raise UserError(f"bert-score has no baseline for {name!r} in the language {lang!r}", hint="leave rescale out")


def _scorer(name: str, **settings: Any) -> Any:
    """A BERTScorer; its library's ways to fail become letters."""
    from bert_score import BERTScorer
    from transformers import AutoConfig

    check_checkpoint_name(name)
    try:
        config = AutoConfig.from_pretrained(name)
        # bert-score goes by names: it loads anything with "t5" in its path as a T5 encoder, with fresh
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
    room = _NO_LIMIT
    if (positions := getattr(config, "max_position_embeddings", None)) is not None:
        roberta = config.model_type in ("roberta", "xlm-roberta", "camembert")  # counts from pad + 1
        room = positions - (config.pad_token_id + 1 if roberta else 0)
    # a tokenizer that states no limit says 1e30, at which truncation overflows
    scorer._tokenizer.model_max_length = min(scorer._tokenizer.model_max_length, room)
    return scorer
