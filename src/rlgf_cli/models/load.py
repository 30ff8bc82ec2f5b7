"""Loading and saving policies: a folder, a hub name, plain weights or a LoRA adapter."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
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
from rlgf_cli.models.adapter import CONFIG, Base, find_base, is_path, refuse_tied
from rlgf_cli.models.text import TextFormat, unseen_ids
from rlgf_cli.models.turns import TurnEnd, check_template

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

hf_logging.disable_progress_bar()


@dataclass
class Loaded:
    """A model with its tokenizer and text format. ``dtype`` is what it computes in; ``base`` is where its weights come
    from, or those below its adapter (None: they are random); ``stated_eos_ids`` is what its generation_config ended a
    text with before rlgf had its say."""

    model: Any
    tokenizer: Any
    text: TextFormat
    name: str
    dtype: torch.dtype = torch.float32
    base: Base | None = None
    stated_eos_ids: list[int] = field(default_factory=list)

    @property
    def encoder_decoder(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)

    @property
    def turn_end(self) -> TurnEnd | None:
        """How the chat template ends a turn; None for plain text, and for an encoder-decoder, whose response does not
        stand in the template."""
        return None if self.encoder_decoder else self.text.turn_end(self.tokenizer)

    @property
    def eos_id(self) -> int:
        """The id that ends a response in training data: the chat template's end of a turn if it has one, else EOS."""
        end = self.turn_end
        return int(self.tokenizer.eos_token_id if end is None or end.id is None else end.id)

    @property
    def no_turn_end(self) -> str:
        """What to tell the user where the chat template has no token that ends a turn; empty where all is well."""
        end = self.turn_end
        if end is None or not end.problem:
            return ""
        return f"{end.problem}: a response ends with tokenizer.eos_token, {self.tokenizer.eos_token!r}"

    @property
    def eos_ids(self) -> frozenset[int]:
        """All ids that end a response: in training data, EOS, and those of the model's generation_config."""
        return frozenset({self.eos_id, int(self.tokenizer.eos_token_id), *self.configured_eos_ids})

    @property
    def configured_eos_ids(self) -> list[int]:
        """What the model's generation_config ends a text with, now (``stated_eos_ids``: when it was loaded)."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        several = configured if isinstance(configured, list) else [configured]
        return [int(i) for i in several if i is not None]

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids that a policy can write and no text shows: special tokens but those that end a response, and rows of the
        vocabulary without a token."""
        rows = int(self.model.config.get_text_config().vocab_size)
        return unseen_ids(self.tokenizer, rows) - self.eos_ids

    @property
    def pad_id(self) -> int:
        """Filler for batches. It may equal EOS: masks come from lengths, never from ids."""
        return int(self.tokenizer.pad_token_id)

    @property
    def max_positions(self) -> int | None:
        """Prompt plus response (decoder) or either alone (encoder-decoder); None: no limit (relative positions)."""
        config = self.model.config
        if hasattr(config, "relative_attention_num_buckets"):
            return None
        limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        return int(limit) if limit else None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def pick_device(name: str) -> torch.device:
    """``auto`` is cuda, else mps, else cpu; a device that is not there is a UserError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}", hint="auto, cpu, cuda, cuda:1 or mps") from None
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(device.type, False):
        raise UserError(f"the device {name!r} is not available here", hint="--device auto takes what is there")
    return device


@contextlib.contextmanager
def autocast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Compute in ``dtype`` where it is not float32; weights keep their own type."""
    if dtype == torch.float32:
        yield
    else:
        with torch.autocast(device.type, dtype=dtype):
            yield


def load(config: ModelConfig, *, text: TextConfig | None = None, for_training: bool = False) -> Loaded:
    """Load a policy or a guide.

    ``for_training`` keeps the weights in float32 and leaves bfloat16 to autocast, and a model that rlgf cannot sample
    from is refused; otherwise weights are loaded in ``config.dtype``. The model's generation_config keeps nothing of
    the base's but its special ids, see :func:`own_generation`. Raises UserError for a folder that is no checkpoint, a
    name that the hub does not give, a tokenizer that does not fit the model, and an adapter whose base is not there
    or, for training, could not be merged.
    """
    name = config.name
    check_checkpoint_name(name)
    device = pick_device(config.device)
    dtype = DTYPES[config.dtype]
    if dtype == torch.bfloat16 and device.type == "mps":
        dtype = torch.float32
    common: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    weights: dict[str, Any] = {"dtype": torch.float32 if for_training else dtype}
    if config.load_in_4bit:
        weights = {"quantization_config": _four_bit(dtype), "device_map": {"": device}}
    adapter = Path(name, CONFIG).is_file()
    base = find_base(name) if adapter else Base.at(name, config.revision)
    options = {**common, **weights, "revision": base.revision or config.revision}
    model = _from_hub(base.name, options, named_in=str(Path(name, CONFIG)) if adapter else None)
    fuse_gelu(model)
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
    stored = TextFormat.load(name) if Path(name).is_dir() else TextFormat()
    model.eval()
    loaded = Loaded(model, tokenizer, TextFormat.from_config(text, stored), name, dtype, base)
    if loaded.text.chat:
        check_template(tokenizer)
    loaded.stated_eos_ids = loaded.configured_eos_ids
    own_generation(loaded)
    if for_training:
        from rlgf_cli.models.generate import check_cache  # imports this module

        check_cache(loaded)
    return loaded


def own_generation(loaded: Loaded, lengths: LengthConfig | None = None) -> None:
    """Let the model's generation_config say what rlgf does, and its checkpoint with it.

    Penalties, forced tokens, minimal lengths, beams and the like of the base were chosen for another task; rlgf samples
    and searches without them. What stays are the ids that end, pad and start a text, and the lengths that the
    checkpoint was trained with: ``lengths``, where it is trained now. Without ``do_sample``, transformers' ``generate``
    is greedy, as ``rlgf eval`` is.
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
    """Give the base the generation_config that lies with its adapter; the base's lengths are none of the adapter's."""
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    else:
        model.generation_config.max_new_tokens = model.generation_config.min_new_tokens = None


def check_checkpoint_name(name: str) -> None:
    """Refuse a folder or path that is no checkpoint before anything heavy happens; hub names pass."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / CONFIG).is_file():
            found = sorted(p.parent.name for p in path.glob("*/config.json"))
            hint = f"did you mean {path / found[0]}?" if found else "a checkpoint folder holds config.json and weights"
            raise UserError("this folder is no model checkpoint", where=name, hint=hint)
    elif path.is_file():
        raise UserError("this is a file; a checkpoint is a folder or a hub name", where=name)
    elif is_path(name):
        raise UserError("no such checkpoint folder", where=name, hint="run rlgf sft first, or check the path")


def load_tokenizer(name: str, **common: Any) -> Any:
    """The tokenizer of a checkpoint; it must have EOS, and gets pad = EOS where it has no pad of its own."""
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
    """Put a fresh LoRA adapter on plain weights; an adapter checkpoint keeps the adapter that it has.

    Raises UserError for target modules that the model has not, or that could not be merged (tied embeddings).
    """
    from peft import LoraConfig as PeftLora
    from peft import PeftModel, TaskType, get_peft_model
    from transformers.pytorch_utils import Conv1D

    if not config.enabled or isinstance(loaded.model, PeftModel):
        return loaded
    task = TaskType.SEQ_2_SEQ_LM if loaded.encoder_decoder else TaskType.CAUSAL_LM
    base = loaded.base.told() if loaded.base else None
    adapter = PeftLora(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
        task_type=task,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in loaded.model.modules()),
    )
    try:
        with warnings.catch_warnings():
            # tied weights are refused below, the other one PEFT corrects
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings|fan_in_fan_out is set")
            loaded.model = get_peft_model(loaded.model, adapter, revision=base.revision if base else None)
    except ValueError as error:
        raise UserError(f"LoRA does not fit this model: {_first_line(error)}", hint="set lora.target_modules") from None
    refuse_tied(loaded.model)
    loaded.base = base
    return loaded


def save(folder: Path, loaded: Loaded, *, weights: dict[str, torch.Tensor] | None = None) -> None:
    """A checkpoint that ``from_pretrained`` loads: weights (or adapter), generation_config, tokenizer, text format.

    ``weights``: the model's state where the model itself holds only a shard of it.
    """
    # a frozen second adapter (the reference of a resumed LoRA) is not part of the product
    only: dict[str, Any] = {"selected_adapters": ["default"]} if hasattr(loaded.model, "peft_config") else {}
    only |= {"state_dict": weights} if weights is not None else {}
    with os_errors(folder):
        loaded.model.save_pretrained(folder, **only)
        if "selected_adapters" in only:  # PEFT writes neither
            loaded.model.generation_config.save_pretrained(folder)
            if loaded.base is not None:
                loaded.base.note(folder)
        loaded.tokenizer.save_pretrained(folder)
        loaded.text.save(folder)


def _from_hub(name: str, options: dict[str, Any], named_in: str | None = None) -> Any:
    """``named_in``: the adapter's file that names this base."""
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
    pass instead of eight, with nothing kept between them for the gradient. Equal up to rounding."""
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
