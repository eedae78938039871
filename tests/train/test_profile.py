"""Profiles: the stages of an update, what each took, and nothing learnt otherwise."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

from dinox_train.metrics import VARYING, read_lines
from dinox_train.profile import OTHER, by_stage
from dinox_train.stage_timers import STAGES


def test_profiled_updates_learn_the_same(tmp_path: Path, train: Callable[..., int], tiny_preset: None) -> None:
    given = ("train.updates=4", "evaluate.every=100", "train.accumulation=2")
    assert train(tmp_path / "plain", *given) == 0
    assert train(tmp_path / "profiled", *given, "profile.at=[2, 4, 99]") == 0
    plain, profiled = (
        [{key: value for key, value in line.items() if key not in VARYING} for line in read_lines(file)]
        for file in (tmp_path / "plain/metrics.jsonl", tmp_path / "profiled/metrics.jsonl")
    )
    assert plain == profiled
    assert not (tmp_path / "plain" / "profile").exists()
    folder = tmp_path / "profiled" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == [
        *("update-00000002.json.gz", "update-00000002.txt", "update-00000004.json.gz", "update-00000004.txt"),
    ]
    text = gzip.decompress((folder / "update-00000002.json.gz").read_bytes()).decode()
    assert str(tmp_path) not in text
    stages = by_stage(json.loads(text)["traceEvents"], "cpu")
    assert set(stages) == {*STAGES, OTHER} - {"save"}
    assert all(stages[name].host_s > 0 for name in STAGES if name != "save")
    assert stages["student"].peak_bytes > stages["views"].peak_bytes > 0
    assert stages["backward"].copied_bytes > 0
    table = (folder / "update-00000002.txt").read_text().splitlines()
    assert [line.split()[0] for line in table[2:-1]] == list(stages)


def test_what_the_device_does_belongs_to_the_stage_that_launched_it() -> None:
    def span(stage: str, begin: float, end: float) -> dict[str, object]:
        return {"cat": "user_annotation", "name": f"stage {stage}", "ts": begin, "dur": end - begin}

    def launch(correlation: int, ts: float) -> dict[str, object]:
        return {"cat": "cuda_runtime", "name": "launch", "ts": ts, "dur": 1, "args": {"correlation": correlation}}

    def memory(ts: float, size: int) -> dict[str, object]:
        return {"name": "[memory]", "ts": ts, "args": {"Device Type": 1, "Bytes": size}}

    events = [
        *(span("student", 10, 20), span("backward", 30, 40), span("student", 50, 60)),
        *(launch(1, 12), launch(2, 31), launch(3, 25)),
        {"cat": "kernel", "name": "k", "ts": 70, "dur": 5e6, "args": {"correlation": 1}},
        {"cat": "gpu_memcpy", "name": "m", "ts": 80, "dur": 1e6, "args": {"correlation": 2, "bytes": 77}},
        {"cat": "kernel", "name": "k", "ts": 90, "dur": 3e6, "args": {"correlation": 3}},
        *(memory(11, 100), memory(32, 50), memory(33, -120), memory(55, 10)),
        {"name": "[memory]", "ts": 34, "args": {"Device Type": 0, "Bytes": 10**6}},
        {"name": "aten::copy_", "ts": 35, "dur": 1, "args": {"Input Dims": [[4]], "Input type": ["float"]}},
    ]
    stages = by_stage(events, "cuda")
    assert (stages["student"].device_s, stages["student"].peak_bytes) == (5.0, 100)
    assert (stages["backward"].device_s, stages["backward"].copied_bytes, stages["backward"].peak_bytes) == (1, 77, 150)
    assert stages[OTHER].device_s == 3.0
    assert abs(stages["student"].host_s - 20e-6) < 1e-12
    on_host = [event for event in events if event.get("cat") != "gpu_memcpy"]
    assert by_stage(on_host, "cpu")["backward"].copied_bytes == 16
