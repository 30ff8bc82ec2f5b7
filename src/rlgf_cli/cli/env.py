"""The command ``rlgf env``."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

from rlgf_cli import console
from rlgf_cli.cli.options import AsJson

SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_CUSTOM_HEADERS")
"""Only whether they are set is shown, as of the providers' keys."""
SHOWN = (
    "OPENAI_BASE_URL",
    "AZURE_OPENAI_ENDPOINT",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
    "SSL_CERT_FILE",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "RLGF_CACHE_DIR",
    "RLGF_CONFIG_DIR",
    "RLGF_REAL_DATA",
    "RLGF_DEBUG",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "NO_COLOR",
)


def env(as_json: AsJson = False) -> None:
    """Print versions and devices.

    A bug report needs this list. Of keys and tokens it has only whether they are set.

    ```
    rlgf env
    rlgf env --json
    rlgf env > environment.txt
    ```
    """
    collected = _collect()
    if as_json:
        console.result_json(collected)
        return
    for title, entries in collected.items():
        console.result(f"{title}:")
        for name, value in entries.items():
            console.result(f"  {name}: {value}")


def _collect() -> dict[str, dict[str, Any]]:
    from rlgf_cli.artifacts.rundir import library_versions
    from rlgf_cli.guides.openai.presets import providers

    keys = [provider.api_key_env for provider in providers().values() if provider.api_key_env]
    variables = {name: "set" if os.environ.get(name) else "unset" for name in dict.fromkeys((*keys, *SECRETS))}
    variables.update({name: _without_secrets(os.environ.get(name, "unset")) for name in SHOWN})
    return {
        "versions": library_versions(),
        "machine": {
            "platform": platform.platform(),
            "python": sys.executable,
            "cpu cores": os.cpu_count(),
            "cpu bfloat16 units": _bfloat16_units(),
            **_devices(),
        },
        "environment": variables,
    }


def _bfloat16_units() -> str:
    from rlgf_cli.models.device import cpu_capabilities, has_bfloat16_units

    return {True: "yes", False: "no", None: "unknown"}[has_bfloat16_units(cpu_capabilities())]


def _devices() -> dict[str, Any]:
    import torch

    devices: dict[str, Any] = {"torch threads": torch.get_num_threads()}
    for i in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(i).total_memory / 2**30
        devices[f"cuda:{i}"] = f"{torch.cuda.get_device_name(i)}, {memory:.0f} GiB"
    if torch.backends.mps.is_available():
        devices["mps"] = "available"
    from rlgf_cli.models.device import pick_device

    devices["device auto"] = str(pick_device("auto"))
    return devices


def _without_secrets(value: str) -> str:
    """An address without what may be secret in it: user and password, and what follows ``?`` or ``#``."""
    from urllib.parse import urlsplit, urlunsplit

    if not any(mark in value for mark in "@?#"):
        return value
    try:
        parts = urlsplit(value)
    except ValueError:
        return "***"
    if not parts.netloc:
        return "***"
    _, at, host = parts.netloc.rpartition("@")
    hidden = {part: "***" for part in ("query", "fragment") if getattr(parts, part)}
    return urlunsplit(parts._replace(netloc=f"***@{host}" if at else host, **hidden))
