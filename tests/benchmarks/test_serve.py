"""serve.py says what it is instead of taking `--help` for a module."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), ([], 2), (["only_a_module"], 2)])
def test_usage_is_no_traceback(arguments: list[str], code: int, repository: Path) -> None:
    command = [sys.executable, str(repository / "benchmarks" / "serve.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert "serve.py MODULE ARGUMENTS" in (done.stderr if code else done.stdout)
    assert "Traceback" not in done.stderr
