"""LoRA adapters: where the base lies that one was trained on, which weights one must leave alone, and whether merged
weights are the same model.

An adapter's folder names its base in PEFT's ``adapter_config.json``: a hub name, or an absolute path, so that it loads
from any working directory, and by PEFT and transformers alone. ``rlgf_base.json`` beside it tells the base's weights.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rlgf_cli.artifacts.jsonl import read_json, write_json
from rlgf_cli.errors import UserError

if TYPE_CHECKING:
    from rlgf_cli.models.load import Loaded

CONFIG = "adapter_config.json"
NOTE = "rlgf_base.json"
"""``{"schema_version": 1, "weights": ...}``, for a base on this disk: see :func:`weights_digest`."""

ROUNDING = 1e-4
"""How far merged float32 weights may move a logit, as a share of the largest one (of 1, where that is smaller)."""

_BLOCKS, _BLOCK = 16, 4096


@dataclass(frozen=True)
class Base:
    """The plain weights below an adapter: a folder (absolute) or a hub name and its revision.

    ``weights``: the digest of a folder's weights, None where there is none or it was not asked for.
    """

    name: str
    revision: str | None = None
    weights: str | None = None

    @classmethod
    def at(cls, name: str, revision: str | None = None) -> Base:
        return cls(str(Path(name).resolve()) if Path(name).is_dir() else name, revision)

    def told(self) -> Base:
        """With the digest of its weights."""
        return replace(self, weights=weights_digest(Path(self.name)))

    def note(self, folder: Path) -> None:
        """Leave the digest in an adapter's folder."""
        if self.weights is not None:
            write_json(folder / NOTE, {"schema_version": 1, "weights": self.weights})


def weights_digest(folder: Path) -> str | None:
    """Tells checkpoints apart without reading them whole: a sha256 of every weight file's size and of blocks spread
    over it. None where the folder has no weights."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{size}:".encode())
        with path.open("rb") as stream:
            for i in range(_BLOCKS):
                stream.seek(max(0, size - _BLOCK) * i // (_BLOCKS - 1))
                digest.update(stream.read(_BLOCK))
    return digest.hexdigest() if files else None


def find_base(folder: str | Path) -> Base:
    """The base of an adapter's folder.

    A base on disk is where ``adapter_config.json`` says. Where it is not there (the tree was moved), it is looked for
    below the folders above the adapter, by the end of its old path, and taken where its weights are those that were
    noted. Raises UserError where there is none, and where its weights are not those that the adapter was trained on.
    """
    config = Path(folder) / CONFIG
    found = read_json(config)
    name, revision = found.get("base_model_name_or_path"), found.get("revision")
    if not name:
        raise UserError("the adapter does not name its base model", where=str(config), hint=_SET)
    noted = read_json(Path(folder) / NOTE)["weights"] if (Path(folder) / NOTE).is_file() else None
    stored = Path(name)
    if noted is None and not stored.is_dir():
        if not is_path(name):
            return Base(name, revision)
        raise UserError(f"the base model of this adapter is not there: {name}", where=str(config), hint=_SET)
    places = [stored] if noted is None else [stored, *_moved(stored, Path(folder).resolve())]
    for place in filter(Path.is_dir, places):
        if noted is None or weights_digest(place) == noted:
            return replace(Base.at(str(place), revision), weights=noted)
    if stored.is_dir():
        raise UserError(
            f"the base model of this adapter has other weights now than when the adapter was trained: {name}",
            where=str(config),
            hint=f"put the former weights back, or train the adapter again ({NOTE} there tells the former ones)",
        )
    raise UserError(f"the base model of this adapter is not there: {name}", where=str(config), hint=_SET)


_SET = "put it back, or set base_model_name_or_path in this file to the folder where it is, or to a hub name"


def is_path(name: str) -> bool:
    """Whether a name that is no folder here was meant as one; else it is a hub name."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.startswith("runs/")


def _moved(stored: Path, folder: Path) -> Iterator[Path]:
    """Where a base may be now: the longest end of its old path first, below the nearest folder first."""
    parts = stored.parts[1:] if stored.is_absolute() else stored.parts
    for start in range(len(parts)):
        for above in folder.parents:
            yield above.joinpath(*parts[start:])


def refuse_tied(model: Any, where: str | None = None) -> None:
    """Raise UserError where LoRA sits on weights that another layer has too.

    The adapter changes what the one layer does; merged into the shared weights it would change the other as well.
    """
    owners: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[parameter.data_ptr()].append(name)
    for names in owners.values():
        adapted = [name for name in names if ".base_layer." in name]
        if not adapted or len(names) == 1:
            continue
        target = _module_of(adapted[0])
        others = " and ".join(_module_of(name) for name in names if name != adapted[0])
        raise UserError(
            f"LoRA on {target} cannot be merged: its weights are those of {others} too (tied embeddings)",
            where=where,
            hint=f"train with {target.rpartition('.')[2]} left out of lora.target_modules",
        )


def _module_of(parameter: str) -> str:
    plain = parameter.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return plain.rpartition(".")[0]


@torch.no_grad()
def probe(loaded: Loaded) -> torch.Tensor:
    """Logits [T, V] in float32 for T token ids that are spread over the vocabulary, those of an encoder-decoder as
    prompt and as response."""
    rows = loaded.model.get_input_embeddings().weight.shape[0]
    count = min(64, rows, loaded.max_positions or 64)
    ids = torch.arange(count, device=loaded.device)[None] * rows // count
    more = {"decoder_input_ids": ids} if loaded.encoder_decoder else {}
    logits = loaded.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **more).logits
    return logits[0].float()


def refuse_other(merged: torch.Tensor, adapter: torch.Tensor, where: str) -> None:
    """Raise UserError where two :func:`probe` results, [T, V] each, are further apart than float32 rounds."""
    bound = ROUNDING * max(1.0, float(adapter.abs().max()))
    gap = float((merged - adapter).abs().max())
    if not gap <= bound:  # not a number is no match either
        raise UserError(
            f"merged, the weights are another model than the adapter's: logits differ by {gap:.2g}, "
            f"of which rounding explains {bound:.2g}",
            where=where,
            hint="use the adapter as it is: eval, generate and train load it",
        )
