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
SIZE = int(sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step = [bytearray(SIZE) for _ in range(6)]
    del step
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize("size", [16_000_000, 50_000_000])
def test_page_faults_end(size: int) -> None:
    def faults(mode: str) -> int:
        command = [sys.executable, "-c", CODE, mode, str(size)]
        return int(subprocess.run(command, capture_output=True, check=True).stdout)

    pages = 6 * size // resource.getpagesize()
    assert faults("reuse") < 2 * pages < 10 * pages < faults("leave")


HELD = """
from pathlib import Path
from kontext.allocation import give_back_memory, reuse_freed_memory
def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
reuse_freed_memory()
before, model = held(), bytearray(100_000_000)
model[:] = b"1" * 100_000_000
del model
freed = held() - before
give_back_memory()
print(freed, held() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's account of memory")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_can_be_given_back() -> None:
    freed, given_back = map(int, subprocess.check_output([sys.executable, "-c", HELD], text=True).split())
    assert given_back < 10_000 < 90_000 < freed
