"""How far the evaluated policy has moved from the checkpoint that its training began from.

``kl`` estimates KL(pi || pi_start), the sequence-level KL of the policy pi from the start, in nats per text: the mean
over texts that pi sampled of

    sum over the text's tokens y_t of  log pi(y_t | x, y_<t) - log pi_start(y_t | x, y_<t)

(Schulman, "Approximating KL divergence", the estimator k1, summed over the text). The direction is that of the KL that
``rlgf train`` charges: positive where the policy prefers its own texts more than the start did. The KL is at least 0;
the estimate, and the value of a text, can be below. ``kl.token`` is the sum of these nats by the sum of the tokens.

The tokens are those that were sampled, not those of the decoded text, and the end-of-text token of a text that ended
by itself is one of them. A text that was cut at ``max_new_tokens`` counts up to there: the figure is the KL of the
distributions over texts of at most so many tokens. Both models read the ids of the policy's prompt.

The mean is an estimate of this KL for samples of pi alone. With another temperature, top-k, top-p, beams or a shortest
length, the texts are of another distribution, and weights that would correct it, products over all tokens, have a
variance that grows exponentially with the length: such texts are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from rlgf_cli.artifacts.rundir import model_signature
from rlgf_cli.errors import UserError
from rlgf_cli.protocols import CorpusFigure, Example, Metric, MetricResult
from rlgf_cli.scorers.base import signature

if TYPE_CHECKING:
    from rlgf_cli.config.common import DecodingConfig, LengthConfig
    from rlgf_cli.models.likelihood import Row
    from rlgf_cli.models.loaded import Loaded


class KLMetric(Metric):
    """``kl:START``, the checkpoint that training began from. It is loaded in the evaluated model's dtype."""

    name = "kl"
    reports_rows = True
    reads_tokens = True

    def __init__(self, path: str | None = None, *, batch_size: Annotated[int, Field(ge=1)] = 16) -> None:
        if path is None:
            hint = "write kl:START, the checkpoint that training began from"
            raise UserError(f"the metric {self.name!r} needs a checkpoint", hint=hint)
        self.path, self.batch_size = path, batch_size
        self._policy: Loaded | None = None
        self._rows: list[Row] = []

    def take_decoding(self, decoding: DecodingConfig) -> None:
        wrong = {
            f"--temperature 1 (it is {decoding.temperature:g})": decoding.temperature != 1,
            f"--top-k 0 (it is {decoding.top_k})": decoding.top_k != 0,
            f"--top-p 1 (it is {decoding.top_p:g})": decoding.top_p != 1,
            f"--num-beams 1 (it is {decoding.num_beams})": decoding.num_beams != 1,
        }
        self._refuse_decoding([text for text, is_wrong in wrong.items() if is_wrong])

    def _refuse_decoding(self, wrong: Sequence[str]) -> None:
        if wrong:
            raise UserError(
                f"the metric {self.name!r} holds for texts that are sampled from the model's own distribution, and "
                "this decoding changes it",
                hint=f"set {', '.join(wrong)}, with an output folder (-o) of its own",
            )

    def take_model(self, loaded: Loaded, lengths: LengthConfig) -> None:
        """The policy. START is loaded now: one that does not fit must be refused before anything is written."""
        from rlgf_cli.config.common import ModelConfig
        from rlgf_cli.models.likelihood import check_likelihood
        from rlgf_cli.models.load import load

        if lengths.min_new_tokens:
            self._refuse_decoding([f"--min-new-tokens 0 (it is {lengths.min_new_tokens})"])
        check_likelihood(loaded)
        dtype = "bfloat16" if str(loaded.dtype) == "torch.bfloat16" else "float32"
        start = load(ModelConfig(name=self.path, dtype=dtype, device=str(loaded.device)))
        check_likelihood(start)
        _check_pair(loaded, start, self.path)
        self._policy, self._start = loaded, start
        limits = f"max_new_tokens={lengths.max_new_tokens}"
        if lengths.max_prompt_tokens is not None:
            limits += f",max_prompt_tokens={lengths.max_prompt_tokens}"
        self._settings = f"start:{model_signature(self.path)},dtype={dtype},estimator=k1,eos=yes,{limits},rule=1"

    def check_set(self, examples: Sequence[Example]) -> None:
        if self._policy is None:
            raise UserError(
                f"the metric {self.name!r} is of a model, and needs the tokens that it sampled",
                hint="rlgf eval --model FOLDER --temperature 1 instead of --predictions",
            )

    def take_tokens(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> None:
        self._rows = list(zip(prompts, responses, strict=True))

    def compute(self, examples: Sequence[Example], texts: Sequence[str]) -> MetricResult:
        from rlgf_cli.models.likelihood import token_logprobs

        assert self._policy is not None  # check_set holds it
        done = 0

        def on_rows(n: int) -> None:  # two passes over the rows are the progress of one
            nonlocal done
            before, done = done, done + n
            self.on_rows(done // 2 - before // 2)

        policy, start = (
            token_logprobs(model, self._rows, batch_size=self.batch_size, on_rows=on_rows)
            for model in (self._policy, self._start)
        )
        nats = [float((p - s).sum()) for p, s in zip(policy, start, strict=True)]
        tokens = [float(len(ids)) for _, ids in self._rows]
        return MetricResult(
            {"score": nats},
            signature(self.name, self._settings, examples),
            corpus={"token": CorpusFigure(list(zip(nats, tokens, strict=True)), "mean")},
        )


def _check_pair(policy: Loaded, start: Loaded, path: str) -> None:
    """Raise UserError where the start cannot give the policy's tokens a probability."""
    from rlgf_cli.models.token_boundaries import same_tokens

    hint = "give the checkpoint that training began from"
    if start.encoder_decoder != policy.encoder_decoder:
        raise UserError("one of the model and START is an encoder-decoder, the other is not", where=path, hint=hint)
    if not same_tokens(policy.tokenizer, start.tokenizer):
        raise UserError("START has another tokenizer than the model", where=path, hint=hint)
    rows, known = (int(model.model.config.get_text_config().vocab_size) for model in (policy, start))
    if rows > known:
        message = f"the model's vocabulary has {rows} rows, that of START {known}"
        raise UserError(f"{message}: it has no probability for the others", where=path, hint=hint)
    if start.max_positions is not None and (policy.max_positions is None or policy.max_positions > start.max_positions):
        message = f"START has {start.max_positions} positions, fewer than the model"
        raise UserError(message, where=path, hint=hint)
