"""Freed blocks are reused: counted in page faults, not in seconds."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, sys
import numpy as np
from mae_et.engine.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
np.ones(1 << 26, dtype=np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(1 << 26, dtype=np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", CODE, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tunes glibc's allocator, which is not the one here")
def test_large_blocks_are_mapped_once():
    # 20 arrays of 64 MB: 327,680 pages of 4 kB, or fewer where the kernel gives huge ones.
    default, kept = page_faults("default"), page_faults("keep")
    assert default > 500
    assert kept < default / 20


def test_other_systems_are_left_alone(monkeypatch):
    from mae_et.engine.memory import keep_freed_memory

    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
