import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, sys
import torch
from dinox_model.host_memory import keep_freed_memory

if sys.argv[1] == "keep":
    print(keep_freed_memory())
else:
    print("as it is")

def faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(3, 4_000_000).add_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
"""


def run(repository: Path, how: str) -> tuple[str, int]:
    command = [sys.executable, "-c", PROGRAM, how]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True, timeout=120)
    said, count = done.stdout.split("\n")[:2]
    return said, int(count)


def test_kept_memory_is_not_asked_for_again(repository: Path) -> None:
    said, kept = run(repository, "keep")
    if said == "False":
        pytest.skip("this C library has no mallopt")
    _, given_back = run(repository, "not")
    assert 5 * kept < given_back, "48 MB four times are 47,000 pages, fewer where pages are larger"
