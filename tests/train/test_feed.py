"""The feed: on CPU the loader's memory itself, on a device a copy that is there before the memory is written anew."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dinox_io
from dinox_io.filters import FILTERS
from dinox_io.manifest import build_manifest, commit_set
from dinox_io.shard import ShardWriter, encode_volume
from dinox_io.volume import Volume
from dinox_model.kernels.unfilter import unfilter, unfilter_reference
from dinox_train import feed as feed_module
from dinox_train.fake import fake_volume
from dinox_train.feed import Feed, Unfilter
from dinox_train.platform.bandwidth import Bandwidth


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


@pytest.fixture(scope="module")
def mixed_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Volumes of several sizes, odd ones too, each filter among them."""
    folder = tmp_path_factory.mktemp("mixed") / "shards"
    folder.mkdir()
    volumes: list[Volume] = []
    with ShardWriter(folder / "shard-000000.tar", config_digest="c" * 64) as writer:
        for number in range(6):
            made = fake_volume(number)
            height, width = 40 - 3 * number, 24 + 5 * (number % 3)
            volumes.append(replace(made, hu=np.ascontiguousarray(made.hu[:, 100 : 100 + height, 90 : 90 + width])))
            writer.add(encode_volume(volumes[-1], filter=FILTERS[number % 3]))
        summary = writer.finish()
    manifest = build_manifest(
        [summary], sides={volume.id: "train" for volume in volumes}, options={}, rejected_by_code={},
        config_digest="c" * 64, leaks=[], packer="test", sources={"files": 0, "bytes": 0}, previous=None,
    )  # fmt: skip
    commit_set(folder, manifest)
    return folder


@pytest.mark.parametrize("arguments", [{"mode": "runs"}, {"mode": "random"}, {"mode": "runs", "step": 2}])
@pytest.mark.parametrize("mixed", [True, False])
def test_the_device_undoes_the_filter_as_the_host_does(
    mixed_set: Path, small_set: Path, arguments: dict, mixed: bool
) -> None:
    feed = Feed(torch.device("cpu"), unfilter=unfilter_reference)
    assert feed.filtered
    assert "undoes the filter" in feed.describe()
    with (
        dinox_io.open_shards(mixed_set if mixed else small_set) as shards,
        dinox_io.Loader(shards, batch_size=6, slab=feed.allocate, filtered=feed.filtered, **arguments) as loader,
        dinox_io.Loader(shards, batch_size=6, **arguments) as plain,
    ):
        seen: set[int] = set()
        for batch, expected in islice(zip(loader, plain, strict=False), 5):
            images = feed.to_device(batch)
            assert images.dtype == torch.int16
            np.testing.assert_array_equal(images.numpy(), expected.images)
            np.testing.assert_array_equal(batch.filters, expected.filters)
            seen |= set(batch.filters.tolist())
        assert seen == ({0, 1, 2} if mixed else {2})


def test_filtered_windows_are_refused_where_nothing_undoes_the_filter(small_set: Path) -> None:
    feed = Feed(torch.device("cpu"))
    with (
        dinox_io.open_shards(small_set) as shards,
        dinox_io.Loader(shards, batch_size=4, filtered=True) as loader,
        pytest.raises(ValueError, match="filtered"),
    ):
        feed.to_device(next(loader))


@pytest.mark.parametrize(
    ("pin", "shared", "pinned", "pins"),
    [
        ("auto", False, 20.0, True),
        ("auto", False, 10.9, False),
        ("auto", False, None, False),
        ("auto", True, 20.0, False),
        ("on", False, 5.0, True),
        ("off", False, 20.0, False),
    ],
)
def test_memory_is_pinned_where_that_was_measured_to_pay(
    monkeypatch: pytest.MonkeyPatch, pin: str, shared: bool, pinned: float | None, pins: bool
) -> None:
    """By the copies that the platform measured: 10 GB/s from plain memory."""
    measured = Bandwidth(host=50.0, device=1000.0, to_device=10.0, to_device_pinned=pinned)
    monkeypatch.setattr(feed_module, "find", lambda device: device)
    monkeypatch.setattr(feed_module, "Kept", lambda facts: facts)
    monkeypatch.setattr(feed_module, "recalled_bandwidth", lambda kept, device: measured)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: object())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(is_integrated=shared))
    assert Feed(torch.device("cuda"), pin=pin).pins is pins


@pytest.mark.gpu
@pytest.mark.parametrize("unfilter", [None, unfilter_reference, unfilter])
@pytest.mark.parametrize("mode", ["runs", "random"])
def test_what_arrives_is_what_was_sent(small_set: Path, mode: str, unfilter: Unfilter | None) -> None:
    feed = Feed(torch.device("cuda"), unfilter)
    with (
        dinox_io.open_shards(small_set) as shards,
        dinox_io.Loader(shards, batch_size=8, mode=mode, slab=feed.allocate, filtered=feed.filtered) as loader,
        dinox_io.Loader(shards, batch_size=8, mode=mode) as plain,
    ):
        moved = [feed.to_device(batch) for batch in islice(loader, 30)]
        for there, batch in zip(moved, islice(plain, 30), strict=True):
            np.testing.assert_array_equal(there.cpu().numpy(), batch.images)
