"""Functions from summed per-text rows to a corpus figure: those that ``protocols.CorpusFigure`` names.

Each takes sums of rows, ``[..., k]``, and returns the figures ``[...]``: of one set of texts, or of as many resamples
as the leading axes hold, in one call.
"""

from __future__ import annotations

import numpy as np


def mean(sums: np.ndarray) -> np.ndarray:
    """The mean of rows ``[value, 1]``."""
    return np.asarray(sums[..., 0] / sums[..., 1])


def exp_mean(sums: np.ndarray) -> np.ndarray:
    """exp(sum of values / sum of counts) of rows ``[value, count]``: perplexity, where a value is in nats."""
    return np.asarray(np.exp(sums[..., 0] / sums[..., 1]))


def bleu(sums: np.ndarray) -> np.ndarray:
    """Corpus BLEU, 0 to 100, of rows ``[sys_len, ref_len, correct_1..4, total_1..4]`` (Papineni et al. 2002, 2.3).

    Exponential smoothing as in mteval-v13a and sacrebleu: the k-th order without a match counts 1 / 2^k matches. 0
    without any match, and where no text is long enough for an order.
    """
    sys_len, ref_len, correct, total = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:10]
    empty = correct == 0
    matches = np.where(empty, 0.5 ** np.cumsum(empty, axis=-1), correct)
    precisions = matches / np.maximum(total, 1)
    brevity = np.exp(np.minimum(0, 1 - ref_len / np.maximum(sys_len, 1)))
    figure = 100 * brevity * np.exp(np.log(precisions).mean(axis=-1))
    return np.asarray(np.where(correct.any(axis=-1) & total.all(axis=-1), figure, 0.0))


def chrf(sums: np.ndarray) -> np.ndarray:
    """Corpus chrF2, 0 to 100, of rows ``[in the text, in the reference, in both]`` for each n-gram order, concatenated
    (Popovic 2015): F with beta 2 of the mean precision and the mean recall over the orders.

    As in sacrebleu, an order of which text or reference has no n-gram does not count. 0 without any match.
    """
    in_text, in_reference, both = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 3), -1, 0)
    used = (in_text > 0) & (in_reference > 0)
    orders = np.maximum(used.sum(axis=-1), 1)
    precision = np.where(used, both / np.maximum(in_text, 1), 0).sum(axis=-1) / orders
    recall = np.where(used, both / np.maximum(in_reference, 1), 0).sum(axis=-1) / orders
    weighted = 4 * precision + recall
    return np.asarray(100 * np.where(weighted > 0, 5 * precision * recall / np.where(weighted > 0, weighted, 1), 0.0))
