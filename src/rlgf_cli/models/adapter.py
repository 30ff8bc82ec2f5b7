"""The base model of a LoRA adapter: its name and revision, the digest of its weights, and where to find it again.

An adapter's folder names its base in PEFT's ``adapter_config.json``: a hub name, or an absolute path, so that it loads
from any working directory, and by PEFT and transformers alone. ``rlgf_base.json`` beside it has the digest of the
base's weights, and the GGUF file that they were converted from, if they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rlgf_cli.artifacts.disk import blocks_digest
from rlgf_cli.artifacts.jsonl import read_json, write_json
from rlgf_cli.errors import UserError
from rlgf_cli.models.gguf import GgufFile, converted_again

ADAPTER_CONFIG = "adapter_config.json"
BASE_DIGEST = "rlgf_base.json"
"""``{"schema_version": 1, "weights": ...}``, for a base on this disk: see :func:`weights_digest`. With ``"gguf":
{"name": ..., "digest": ...}``: the file that the base was converted from."""


@dataclass(frozen=True)
class Base:
    """The plain weights below an adapter: an absolute folder, or a hub name and its revision.

    ``weights``: the digest of a folder's weights, None where there is none or it was not computed. ``gguf``: the file
    that the folder was converted from.
    """

    name: str
    revision: str | None = None
    weights: str | None = None
    gguf: GgufFile | None = None

    @classmethod
    def at(cls, name: str, revision: str | None = None, gguf: GgufFile | None = None) -> Base:
        return cls(str(Path(name).resolve()) if Path(name).is_dir() else name, revision, gguf=gguf)

    def with_digest(self) -> Base:
        """This base with the digest of its weights."""
        return replace(self, weights=weights_digest(Path(self.name)))

    def write_digest(self, folder: Path) -> None:
        """Write the digest into an adapter's folder."""
        if self.weights is not None:
            source = {"gguf": asdict(self.gguf)} if self.gguf is not None else {}
            write_json(folder / BASE_DIGEST, {"schema_version": 1, "weights": self.weights, **source})


def weights_digest(folder: Path) -> str | None:
    """:func:`blocks_digest` of a checkpoint's weight files; None where the folder has none."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")])
    return blocks_digest(files) if files else None


def find_base(folder: str | Path) -> Base:
    """The base of an adapter's folder.

    ``adapter_config.json`` says where a base on disk is. Where it is not there (the tree was moved), it is searched
    below the parent folders of the adapter, by the end of its old path, and used where its weights have the stored
    digest. A base that was converted from a GGUF file, and is no longer in the cache, is converted again. Raises
    UserError where there is no base, and where its weights are not those that the adapter was trained on.
    """
    config = Path(folder) / ADAPTER_CONFIG
    stored_config = read_json(config)
    name, revision = stored_config.get("base_model_name_or_path"), stored_config.get("revision")
    if not name:
        raise UserError("the adapter does not name its base model", where=str(config), hint=_SET)
    digest_file = Path(folder) / BASE_DIGEST
    recorded = read_json(digest_file) if digest_file.is_file() else {}
    digest = recorded.get("weights")
    gguf = GgufFile(**recorded["gguf"]) if "gguf" in recorded else None
    stored = Path(name)
    if digest is None and not stored.is_dir():
        if not is_path(name):
            return Base(name, revision)
        raise UserError(f"the base model of this adapter is not there: {name}", where=str(config), hint=_SET)
    places = [stored] if digest is None else [stored, *_moved_places(stored, Path(folder).resolve())]
    for place in filter(Path.is_dir, places):
        if digest is None or weights_digest(place) == digest:
            return replace(Base.at(str(place), revision, gguf), weights=digest)
    if stored.is_dir():
        raise UserError(
            f"the base model of this adapter has other weights now than when the adapter was trained: {name}",
            where=str(config),
            hint=f"put the former weights back, or train the adapter again ({BASE_DIGEST} there has their digest)",
        )
    if gguf is not None and (folder_again := converted_again(gguf)) is not None:
        return Base.at(folder_again, gguf=gguf).with_digest()
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
