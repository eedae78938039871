"""The README's picture: drawn from a run folder, whole or not at all; a run that is not finished is named."""

import json
from pathlib import Path

import numpy as np
import pytest
import readme_picture
from matplotlib.image import imread, imsave


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What the picture needs of a finished run."""
    folder = tmp_path / "run"
    (folder / "pictures").mkdir(parents=True)
    lines = [{"update": n, "loss": 5.0 / n, "loss_val": 4.0 / n if n % 2 == 0 else None} for n in range(1, 7)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, level in (("views", 0.2), ("patch_features", 0.8)):
        imsave(folder / "pictures" / f"{name}.png", np.full((20, 30, 3), level))
    return folder


def test_it_draws_the_run_and_the_same_again(run: Path, tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        assert readme_picture.main([str(run), str(tmp_path / "docs" / name)]) == 0
    picture = imread(tmp_path / "docs" / "one.png")
    assert picture.shape[:2] == (700, 1400)
    # Both of the run's pictures are in it, the view below on the left and the features on the right.
    np.testing.assert_allclose(picture[500, 400, :3], 0.2, atol=0.01)
    np.testing.assert_allclose(picture[350, 1100, :3], 0.8, atol=0.01)
    assert len({(tmp_path / "docs" / name).read_bytes() for name in ("one.png", "two.png")}) == 1
    assert {path.name for path in (tmp_path / "docs").iterdir()} == {"one.png", "two.png"}


def test_without_a_validation_there_is_only_the_loss(run: Path, tmp_path: Path) -> None:
    (run / "metrics.jsonl").write_text('{"update": 1, "loss": 5.0, "loss_val": null}\n')
    assert readme_picture.main([str(run), str(tmp_path / "one.png")]) == 0


@pytest.mark.parametrize("missing", ["metrics.jsonl", "pictures/views.png", "pictures/patch_features.png"])
def test_what_is_missing_is_named_and_nothing_is_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    (run / missing).unlink()
    assert readme_picture.main([str(run), str(tmp_path / "one.png")]) == 1
    said = capsys.readouterr().err
    assert missing in said
    assert "make demo" in said
    assert not (tmp_path / "one.png").exists()
