"""The feed: on CPU the loader's memory itself, on a device a copy that is there before the memory is written anew."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

import dinox_io
from dinox_train.feed import Feed

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_on_cpu_nothing_is_copied(small_set: Path) -> None:
    feed = Feed(torch.device("cpu"))
    assert feed.describe() == "the loader's memory itself"
    with (
        dinox_io.open_shards(small_set) as shards,
        dinox_io.Loader(shards, batch_size=4, mode="random", slab=feed.allocate) as loader,
    ):
        batch = next(loader)
        images = feed.to_device(batch)
        assert images.dtype == torch.int16
        assert np.shares_memory(images.numpy(), batch.images)
        assert np.shares_memory(images.numpy(), batch.windows[0])


@needs_gpu
@pytest.mark.parametrize("mode", ["runs", "random"])
def test_what_arrives_is_what_was_sent(small_set: Path, mode: str) -> None:
    feed = Feed(torch.device("cuda"))
    with (
        dinox_io.open_shards(small_set) as shards,
        dinox_io.Loader(shards, batch_size=8, mode=mode, slab=feed.allocate) as loader,
        dinox_io.Loader(shards, batch_size=8, mode=mode) as plain,
    ):
        moved = [feed.to_device(batch) for batch in islice(loader, 30)]
        for there, batch in zip(moved, islice(plain, 30), strict=True):
            np.testing.assert_array_equal(there.cpu().numpy(), batch.images)
