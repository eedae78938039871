"""The pictures: what stands in them, that their bytes depend on nothing else, and that they are whole or absent."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch

from dinox_train import pictures

MEAN, STD = 0.4, 0.2


def make_views(batch: int = 3, num_global: int = 2, num_local: int = 3) -> tuple[Any, Any]:
    """Views of constant gray: view v of row r is 0.1 + 0.05 (v + r) in the middle channel, and 9 in the others."""
    num_views = num_global + num_local

    def render(first: int, last: int, size: int) -> torch.Tensor:
        gray = torch.tensor([0.1 + 0.05 * (v + r) for v in range(first, last) for r in range(batch)])
        images = torch.full((len(gray), 3, size, size), 9.0)
        images[:, 1] = ((gray - MEAN) / STD)[:, None, None]
        return images

    plan = SimpleNamespace(
        num_global=num_global,
        level_hu=np.linspace(-600, 100, batch * num_views).reshape(batch, num_views),
        describe=lambda row, view: (f"L {100 * row}  W {400 + view} HU", "blur 1.2" if view else ""),
    )
    views = SimpleNamespace(global_views=render(0, num_global, 32), local_views=render(num_global, num_views, 16))
    return views, plan


def test_each_view_stands_in_its_row_and_column_and_in_gray_again(tmp_path: Path) -> None:
    views, plan = make_views()
    pictures.save_views_picture(tmp_path / "pictures" / "views.png", views, plan, MEAN, STD, windows=2)
    image = matplotlib.image.imread(tmp_path / "pictures" / "views.png")[..., :3]
    columns, rows = 5, 2
    tile, gap, strip, name = (100 * inches for inches in (1.35, pictures.GAP_INCHES, pictures.STRIP_INCHES, 0.3))
    for row in range(rows):
        for column in range(columns):
            y = int(name + row * (strip + tile + gap) + strip + tile / 2)
            x = int(gap + column * (tile + gap) + tile / 2)
            assert image[y, x] == pytest.approx(0.1 + 0.05 * (row + column), abs=0.01), (row, column)
    assert image.shape[0] < name + 3 * (strip + tile)  # two rows, though the batch has three


def test_no_local_views_are_needed(tmp_path: Path) -> None:
    views, plan = make_views(num_local=0)
    pictures.save_views_picture(tmp_path / "views.png", views, plan, MEAN, STD)
    assert matplotlib.image.imread(tmp_path / "views.png").shape[1] < 320


def test_same_arrays_same_bytes_and_nothing_in_them_but_the_picture(tmp_path: Path) -> None:
    views, plan = make_views()
    for name in ("a.png", "b.png"):
        pictures.save_views_picture(tmp_path / name, views, plan, MEAN, STD)
    first = (tmp_path / "a.png").read_bytes()
    assert first == (tmp_path / "b.png").read_bytes()
    assert b"tEXt" not in first
    assert b"tIME" not in first
    assert b"matplotlib" not in first.lower()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_patch_pca_separates_regions_and_shows_equal_features_in_equal_colours(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    kinds = generator.normal(size=(4, 24))
    which = [np.arange(12) % 4, np.arange(6) % 4]
    features = [kinds[w].astype(np.float32) for w in which]
    slices = [np.full((44, 60), 0.25), np.full((32, 48), 0.75)]
    pictures.save_patch_pca(tmp_path / "patch_features.png", slices, features, [(3, 4), (2, 3)])
    image = matplotlib.image.imread(tmp_path / "patch_features.png")[..., :3]
    tile, gap, name = 320, 100 * pictures.GAP_INCHES, 30

    def colour(row: int, patch: int, grid: tuple[int, int]) -> np.ndarray:
        side = tile / grid[1]
        y = name + row * (tile * 3 / 4 + gap) + (patch // grid[1] + 0.5) * side
        return image[int(y), int(2 * gap + tile + (patch % grid[1] + 0.5) * side)]

    seen = np.array(
        [colour(0, patch, (3, 4)) for patch in range(12)] + [colour(1, patch, (2, 3)) for patch in range(6)]
    )
    kind = np.concatenate(which)
    for k in range(4):
        np.testing.assert_allclose(seen[kind == k], np.broadcast_to(seen[k], seen[kind == k].shape), atol=0.005)
        assert np.abs(seen[kind != k] - seen[k]).max(axis=1).min() > 0.1
    assert image[name + 20, int(gap) + 20] == pytest.approx(0.25, abs=0.01)  # the slice itself
    assert image[name + 235, int(gap) + 20] == pytest.approx(0, abs=0.01)  # what was padded at its lower edge
    assert image[int(name + 240 + gap) + 20, int(gap) + 20] == pytest.approx(0.75, abs=0.01)


def test_principal_colours_do_not_depend_on_the_free_sign_and_survive_constant_features() -> None:
    features = np.random.default_rng(1).normal(size=(50, 6)) * [9, 5, 3, 1, 1, 1]
    colours = pictures.principal_colours(features)
    assert colours.shape == (50, 3)
    assert colours.min() == 0
    assert colours.max() == 1
    # The first axis carries most of the variance; the sign rule makes its loading positive.
    assert np.corrcoef(colours[:, 0], features[:, 0])[0, 1] > 0.9
    assert (pictures.principal_colours(np.full((50, 6), 0.1, np.float32)) == 0.5).all()
    line = np.outer(np.linspace(0, 1, 50), np.ones(2))  # one direction, and fewer dimensions than colours
    assert (pictures.principal_colours(line)[:, 1:] == 0.5).all()


def test_shapes_that_do_not_fit_are_named(tmp_path: Path) -> None:
    views, plan = make_views()
    views.local_views = views.local_views[:-1]
    with pytest.raises(ValueError, match=r"\(6, 8\).*\(6, 9\)"):
        pictures.save_views_picture(tmp_path / "views.png", views, plan, MEAN, STD)
    with pytest.raises(ValueError, match="grid"):
        pictures.save_patch_pca(tmp_path / "p.png", [np.zeros((32, 32))], [np.zeros((4, 8))], [(4, 1)])
    assert not list(tmp_path.iterdir())
