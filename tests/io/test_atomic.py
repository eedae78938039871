"""A file written atomically is whole or absent, also when the writing fails."""

import errno
from pathlib import Path

import pytest

from dinox_io.atomic import AtomicFile, atomic_file, replace_folder, temporary_path, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_replaces_the_old_bytes(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"old")
    write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert names(tmp_path) == ["a"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"old")

    def fail_in_the_middle() -> None:
        with atomic_file(tmp_path / "a") as file:
            file.write(b"half")
            assert names(tmp_path) == [".a.tmp", "a"]
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail_in_the_middle()
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_full_disk_at_commit_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    output = AtomicFile(tmp_path / "a")
    output.file.write(b"x" * 100)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        output.commit()
    assert names(tmp_path) == []


def test_what_a_killed_writer_left_is_overwritten(tmp_path: Path) -> None:
    temporary_path(tmp_path / "a").write_bytes(b"left behind, and longer than what comes")
    write_atomically(tmp_path / "a", b"whole")
    assert (tmp_path / "a").read_bytes() == b"whole"
    assert names(tmp_path) == ["a"]


def test_order_of_durability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync of the file, rename, fsync of the folder: any other order can lose the file to a power cut."""
    calls: list[str] = []
    real_replace = Path.replace
    monkeypatch.setattr("os.fsync", lambda descriptor: calls.append("fsync"))
    monkeypatch.setattr(Path, "replace", lambda path, to: calls.append("rename") or real_replace(path, to))
    write_atomically(tmp_path / "a", b"x")
    assert calls == ["fsync", "rename", "fsync"]


def test_replace_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / ".made.tmp"
    (temporary / "inner").mkdir(parents=True)
    (temporary / "inner" / "file").write_bytes(b"x")
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", synced.append)
    replace_folder(temporary, tmp_path / "made")
    assert (tmp_path / "made" / "inner" / "file").read_bytes() == b"x"
    assert len(synced) == 4  # the file, two folders, the parent
    (tmp_path / "more").mkdir()
    with pytest.raises(FileExistsError, match="never overwritten"):
        replace_folder(tmp_path / "more", tmp_path / "made")
