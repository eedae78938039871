"""The page of a run in a real browser: nothing is asked for and nothing stands out at the side, on desk and phone."""

import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from screenshot_report import SCREENS, Browser, BrowserError, Screen, find_browser, main

from dinox_train.report import write_report
from tests.train.report_run import make_full_run

NARROW = Screen("narrow", 320, 700, phone=True)
PHONE = Screen("phone", 360, 800, phone=True)
DESK = Screen("desk", 1280, 900)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium or Chrome is on PATH")
    page = tmp_path_factory.mktemp("empty") / "page.html"
    page.write_text("<p>nothing</p>")
    browser = Browser(program)
    with browser:
        try:
            browser.look(page, DESK)
        except BrowserError as error:
            pytest.skip(f"the browser does not run here: {error}")
        yield browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run that has everything."""
    return write_report(make_full_run(tmp_path_factory.mktemp("runs") / "a_run_with_quite_a_long_name_of_its_own"))


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("screen", [NARROW, PHONE, replace(PHONE, width=430), DESK], ids=lambda s: str(s.width))
def test_the_page_fits_and_asks_for_nothing(browser: Browser, page: Path, screen: Screen, dark: bool) -> None:
    look = browser.look(page, replace(screen, dark=dark), open_all=True)
    assert look.requests == []
    assert look.complaints == []
    assert look.window == screen.width
    assert look.width <= look.window, look.outside
    assert look.outside == []
    shades = [int(value) for value in look.background.removeprefix("rgb(").rstrip(")").split(",")]
    assert max(shades) < 60 if dark else min(shades) > 200


def test_a_page_that_is_too_wide_and_one_that_asks_are_seen_to(browser: Browser, tmp_path: Path) -> None:
    wide = tmp_path / "wide.html"
    viewport = '<!DOCTYPE html><meta name="viewport" content="width=device-width, initial-scale=1">'
    wide.write_text(f'{viewport}<main><div style="width:900px">wide</div></main><img src="absent.png">')
    look = browser.look(wide, PHONE)
    assert look.width > look.window
    assert look.outside == ["DIV."]
    assert [request.rpartition("/")[2] for request in look.requests] == ["absent.png"]
    assert look.complaints


def test_pictures_are_written(browser: Browser, page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(page.parent), str(tmp_path / "pictures")]) == 0
    for screen in SCREENS:
        path = tmp_path / "pictures" / f"report_{screen.name}.png"
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        assert (width, height) == (screen.width, screen.height)
    assert capsys.readouterr().out.count(" kB\n") == len(SCREENS)
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == sorted(
        f"report_{screen.name}.png" for screen in SCREENS
    )


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("screenshot_report.find_browser", lambda: "a browser")
    assert main([str(tmp_path), str(tmp_path / "pictures")]) == 1
    assert "report.html is not there" in capsys.readouterr().err
    monkeypatch.setattr("screenshot_report.find_browser", lambda: None)
    assert main([str(tmp_path), str(tmp_path / "pictures")]) == 1
    assert "no browser is on PATH" in capsys.readouterr().err
