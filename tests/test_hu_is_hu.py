"""One chain for the first law: the HU of a DICOM file are the HU that reach the network, through all between."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import dinox_io
from dinox_io import hounsfield
from dinox_model import Preprocess, preprocess
from dinox_train.feed import Feed
from dinox_train.views import render_whole_slices
from tests.io.dicom_factory import set_pixels, slice_dataset, write

SIDE, SLICES, INTERCEPT = 32, 5, -1024
# Gray from 0 to 1 over all of int16: nothing is clipped, so that HU can be read back from what the network sees.
WHOLE_RANGE = Preprocess(level_hu=0.0, width_hu=65536.0, mean=0.0, std=1.0)


def hu_of(gray: torch.Tensor) -> np.ndarray:
    return np.rint(gray.double().numpy() * 65536.0 - 32768.0).astype(np.int64)


def test_hu_are_the_same_from_the_file_to_the_network(tmp_path: Path, repository: Path) -> None:
    stored = np.random.default_rng(0).integers(0, 4096, (SLICES, SIDE, SIDE), dtype=np.uint16)
    for index, values in enumerate(stored):
        dataset = slice_dataset(index)
        set_pixels(dataset, values)
        dataset.PixelSpacing = [1.0, 1.0]
        write(dataset, tmp_path / "dicom" / f"{index}.dcm")
    command = [sys.executable, "tools/pack_shards.py", str(tmp_path / "dicom"), "--output", str(tmp_path / "shards")]
    environment = os.environ | {"PYTHONPATH": str(repository)}
    subprocess.run(command, cwd=repository, env=environment, check=True, capture_output=True)
    expected = stored.astype(np.int64) + INTERCEPT

    with dinox_io.open_shards(tmp_path / "shards") as shards:
        assert np.array_equal(shards.read(shards.volumes[0], 0, SLICES), expected)
        with dinox_io.Loader(shards, batch_size=SLICES, split=None) as loader:
            batch = next(loader)
            centers = batch.center
            images = Feed(torch.device("cpu")).to_device(batch)
            seen = render_whole_slices(images, batch.sizes, SIDE, WHOLE_RANGE)[:, 1]
            used = WHOLE_RANGE.apply(images)[:, 1]

    assert sorted(centers) == list(range(SLICES))
    assert np.array_equal(hu_of(seen), expected[centers])
    assert np.array_equal(hu_of(used), expected[centers])


def test_the_packages_agree_on_what_stands_in_both() -> None:
    assert preprocess.AIR_HU == hounsfield.AIR_HU
    assert preprocess.HISTOGRAM_BINS == hounsfield.HISTOGRAM_BINS
    counts = hounsfield.histogram(np.array([[[-1000, -1000, 40, 3071]]], np.int16))
    found = Preprocess.from_histogram(counts, 0.0, 65536.0)
    mean_hu = found.mean * 65536.0 - 32768.0
    assert abs(mean_hu - np.mean([-1000, -1000, 40, 3071])) <= preprocess.HISTOGRAM_BIN_HU / 2
