"""pip in a virtual environment: it obeys the constraints file, shows progress, and looks only where it is told to."""

import os
import re
import subprocess
from pathlib import Path

from environment.machine import SetupError


def say(text: str) -> None:
    print(text, flush=True)


def pip_environment(**settings: str) -> dict[str, str]:
    """The caller's environment without what sends pip elsewhere; `settings` win over every pip configuration file."""
    environment = {
        name: value for name, value in os.environ.items() if name not in {"PIP_TARGET", "PIP_PREFIX", "PYTHONHOME"}
    }
    return environment | {"PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUNBUFFERED": "1"} | settings


def only_from(folder: Path) -> dict[str, str]:
    """Settings that make pip, and the pip in its build environments, use this folder and nothing else."""
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": folder.resolve().as_uri()}


def shown(line: str) -> str | None:
    """What of a line of pip's output is progress that a person wants to see."""
    if match := re.match(r"\s*Downloading (?:\S*/)?([^/\s]+?)(?:\.metadata)? (\(.*\))", line):
        return None if ".metadata " in line else f"  downloading {match[1]} {match[2]}"
    if match := re.match(r"\s*Processing (?:\S*/)?([^/\s]+\.whl)", line):
        return f"  reading {match[1]}"
    if match := re.match(r"Installing collected packages: (.*)", line):
        return f"  installing {match[1]}"
    return None


class Pip:
    """pip of one virtual environment; every install obeys its constraints file."""

    def __init__(self, folder: Path, settings: dict[str, str]):
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.constraints = folder / "constraints.txt"
        self.settings = settings

    def run(self, *arguments: str, **settings: str) -> tuple[int, list[str]]:
        """Runs pip, showing its progress; the exit status and all lines it printed."""
        # -P: an egg-info in the current folder is no installed package.
        command = [str(self.python), "-P", "-m", "pip", *arguments, "--progress-bar", "off"]
        environment = pip_environment(**self.settings, **settings)
        lines = []
        with subprocess.Popen(
            command, text=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line.rstrip())
                if text := shown(line):
                    say(text)
        return process.returncode, lines

    def must(self, *arguments: str, **settings: str) -> None:
        status, lines = self.run(*arguments, **settings)
        if status != 0:
            tail = "\n".join(lines[-25:])
            raise SetupError(
                f"{tail}\npip {' '.join(arguments)} failed: its last lines are above. Put right what they say, then "
                "run this again."
            )

    def install(self, *what: str) -> None:
        constraints = ["--constraint", str(self.constraints)] if self.constraints.exists() else []
        self.must("install", *constraints, *what)
