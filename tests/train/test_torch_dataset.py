"""The loader as a torch dataset: the loader's stream, batches that last, a state that loses and repeats nothing."""

import gc
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import dinox_io
from dinox_train.fake import write_fake_set
from dinox_train.torch_dataset import WindowBatches

SETTINGS: dict[str, Any] = {"batch_size": 12, "seed": 3, "mode": "random", "threads": 1}
FIELDS = ("images", "sizes", "spacing_mm", "set", "volume", "center", "epoch", "rows")
Told = tuple[int, bytes, bytes]


@pytest.fixture
def shards(small_set: Path) -> Iterator[dinox_io.ShardSet]:
    with dinox_io.open_shards(small_set) as opened:
        yield opened


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    gc.collect()
    deadline_s = time.monotonic() + 2
    while decoder_threads() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert decoder_threads() == []


def decoder_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("dinox-decoder")]


def told(batch: dict[str, Tensor]) -> Told:
    """What tells one batch from another, and its pixels, small enough to keep."""
    which = torch.stack([batch[name] for name in ("set", "volume", "center", "epoch", "rows")])
    return int(batch["position"]), which.numpy().tobytes(), batch["images"][:, :, ::16, ::16].numpy().tobytes()


def stream(dataset: WindowBatches, count: int) -> list[Told]:
    found: list[Told] = []
    while len(found) < count:
        found += [told(batch) for batch in islice(DataLoader(dataset, batch_size=None), count - len(found))]
    dataset.close()
    return found


@pytest.mark.parametrize("mode", ["random", "runs"])
def test_the_batches_are_the_loaders(shards: dinox_io.ShardSet, mode: str) -> None:
    settings = SETTINGS | {"mode": mode, "step_mm": 4.0, "inflation": 2}
    dataset = WindowBatches(shards, **settings)
    with dinox_io.Loader(shards, **settings) as loader:
        for expected, batch in zip(islice(loader, 4), DataLoader(dataset, batch_size=None), strict=False):
            assert batch.keys() == {*FIELDS, "position"}
            for name in FIELDS:
                assert batch[name].numpy().dtype == getattr(expected, name).dtype
                np.testing.assert_array_equal(batch[name].numpy(), getattr(expected, name))
            assert int(batch["position"]) == expected.position
    dataset.close()


def test_a_batch_stays_what_it_was(shards: dinox_io.ShardSet) -> None:
    """The loader's own become invalid with the next one; trainers that fetch ahead would see other pixels."""
    for mode in ("random", "runs"):
        dataset = WindowBatches(shards, **(SETTINGS | {"mode": mode}))
        batches = []
        for batch in islice(dataset, 4):
            batches.append((batch, told(batch)))
        assert [told(batch) for batch, _ in batches] == [before for _, before in batches]
        assert len({before for _, before in batches}) == 4
        dataset.close()


def test_slices_of_several_sizes_share_a_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_set: Path
) -> None:
    monkeypatch.setattr("dinox_train.fake.SHAPE", (24, 40, 72))
    with (
        dinox_io.open_shards(small_set) as large,
        dinox_io.open_shards(write_fake_set(tmp_path / "small", {0: "train", 1: "train"})) as small,
    ):
        dataset = WindowBatches([(large, 1.0), (small, 2.0)], **SETTINGS)
        batch = next(iter(dataset))
        assert batch["images"].shape == (12, 3, 256, 256)
        assert sorted(set(batch["set"].tolist())) == [0, 1]
        for image, size, one in zip(batch["images"], batch["sizes"].tolist(), batch["set"].tolist(), strict=True):
            assert size == ([256, 256], [40, 72])[one]
            assert (image[:, size[0] :] == -1024).all()
            assert (image[:, :, size[1] :] == -1024).all()
        assert len(dataset.state_dict()["shards"]) == 2
        dataset.close()


# --- the state ---------------------------------------------------------------------------------------------------


def test_resume_after_every_batch_with_other_threads_modes_of_work_and_ends(shards: dinox_io.ShardSet) -> None:
    whole = stream(WindowBatches(shards, **SETTINGS), 20)  # 216 windows: an epoch is 18 batches
    assert [position for position, _, _ in whole] == list(range(20))
    first = WindowBatches(shards, batches=7, **SETTINGS)
    assert stream(first, 20) == whole
    for stop in (0, 6, 7, 18):
        before = WindowBatches(shards, batches=7, **SETTINGS)
        assert stream(before, stop) == whole[:stop]
        state = json.loads(json.dumps(before.state_dict()))
        after = WindowBatches(shards, batches=5, **(SETTINGS | {"threads": 2, "prefetch_bytes": 0}))
        after.load_state_dict(state)
        assert stream(after, 20 - stop) == whole[stop:]


def test_a_trainer_that_fetches_ahead(shards: dinox_io.ShardSet) -> None:
    whole = stream(WindowBatches(shards, **SETTINGS), 8)
    dataset = WindowBatches(shards, **SETTINGS)
    batches = iter(dataset)
    ahead, used, state = next(batches), [], {}
    for _ in range(4):
        batch, ahead = ahead, next(batches)
        used.append(told(batch))
        state = dataset.state_dict()
        assert state["position"] == int(ahead["position"]) + 1
        state["position"] = int(batch["position"]) + 1
    assert used == whole[:4]
    dataset.load_state_dict(state)
    with pytest.raises(RuntimeError, match="over"):
        next(batches)
    assert stream(dataset, 4) == whole[4:]


def test_a_state_of_something_else_is_refused(shards: dinox_io.ShardSet, small_set: Path, tmp_path: Path) -> None:
    state = WindowBatches(shards, **SETTINGS).state_dict()
    for changed in ({"seed": 4}, {"batch_size": 6}, {"depth": 5}, {"mode": "runs"}, {"split": "val"}, {"every": 2}):
        (name,) = changed
        with pytest.raises(ValueError, match=f"{name} was"):
            WindowBatches(shards, **(SETTINGS | changed)).load_state_dict(state)
    with pytest.raises(ValueError, match="weights was"):
        WindowBatches([(shards, 2.0)], **SETTINGS).load_state_dict(state)
    with dinox_io.open_shards(small_set, edge="reflect") as reflected, pytest.raises(ValueError, match="edges was"):
        WindowBatches(reflected, **SETTINGS).load_state_dict(state)
    other = write_fake_set(tmp_path / "other", {0: "train", 1: "val"})
    with dinox_io.open_shards(other) as others, pytest.raises(ValueError, match="shards was"):
        WindowBatches(others, **SETTINGS).load_state_dict(state)
    for position in (None, -1, 1.5, True):
        with pytest.raises(ValueError, match="position"):
            WindowBatches(shards, **SETTINGS).load_state_dict(state | {"position": position})


# --- ranks -------------------------------------------------------------------------------------------------------


def test_ranks_share_each_batch_and_a_state_goes_to_any_number_of_them(
    shards: dinox_io.ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = WindowBatches(shards, **SETTINGS)
    alone.load_state_dict(alone.state_dict() | {"position": 5})
    whole = next(iter(alone))
    parts, states = [], []
    for rank in range(3):
        dataset = WindowBatches(shards, **SETTINGS)
        # As in a process of a group; it is asked only when the iteration begins.
        monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
        dataset.load_state_dict(alone.state_dict() | {"position": 5})
        parts.append(next(iter(dataset)))
        states.append(dataset.state_dict())
        dataset.close()
    for name in FIELDS:
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])
    assert states == [alone.state_dict()] * 3
    given = WindowBatches(shards, rank=1, world=2, **SETTINGS)
    assert next(iter(given))["rows"].tolist() == list(range(6, 12))
    given.close()
    alone.close()


def test_processes_that_do_not_know_of_each_other(shards: dinox_io.ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="not initialised"):
        next(iter(WindowBatches(shards, **SETTINGS)))
    monkeypatch.setenv("WORLD_SIZE", "1")
    dataset = WindowBatches(shards, **SETTINGS)
    assert len(next(iter(dataset))["rows"]) == 12
    dataset.close()


# --- how it is used ----------------------------------------------------------------------------------------------


def test_iterations_end_at_multiples(shards: dinox_io.ShardSet) -> None:
    dataset = WindowBatches(shards, batches=3, **SETTINGS)
    loader = DataLoader(dataset, batch_size=None)
    assert len(loader) == len(dataset) == 3
    positions = [[int(batch["position"]) for batch in loader] for _ in range(2)]
    assert positions == [[0, 1, 2], [3, 4, 5]]
    for batch in loader:
        assert int(batch["position"]) == 6
        break
    assert [int(batch["position"]) for batch in loader] == [7, 8], "the rest of what a break had cut off"
    dataset.close()
    with pytest.raises(TypeError, match="no length"):
        len(WindowBatches(shards, **SETTINGS))


def test_two_iterations_do_not_share_a_stream(shards: dinox_io.ShardSet) -> None:
    dataset = WindowBatches(shards, **SETTINGS)
    older = iter(dataset)
    next(older)
    newer = iter(dataset)
    with pytest.raises(RuntimeError, match="newer"):
        next(older)
    assert int(next(newer)["position"]) == 1
    dataset.close()


def test_threads_end_when_it_is_dropped(shards: dinox_io.ShardSet) -> None:
    dataset = WindowBatches(shards, **SETTINGS)
    next(iter(dataset))
    assert decoder_threads()
    del dataset
    gc.collect()
    assert not decoder_threads()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_are_refused(shards: dinox_io.ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch waits so long for a worker whose dataset has raised: 5 s without this.
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    batches = iter(DataLoader(WindowBatches(shards, **SETTINGS), batch_size=None, num_workers=1))
    with pytest.raises(RuntimeError, match="num_workers=0"):
        next(batches)
    del batches
    gc.collect()


def test_impossible_arguments(shards: dinox_io.ShardSet) -> None:
    for given in ({"batches": 0}, {"rank": 0}, {"world": 2}):
        with pytest.raises(ValueError, match=next(iter(given))):
            WindowBatches(shards, **given, **SETTINGS)
    unknown: dict[str, Any] = {"batchsize": 3}
    with pytest.raises(TypeError, match="batchsize"):
        WindowBatches(shards, **unknown)


def test_the_example_of_the_documentation(
    repository: Path, small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (repository / "docs" / "other_trainers.md").read_text(encoding="utf-8")
    (source,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "WindowBatches" in block]
    (tmp_path / "shards").symlink_to(small_set)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(source, "docs/other_trainers.md", "exec"), names)  # noqa: S102 (the document's own example)
    assert names["state"]["position"] == 10
    assert int(names["batch"]["position"]) == 9
    assert torch.isfinite(names["loss"])
    names["shards"].close()
    assert os.environ.get("WORLD_SIZE") is None
