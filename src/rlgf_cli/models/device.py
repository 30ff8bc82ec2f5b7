"""Devices and number types of models."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from rlgf_cli.errors import RlgfWarning, UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_BFLOAT16_UNITS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""Instructions that multiply bfloat16, as ``torch.cpu.get_capabilities`` names them: two of x86, two of ARM."""


def pick_device(name: str) -> torch.device:
    """``auto`` is cuda, else mps, else cpu. Raises UserError for a device that is not available."""
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


def cpu_capabilities() -> Mapping[str, Any]:
    """The instructions that the CPU has; empty where this torch does not say."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    return capabilities() if capabilities is not None else {}


def has_bfloat16_units(capabilities: Mapping[str, Any]) -> bool | None:
    """Whether a CPU of these ``capabilities`` multiplies bfloat16 itself; None: they do not say."""
    known = [bool(capabilities[name]) for name in _BFLOAT16_UNITS if name in capabilities]
    return any(known) if known else None


def warn_of_slow_bfloat16(device: torch.device, dtype: torch.dtype) -> None:
    """Warn, once in a process, of a model that computes in bfloat16 on a CPU that has no units for it."""
    if device.type == "cpu" and dtype == torch.bfloat16 and has_bfloat16_units(cpu_capabilities()) is False:
        warnings.warn(
            "a model computes in bfloat16 on a CPU without bfloat16 units, which is several times slower than float32 "
            "(8 times in the matrix products of a CPU with AVX2); --dtype float32 is faster (guide.dtype of a guide, "
            "dtype: float32 in the params of a reward or metric)",
            RlgfWarning,
            stacklevel=2,
        )


@contextlib.contextmanager
def autocast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Compute in ``dtype`` where it is not float32; the weights keep their type."""
    if dtype == torch.float32:
        yield
    else:
        with torch.autocast(device.type, dtype=dtype):
            yield
