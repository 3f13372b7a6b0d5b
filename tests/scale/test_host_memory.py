"""Freed memory stays in the process, unless the user has said otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource
import torch
from m3i_scale.engine.device import keep_host_memory

keep_host_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for _ in range(3):
    before = faults()
    torch.ones(16 * 2**20).sum()  # 64 MiB, 16,384 pages
print(faults() - before)
"""


def page_faults(**variables: str) -> int:
    """Of the third time that 64 MiB are taken and freed."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"DS_ACCELERATOR": "cpu", **variables},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_memory_is_taken_from_the_kernel_once() -> None:
    assert page_faults() < 1_000
    # With the user's own settings the memory goes back every time (in 4 KiB pages, or in 2 MiB ones).
    assert page_faults(MALLOC_MMAP_THRESHOLD_="131072") >= 32
