"""What a step has freed serves the next step, instead of being mapped anew."""

import platform
import resource
import subprocess
import sys

import pytest

CODE = """
import resource, sys
from kontext.allocation import reuse_freed_memory
if sys.argv[1] == "reuse":
    reuse_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step = [bytearray(16_000_000) for _ in range(6)]
    del step
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_page_faults_end():
    def faults(mode: str) -> int:
        return int(subprocess.run([sys.executable, "-c", CODE, mode], capture_output=True, check=True).stdout)

    pages = 6 * 16_000_000 // resource.getpagesize()
    assert faults("reuse") < 2 * pages < 10 * pages < faults("leave")
