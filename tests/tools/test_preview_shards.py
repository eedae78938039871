"""What people see of a set: right proportions, right numbers, the same bytes again, damage named, and nobody's name."""

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import preview_shards
import pytest
from PIL import Image
from preview import sheet
from preview.directions import Marks, directions, marked
from preview.listing import Row, outlier_scores, write_listing
from preview.page import Page
from preview.sample import drawn_windows
from preview.sheet import draw_sheet, fact_lines, layout, read_volume, reformat_boxes, shown_slices
from preview.tiles import BONE, LUNG, SOFT_TISSUE, fitted, gray, resized

from dinox_io import ShardSet, open_shards
from dinox_io.atomic import temporary_path
from dinox_io.errors import ShardError
from tests.io.conftest import MakeVolume, WriteSet, make_volume, write_set  # noqa: F401 (fixtures)
from tests.io.kept_pools import Pools, pools  # noqa: F401 (a fixture)


@pytest.fixture(autouse=True)
def kept_workers(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Starting Python for each command would take most of the time."""
    monkeypatch.setattr("preview_shards.WorkerPool", pools.lend)


@pytest.fixture
def folder(make_volume: MakeVolume, write_set: WriteSet, tmp_path: Path) -> Path:  # noqa: F811
    """A set of three volumes of two patients."""
    volumes = [make_volume(1, (20, 16, 20)), make_volume(2, (3, 20, 12)), make_volume(3, (1, 9, 9), patient=1)]
    write_set(tmp_path / "set", [volumes[:2], volumes[2:]])
    return tmp_path / "set"


@pytest.fixture
def shards(folder: Path) -> Iterator[ShardSet]:
    with open_shards(folder) as opened:
        yield opened


def run(folder: Path, *options: object) -> int:
    return preview_shards.main([str(folder), "--workers", "1", *map(str, options)])


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# ---------------------------------------------------------------------------------------------- tiles


def test_windows_are_black_and_white_where_they_say() -> None:
    for window, low, high in ((LUNG, -1350, 150), (SOFT_TISSUE, -160, 240), (BONE, -500, 1500)):
        shown = gray(np.array([-32768, low, (low + high) // 2, high, 32767], np.int16), window)
        np.testing.assert_allclose(shown, [0, 0, 127.5, 255, 255], atol=0.5)


def test_pictures_have_the_proportions_of_the_body() -> None:
    assert fitted((400, 400), (200, 200)) == (200, 200)
    assert fitted((100, 400), (200, 200)) == (50, 200)
    assert fitted((300, 100), (200, 200)) == (200, 67)
    assert fitted((0.1, 400), (200, 200)) == (1, 200)


def test_resizing_keeps_the_mean_and_the_place() -> None:
    plane = np.zeros((64, 64), np.int16)
    plane[16:32, 48:] = 1000
    small = resized(plane, (16, 16))
    assert small.mean() == pytest.approx(plane.mean(), rel=0.01)
    assert small[6, 14] == pytest.approx(1000)
    assert small[10, 4] == 0


def test_shown_slices_are_even_and_inside() -> None:
    assert shown_slices(5) == [0, 1, 2, 3, 4]
    for depth in (16, 17, 100, 701):
        shown = shown_slices(depth)
        assert len(shown) == 16
        assert 0 <= shown[0] <= shown[-1] < depth
        assert np.ptp(np.diff(shown)) <= 1


# ---------------------------------------------------------------------------------------------- the page


def test_a_page_holds_what_was_put_on_it() -> None:
    page = Page(200, 100)
    page.picture(10, 20, np.arange(2500, dtype=np.uint16).reshape(50, 50).astype(np.uint8))
    page.text(100, 20, "$unbalanced_{", size=12)  # no formula
    with Image.open(io.BytesIO(page.png())) as image:
        assert image.size == (200, 100)
        assert set(image.info) <= {"dpi"}
        drawn = np.asarray(image)
    np.testing.assert_array_equal(drawn[20:70, 10:60, 1], np.arange(2500).reshape(50, 50) % 256)
    np.testing.assert_array_equal(drawn[0, 0], [0x10, 0x14, 0x18])
    assert drawn[18:40, 100:].max() > 200


# ---------------------------------------------------------------------------------------------- sheets


def test_a_sheet_for_each_volume_and_the_same_bytes_again(
    folder: Path, shards: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert run(folder) == 0
    sheets = {path.name: path.read_bytes() for path in (folder.parent / "set-preview").iterdir()}
    assert set(sheets) == {"index.html"} | {f"{volume.id}.png" for volume in shards.volumes}
    assert "3 sheets in" in capsys.readouterr().out
    assert run(folder, "--workers", 2, "--output", folder.parent / "again") == 0
    assert {path.name: path.read_bytes() for path in (folder.parent / "again").iterdir()} == sheets
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_slices_and_reformats_are_where_they_belong(shards: ShardSet) -> None:
    """The pixels of tiles and of the coronal picture are those of the volume, top is high z."""
    volume = next(volume for volume in shards.volumes if volume.shape == (20, 16, 20))
    hu = shards.read(volume, 0, 20)
    reading = read_volume(shards, volume)
    assert list(reading.chosen) == shown_slices(20)
    np.testing.assert_array_equal(reading.coronal_hu, hu[:, 8])
    np.testing.assert_array_equal(reading.sagittal_hu, hu[:, :, 10])
    assert reading.counts.sum() == hu.size
    with Image.open(io.BytesIO(draw_sheet(volume, shards.facts(volume), reading).png())) as image:
        page = np.asarray(image)[..., 0]
    rows, columns = fitted((16 * 0.7, 20 * 0.7), (sheet.TILE, sheet.TILE))
    top = sheet.HEAD + sheet.HEADING
    marks = directions(volume.orientation, {})
    tile = marked(gray(resized(hu[shown_slices(20)[0]], (rows, columns)), LUNG), marks.axial)
    np.testing.assert_array_equal(page[top : top + rows, sheet.MARGIN : sheet.MARGIN + columns], tile)
    block = sheet.HEADING + 2 * (rows + sheet.LABEL + sheet.GAP)
    top = sheet.HEAD + 3 * block + sheet.MARGIN + sheet.HEADING
    size = fitted((20 * 2.0, 20 * 0.7), reformat_boxes(40, 14)[0])
    assert size[0] / size[1] == pytest.approx(40 / 14, rel=0.02)
    coronal = marked(gray(resized(hu[::-1, 8], size), sheet.WIDE), marks.coronal)
    np.testing.assert_array_equal(page[top : top + size[0], sheet.MARGIN : sheet.MARGIN + size[1]], coronal)


def test_the_record_is_told_in_short(shards: ShardSet) -> None:
    facts = {
        "kernel": ["B30f"] * 9 + ["B31f"], "kvp": None, "rescale": [1.0, -1024.0], "lossy": True, "long": "x" * 500,
        "dropped": {"duplicate": 2}, "saturated_voxels": 0, "withheld": [],
    }  # fmt: skip
    told = dict(fact_lines(shards.volumes[0], facts))
    assert told["kernel"] == "2 values: B30f, B31f"
    assert told["kvp"] == "not known"
    assert told["rescale"] == "1, -1024"
    assert told["lossy"] == "yes"
    assert told["dropped"] == "duplicate 2"
    assert told["withheld"] == "none"
    assert told["patient"] == shards.volumes[0].patient
    assert max(map(len, told.values())) <= 36


def test_facts_are_those_of_the_record_and_checked(folder: Path, shards: ShardSet) -> None:
    for volume in shards.volumes:
        assert shards.facts(volume) == shards.facts(volume.index) == {"kernel": "B30f", "kvp": 120.0}
    shard = folder / "shard-000000.tar"
    flip(shard, shard.read_bytes().index(b'"kernel":"B30f"') + 11)
    with pytest.raises(ShardError, match=r"KEY\.json"):
        [shards.facts(volume) for volume in shards.volumes]


def test_volumes_are_chosen_by_any_pseudonym(
    folder: Path, shards: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    one = shards.volumes[0]
    for number, (options, expected) in enumerate(
        (
            (["--volumes", one.id], {one.id}),
            (["--volumes", one.patient], {volume.id for volume in shards.volumes if volume.patient == one.patient}),
            (["--limit", 2], {volume.id for volume in shards.volumes[:2]}),
        )
    ):
        output = folder.parent / str(number)
        assert run(folder, "--output", output, *options) == 0
        assert {path.stem for path in output.glob("*.png")} == expected
    assert run(folder, "--volumes", "nobody") == 2
    assert "nobody is no volume, series or patient" in capsys.readouterr().err


def test_a_damaged_volume_is_named_and_the_others_drawn(
    folder: Path, shards: ShardSet, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = folder / "shard-000001.tar"
    data = shard.read_bytes()
    (damaged,) = (volume for volume in shards.volumes if volume.shape == (1, 9, 9))
    flip(shard, data.index(b"\x28\xb5\x2f\xfd") + 12)  # in the only frame of that volume
    assert run(folder) == 1
    said = capsys.readouterr().err
    assert said.count("DAMAGED") == 1
    assert damaged.id in said
    drawn = {path.stem for path in (folder.parent / "set-preview").glob("*.png")}
    assert drawn == {volume.id for volume in shards.volumes} - {damaged.id}
    listing = (folder.parent / "set-preview" / "index.html").read_text()
    assert listing.index(damaged.id) < listing.index("DAMAGED: ") < min(listing.index(name) for name in drawn)
    (folder / "manifest.json").unlink()
    assert run(folder) == 1


def test_what_cannot_be_done_exits_with_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder.parent / "file").write_text("")
    for options, said in (
        (["--output", folder / "pictures"], "in the set itself"),
        (["--output", folder], "in the set itself"),
        (["--output", folder.parent / "file"], "is a file"),
        (["--limit", 0], "--limit must be at least 1"),
        (["--sample", 0], "--sample must be at least 1"),
        (["--sample", 5000], "at most 1000"),
        (["--workers", 0], "--workers must be at least 1"),
    ):
        assert run(folder, *options) == 2
        assert said in capsys.readouterr().err
    assert run(folder.parent / "nowhere") == 2
    (folder.parent / "no-set").mkdir()
    assert run(folder.parent / "no-set") == 2
    assert "not a set of shards" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        run(folder, "--sample", 3, "--limit", 3)
    assert ended.value.code == 2


# ---------------------------------------------------------------------------------------------- samples


def test_sampled_windows_are_different_ones_of_the_whole_set(shards: ShardSet) -> None:
    every = {(v.index, z) for v in shards.volumes for z in range(v.shape[0])}
    assert set(drawn_windows(shards, 1000, seed=0)) == every
    ten = drawn_windows(shards, 10, seed=0)
    assert len(set(ten)) == 10
    assert ten == drawn_windows(shards, 10, seed=0)
    assert ten != drawn_windows(shards, 10, seed=1)
    assert ten[:5] == drawn_windows(shards, 5, seed=0)


def test_a_page_of_windows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pages = []
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        assert run(folder, "--sample", 5, "--seed", seed, "--output", folder.parent / name) == 0
        (path,) = (folder.parent / name).iterdir()
        pages.append(path.read_bytes())
    assert f"a page of random windows: {path}" in capsys.readouterr().out
    assert pages[0] == pages[1] != pages[2]


def test_every_volume_is_sampled_before_one_comes_again(shards: ShardSet) -> None:
    for seed in range(5):
        drawn = [volume for volume, _ in drawn_windows(shards, 5, seed)]
        assert set(drawn[:3]) == {0, 1, 2}
        assert len(set(drawn[3:])) == 2


def test_a_long_sample_has_several_pages(folder: Path) -> None:
    assert run(folder, "--sample", 24, "--output", folder.parent / "many") == 0
    assert {path.name for path in (folder.parent / "many").iterdir()} == {"sample-01.png", "sample-02.png"}


# ---------------------------------------------------------------------------------------------- marks, list, Ctrl-C


def test_letters_follow_the_direction_cosines() -> None:
    axial = directions((1, 0, 0, 0, 1, 0, 0, 0, 1), {})
    assert axial.axial == Marks("R", "L", "A", "P")
    assert axial.coronal == Marks("R", "L", "H", "F")
    assert axial.sagittal == Marks("A", "P", "H", "F")
    assert directions((-1, 0, 0, 0, -1, 0, 0, 0, 1), {}).axial == Marks("L", "R", "P", "A")
    assert directions((1, 0, 0, 0, -1, 0, 0, 0, -1), {}).coronal == Marks("R", "L", "F", "H")
    assert directions((0, 1, 0, 0, 0, -1, -1, 0, 0), {}).axial == Marks()
    assert directions((1, 0, 0, 0, 0.8, 0.6, 0, -0.6, 0.8), {}).axial == Marks()
    assert directions((1, 0, 0, 0, 1, 0, 0, 0, 1), {"geometry": "assumed"}).axial == Marks()


def test_letters_stand_at_their_edges() -> None:
    plain = np.full((100, 100), 90, np.uint8)
    for place, area in (("left", np.s_[30:70, :25]), ("right", np.s_[30:70, 75:]), ("top", np.s_[:25, 30:70])):
        changed = marked(plain, Marks(**{place: "R"})) != plain
        assert changed[area].sum() == changed.sum() > 20
    np.testing.assert_array_equal(marked(plain[:20, :20], Marks("R", "L", "A", "P")), plain[:20, :20])


def test_tiles_fill_their_rows_and_strips_get_the_width() -> None:
    for slices in range(4, 17):
        columns, width = layout(slices)
        assert sheet.WIDTH - 2 * sheet.MARGIN - columns < columns * (width + sheet.GAP) - sheet.GAP + sheet.GAP
        assert columns * -(-slices // columns) - slices <= 1
    assert fitted((46, 400), reformat_boxes(46, 400)[0])[1] == sheet.REFORMATS
    assert reformat_boxes(400, 300)[1][0] == 0


def test_the_list_begins_with_what_is_unlike_the_rest(shards: ShardSet, tmp_path: Path) -> None:
    one = shards.volumes[0]
    rows = [Row(replace(one, id=f"v{number}", index=number), (-1000, -400, 300), "B30f", "120") for number in range(6)]
    rows[3] = replace(rows[3], hu=(-24, 600, 1300))
    rows[4] = replace(rows[4], volume=replace(rows[4].volume, spacing_mm=(9.0, 0.7, 0.7)), kernel="<script>")
    scores = outlier_scores(rows)
    assert [score > 4 for score in scores] == [False, False, False, True, True, False]
    write_listing(tmp_path / "index.html", rows, {"v9": "a < b"})
    text = (tmp_path / "index.html").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "a &lt; b" in text
    places = [text.index(f">v{number}<") for number in (9, 4, 3, 0, 1)]
    assert sorted(places) in (places, [places[number] for number in (0, 2, 1, 3, 4)])
    assert 'href="v0.png"' in text


def test_ctrl_c_leaves_whole_sheets_and_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = folder.parent / "set-preview"

    class Interrupted:
        def __init__(self, _: int) -> None: ...
        def __enter__(self) -> "Interrupted":
            return self

        def __exit__(self, *_: object) -> None: ...
        def map(self, function: Callable, tasks: list) -> Iterator[tuple]:
            yield tasks[0], function(tasks[0])
            temporary_path(Path(tasks[1].path)).write_bytes(b"half a pict")
            raise KeyboardInterrupt

    monkeypatch.setattr("preview_shards.WorkerPool", Interrupted)
    assert run(folder) == 130
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "interrupted: 1 sheets are whole; the same command begins again"
    (path,) = output.iterdir()
    with Image.open(path) as image:
        image.load()


def test_matplotlib_is_silent_without_a_home(repository: Path) -> None:
    """Its folder is temporary, and gone in the end."""
    code = "import os, preview.page; print(os.environ['MPLCONFIGDIR'])"
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": "/dev/null/home",
        "PYTHONPATH": f"{repository}:{repository}/tools",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert not Path(done.stdout.strip()).exists()


def test_help_is_for_newcomers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        preview_shards.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for part in ("--output", "--volumes", "--limit", "--sample", "--seed", "examples:", "exit code:"):
        assert part in text
