"""Settings of glibc's allocator for training on the CPU."""

from __future__ import annotations

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SETTINGS = {
    "MALLOC_TRIM_THRESHOLD_": (_M_TRIM_THRESHOLD, 2**31 - 1),
    "MALLOC_MMAP_THRESHOLD_": (_M_MMAP_THRESHOLD, 64 << 20),
}


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks of up to 64 MiB for the next step; returns whether all settings were accepted.

    By default glibc returns large blocks to the kernel and gets them again, zeroed page by page, at every step of a
    training on the CPU (docs/performance.md has the cost). The peak memory of the process stays the same, but memory is
    kept until the process ends. Settings in the environment take precedence; other C libraries are left unchanged.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    accepted = [mallopt(*setting) for name, setting in _SETTINGS.items() if name not in os.environ]
    return all(accepted)
