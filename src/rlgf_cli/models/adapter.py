"""The base model of a LoRA adapter: its name and revision, the digest of its weights, and where to find it again.

An adapter's folder names its base in PEFT's ``adapter_config.json``: a hub name, or an absolute path, so that it loads
from any working directory, and by PEFT and transformers alone. ``rlgf_base.json`` beside it has the digest of the
base's weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rlgf_cli.artifacts.jsonl import read_json, write_json
from rlgf_cli.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
BASE_DIGEST = "rlgf_base.json"
"""``{"schema_version": 1, "weights": ...}``, for a base on this disk: see :func:`weights_digest`."""

_BLOCKS, _BLOCK_BYTES = 16, 4096


@dataclass(frozen=True)
class Base:
    """The plain weights below an adapter: an absolute folder, or a hub name and its revision.

    ``weights``: the digest of a folder's weights, None where there is none or it was not computed.
    """

    name: str
    revision: str | None = None
    weights: str | None = None

    @classmethod
    def at(cls, name: str, revision: str | None = None) -> Base:
        return cls(str(Path(name).resolve()) if Path(name).is_dir() else name, revision)

    def with_digest(self) -> Base:
        """This base with the digest of its weights."""
        return replace(self, weights=weights_digest(Path(self.name)))

    def write_digest(self, folder: Path) -> None:
        """Write the digest into an adapter's folder."""
        if self.weights is not None:
            write_json(folder / BASE_DIGEST, {"schema_version": 1, "weights": self.weights})


def weights_digest(folder: Path) -> str | None:
    """A sha256 of every weight file's size and of blocks spread over it, which tells checkpoints apart without reading
    them whole. None where the folder has no weights."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{size}:".encode())
        with path.open("rb") as stream:
            for i in range(_BLOCKS):
                stream.seek(max(0, size - _BLOCK_BYTES) * i // (_BLOCKS - 1))
                digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest() if files else None


def find_base(folder: str | Path) -> Base:
    """The base of an adapter's folder.

    ``adapter_config.json`` says where a base on disk is. Where it is not there (the tree was moved), it is searched
    below the parent folders of the adapter, by the end of its old path, and used where its weights have the stored
    digest. Raises UserError where there is none, and where its weights are not those that the adapter was trained on.
    """
    config = Path(folder) / ADAPTER_CONFIG
    stored_config = read_json(config)
    name, revision = stored_config.get("base_model_name_or_path"), stored_config.get("revision")
    if not name:
        raise UserError("the adapter does not name its base model", where=str(config), hint=_SET)
    digest_file = Path(folder) / BASE_DIGEST
    digest = read_json(digest_file)["weights"] if digest_file.is_file() else None
    stored = Path(name)
    if digest is None and not stored.is_dir():
        if not is_path(name):
            return Base(name, revision)
        raise UserError(f"the base model of this adapter is not there: {name}", where=str(config), hint=_SET)
    places = [stored] if digest is None else [stored, *_moved_places(stored, Path(folder).resolve())]
    for place in filter(Path.is_dir, places):
        if digest is None or weights_digest(place) == digest:
            return replace(Base.at(str(place), revision), weights=digest)
    if stored.is_dir():
        raise UserError(
            f"the base model of this adapter has other weights now than when the adapter was trained: {name}",
            where=str(config),
            hint=f"put the former weights back, or train the adapter again ({BASE_DIGEST} there has their digest)",
        )
    raise UserError(f"the base model of this adapter is not there: {name}", where=str(config), hint=_SET)


_SET = "put it back, or set base_model_name_or_path in this file to the folder where it is, or to a hub name"


def is_path(name: str) -> bool:
    """Whether a name that is no existing folder was meant as a path; else it is a hub name."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.startswith("runs/")


def _moved_places(stored: Path, folder: Path) -> Iterator[Path]:
    """Candidate folders of a moved base: the longest end of its old path first, below the nearest folder first."""
    parts = stored.parts[1:] if stored.is_absolute() else stored.parts
    for start in range(len(parts)):
        for above in folder.parents:
            yield above.joinpath(*parts[start:])
