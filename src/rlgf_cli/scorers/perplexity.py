"""Perplexity of the texts under a language model.

``perplexity`` is that of the whole set: e to the power of (sum of the texts' negative log-likelihoods / sum of their
tokens). ``perplexity.nll`` is the mean over texts of each text's nats per token. The text's own tokens count, the
prompt's do not, and neither does an end-of-text token: a text may have been cut, and not every file says so.

The text stands behind the prompt in the checkpoint's stored format, tokenised apart from it as everywhere in rlgf.
``condition: none`` leaves the prompt out: then the first token is predicted from the tokenizer's BOS, or from EOS where
it has none (as GPT-2's training texts begin). A text without tokens has no perplexity; it is skipped
(``without_tokens``). Where prompt and text are longer than the model's positions, the prompt loses its beginning (the
template's own words stay), down to half of the positions (``prompts_cut``), and then the text its end (``texts_cut``).
An encoder-decoder has positions for each: what is too long loses its end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from rlgf_cli.artifacts.rundir import model_signature
from rlgf_cli.config.common import Dtype, ModelConfig, TextConfig
from rlgf_cli.errors import UserError
from rlgf_cli.models.likelihood import Row, token_logprobs
from rlgf_cli.models.load import load
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.noise import short_hash
from rlgf_cli.protocols import CorpusFigure, Example, Metric, MetricResult
from rlgf_cli.scorers.base import signature


class PerplexityMetric(Metric):
    """``perplexity:PATH``, a causal or an encoder-decoder checkpoint.

    ``template`` and ``response_prefix`` replace what is stored with it; a plain hub model has neither, and most want
    ``response_prefix: " "``.
    """

    name = "perplexity"
    reports_rows = True

    def __init__(
        self,
        path: str | None = None,
        *,
        condition: Literal["prompt", "none"] = "prompt",
        template: str | None = None,
        response_prefix: str | None = None,
        batch_size: Annotated[int, Field(ge=1)] = 16,
        dtype: Dtype = "float32",
        device: str = "auto",
    ) -> None:
        if path is None:
            raise UserError(f"{self.name!r} needs a checkpoint", hint="write perplexity:PATH")
        if template is not None and "{prompt}" not in template:
            raise UserError(f"the metric {self.name!r}: the template must hold {{prompt}}")
        text = TextConfig(template=template, response_prefix=response_prefix)
        self.loaded: Loaded = load(ModelConfig(name=path, dtype=dtype, device=device), text=text)
        if condition == "none" and self.loaded.encoder_decoder:
            raise UserError(
                "an encoder-decoder gives a text no probability without a prompt",
                where=path,
                hint="condition: prompt, or a causal model",
            )
        self.condition, self.batch_size = condition, batch_size
        form = short_hash(repr(self.loaded.text), 12)
        self._settings = (
            f"{model_signature(path)},dtype={str(self.loaded.dtype).removeprefix('torch.')},text={form}"
            f",condition={condition},eos=no"
        )

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        counts: Counter[str] = Counter()
        rows = [self._row(e, text, counts) for e, text in zip(examples, texts, strict=True)]
        logprobs = token_logprobs(self.loaded, rows, batch_size=self.batch_size, on_rows=self.on_rows)
        statistics = [(-float(row.sum()), float(len(row))) if len(row) else None for row in logprobs]
        return MetricResult(
            {"nll": [None if row is None else row[0] / row[1] for row in statistics]},
            signature(self.name, self._settings, examples),
            dict(counts),
            {"score": CorpusFigure(statistics, "exp_mean")},
        )

    def _row(self, example: Example, text: str, counts: Counter[str]) -> Row:
        """The ids of one text and its prompt that the model reads, cut to its positions."""
        loaded, limit = self.loaded, self.loaded.max_positions
        ids = loaded.text.encode_response(loaded.tokenizer, text) if text.strip() else []
        counts["without_tokens"] += not ids
        before = self._before(example)
        if limit is None or not ids:
            return before, ids
        # the last token of a decoder's text is predicted and never read
        room = limit if loaded.encoder_decoder else max(limit - len(ids) + 1, limit // 2)
        if len(before) > room:
            counts["prompts_cut"] += 1
            before = loaded.text.cut_prompt(loaded.tokenizer, example.given, loaded.encoder_decoder, room)
        left = limit if loaded.encoder_decoder else limit - len(before) + 1
        counts["texts_cut"] += len(ids) > left
        return before, ids[:left]

    def _before(self, example: Example) -> list[int]:
        loaded = self.loaded
        if self.condition == "prompt":
            return loaded.text.encode_prompt(loaded.tokenizer, example.given, loaded.encoder_decoder)
        start = loaded.tokenizer.bos_token_id
        return [int(loaded.tokenizer.eos_token_id if start is None else start)]
