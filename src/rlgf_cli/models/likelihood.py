"""Log-probabilities of texts under a language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from rlgf_cli.errors import UserError
from rlgf_cli.functional.logprobs import chosen_logprobs, in_chunks
from rlgf_cli.models.device import autocast
from rlgf_cli.models.forward import TokenBatch, response_states
from rlgf_cli.models.head import Finish, find_finish
from rlgf_cli.models.loaded import Loaded

Row = tuple[Sequence[int], Sequence[int]]
"""Ids of the context before a text, and of the text."""
_NO_LANGUAGE_MODEL = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForMaskedLM",
)


def check_likelihood(loaded: Loaded) -> None:
    """Raise UserError for weights that are no language model's: the LM head would be random."""
    architectures = list(getattr(loaded.model.config, "architectures", None) or [])
    if architectures and all(name.endswith(_NO_LANGUAGE_MODEL) for name in architectures):
        raise UserError(
            f"this checkpoint is a {architectures[0]}: it gives a text no likelihood",
            where=loaded.name,
            hint="give a causal or an encoder-decoder language model",
        )


@torch.no_grad()
def token_logprobs(
    loaded: Loaded, rows: Sequence[Row], *, batch_size: int, on_rows: Callable[[int], None] = lambda n: None
) -> list[np.ndarray]:
    """Per row the log-probabilities (nats, float64) of its text's tokens, each given all before it; shape [0] for an
    empty text.

    Rows of similar length form a batch; ``on_rows`` is called with the number of rows done.
    """
    logprobs = [np.zeros(0)] * len(rows)
    order = sorted((i for i, (_, ids) in enumerate(rows) if ids), key=lambda i: sum(map(len, rows[i])))
    on_rows(len(rows) - len(order))
    with autocast(loaded.device, loaded.dtype):
        finish = find_finish(loaded.model)
    for at in range(0, len(order), batch_size):
        batch = order[at : at + batch_size]
        for i, values in zip(batch, _batch_logprobs(loaded, [rows[i] for i in batch], finish), strict=True):
            logprobs[i] = values
        on_rows(len(batch))
    return logprobs


def _batch_logprobs(loaded: Loaded, rows: Sequence[Row], finish: Finish) -> list[np.ndarray]:
    batch = TokenBatch.build(
        [context for context, _ in rows],
        [ids for _, ids in rows],
        pad_id=loaded.pad_id,
        encoder_decoder=loaded.encoder_decoder,
        device=loaded.device,
    )
    real = torch.arange(batch.response_ids.shape[1], device=loaded.device) < batch.lengths.unsqueeze(-1)
    head = loaded.model.get_output_embeddings()

    def score(hidden: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor]:
        return (chosen_logprobs(finish(head(hidden)).float(), tokens),)

    with autocast(loaded.device, loaded.dtype):
        hidden = response_states(loaded.model, batch, share_prompts=False).at(real)
        vocabulary = loaded.model.config.get_text_config().vocab_size
        (chosen,) = in_chunks(score, (hidden, batch.response_ids[real]), vocabulary)  # in the order of the rows
    return [part.double().numpy() for part in chosen.cpu().split(batch.lengths.tolist())]
