"""How many tokens an encoder has positions for: what its table of positions says, run at exactly that length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from conftest import make_tokenizer
from rlgf_cli.evolve.encoder import EncoderSpace
from rlgf_cli.models.classification import position_limit
from rlgf_cli.protocols import Example
from rlgf_cli.scorers.bertscore import BertScore
from rlgf_cli.scorers.classifier import RewardModelReward

POSITIONS, PAD = 20, 1
SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
    "max_position_embeddings": POSITIONS, "pad_token_id": PAD, "eos_token_id": 2, "bos_token_id": 0,
}  # fmt: skip
FROM_PAD = {
    "roberta": {},
    "xlm-roberta": {},
    "xlm-roberta-xl": {},
    "camembert": {},
    "roberta-prelayernorm": {},
    "data2vec-text": {},
    "xmod": {"languages": ["en"], "default_language": "en"},
    "longformer": {"attention_window": [8]},  # 18 tokens are padded to 24 inside, and the filler has no position
    "esm": {"position_embedding_type": "absolute", "mask_token_id": 3, "token_dropout": False},
    "ibert": {},
    "mpnet": {},
    "luke": {"entity_vocab_size": 4, "entity_emb_size": 8},
    "lilt": {"channel_shrink_ratio": 2, "max_2d_position_embeddings": 4},
    "markuplm": {"xpath_unit_hidden_size": 4, "max_depth": 2},
}
"""Types that count positions from the padding's id + 1, with what else their small config needs."""
FROM_ZERO = {
    "bert": {},
    "electra": {"embedding_size": 12},
    "albert": {"embedding_size": 8},
    "mobilebert": {"embedding_size": 8, "intra_bottleneck_size": 12, "true_hidden_size": 12},
    "distilbert": {"dim": 12, "hidden_dim": 8, "n_layers": 1, "n_heads": 2},
    "nystromformer": {"num_landmarks": 4, "segment_means_seq_len": 4},
    "deberta-v2": {"pooler_hidden_size": 12},
    "gpt2": {"n_embd": 12, "n_layer": 1, "n_head": 2},
    "opt": {"ffn_dim": 8, "word_embed_proj_dim": 12},
}


def small(kind: str, more: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, **more})
    return AutoModelForSequenceClassification.from_config(config).eval()


@torch.no_grad()
def run(model: Any, length: int) -> torch.Tensor:
    ids = torch.full((1, length), 5)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize(("kind", "more"), FROM_PAD.items(), ids=list(FROM_PAD))
def test_positions_that_begin_behind_the_paddings(kind: str, more: dict[str, Any]) -> None:
    model = small(kind, more)
    assert position_limit(model) == POSITIONS - PAD - 1
    assert run(model, POSITIONS - PAD - 1).isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        run(model, POSITIONS - PAD)


@pytest.mark.parametrize(("kind", "more"), FROM_ZERO.items(), ids=list(FROM_ZERO))
def test_positions_that_begin_at_zero(kind: str, more: dict[str, Any]) -> None:
    model = small(kind, more)
    assert position_limit(model) == POSITIONS
    assert run(model, POSITIONS).isfinite().all()


def test_rotary_and_relative_positions() -> None:
    esm = small("esm", {"position_embedding_type": "rotary", "mask_token_id": 3, "token_dropout": False})
    assert position_limit(esm) == POSITIONS  # what it was trained for; it has no table that could end
    t5 = {"d_model": 12, "d_kv": 6, "d_ff": 8, "num_layers": 1, "num_heads": 2, "n_positions": 8}
    assert position_limit(small("t5", {"vocab_size": 40, "decoder_start_token_id": 0, **t5})) is None


def test_whoever_loads_an_encoder_cuts_there(tmp_path: Path) -> None:
    """MPNet has relative positions beside its table: it looked as if it had no limit."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"cls_token": "<cls>", "sep_token": "<sep>"})
    config = AutoConfig.for_model("mpnet", **{**SMALL, "vocab_size": len(tokenizer)}, num_labels=1)
    torch.manual_seed(0)
    for auto, name in ((AutoModel, "encoder"), (AutoModelForSequenceClassification, "rm")):
        auto.from_config(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    example, long = Example("a", "cat", ("the cat sees it . " * 20,)), "the dog finds it . " * 20
    reward = RewardModelReward(str(tmp_path / "rm"))
    assert reward.max_tokens == POSITIONS - PAD - 1
    reward.score([example], [long])
    assert reward.counts["truncated"] == 1
    assert EncoderSpace(str(tmp_path / "encoder"), device="cpu").embed([long, "a"]).shape == (2, 12)
    (score,) = BertScore(str(tmp_path / "encoder"), num_layers=1).score([example], [long])
    assert 0 < score.value <= 1.001
