"""Nothing opens a network connection by itself: the whole way from phantom to report with sockets forbidden."""

import subprocess
import sys
from pathlib import Path


def test_the_whole_way_with_sockets_forbidden(tmp_path: Path, repository: Path, sockets_forbidden: Path) -> None:
    environment = {"PYTHONPATH": f"{sockets_forbidden}:{repository}", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}

    def run(*arguments: str, codes: tuple[int, ...] = (0,)) -> str:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=250)
        assert done.returncode in codes, done.stdout + done.stderr
        return done.stdout

    run("-c", "import socket; assert socket.socket.__name__ == 'Refused'")
    phantom, shards, folder = tmp_path / "phantom", tmp_path / "shards", tmp_path / "run"
    run("tools/make_phantom.py", str(phantom), "--patients", "4", "--size", "64")
    run("tools/pack_shards.py", str(phantom / "dicom"), "--output", str(shards), "--workers", "2", codes=(0, 3))
    run("tools/verify_shards.py", str(shards))
    settings = ["views.global_size=32", "views.local_size=16", "train.updates=2", "train.batch_size=4"]
    run(
        "-m", "dinox_train", "--config", "configs/demo.yaml", f"data.shards={shards}", f"run.folder={folder}", *settings
    )
    assert (folder / "report.html").is_file()
