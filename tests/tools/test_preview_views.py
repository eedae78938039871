"""The picture of views: of a set and of the made-up patient, the pixels that the network gets, errors in words."""

from pathlib import Path

import numpy as np
import preview_views
import pytest
import torch
from PIL import Image
from preview.views import HEAD, MARGIN, Window, _Layout, draw_views_page, outline

from dinox_train.fake import write_fake_set
from dinox_train.views import ViewSettings, draw_views, render_views

SMALL = ("views.global_size=64", "views.local_size=32", "views.num_local=3")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_set(tmp_path_factory.mktemp("set") / "shards")


def test_the_page_shows_the_pixels_of_the_views(tmp_path: Path) -> None:
    settings = ViewSettings(global_size=48, local_size=32, num_local=3, noise_probability=0.5)
    chance = np.random.default_rng(0)
    sizes = [(80, 90), (64, 60)]
    windows = [Window(chance.integers(-900, 500, (3, *size)).astype(np.int16), (2, 0.7, 0.8), "one") for size in sizes]
    draw_views_page(windows, settings, seed=3, position=5).write(tmp_path / "views.png")
    page = np.asarray(Image.open(tmp_path / "views.png"))
    layout = _Layout(settings)
    for row, window in enumerate(windows):
        plan = draw_views(
            settings, seed=3, position=5, rows=np.array([row]), sizes=np.array([window.hu.shape[1:]]),
            spacing_mm=np.array([window.spacing_mm]),
        )  # fmt: skip
        rendered = render_views(torch.from_numpy(window.hu)[None], plan, settings, 0.0, 1.0)
        for view, pixels in enumerate([one for kind in rendered for one in kind]):
            left, below = layout.place(view)
            top = HEAD + row * layout.row_height + below
            shown = page[top : top + pixels.shape[1], left : left + pixels.shape[2]]
            expected = np.floor(pixels[1].numpy() * 255 + 0.5)
            np.testing.assert_allclose(shown, np.repeat(expected[..., None], 3, axis=2), atol=1)
    assert page.shape[1] == layout.width


def test_boxes_are_outlined_where_they_are() -> None:
    picture = np.zeros((10, 12, 3), np.uint8)
    outline(picture, np.array([2.0, 3.0]), np.array([6.0, 12.0]), (1, 2, 3))
    drawn = picture[..., 2] == 3
    assert drawn[2, 3:].all()
    assert drawn[5, 3:].all()
    assert drawn[2:6, 3].all()
    assert drawn[2:6, 11].all()
    assert drawn.sum() == 2 * 9 + 2 * 4 - 4


def test_of_a_set_and_the_same_again(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.png", "b.png"):
        given = ["--shards", str(shards), "--windows", "3", "--output", str(tmp_path / name), *SMALL]
        assert preview_views.main(given) == 0
    assert "3 windows and their views" in capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (
        preview_views.main(["--shards", str(shards), "--position", "1", "--output", str(tmp_path / "c"), *SMALL]) == 0
    )
    assert (tmp_path / "c").read_bytes() != (tmp_path / "a.png").read_bytes()


def test_of_the_made_up_patient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview_views, "PHANTOM_SIDE", 64)
    assert preview_views.main(["--windows", "1", "--output", str(tmp_path / "v.png"), *SMALL]) == 0
    page = np.asarray(Image.open(tmp_path / "v.png"))
    assert page[HEAD : HEAD + 64, MARGIN : MARGIN + 64].std() > 20


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["views.window_presets={lungs: 1}"], "did you mean 'lung'"),
        (["views.blur=1"], "unknown key"),
        (["--windows", "0"], "--windows"),
        (["--shards", "nowhere"], "there is no folder nowhere"),
    ],
)
def test_what_cannot_be_done_is_said(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert preview_views.main(given) == 2
    assert said in capsys.readouterr().err


def test_damage_is_named(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert preview_views.main(["--shards", str(empty), "--output", str(tmp_path / "v.png")]) == 1
    assert "DAMAGED" in capsys.readouterr().err
    assert not (tmp_path / "v.png").exists()


def test_help_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        preview_views.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for part in ("--shards", "--config", "--windows", "--position", "examples:", "exit code:"):
        assert part in shown
