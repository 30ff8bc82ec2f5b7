"""Freed memory stays with the process, so that a training step does not fetch its pages from the kernel anew."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

PROGRAM = """
import resource, sys
import torch
from rlgf_cli.models.memory import keep_freed_memory

told = keep_freed_memory() if sys.argv[1] == "keep" else None
for n in range(30):
    block = torch.ones(8 << 20)  # 32 MiB: 8,192 pages
    del block
    if n == 9:  # by then the heap is as large as it gets
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(told, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str, **environment: str) -> tuple[str, int]:
    """What keep_freed_memory returned, and the page faults of twenty blocks after ten others."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode], env=plain | environment, capture_output=True, text=True, check=True
    )
    told, count = run.stdout.split()
    return told, int(count)


def test_blocks_that_were_freed_are_used_again_without_page_faults() -> None:
    told, count = faults("keep")
    if platform.libc_ver()[0] != "glibc":  # other C libraries are left alone
        assert told == "False"
        return
    assert told == "True"
    assert count < 100 < faults("leave")[1]


def test_what_the_user_sets_in_the_environment_stands() -> None:
    if platform.libc_ver()[0] == "glibc":
        _, count = faults("keep", MALLOC_MMAP_THRESHOLD_="131072", MALLOC_TRIM_THRESHOLD_="131072")
        assert count > 100
