"""Run folders: claimed by one stage, described by ``run.json``, never mixed up with another run.

``run.json`` keeps the list of what the stage wrote, so that ``--overwrite`` removes exactly that and
nothing that the user or another stage put beside it.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from rlgf_cli import __version__
from rlgf_cli.artifacts.checkpoints import COMPLETE
from rlgf_cli.artifacts.jsonl import read_json, write_json
from rlgf_cli.artifacts.lock import FOLDER_LOCK, Lock, hold, refuse_held, released_on_error
from rlgf_cli.artifacts.records import SCHEMA_VERSION
from rlgf_cli.artifacts.secrets import hidden_arguments
from rlgf_cli.errors import Interrupted, Signalled, StoppedEarly, UserError, is_disk_full

Existing = Literal["refuse", "resume", "overwrite"]
_VERSIONS_OF = (
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "peft",
    "datasets",
    "tokenizers",
    "numpy",
    "openai",
    "rouge-score",
    "bert-score",
    "datasketch",
)


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide results; those that are not installed are left out."""
    versions = {"rlgf-cli": __version__, "python": platform.python_version()}
    for name in _VERSIONS_OF:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def git_commit() -> str | None:
    """The commit of the folder that rlgf was started in, with ``+`` behind it where files differ from it."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def parent_of(path: str | Path) -> dict[str, Any] | None:
    """A manifest's entry for an input on disk; ``None`` for a hub name.

    A folder is named by the run that made it and by its weights' sha256; a file by its own sha256.
    """
    path = Path(path)
    if path.is_file():
        manifest = path.with_name(path.name + ".run.json")
        run_id = read_json(manifest).get("run_id") if manifest.is_file() else None
        return {"path": str(path), "run_id": run_id, "sha256": file_sha256(path)}
    if path.is_dir():
        run_json = path / "run.json"
        run_id = read_json(run_json).get("run_id") if run_json.is_file() else None
        weights = sorted(path.glob("*.safetensors"))
        digest = hashlib.sha256("".join(file_sha256(w) for w in weights).encode()).hexdigest() if weights else None
        return {"path": str(path), "run_id": run_id, "sha256": digest}
    return None


def model_signature(path: str) -> str:
    """``model=NAME``, and ``,sha256=...`` of the weights where they lie on this disk: for signatures."""
    weights = (parent_of(path) or {}).get("sha256")
    return f"model={Path(path).name},sha256={weights[:12]}" if weights else f"model={path}"


class Manifest:
    """``run.json``: the command, its inputs, its times and its result. Saved whole at every change. ``lock``: that of
    an output which is a file."""

    def __init__(self, path: Path, command: str, *, seed: int | None = None, lock: Lock | None = None) -> None:
        self.path, self.lock = path, lock
        self.data: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "run_id": uuid.uuid4().hex[:12],
            "command": command,
            "argv": hidden_arguments(sys.argv[1:]),
            "status": "running",
            "reason": None,
            "started": now(),
            "ended": None,
            "seconds": 0.0,
            "resumed": 0,
            "seed": seed,
            "versions": library_versions(),
            "git_commit": git_commit(),
            "device": None,
            "parents": [],
            "wrote": [],
            "result": {},
            "spend": {},
        }

    @classmethod
    def reopen(cls, path: Path) -> Manifest:
        """The manifest of a run that goes on."""
        data = read_json(path)
        if not isinstance(data, dict) or not {"run_id", "command", "wrote", "resumed", "seconds"} <= set(data):
            raise UserError("this file was not written by rlgf", where=str(path), hint="choose another -o")
        if (version := data.get("schema_version")) != SCHEMA_VERSION:
            raise UserError(
                f"this run has schema version {version!r}; this rlgf reads {SCHEMA_VERSION}",
                where=str(path),
                hint="use the version of rlgf that made it, or choose another -o",
            )
        manifest = cls.__new__(cls)
        manifest.path, manifest.lock = path, None
        manifest.data = data
        manifest.data.update(
            status="running", reason=None, ended=None, argv=hidden_arguments(sys.argv[1:]), resumed=data["resumed"] + 1
        )
        return manifest

    def save(self, **changes: Any) -> None:
        self.data.update(changes)
        write_json(self.path, self.data)

    def lists(self, name: str) -> None:
        """Enter a file or folder beside the manifest among what the run writes."""
        if name not in self.data["wrote"]:
            self.data["wrote"].append(name)
            self.save()

    def add_parent(self, path: str | Path | None) -> None:
        """Record an input file or folder; a hub name has neither."""
        parent = parent_of(path) if path else None
        if parent and parent not in self.data["parents"]:
            self.data["parents"].append(parent)
            self.save()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Keep ``status`` true: done, failed, stopped (exit 3) or interrupted; ``reason`` has the error's message."""
        started, before = time.monotonic(), self.data["seconds"]
        self.save()
        status, reason = "done", None
        try:
            yield
        except BaseException as error:
            status, reason = _ended_by(error)
            raise
        finally:
            seconds = round(before + time.monotonic() - started, 3)
            with contextlib.suppress(OSError) if status == "failed" else contextlib.nullcontext():
                self.save(status=status, reason=reason, ended=now(), seconds=seconds)
            if self.lock is not None:
                self.lock.release()


def _ended_by(error: BaseException) -> tuple[str, str]:
    """Status and reason of a run that an error ended."""
    if isinstance(error, Signalled):
        return "stopped", error.name
    status = (
        "stopped"
        if isinstance(error, StoppedEarly)
        else "interrupted"
        if isinstance(error, Interrupted | KeyboardInterrupt)
        else "failed"
    )
    return status, (str(error) or type(error).__name__)[:1000]


class RunDir:
    """A folder that one run owns. :meth:`claim` makes it; :meth:`file` gives every path that is written."""

    def __init__(self, path: Path, manifest: Manifest, lock: Lock | None = None) -> None:
        self.path = path
        self._lock = lock
        self.manifest = manifest
        self.fresh = not manifest.data["resumed"]
        self.resumable = False
        """Whether ``--resume`` can go on from what is written, without a checkpoint among it."""

    @classmethod
    def claim(
        cls,
        path: str | Path,
        command: str,
        *,
        existing: Existing = "refuse",
        seed: int | None = None,
        can_resume: bool = True,
    ) -> RunDir:
        """Take a folder for a run, or refuse it with the reason and a hint (``can_resume``: for ``--resume``).

        Raises UserError where the folder holds something else, another command's run, or a run and
        neither ``resume`` nor ``overwrite`` was asked for.
        """
        path = Path(path)
        refuse_used_folder(path, command, existing, can_resume=can_resume)
        path.mkdir(parents=True, exist_ok=True)
        lock = hold(path, command)
        with released_on_error(lock):  # as the folder is now
            manifest = refuse_used_folder(path, command, existing, can_resume=can_resume)
        if manifest is not None:
            _remove_leftovers(path, manifest.data["wrote"])
            if existing == "resume":
                return cls(path, manifest, lock)
            remove_written(path, manifest.data["wrote"])
            path.mkdir(exist_ok=True)
        for torn in filter(_is_torn_manifest, path.iterdir()):
            torn.unlink()
        return cls(path, Manifest(path / "run.json", command, seed=seed), lock)

    def file(self, name: str) -> Path:
        """The path of a file or folder that this run writes; it is entered in the manifest first."""
        top = Path(name).parts[0]
        assert removable(top), f"a run does not write {name!r}"
        self.manifest.lists(top)
        return self.path / name

    def write_files(self, save: Callable[[Path], None]) -> list[str]:
        """Let ``save(folder)`` fill a temporary folder, then move what it wrote into the run's root."""
        with tempfile.TemporaryDirectory(prefix=".tmp-", dir=self.path) as temporary:
            save(Path(temporary))
            names = sorted(child.name for child in Path(temporary).iterdir())
            for name in names:
                target = self.file(name)
                if target.is_dir():
                    shutil.rmtree(target)
                (Path(temporary) / name).replace(target)
        return names

    def write_config(self, resolved: Mapping[str, Any]) -> None:
        """``config.resolved.json``: every value with its origin."""
        write_json(self.file("config.resolved.json"), resolved)

    @contextlib.contextmanager
    def running(self) -> Iterator[RunDir]:
        """Run a stage's body.

        Where it ends in an error that the user can fix (a full disk is one) before there is a checkpoint to resume
        from and before a call was charged, the files of a new run are removed, so that the same command can run again.
        """
        try:
            with self.manifest.running():
                yield self
        except Exception as error:
            wrote = self.manifest.data["wrote"]
            fixable = isinstance(error, UserError) or is_disk_full(error)
            charged = self.manifest.data["spend"].get("calls")  # the run's cap must know of it
            resumable = self.resumable or charged or any((self.path / "checkpoints").glob(f"*/{COMPLETE}"))
            if fixable and self.fresh and not resumable:
                remove_written(self.path, wrote)
            raise
        finally:
            if self._lock is not None:
                self._lock.release()
            with contextlib.suppress(OSError):
                self.path.rmdir()  # where all that it had was removed


def refuse_used_folder(path: Path, command: str, existing: Existing, *, can_resume: bool = True) -> Manifest | None:
    """The manifest of the run in a folder, reopened; None without one. Nothing is written.

    Raises UserError for a folder that may not be used, as :meth:`RunDir.claim` does.
    """
    if path.exists() and not path.is_dir():
        raise UserError("the output is a file; a folder is needed", where=str(path), hint="choose another -o")
    run_json = path / "run.json"
    if run_json.is_file():
        manifest = Manifest.reopen(run_json)
        if existing == "refuse":
            refuse_held(path)
            ran, ended = manifest.data["command"], read_json(run_json).get("ended")  # reopened, it has not
            raise UserError(
                f"this folder already holds a run ({ran}, {ended or 'not ended'})",
                where=str(path),
                hint=ways_out(can_resume),
            )
        check_command(manifest, command, path, "folder")
        return manifest
    if path.is_dir() and any(
        child.name not in ("eval", FOLDER_LOCK) for child in path.iterdir() if not _is_torn_manifest(child)
    ):
        raise UserError("this folder is not empty and holds no run of rlgf", where=str(path), hint="choose another -o")
    return None


def ways_out(can_resume: bool) -> str:
    return ("--resume goes on with it, " if can_resume else "") + "--overwrite replaces it, another -o leaves it alone"


def check_command(manifest: Manifest, command: str, path: Path, what: str) -> None:
    if (ran := manifest.data["command"]) != command:
        raise UserError(
            f"this {what} holds a run of `rlgf {ran}`, not of `rlgf {command}`",
            where=str(path),
            hint="choose another -o",
        )


def _is_torn_manifest(child: Path) -> bool:
    """Whether this is the unfinished run.json of a run that was killed while it claimed the folder."""
    return child.match(".run.json.*.tmp") and child.is_file()


def _remove_leftovers(path: Path, wrote: list[str]) -> None:
    """Remove the temporary files and folders of a killed run, also in the folders that it wrote."""
    folders = [path, *(path / name for name in filter(removable, wrote) if (path / name).is_dir())]
    for child in [child for folder in folders for pattern in (".tmp-*", ".*.tmp") for child in folder.glob(pattern)]:
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def removable(name: str) -> bool:
    """Whether a name of the manifest's list may be removed: directly in the folder, and not another stage's."""
    return name == Path(name).name and name not in ("", "..", "eval")


def remove_written(path: Path, wrote: list[str]) -> None:
    """Remove what a run wrote, its manifest last, and the folder where nothing else is left in it."""
    for name in filter(removable, wrote):
        target = path / name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
    (path / "run.json").unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        path.rmdir()
