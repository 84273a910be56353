"""Memory that a step has freed serves the next one."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, sys
import torch
from dsmixer.training.heap import keep_freed_memory

torch.set_num_threads(1)
if sys.argv[1] == "kept":
    assert keep_freed_memory()
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF)
    gradients = [torch.full((size << 18,), 1.0) for size in (17, 40, 100, 17)]
    del gradients
after = resource.getrusage(resource.RUSAGE_SELF)
print(after.ru_minflt - before.ru_minflt)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_pages_are_not_asked_of_the_kernel_again() -> None:
    def faults(how: str) -> int:
        run = subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True)
        return int(run.stdout)

    pages = 174 * 2**20 // 4096
    assert faults("plain") > pages // 2, "or there is nothing to win"
    assert faults("kept") < pages // 100
