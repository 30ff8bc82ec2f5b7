"""Loading and saving policies: a folder, a hub name or a GGUF file, plain weights or a LoRA adapter."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig
from transformers.activations import NewGELUActivation
from transformers.utils import logging as hf_logging

from rlgf_cli.artifacts.disk import os_errors
from rlgf_cli.config.common import LengthConfig, LoraConfig, ModelConfig, TextConfig
from rlgf_cli.errors import UserError
from rlgf_cli.models.adapter import ADAPTER_CONFIG, Base, find_base, is_path
from rlgf_cli.models.device import DTYPES, autocast, pick_device, warn_of_slow_bfloat16
from rlgf_cli.models.formats import text_format
from rlgf_cli.models.generate import check_cache
from rlgf_cli.models.gguf import plain_checkpoint
from rlgf_cli.models.loaded import Loaded
from rlgf_cli.models.merging import refuse_tied
from rlgf_cli.models.precision import compute_in_float32_between_layers

hf_logging.disable_progress_bar()


def load(
    config: ModelConfig,
    *,
    text: TextConfig | None = None,
    for_training: bool = False,
    lora: bool = False,
    chat_default: bool = True,
) -> Loaded:
    """Load a policy or a guide.

    Weights are loaded in ``config.dtype``, except those that will learn: ``for_training`` keeps them in float32 and
    leaves bfloat16 to autocast, unless they are the base of an adapter (``lora``: of one that will be put on them). A
    model that rlgf cannot sample from is refused for training. The model's generation_config is replaced, see
    :func:`set_generation_config`. Raises UserError for a folder that is no checkpoint, a name that the hub does not
    have, a tokenizer that does not fit the model, and an adapter whose base is missing or, for training, could not be
    merged.
    """
    name, gguf = plain_checkpoint(config.name)
    check_checkpoint_name(name)
    device = pick_device(config.device)
    dtype = DTYPES[config.dtype]
    if dtype == torch.bfloat16 and device.type == "mps":
        dtype = torch.float32
    warn_of_slow_bfloat16(device, dtype)
    common: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    adapter = Path(name, ADAPTER_CONFIG).is_file()
    learns = for_training and not (adapter or lora)
    weights: dict[str, Any] = {"dtype": torch.float32 if learns else dtype}
    if config.load_in_4bit:
        weights = {"quantization_config": _four_bit(dtype), "device_map": {"": device}}
    base = find_base(name) if adapter else Base.at(name, config.revision, gguf)
    options = {**common, **weights, "revision": base.revision or config.revision}
    model = _from_hub(base.name, options, named_in=str(Path(name, ADAPTER_CONFIG)) if adapter else None)
    fuse_gelu(model)
    if for_training and not learns and dtype != torch.float32 and not config.load_in_4bit:
        compute_in_float32_between_layers(model)
    if adapter:
        from peft import PeftModel

        _describe_adapter(model, Path(name))
        model = PeftModel.from_pretrained(model, name, is_trainable=for_training)
        model.peft_config["default"].base_model_name_or_path = base.name  # it may have moved
        if for_training:
            refuse_tied(model, where=name)
    if not config.load_in_4bit:
        model.to(device)
    tokenizer = load_tokenizer(name, **common)
    _check_fit(model, tokenizer, name)
    model.eval()
    format_, origin = text_format(text, tokenizer, name, chat_default=chat_default)
    loaded = Loaded(model, tokenizer, format_, name, dtype, base, text_origin=origin)
    loaded.original_eos_ids = loaded.configured_eos_ids
    set_generation_config(loaded)
    if for_training:
        with autocast(device, dtype):
            check_cache(loaded)
    return loaded


def set_generation_config(loaded: Loaded, lengths: LengthConfig | None = None) -> None:
    """Replace the model's generation_config, which its checkpoint stores, by the settings that rlgf generates with.

    Penalties, forced tokens, minimal lengths, beams and the like of the base were chosen for another task; rlgf samples
    and searches without them. Kept are the ids that end, pad and start a text, and the lengths that the checkpoint was
    trained with: ``lengths``, where it is trained now. Without ``do_sample``, transformers' ``generate`` is greedy, as
    ``rlgf eval`` is.
    """
    model = loaded.model.get_base_model() if hasattr(loaded.model, "peft_config") else loaded.model
    before = model.generation_config
    ids = sorted(loaded.eos_ids)
    start = getattr(model.config, "decoder_start_token_id", None)
    model.generation_config = GenerationConfig(
        eos_token_id=ids[0] if len(ids) == 1 else ids,
        pad_token_id=loaded.pad_id,
        bos_token_id=loaded.tokenizer.bos_token_id,
        decoder_start_token_id=before.decoder_start_token_id if start is None else start,
        max_new_tokens=lengths.max_new_tokens if lengths else before.max_new_tokens,
        min_new_tokens=(lengths.min_new_tokens or None) if lengths else before.min_new_tokens,
    )


def _describe_adapter(model: Any, folder: Path) -> None:
    """Give the base the generation_config in the adapter's folder; without one, drop the base's lengths."""
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    else:
        model.generation_config.max_new_tokens = model.generation_config.min_new_tokens = None


def check_checkpoint_name(name: str) -> None:
    """Refuse a folder or path that is no checkpoint before anything is loaded; hub names are accepted."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / ADAPTER_CONFIG).is_file():
            inner = sorted(p.parent.name for p in path.glob("*/config.json"))
            hint = f"did you mean {path / inner[0]}?" if inner else "a checkpoint folder holds config.json and weights"
            raise UserError("this folder is no model checkpoint", where=name, hint=hint)
    elif path.is_file():
        hint = "a policy may be a .gguf file, too"
        raise UserError("this is a file; a checkpoint is a folder or a hub name", where=name, hint=hint)
    elif is_path(name):
        raise UserError("no such checkpoint folder", where=name, hint="run rlgf sft first, or check the path")


def load_tokenizer(name: str, **common: Any) -> Any:
    """The tokenizer of a checkpoint; it must have EOS, and gets pad = EOS where it has no pad token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **common)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer can be loaded: {_first_line(error)}", where=name) from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no EOS token, so no text could ever end",
            where=name,
            hint="add an eos_token to it",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def add_lora(loaded: Loaded, config: LoraConfig) -> Loaded:
    """Put a fresh LoRA adapter on plain weights; an adapter checkpoint keeps its adapter.

    Raises UserError for target modules that the model lacks, or that could not be merged (tied embeddings).
    """
    from peft import PeftModel

    if not config.enabled or isinstance(loaded.model, PeftModel):
        return loaded
    base = loaded.base.with_digest() if loaded.base else None
    loaded.model = put_adapter(loaded.model, config, revision=base.revision if base else None)
    refuse_tied(loaded.model)
    loaded.base = base
    return loaded


def put_adapter(model: Any, config: LoraConfig, *, revision: str | None = None) -> Any:
    """A model with a fresh adapter, which is not checked. Raises UserError for target modules that it lacks."""
    from peft import LoraConfig as PeftLora
    from peft import TaskType, get_peft_model
    from transformers.pytorch_utils import Conv1D

    adapter = PeftLora(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
        task_type=TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    try:
        with warnings.catch_warnings():
            # tied weights are refused by add_lora; PEFT itself corrects fan_in_fan_out
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings|fan_in_fan_out is set")
            return get_peft_model(model, adapter, revision=revision)
    except ValueError as error:
        raise UserError(f"LoRA does not fit this model: {_first_line(error)}", hint="set lora.target_modules") from None


def save(folder: Path, loaded: Loaded, *, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write a checkpoint that ``from_pretrained`` loads: weights or adapter, generation_config, tokenizer, text format.

    ``weights``: the model's state where the model itself holds only a shard of it.
    """
    # a frozen second adapter (the ref_model of a resumed LoRA) is not saved
    only: dict[str, Any] = {"selected_adapters": ["default"]} if hasattr(loaded.model, "peft_config") else {}
    only |= {"state_dict": weights} if weights is not None else {}
    with os_errors(folder):
        loaded.model.save_pretrained(folder, **only)
        if "selected_adapters" in only:  # PEFT writes neither the generation_config nor the digest
            loaded.model.generation_config.save_pretrained(folder)
            if loaded.base is not None:
                loaded.base.write_digest(folder)
        loaded.tokenizer.save_pretrained(folder)
        loaded.text.save(folder)


def _from_hub(name: str, options: dict[str, Any], named_in: str | None = None) -> Any:
    """The model of a folder or hub name. ``named_in``: the adapter's file that names this base."""
    try:
        config = AutoConfig.from_pretrained(
            name, revision=options["revision"], trust_remote_code=options["trust_remote_code"]
        )
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        return auto.from_pretrained(name, **options)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        hint = "config.json is of another model than the weights"
        raise UserError("the weights do not have the shapes that config.json says", where=name, hint=hint) from None
    except (OSError, ValueError, SafetensorError) as error:
        if Path(name).is_dir():
            raise UserError(f"the checkpoint cannot be loaded: {_first_line(error)}", where=name) from None
        offline = os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "True")
        hint = "HF_HUB_OFFLINE is set: only what is in the local cache can be used" if offline else "check the name"
        if named_in is not None:
            hint += "; base_model_name_or_path in this file names the base: a hub name, or the folder where it is"
        message = f"{name!r} is neither a folder nor a model that can be fetched"
        raise UserError(message, where=named_in, hint=hint) from None


def fuse_gelu(model: nn.Module) -> None:
    """Give GPT-2's and T5's GELU torch's own kernel: the same tanh approximation (Hendrycks and Gimpel 2016) in one
    pass instead of eight, without intermediate tensors for the gradient. Equal up to rounding."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def _four_bit(dtype: torch.dtype) -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UserError("4-bit loading needs bitsandbytes", hint="pip install 'rlgf-cli[bitsandbytes]'") from None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_type="nf4")


def _check_fit(model: Any, tokenizer: Any, name: str) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise UserError(
            f"tokenizer and model do not fit: the tokenizer knows the id {largest}, the model has {rows} embeddings",
            where=name,
            hint="use the tokenizer that the model was trained with",
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
