"""What the process's allocator does with memory that is freed."""

from __future__ import annotations

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SETTINGS = {
    "MALLOC_TRIM_THRESHOLD_": (_M_TRIM_THRESHOLD, 2**31 - 1),
    "MALLOC_MMAP_THRESHOLD_": (_M_MMAP_THRESHOLD, 1 << 30),
}


def keep_freed_memory() -> bool:
    """Let glibc keep blocks of up to 1 GiB that are freed, for the next step; returns whether it was told.

    By default it gives large blocks back to the kernel and gets them again, zeroed page by page, at every step of a
    training on the CPU (docs/performance.md has what that costs). The peak of the process stays what it was, but memory
    is kept until it ends. What the user sets in the environment stands; other C libraries are left as they are.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    told = [mallopt(*setting) for name, setting in _SETTINGS.items() if name not in os.environ]
    return all(told)
