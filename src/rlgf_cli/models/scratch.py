"""Small models from scratch: a tokenizer trained on the data, and a known architecture with random weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from rlgf_cli.artifacts.jsonl import read_json
from rlgf_cli.config.common import ModelConfig
from rlgf_cli.config.scratch import ScratchConfig, TokenizerConfig
from rlgf_cli.errors import UserError
from rlgf_cli.models.device import DTYPES, pick_device, warn_of_slow_bfloat16
from rlgf_cli.models.load import fuse_gelu, set_generation_config
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.text import TextFormat
from rlgf_cli.protocols import Prompt

EOS, PAD, UNK, BOS = "</s>", "<pad>", "<unk>", "<s>"
_BRACKETING = ("bart", "distilbert")
"""Architectures whose encoder reads ``<s> text </s>``; T5's encoder reads ``text </s>``, decoders the bare text."""

_WORDS = r"'\w+|\d+(?:[.,]\d+)+|\w+(?:-\w+)*|[^\w\s]+"
"""Clitics, numbers, words (hyphens inside), runs of punctuation. Joined by spaces they split the same way."""


def build(
    config: ScratchConfig,
    *,
    model: ModelConfig,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    text: TextFormat,
    seed: int,
) -> Loaded:
    """A language model with random weights; its tokenizer knows the rendered prompts and the responses."""
    if config.architecture == "distilbert":
        raise UserError(
            "distilbert is an encoder and writes no text",
            where=model.name,
            hint="architecture: gpt2, llama, qwen3, t5 or bart; distilbert is for rlgf train-reward",
        )
    if text.chat:
        raise UserError(
            "a model from scratch has no chat template", where=model.name, hint="give text.template instead"
        )
    rendered = (text.render_prompt(None, prompt) for prompt in prompts)
    prefixed = (text.response_prefix + response for response in responses)
    tokenizer = build_tokenizer(config, [*rendered, *prefixed])
    torch.manual_seed(seed)
    auto = hf.AutoModelForSeq2SeqLM if config.architecture in ("t5", "bart") else hf.AutoModelForCausalLM
    network = auto.from_config(build_config(config, tokenizer))
    fuse_gelu(network)  # as load() does with its checkpoint, so that a resumed run rounds alike
    network.to(pick_device(model.device)).eval()
    warn_of_slow_bfloat16(network.device, DTYPES[model.dtype])
    loaded = Loaded(network, tokenizer, text, model.name, DTYPES[model.dtype])
    set_generation_config(loaded)
    return loaded


def build_classifier(
    config: ScratchConfig, *, name: str, texts: Sequence[str], labels: Sequence[str], seed: int
) -> tuple[Any, Any]:
    """A sequence classifier with random weights, and its tokenizer trained on ``texts``."""
    if config.architecture in ("t5", "bart"):
        raise UserError(
            f"{config.architecture} from scratch is no classifier here",
            where=name,
            hint="architecture: distilbert, gpt2, llama or qwen3",
        )
    tokenizer = build_tokenizer(config, texts)
    architecture = build_config(config, tokenizer)
    architecture.num_labels = len(labels)
    torch.manual_seed(seed)
    return hf.AutoModelForSequenceClassification.from_config(architecture), tokenizer


def build_config(config: ScratchConfig, tokenizer: Any) -> Any:
    """The transformers config of an architecture of the given size, with the tokenizer's special ids."""
    hidden, layers, heads, dropout = config.hidden, config.layers, config.heads, config.dropout
    eos, pad, vocab = tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)
    ids: dict[str, Any] = {"vocab_size": vocab, "pad_token_id": pad}
    ends = {**ids, "eos_token_id": eos, "bos_token_id": tokenizer.bos_token_id}
    if config.architecture == "gpt2":
        return hf.GPT2Config(
            n_embd=hidden, n_layer=layers, n_head=heads, n_positions=config.positions,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, **ends,
        )  # fmt: skip
    if config.architecture == "t5":
        return hf.T5Config(
            d_model=hidden, d_kv=hidden // heads, d_ff=4 * hidden, num_layers=layers, num_heads=heads,
            dropout_rate=dropout, eos_token_id=eos, **ids, **{"decoder_start_token_id": pad},
        )  # fmt: skip
    if config.architecture == "bart":
        return hf.BartConfig(
            d_model=hidden, encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=heads,
            decoder_attention_heads=heads, encoder_ffn_dim=4 * hidden, decoder_ffn_dim=4 * hidden,
            max_position_embeddings=config.positions, dropout=dropout, attention_dropout=0.0,
            activation_dropout=0.0, decoder_start_token_id=eos, forced_eos_token_id=None, **ends,
        )  # fmt: skip
    if config.architecture == "distilbert":
        return hf.DistilBertConfig(
            dim=hidden, n_layers=layers, n_heads=heads, hidden_dim=4 * hidden,
            dropout=dropout, attention_dropout=dropout, seq_classif_dropout=dropout,
            max_position_embeddings=config.positions, **ids,
        )  # fmt: skip
    kind = hf.LlamaConfig if config.architecture == "llama" else hf.Qwen3Config
    return kind(
        hidden_size=hidden, intermediate_size=round(8 * hidden / 3), num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=hidden // heads,
        max_position_embeddings=config.positions, tie_word_embeddings=True, **ends,
    )  # fmt: skip


def build_tokenizer(config: ScratchConfig, texts: Iterable[str]) -> Any:
    """A fast tokenizer with EOS and pad (and unk, and BOS where the architecture's input begins with it)."""
    if config.tokenizer.path is not None:
        backend, names = _read_tokenizer(Path(config.tokenizer.path))
    else:
        backend, names = _train_tokenizer(config.tokenizer, texts, config.architecture in _BRACKETING)
    if config.architecture in _BRACKETING:
        names.setdefault("bos_token", BOS)
    names["pad_token"] = names["eos_token"] if config.pad == "eos" else names.get("pad_token", PAD)
    if config.pad == "distinct" and names["pad_token"] == names["eos_token"]:
        names["pad_token"] = PAD
    backend.add_special_tokens(list(dict.fromkeys(names.values())))
    _bracket(backend, config.architecture, names)
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)


def _train_tokenizer(config: TokenizerConfig, texts: Iterable[str], bos: bool) -> tuple[Tokenizer, dict[str, str]]:
    names = {"pad_token": PAD, "eos_token": EOS, **({"bos_token": BOS} if bos else {})}
    common: dict[str, Any] = {"show_progress": False}
    size = config.vocab_size or 4096
    if config.kind == "bpe":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = list(names.values())
        trainer: Any = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, **common)
    else:
        names["unk_token"] = UNK
        special = list(names.values())
        if config.kind == "word":
            backend = Tokenizer(models.WordLevel(unk_token=UNK))
            backend.pre_tokenizer = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
            limit = config.vocab_size or 1 << 30
            trainer = trainers.WordLevelTrainer(vocab_size=limit, special_tokens=special, **common)
        else:
            backend = Tokenizer(models.Unigram())
            backend.pre_tokenizer = pre_tokenizers.Metaspace()
            backend.decoder = decoders.Metaspace()
            trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=special, unk_token=UNK, **common)
    backend.train_from_iterator(texts, trainer)
    return backend, names


_KNOWN = {
    "eos_token": ("</s>", "<|endoftext|>", "<eos>", "<|im_end|>"),
    "pad_token": ("<pad>", "<|pad|>", "[PAD]"),
    "unk_token": ("<unk>", "[UNK]"),
    "bos_token": ("<s>", "<bos>"),
}
"""Usual spellings of special tokens, for a folder without a tokenizer_config.json."""


def _read_tokenizer(folder: Path) -> tuple[Tokenizer, dict[str, str]]:
    """A tokenizer from a folder, and its special tokens by role; EOS is added where it has none."""
    whole, vocab, merges, settings = (
        folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")
    )
    if whole.is_file():
        try:
            backend = Tokenizer.from_file(str(whole))
        except Exception as error:  # noqa: BLE001 - the library raises bare Exception for a file it cannot read
            raise UserError(f"not a tokenizer: {error}", where=str(whole)) from None
    elif vocab.is_file() and merges.is_file():
        try:
            backend = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
        except Exception as error:  # noqa: BLE001 - as above
            raise UserError(f"not a byte-level BPE: {error}", where=str(folder)) from None
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    else:
        raise UserError(
            "no tokenizer here",
            where=str(folder),
            hint="tokenizer.path is a folder with tokenizer.json, or with vocab.json and merges.txt",
        )
    stored = read_json(settings) if settings.is_file() else {}
    known = backend.get_vocab()
    names: dict[str, str] = {}
    for role, usual in _KNOWN.items():
        value = stored.get(role)
        value = value["content"] if isinstance(value, dict) else value
        value = value or next((name for name in usual if name in known), None)
        if value:
            names[role] = value
    names.setdefault("eos_token", EOS)
    return backend, names


def _bracket(backend: Tokenizer, architecture: str, names: dict[str, str]) -> None:
    """Make an encoder's input end with EOS (and begin with BOS) where the tokenizer adds no special tokens itself."""
    with_special, bare = (backend.encode("a", add_special_tokens=add).ids for add in (True, False))
    if architecture not in ("t5", *_BRACKETING) or with_special != bare:
        return
    bos, eos = names.get("bos_token"), names["eos_token"]
    first = f"{bos} " if architecture in _BRACKETING else ""
    used = [token for token in (bos if first else None, eos) if token]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first}$A {eos}", special_tokens=[(token, backend.token_to_id(token)) for token in used]
    )
