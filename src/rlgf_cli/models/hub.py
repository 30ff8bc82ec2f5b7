"""Uploading a finished run to the hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from rlgf_cli.errors import RlgfError, UserError

LEFT_OUT = ["checkpoints/*", "rollouts/*", "eval/*", ".*"]
"""Files that are not uploaded: optimizer states, and the prompts in rollouts and predictions."""

_FAILURES: tuple[type[BaseException], ...] = (*HfHubHTTPError.__bases__, OSError)
"""Refusals, and a hub out of reach. The base class comes from whichever HTTP client huggingface_hub uses."""


def check(repo_id: str) -> None:
    """Raise UserError before training where the upload at its end would fail. Sends no request."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{repo_id!r} is no repository name: {error}", hint="for example user/model") from None
    if constants.HF_HUB_OFFLINE:
        raise UserError("--push-to-hub and offline mode exclude each other", hint="unset HF_HUB_OFFLINE")
    if get_token() is None:
        raise UserError("pushing to the hub needs a token", hint="export HF_TOKEN=..., or hf auth login")


def push(folder: str | Path, repo_id: str) -> str:
    """Create the repository where it does not exist and upload the folder; returns the repository's URL.

    Raises RlgfError where the hub refuses or cannot be reached; the folder itself is whole in any case.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, ignore_patterns=LEFT_OUT, commit_message="Upload by rlgf"
        )
    except _FAILURES as error:
        reason = str(error).strip().split("\n")[0]
        raise RlgfError(
            f"the model was not pushed to {repo_id}: {reason}",
            where=str(folder),
            hint=f"the folder is whole; once the cause is gone: hf upload {repo_id} {folder}",
        ) from error
    return str(url)
