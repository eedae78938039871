"""The decisions of `make setup`: what of torch is reused, refused or installed, and when `.venv` is made anew."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import setup_environment
from environment import installer, machine, torch_builds
from environment.machine import SetupError, Torch

GOOD = Torch(version="2.13.0+rocm7.2", file="/opt/theirs/torch/__init__.py")


class FakePip:
    """Records what is installed; `offered` are the versions of torch that the index has."""

    def __init__(self, offered: tuple[str, ...] = ()):
        self.offered = offered
        self.installed: list[str] = []

    def run(self, *arguments: str, **settings: str) -> tuple[int, list[str]]:
        wanted = arguments[-1].removeprefix("torch==")
        if wanted in self.offered:
            self.installed.append(arguments[-1])
            return 0, []
        return 1, [f"ERROR: Could not find a version … torch=={wanted} (from versions: {', '.join(self.offered)})"]

    def install(self, *what: str) -> None:
        self.installed.extend(what)


@pytest.fixture
def linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_builds.platform, "system", lambda: "Linux")
    monkeypatch.setattr(torch_builds.platform, "machine", lambda: "x86_64")


def driver(monkeypatch: pytest.MonkeyPatch, vendor: str | None) -> None:
    monkeypatch.setattr(torch_builds, "gpu_driver", lambda: vendor)


def test_the_script_parses_on_old_pythons_to_tell_them(repository: Path) -> None:
    source = (repository / "tools/setup_environment.py").read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 6))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    check = next(node for node in tree.body if isinstance(node, ast.If))
    early = [node for node in imports if node.lineno < check.lineno]
    assert [alias.name for node in early for alias in node.names] == ["sys"]


def test_only_the_standard_library_is_needed(repository: Path) -> None:
    files = [repository / "tools/setup_environment.py", *(repository / "tools/environment").glob("*.py")]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.partition(".")[0] for name in names} <= {*sys.stdlib_module_names, "environment"}, file


@pytest.mark.parametrize(
    ("version", "taken"),
    [
        ("2.11.0", True),
        ("2.13.0+cpu", True),
        ("2.13.1+rocm7.2", True),
        ("2.12.0a0+git1234", True),
        ("2.11.1.dev20260101", True),
        ("2.11.0a0+nv25.10", False),
        ("2.10.9", False),
        ("2.14.0", False),
        ("2.14.0a0", False),
        ("3.0.0", False),
        ("unknown", False),
    ],
)
def test_range_of_torch(repository: Path, version: str, taken: bool) -> None:
    assert machine.in_range(version, repository) is taken


def test_a_torch_of_another_version_is_refused_with_a_way_on(repository: Path) -> None:
    with pytest.raises(SetupError, match=r"2\.9\.1\+rocm.*left as it is.*PYTHON="):
        machine.check_reusable(Torch(version="2.9.1+rocm6.4", file="/x/torch/__init__.py"), repository)


def test_amd_gpu_without_torch_is_refused(monkeypatch: pytest.MonkeyPatch, linux: None, repository: Path) -> None:
    driver(monkeypatch, "amd")
    pip = FakePip(("2.13.0", "2.13.0+cpu"))
    with pytest.raises(SetupError, match="TORCH_INDEX=URL"):
        torch_builds.install_torch(pip, repository, None, None)  # pyright: ignore[reportArgumentType]
    assert pip.installed == []


@pytest.mark.parametrize(
    ("vendor", "offered", "installed"),
    [
        (None, ("2.13.0", "2.13.0+cpu"), "torch==2.13.0+cpu"),
        (None, ("2.9.0+cpu", "2.11.0+cpu", "2.12.1+cpu", "2.13.0"), "torch==2.12.1+cpu"),
        (None, ("2.9.0+cpu", "2.13.0"), "torch>=2.11,<2.14"),
        (None, (), "torch>=2.11,<2.14"),
        ("nvidia", ("2.13.0", "2.13.0+cpu"), "torch>=2.11,<2.14"),
    ],
)
def test_which_torch_is_installed(
    monkeypatch: pytest.MonkeyPatch,
    linux: None,
    repository: Path,
    vendor: str | None,
    offered: tuple[str, ...],
    installed: str,
) -> None:
    driver(monkeypatch, vendor)
    pip = FakePip(offered)
    torch_builds.install_torch(pip, repository, None, None)  # pyright: ignore[reportArgumentType]
    assert pip.installed == [installed]


def test_the_general_build_is_announced(
    monkeypatch: pytest.MonkeyPatch, linux: None, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    driver(monkeypatch, None)
    torch_builds.install_torch(FakePip(("2.13.0",)), repository, None, None)  # pyright: ignore[reportArgumentType]
    assert "GB of CUDA" in capsys.readouterr().out


def test_a_folder_of_wheels_without_torch_is_refused(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="holds no torch"):
        torch_builds.install_torch(FakePip(), repository, None, tmp_path)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("version", "system", "wheels", "needed"),
    [
        ("2.13.0+cpu", "Linux", None, True),
        ("2.13.0+cpu", "Darwin", None, False),
        ("2.13.0", "Linux", None, False),  # the general build, which requires its own
        ("2.13.0+rocm7.2", "Linux", None, False),
        ("2.13.0+cpu", "Linux", [], False),
        ("2.13.0+cpu", "Linux", ["triton-3.7.1-cp311.whl"], True),
    ],
)
def test_triton_is_installed_beside_cpu_builds_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, system: str, wheels: list[str] | None, needed: bool
) -> None:
    monkeypatch.setattr(setup_environment.platform, "system", lambda: system)
    for name in wheels or []:
        (tmp_path / name).touch()
    assert setup_environment.needs_triton(version, None if wheels is None else tmp_path) is needed


def environment_at(folder: Path, torch: Torch, **changes: object) -> setup_environment.Ready:
    """A folder that works, as setup left it (its interpreter is this one)."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    values = {"project": "p", "interpreter": sys.executable, "torch": torch, "reused": True, "torch_index": None}
    ready = setup_environment.Ready(**values | changes)  # pyright: ignore[reportArgumentType]
    setup_environment.write_ready(folder, ready)
    assert setup_environment.read_ready(folder) == ready
    return ready


def test_why_an_environment_is_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "env"
    why = setup_environment.why_anew
    assert why(folder, None, None, None) == "there is none yet"
    ready = environment_at(folder, GOOD)
    assert why(folder, ready, GOOD, None) is None
    assert why(folder, ready, GOOD, "https://index.invalid") is None  # an installed torch wins over TORCH_INDEX
    newer = Torch(version="2.13.1", file=GOOD.file)
    assert why(folder, ready, newer, None) is None  # seen through .venv: only the pin changes
    assert "installed" in str(why(folder, ready, Torch(version="2.13.0", file="/other/torch/__init__.py"), None))
    assert "gone" in str(why(folder, ready, None, None))
    (folder / ".unfinished").touch()
    assert "not finished" in str(why(folder, ready, GOOD, None))


def test_another_index_makes_a_new_environment_and_none_keeps_it(tmp_path: Path) -> None:
    own = tmp_path / "torch.py"
    own.touch()
    torch = Torch(version="2.13.0+cpu", file=str(own))
    ready = environment_at(tmp_path / "env", torch, reused=False, torch_index="https://a.invalid")
    assert setup_environment.why_anew(tmp_path / "env", ready, None, None) is None
    assert setup_environment.why_anew(tmp_path / "env", ready, None, "https://a.invalid") is None
    assert "index" in str(setup_environment.why_anew(tmp_path / "env", ready, None, "https://b.invalid"))


def test_a_damaged_ready_file_is_as_none(tmp_path: Path) -> None:
    for text in ("", "{", "[]", '{"torch": 1}', json.dumps({"torch": {"version": "2"}})):
        (tmp_path / ".ready").write_text(text)
        assert setup_environment.read_ready(tmp_path) is None


def test_killed_while_pip_works_leaves_the_mark_and_a_clean_error_does_not(tmp_path: Path) -> None:
    mark = setup_environment.unfinished(tmp_path)
    with pytest.raises(KeyboardInterrupt), setup_environment.marked_unfinished(tmp_path):
        raise KeyboardInterrupt
    assert mark.exists()
    mark.unlink()
    with pytest.raises(SetupError), setup_environment.marked_unfinished(tmp_path):
        raise SetupError("no network")
    assert not mark.exists()


def test_a_folder_of_wheels_is_the_only_source(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    settings = installer.pip_environment(**installer.only_from(folder))
    assert settings["PIP_NO_INDEX"] == "1"
    assert settings["PIP_FIND_LINKS"].endswith("/a%20folder")  # pip splits this variable at spaces


def test_what_is_shown_of_pip() -> None:
    line = "  Downloading numpy-2.4.6-cp311-linux.whl (16.9 MB)"
    assert installer.shown(line) == "  downloading numpy-2.4.6-cp311-linux.whl (16.9 MB)"
    assert installer.shown("  Downloading numpy-2.4.6.whl.metadata (6 kB)") is None
    assert installer.shown("Processing /opt/w/torch-2.13.0+cpu.whl (from x)") == "  reading torch-2.13.0+cpu.whl"
    assert installer.shown("Requirement already satisfied: numpy") is None


def test_usage(repository: Path, tmp_path: Path) -> None:
    script = [sys.executable, str(repository / "tools/setup_environment.py")]
    shown = subprocess.run([*script, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert "--torch-index" in shown.stdout
    wrong = subprocess.run([*script, "--wheels", str(tmp_path / "none")], capture_output=True, text=True)
    assert wrong.returncode == 1
    assert "make wheels" in wrong.stderr
