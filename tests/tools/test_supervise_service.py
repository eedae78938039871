"""The units of docs/supervise.md: systemd takes them as they stand, and what they start is what supervise.py takes."""

import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import supervise
from supervision.policy import FINAL

NAMES = ("user", "system")


def units(repository: Path) -> dict[str, str]:
    """The text of each unit in the document, in the order that it has them."""
    text = (repository / "docs" / "supervise.md").read_text("utf-8")
    return dict(zip(NAMES, re.findall(r"^```ini\n(.*?)^```$", text, re.DOTALL | re.MULTILINE), strict=True))


def parsed(text: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment]
    parser.read_string(text)
    return parser


@pytest.mark.parametrize("name", NAMES)
def test_a_unit_starts_what_supervise_takes(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    service = parsed(units(repository)[name])["Service"]
    home = service["WorkingDirectory"]
    python, tool, *arguments = shlex.split(service["ExecStart"])
    assert python == f"{home}/.venv/bin/python"
    assert (repository / tool).is_file()
    monkeypatch.chdir(repository)
    _, trainer, folder = supervise.parse(arguments)
    assert trainer[:4] == [python, "-m", "dinox_train", "--config"]
    assert (repository / trainer[4]).is_file()
    assert folder.name == "large"


@pytest.mark.parametrize("name", NAMES)
def test_a_unit_gives_the_trainer_one_signal_and_time(repository: Path, name: str) -> None:
    service = parsed(units(repository)[name])["Service"]
    assert service["KillMode"] == "mixed"  # the trainer's second SIGTERM would end it without a checkpoint
    assert service["OOMPolicy"] == "continue"
    assert service["Restart"] == "on-abnormal"
    assert {int(code) for code in service["SuccessExitStatus"].split()} == {code for code in FINAL if code > 128}


def verified(unit: Path, home: Path, *, user: bool) -> str:
    command = ["systemd-analyze", *(["--user"] if user else []), "verify", "--man=no", str(unit)]
    environment = os.environ | {"XDG_RUNTIME_DIR": str(home), "HOME": str(home)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    said = ran.stdout + ran.stderr
    if "Failed to initialize manager" in said:
        pytest.skip(f"systemd-analyze cannot work here: {said.strip()}")
    return said + ("" if ran.returncode == 0 else f"exit code {ran.returncode}")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze on this machine")
@pytest.mark.parametrize("name", NAMES)
def test_systemd_takes_a_unit_as_it_stands(repository: Path, tmp_path: Path, name: str) -> None:
    text = units(repository)[name]
    home = parsed(text)["Service"]["WorkingDirectory"]
    # The places of the document are made up: this interpreter and an existing folder and user stand for them.
    text = text.replace(f"{home}/.venv/bin/python", sys.executable).replace(home, str(tmp_path))
    text = text.replace("User=dinox", "User=root").replace("RequiresMountsFor=/data", "RequiresMountsFor=/")
    unit = tmp_path / "dinox.service"
    unit.write_text(text)
    assert verified(unit, tmp_path, user=name == "user") == ""
    unit.write_text(text.replace("KillMode=mixed", "KillMode=mixd"))
    assert "kill mode" in verified(unit, tmp_path, user=name == "user").lower()
