"""From readings to events with advice, each told once and over once; and the ten lines of a digest."""

from collections.abc import Iterable
from typing import Any

import pytest

from dinox_train.watch.concerns import CONCERNS, PATIENCE, Concerns, Lasting
from dinox_train.watch.digest import NUM_LINES, News, digest_of
from dinox_train.watch.machine import FIGURES

GIB = 2**30
UNKNOWN: dict[str, Any] = dict.fromkeys(FIGURES)


def told(readings: Iterable[dict[str, Any]], *, shared: bool = False, checkpoint: int | None = None) -> list[str]:
    """The events that readings make, 10 s apart, on a host of 64 GiB; each with the index of its reading."""
    concerns, events = Concerns(64 * GIB, shared=shared), []
    for index, reading in enumerate(readings):
        found = concerns.see({**UNKNOWN, "elapsed_s": 10.0 * index, **reading}, checkpoint)
        assert all(len(text) > 10 for _, text in found)
        events += [f"{name} {index}" for name, _ in found]
    return events


def test_lasting_needs_patience_both_ways() -> None:
    lasting = Lasting(3)
    seen = [True, True, False, True, None, True, True, True, True, False, False, True, False, False, False]
    changes = [index for index, holds in enumerate(seen) if lasting.see(holds)]
    assert changes == [7, 14]


def gpu(clock: float, heat: float | None = 85.0, busy: float = 0.99, driver: bool | None = None) -> dict[str, Any]:
    return {"gpu_clock_mhz": clock, "gpu_temperature_c": heat, "gpu_busy": busy, "gpu_throttled": driver}


def test_a_clock_that_falls_while_it_is_hot_and_busy_is_throttling() -> None:
    steady = [gpu(2400.0)] * 40
    assert told([*steady, *[gpu(1800.0)] * 500, *steady]) == ["throttling 42", "throttling over 542"]
    assert told([*steady, *[gpu(1800.0, heat=60.0)] * 20]) == []  # a lower clock in the cold is a wish
    assert told([*steady, *[gpu(300.0, busy=0.1)] * 20]) == []  # idle
    assert told([*steady, *[gpu(2200.0)] * 20]) == []  # within what clocks do
    assert told([*steady, *[gpu(1800.0, heat=None)] * 20]) == []
    assert told([gpu(1800.0)] * 20) == []  # its own level is not known yet


def test_the_driver_may_say_it_itself() -> None:
    assert told([gpu(1800.0, driver=True)] * 5) == ["throttling 2"]
    assert told([*[gpu(1800.0, driver=True)] * 5, *[gpu(1800.0, heat=70.0, driver=False)] * 3]) == [
        "throttling 2",
        "throttling over 7",
    ]
    text = Concerns(GIB, shared=False)._throttling_in_words({**UNKNOWN, **gpu(1800.0)})
    assert "1800 MHz" in text
    assert "85 °C" in text
    assert "power limit" in text


def test_little_host_memory_and_more_of_it_where_the_gpu_shares_it() -> None:
    def free(gib: float) -> dict[str, Any]:
        return {"host_free_bytes": int(gib * GIB)}

    assert told([free(3.0)] * 5) == ["host memory 2"]
    assert told([free(5.0)] * 5) == []
    assert told([free(5.0)] * 5, shared=True) == ["host memory 2"]
    assert told([free(3.0)] * 5 + [free(3.4)] * 5 + [free(9.0)] * 5) == ["host memory 2", "host memory over 12"]


def test_swap_that_grows_and_swap_that_is_there() -> None:
    still = [{"swap_used_bytes": 5 * GIB}] * 100
    assert told(still) == []
    growing = [{"swap_used_bytes": index * 50 * 2**20} for index in range(20)]
    stays = [{"swap_used_bytes": 950 * 2**20}] * 100
    assert told([*growing, *stays]) == ["swap 8", "swap over 80"]


def test_pressure_and_disk() -> None:
    pressed = [{"pressure_memory": share} for share in (0.3, 0.3, 0.3, 0.05, 0.05, 0.05, 0.01, 0.0, 0.0)]
    assert told(pressed) == ["memory pressure 2", "memory pressure over 8"]
    full = [{"disk_free_bytes": size * GIB} for size in (12, 12, 12, 17, 17, 17, 40, 40, 40)]
    assert told(full, checkpoint=10 * GIB) == ["disk 2", "disk over 8"]
    assert told(full, checkpoint=None) == []


def test_what_cannot_be_read_is_no_event() -> None:
    assert told([UNKNOWN] * 50, checkpoint=GIB) == []
    assert PATIENCE >= 3
    assert len(set(CONCERNS)) == 5


LINE = {
    "update": 1200,
    "images": 76800,
    "loss": 8.1234,
    "teacher_entropy": 0.61,
    "effective_rank": 102.4,
    "prototype_use": 0.31,
    "grad_norm": 1.2,
    "images_per_s": 213.4,
    "data_wait_fraction": 0.012,
    "model_flops_utilisation": None,
}
READING = {**UNKNOWN, "gpu_temperature_c": 71.0, "gpu_throttled": True, "host_free_bytes": 20 * GIB}


def test_a_digest_has_ten_lines_that_say_it() -> None:
    news = News(
        run="large",
        occasion="alarm (feature_std)",
        total=5000,
        line=LINE,
        evaluated={"update": 1000, "loss_val": 8.2, "knn_z": 0.412, "knn_label": None},
        updates_per_s=0.5,
        reading={**READING, "disk_free_bytes": 300 * GIB},
        events=[("clipping", 3), ("resumed", 1)],
        newest="alarm: features lie\ntogether",
        checkpoint=1100,
        alarms={"feature_std": "features lie together: lower the learning rate"},
    )
    lines = digest_of(news).splitlines()
    assert len(lines) == NUM_LINES == 10
    assert lines[0] == "DINOX large: alarm (feature_std)"
    assert lines[1] == "progress: update 1,200 of 5,000 (24.0%), 76,800 images"
    assert lines[2].startswith("time to the end: 2.1 hours")
    assert lines[3] == (
        "health: loss 8.1234, teacher entropy 0.61 of ln K, effective rank 102.4, prototypes used 31.0%, "
        "gradient norm 1.20"
    )
    assert lines[4] == "speed: 213.4 images/s, data wait 1.2%"
    assert lines[5] == "memory: host 20.0 GiB free"
    assert lines[6] == "heat: GPU 71 °C, THROTTLED"
    assert lines[7] == "validation: loss 8.2000, knn_z 0.412 (update 1,000)"
    assert lines[8] == (
        "checkpoint of update 1,100, 300.0 GiB of disk free; events since the last digest: clipping x 3, resumed; "
        "newest: alarm: features lie together"
    )
    assert lines[9] == "alarm: feature_std: features lie together: lower the learning rate"


@pytest.mark.parametrize("line", [{}, {"update": 3}, {**LINE, "loss": None}])
def test_a_digest_of_little_has_ten_lines_too(line: dict[str, Any]) -> None:
    text = digest_of(News(run="r", occasion="daily", total=10, line=line, alarms={"long": "x" * 5000}))
    assert len(text.splitlines()) == NUM_LINES
    assert all(len(one) <= 300 for one in text.splitlines())
    assert "nan" not in text.lower()
