"""The pace: threads follow the demand, and a cap holds."""

from itertools import islice
from pathlib import Path

import pytest

import dinox_io
from dinox_io.pace import Pace


def test_threads_follow_the_demand() -> None:
    pace = Pace(4)
    assert pace.active == 4
    for _ in range(100):
        pace.asked(has_come=True, full=True)
    assert pace.active == 1
    assert pace.delay_s(0) == 0.0
    assert pace.delay_s(1) is None
    pace.asked(has_come=False, full=False)
    assert pace.active == 2
    for _ in range(9):
        pace.asked(has_come=False, full=False)
    assert pace.active == 4


def test_one_calm_moment_is_chance() -> None:
    pace = Pace(3)
    for _ in range(50):
        pace.asked(has_come=True, full=True)
        pace.asked(has_come=True, full=False)
    assert pace.active == 3


def test_the_cap_holds_over_time() -> None:
    now_s = 0.0
    pace = Pace(2, 1000.0, clock=lambda: now_s)
    moved = 0
    while now_s < 10:
        delay_s = pace.delay_s(0)
        assert delay_s is not None
        if delay_s == 0:
            pace.began(300)
            moved += 300
        now_s += max(delay_s, 0.001)
    assert moved == pytest.approx(10_000, rel=0.05)


@pytest.mark.parametrize(("threads", "rate"), [(0, None), (1, 0.0), (1, -5.0)])
def test_refusals(threads: int, rate: float | None) -> None:
    with pytest.raises(ValueError, match=r"at least 1|above 0"):
        Pace(threads, rate)


def test_a_capped_loader_gives_the_same(tmp_path: Path, make_volume, write_set) -> None:
    write_set(tmp_path / "set", [[make_volume(number, (8, 16, 16)) for number in range(4)]])
    with dinox_io.open_shards(tmp_path / "set") as shards:
        with dinox_io.Loader(shards, batch_size=4) as loader:
            expected = [batch.images.copy() for batch in islice(loader, 6)]
        with dinox_io.Loader(shards, batch_size=4, max_gbps=1e-4, threads=2) as loader:
            for batch, images in zip(islice(loader, 6), expected, strict=True):
                assert (batch.images == images).all()
