"""views.py from end to end on a tiny phantom; and that a pipeline which shows something else is not timed."""

from dataclasses import replace
from pathlib import Path

import cases
import numpy as np
import pytest
import result
import views
from view_pipelines import ONE_WINDOW, Pipelines, ViewPlan, Views, windows_of


@pytest.fixture(scope="module")
def tiny() -> list[cases.Case]:
    return cases.phantom(quick=True, side=64)


def test_quick(
    tiny: list[cases.Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(views, "load_cases", lambda folders, *, quick: tiny)
    monkeypatch.setattr(views, "BATCH_QUICK", 1)
    assert views.main(["--quick", "--output", str(tmp_path / "views.json")]) == 0
    figures = {figure.name: figure.value for figure in result.read(tmp_path / "views.json").figures}
    assert figures["ours"] > 0
    assert figures["ours / PIL, 8 bit"] > 0
    assert figures["bytes to the device, float32 views"] == pytest.approx(2.088960)
    assert "images per CPU-second" in capsys.readouterr().out


def test_a_pipeline_that_shows_something_else_is_not_timed(tiny: list[cases.Case]) -> None:
    pipelines = Pipelines(windows_of([case.volume.hu for case in tiny], 2))
    pipelines.pil(pipelines.pil_own_windows, None)()
    pipelines.pil(pipelines.pil_one_window, ONE_WINDOW)()

    def shifted(plan: ViewPlan) -> Views:
        return pipelines.pil_own_windows(replace(plan, level_hu=plan.level_hu + 100))

    with pytest.raises(ValueError, match="other views"):
        pipelines.pil(shifted, None)()


def test_windows_are_neighbouring_slices() -> None:
    volume = np.arange(4, dtype=np.int16)[:, None, None] * np.ones((1, 2, 2), np.int16)
    found = windows_of([volume, volume[:1] + 10], 4)[:, :, 0, 0]
    assert found.tolist() == [[0, 0, 1], [10, 10, 10], [0, 1, 2], [10, 10, 10]]
