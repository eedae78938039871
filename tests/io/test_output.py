"""Where a set may be packed to, and what is said where it may not."""

import errno
import io
from pathlib import Path
from typing import Any

import pytest

from dinox_io.output import PackError, explained
from dinox_io.pack import pack
from dinox_io.progress import ProgressReport
from dinox_io.report import PackReport
from dinox_io.settings import PackSettings
from tests.io.dicom_factory import write_series
from tests.io.small_packs import KEY, same_process  # noqa: F401 (same_process is a fixture)

pytestmark = pytest.mark.usefixtures("same_process")


def run(source: Path, out: Path, **options: Any) -> PackReport:
    """Pack with the tests' key, in this process."""
    key = source.parent / "key"
    key.write_bytes(KEY)
    settings = PackSettings(inputs=(source,), output=out, key_file=key, **options)
    return pack(settings, ProgressReport(io.StringIO()))


def tree(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("in", "is INPUT"),
        ("in/link", "is INPUT"),
        (".", "lies in --output"),
        ("in/0.dcm/sub", r"0\.dcm is a file, so there can be no"),
        ("in/0.dcm", r"0\.dcm is a file: --output"),
        ("others", "holds 2 files or folders that are not of a set"),
        ("note/x/../../others", "holds 2 files"),
    ],
)
def test_an_output_that_is_not_meant_is_refused_before_anything_is_written(
    tmp_path: Path, output: str, message: str
) -> None:
    top = tmp_path / "top"
    for number, path in enumerate(write_series(top / "in", 3)):
        path.rename(top / f"in/{number}.dcm")
    (top / "in/link").symlink_to(top / "in")
    (top / "in/private").mkdir()
    (top / "in/private/lock").touch()  # so that the folder is no stranger
    (top / "private").mkdir()
    (top / "private/lock").touch()
    for folder in ("others", "note/x"):
        (top / folder).mkdir(parents=True)
    for name in ("letter.txt", "more.txt"):
        (top / "others" / name).touch()
    (top / "key").write_bytes(KEY)
    before = tree(top)
    with pytest.raises(PackError, match=message) as refused:
        run(top / "in", top / output)
    assert "is whole" not in str(refused.value)
    assert tree(top) == before


@pytest.mark.parametrize("present", ["labels/a.jsonl", "private/notes", ".hidden", "part-1-of-2/x", "in_input/.keep"])
def test_what_may_be_in_an_output_before_its_set(tmp_path: Path, present: str) -> None:
    write_series(tmp_path / "in", 3)
    out = tmp_path / ("in/out" if "input" in present else "out")
    if "input" not in present:
        (out / present).parent.mkdir(parents=True)
        (out / present).touch()
    assert run(tmp_path / "in", out).new_volumes == 1
    (out / "README").write_text("of the owner")
    assert run(tmp_path / "in", out).new_volumes == 0


def test_a_set_before_is_named_only_where_there_was_one(tmp_path: Path) -> None:
    def refusal(folder: Path) -> str:
        with pytest.raises(PackError) as refused, explained(folder):
            raise PermissionError(errno.EACCES, "closed")
        return str(refused.value)

    new = refusal(tmp_path / "new/out")
    assert new.startswith(f"cannot make {tmp_path / 'new/out'} in {tmp_path}: Permission denied. ")
    assert "is whole" not in new
    write_series(tmp_path / "in", 3)
    run(tmp_path / "in", tmp_path / "out")
    assert "the set as it was before is whole" in refusal(tmp_path / "out")
