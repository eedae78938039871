"""What a run finds, measures, sets and keeps of its machine; GPUs are made-up properties here."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dinox_model import ViTConfig
from dinox_model.kernels import tiles
from dinox_model.kernels.choice import AttentionShape
from dinox_model.linear import LAYOUTS, OFF, Routes
from dinox_train.platform import bandwidth, device, memory, products, start, tune
from dinox_train.platform.__main__ import main
from dinox_train.platform.bandwidth import Bandwidth
from dinox_train.platform.facts import Facts, find
from dinox_train.platform.kept import Kept, cache_folder
from dinox_train.platform.products import Measured, linears_of, measure_products, routes_of
from dinox_train.platform.switches import settle, switches_for

CPU, GPU = torch.device("cpu"), torch.device("cuda")
GIB = 2**30
STRIX_HALO = Facts(
    kind="amd",
    architecture="gfx1151",
    name="Radeon 8060S",
    memory_bytes=96 * GIB,
    host_memory_bytes=124 * GIB,
    unified=True,
    units=40,
    torch="2.13.0",
    runtime="7.2",
    system="6.18",
)
H200 = dataclasses.replace(
    STRIX_HALO, kind="nvidia", architecture="sm_90", name="H200", memory_bytes=139 * GIB, unified=False, runtime="13.0"
)
MI300 = dataclasses.replace(STRIX_HALO, architecture="gfx942", name="MI300X", memory_bytes=192 * GIB, unified=False)
SMALL = ViTConfig(width=32, num_layers=2, num_heads=2, mlp_hidden=64)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {"DINOX_CACHE": str(tmp_path / "cache")}


# --- facts


def test_the_facts_of_a_cpu_are_found() -> None:
    found = find(CPU)
    assert (found.kind, found.architecture, found.is_gpu) == ("cpu", "cpu", False)
    assert found.memory_bytes == found.host_memory_bytes > 0
    assert found.units == torch.get_num_threads()
    assert "(cpu)" in found.words()
    json.dumps(found.record())


@pytest.mark.parametrize("hip", ["7.2", None])
def test_the_facts_of_a_gpu_are_asked_of_torch(monkeypatch: pytest.MonkeyPatch, hip: str | None) -> None:
    properties = SimpleNamespace(
        name="G", total_memory=8 * GIB, is_integrated=1 if hip else 0, multi_processor_count=40
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr("dinox_train.platform.facts.architecture", lambda device: "gfx1151" if hip else "sm_90")
    monkeypatch.setattr(torch.version, "hip", hip)
    found = find(GPU)
    assert found.kind == ("amd" if hip else "nvidia")
    assert (found.unified, found.units, found.is_rdna) == (bool(hip), 40, bool(hip))
    assert ("shared with the host" in found.words()) is bool(hip)


@pytest.mark.parametrize(("name", "word"), [("mps", "Apple"), ("xpu:0", "Intel"), ("gpu", "none"), ("cuda:x", "none")])
def test_other_devices_get_a_clear_word(name: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        device.choose_device(name)


def test_an_accelerator_that_stays_idle_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert device.idle_accelerator(CPU) is None
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for kind, word in (("cuda", "stays idle"), ("mps", "Apple")):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda kind=kind: torch.device(kind))
        assert word in (device.idle_accelerator(CPU) or "")
    assert device.idle_accelerator(GPU) is None


# --- switches


def names(facts: Facts) -> set[str]:
    return {switch.name for switch in switches_for(facts)}


def test_switches_fit_the_machine() -> None:
    assert names(find(CPU)) == names(H200) == set()
    assert names(MI300) == {"ROCBLAS_USE_HIPBLASLT"}
    assert names(STRIX_HALO) == {
        "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL",
        "TRITON_HIP_USE_IN_THREAD_TRANSPOSE",
        "ROCBLAS_USE_HIPBLASLT",
        "PYTORCH_ALLOC_CONF",
    }


def test_what_is_not_set_is_set_and_what_the_user_has_set_stays() -> None:
    environment = {"ROCBLAS_USE_HIPBLASLT": "1", "PYTORCH_HIP_ALLOC_CONF": "max_split_size_mb:128"}
    said = settle(STRIX_HALO, environment)
    assert environment["TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL"] == "1"
    assert environment["ROCBLAS_USE_HIPBLASLT"] == "1"
    assert "PYTORCH_ALLOC_CONF" not in environment
    assert sum("is yours and stays" in line for line in said) == 2
    assert sum(line.endswith(", as it was") for line in settle(STRIX_HALO, environment)) == 2


def test_settings_that_do_harm_are_warned_of() -> None:
    environment = {"HSA_OVERRIDE_GFX_VERSION": "11.0.0", "PYTORCH_ALLOC_CONF": "backend:malloc"}
    warnings = [line for line in settle(STRIX_HALO, environment) if line.startswith("warning: ")]
    assert [("HSA" in line, "malloc" in line) for line in warnings] == [(True, False), (False, True)]
    assert settle(H200, environment) == []


# --- memory


def test_only_a_shared_memory_is_limited() -> None:
    assert memory.limit_for(find(CPU)) is None
    assert memory.limit_for(H200) is None
    found = memory.limit_for(STRIX_HALO)
    assert found is not None
    assert found.fraction == memory.MOST
    tight = memory.limit_for(dataclasses.replace(STRIX_HALO, host_memory_bytes=100 * GIB, memory_bytes=100 * GIB))
    assert tight is not None
    assert tight.fraction == pytest.approx(0.87)
    small = memory.limit_for(dataclasses.replace(STRIX_HALO, host_memory_bytes=16 * GIB, memory_bytes=16 * GIB))
    assert small is not None
    assert (small.fraction, "small" in small.reason) == (0.25, True)


# --- what is kept


def test_what_is_kept_is_of_one_machine_and_version(environment: dict[str, str]) -> None:
    Kept(STRIX_HALO, environment).put("a", [1, 2.5])
    Kept(STRIX_HALO, environment).put("b", {"c": None})
    assert Kept(STRIX_HALO, environment).get("a") == [1, 2.5]
    assert Kept(STRIX_HALO, environment).get("b") == {"c": None}
    for other in (H200, dataclasses.replace(STRIX_HALO, torch="2.14.0"), dataclasses.replace(STRIX_HALO, runtime="8")):
        assert Kept(other, environment).get("a") is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"machine": {}, "values": {"a": 1}}', "\x00"])
def test_a_damaged_cache_is_no_cache(environment: dict[str, str], text: str) -> None:
    kept = Kept(STRIX_HALO, environment)
    kept.put("a", 1)
    kept.path.write_text(text)
    assert kept.get("a") is None
    kept.put("a", 2)
    assert kept.get("a") == 2


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    kept = Kept(STRIX_HALO, {"DINOX_CACHE": str(tmp_path / "file")})
    kept.put("a", 1)
    assert kept.get("a") is None


def test_the_folder_is_the_users() -> None:
    assert cache_folder({"HOME": "/home/u"}) == Path("/home/u/.cache/dinox")
    assert cache_folder({"HOME": "/home/u", "XDG_CACHE_HOME": "/c"}) == Path("/c/dinox")
    assert cache_folder({"XDG_CACHE_HOME": "/c", "DINOX_CACHE": "/d"}) == Path("/d")


# --- bandwidth


def test_the_hosts_bandwidth_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_HOST_BYTES", 1 << 20)
    found = bandwidth.measure_bandwidth(CPU)
    assert found.host > 0
    assert found.looks_unified is None
    assert found.words().startswith("copies, GB/s: host ")


def test_copies_tell_a_shared_memory() -> None:
    assert Bandwidth(host=100, device=212, to_device=84).looks_unified is True
    assert Bandwidth(host=50, device=4300, to_device=11, to_device_pinned=55).looks_unified is False


def test_what_pinning_gains() -> None:
    assert Bandwidth(host=50, device=4300, to_device=11, to_device_pinned=55).pinning_gain == 5
    assert Bandwidth(host=50).pinning_gain is None


# --- products


def timer(seconds: Mapping[tuple[str, str], float]) -> Callable[..., Mapping[str, float]]:
    """Seconds by layout and library; layouts come in their order."""
    layouts = iter(LAYOUTS * 100)

    def timed(calls: Mapping[str, Callable[[], torch.Tensor]], device: torch.device) -> Mapping[str, float]:
        layout = next(layouts)
        for call in calls.values():
            call()
        return {library: seconds[layout, library] for library in calls}

    return timed


ALIKE = {(layout, library): 1.0 for layout in LAYOUTS for library in ("default", "cublas", "cublaslt")}


def measured(seconds: Mapping[tuple[str, str], float]) -> tuple[Measured, ...]:
    return tuple(
        Measured(one.name, layout, library, 10, one.inputs, one.outputs, one.count, taken)
        for one in linears_of(SMALL)
        for (layout, library), taken in seconds.items()
    )


def test_each_layout_goes_to_the_library_that_is_faster_at_it() -> None:
    strix = ALIKE | {("grad_weight", "cublas"): 0.4, ("forward", "cublaslt"): 0.5, ("grad_input", "cublas"): 2.0}
    routes, why = routes_of(measured(strix))
    assert routes == Routes(forward="cublaslt", grad_input="default", grad_weight="cublas")
    assert why == "saves 36.7% of the products' time"


def test_routing_is_off_where_it_does_not_help() -> None:
    assert routes_of(measured(ALIKE | {("forward", "cublas"): 0.95}))[0] == OFF
    only_one = {(layout, "default"): 1.0 for layout in LAYOUTS}
    assert routes_of(measured(only_one)) == (OFF, "this device has one BLAS library")


def test_products_are_measured_in_the_three_layouts() -> None:
    found = measure_products(linears_of(SMALL), 50, torch.float32, CPU, timer=timer(ALIKE))
    assert [(one.name, one.layout) for one in found] == [
        (one.name, layout) for one in linears_of(SMALL) for layout in LAYOUTS
    ]
    assert {one.library for one in found} == {"default"}
    assert found[0].tflops == pytest.approx(2 * 50 * 32 * 96 / 1e12)


def test_a_layout_is_laid_out_as_a_linears_forward_and_backward() -> None:
    (qkv, *_) = linears_of(SMALL)
    made = {name: make() for name, make in products.operands(qkv, 5, torch.float32, CPU).items()}
    assert {name: (a @ b).shape for name, (a, b) in made.items()} == {
        "forward": (5, 96),
        "grad_input": (5, 32),
        "grad_weight": (96, 32),
    }
    assert [[part.is_contiguous() for part in made[name]] for name in LAYOUTS] == [
        [True, False],
        [True, True],
        [False, True],
    ]


def test_gated_networks_have_two_products_up() -> None:
    gated = dataclasses.replace(SMALL, mlp="swiglu")
    assert [one.count for one in linears_of(gated)] == [1, 1, 2, 1]


# --- at the start of a run


def started(environment: dict[str, str], rows: int = 40) -> start.Platform:
    return start.start(CPU, SMALL, rows, torch.float32, routed=True, environment=environment)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_HOST_BYTES", 1 << 20)
    monkeypatch.setattr(products, "_CPU_FLOPS", 1e5)


@pytest.mark.usefixtures("quick")
def test_a_machine_is_measured_once(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = started(environment)
    assert first.routes == OFF
    assert first.lines[0].startswith("machine: ")
    assert any(line.startswith("routing of products: off") for line in first.lines)
    monkeypatch.setattr(start, "measure_bandwidth", None)
    monkeypatch.setattr(start, "measure_products", None)
    assert started(environment).record() == first.record()
    with pytest.raises(TypeError):  # other rows were not measured yet
        started(environment, rows=41)
    json.dumps(first.record())


@pytest.mark.usefixtures("quick")
def test_a_cache_of_another_form_is_measured_anew(environment: dict[str, str]) -> None:
    first = started(environment)
    kept = Kept(first.facts, environment)
    kept.put("bandwidth", {"host": 1.0, "moon": 2.0})
    assert "moon" not in started(environment).record()["copies_gb_per_s"]


@pytest.fixture
def own_tiles() -> object:
    yield
    tiles.prefer({})


@pytest.mark.usefixtures("quick", "own_tiles")
def test_tuned_tiles_are_read_and_damaged_ones_are_told(environment: dict[str, str]) -> None:
    kept = Kept(find(CPU), environment)
    row = {"arch": ["interpreter"], "sizes": {"BLOCK_M": 16, "BLOCK_N": 16}, "num_warps": 2}
    kept.put(start.TUNED_TILES, {"attention_forward": [row]})
    assert "tiles: tuned here for attention_forward" in started(environment).lines
    found = tiles.tiles_for("attention_forward", arch="interpreter", dtype="fp32", head_dim=64, length=9)
    assert found is not None
    assert found.sizes == {"BLOCK_M": 16, "BLOCK_N": 16}
    kept.put(start.TUNED_TILES, {"attention_forward": [{"sizse": {}}]})
    assert any("are not used" in line for line in started(environment).warnings)


# --- tuning


def test_on_a_cpu_there_is_nothing_to_tune(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_CPU_FLOPS", 1e6)
    file = tmp_path / "c.yaml"
    file.write_text("device: cpu\nmodel: {preset: vit_ti}\n")
    assert main(["tune", "--config", str(file)]) == 0
    out = capsys.readouterr().out
    assert "products, grad_weight: default" in out
    assert tune.NOTHING_TO_TUNE in out
    assert main(["tune", "--config", str(file), "device=mps"]) == 2
    assert "Apple" in capsys.readouterr().err


class FakeTunable:
    """torch.cuda.tunable, which makes products twice as fast, or not."""

    def __init__(self, file: str) -> None:
        self.file, self.calls = file, []

    def __getattr__(self, name: str) -> Callable[..., bool]:
        def call(*arguments: object) -> bool:
            self.calls.append((name, *arguments))
            if name == "write_file":
                Path(str(arguments[0])).write_text("")
            return True

        return call


@pytest.mark.parametrize("gain", [2.0, 1.0])
def test_products_are_tuned_and_kept_where_that_gains(
    gain: float, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, fake = Kept(MI300, environment), FakeTunable("")
    monkeypatch.setattr(torch.cuda, "tunable", fake)
    linears = linears_of(SMALL)
    work = tune.Work(vit=SMALL, rows=20, dtype=torch.float32, shapes=())
    before = measure_products(linears, 20, torch.float32, CPU, timer=timer(ALIKE))
    faster = dict.fromkeys(ALIKE, 1.0 / gain)
    monkeypatch.setattr(tune, "measure_products", lambda *a, **k: measure_products(*a, **k, timer=timer(faster)))
    said = list(tune.tune_products(linears, work, MI300, CPU, kept, before))
    assert sum(line.startswith("tuned ") for line in said) == 12
    assert f"{gain:.2f} times as fast" in said[-1]
    assert (kept.get(start.TUNED_PRODUCTS) is not None) is (gain > 1)
    assert fake.calls[-1] == ("enable", False)
    (line,) = tune.tune_products(linears, work, H200, CPU, kept, before)
    assert line.startswith("products: torch tunes")


@pytest.mark.usefixtures("own_tiles")
def test_faster_tiles_are_kept_and_failing_ones_drop_out(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [tiles.Tiles(sizes={"BLOCK_M": size, "BLOCK_N": size}) for size in (16, 32, 64)]
    monkeypatch.setattr(tune, "candidates", lambda kernel: tuple(made))
    facts = dataclasses.replace(STRIX_HALO, architecture="interpreter")
    shape = AttentionShape(images=1, tokens=9, heads=1, head_dim=64, dtype=torch.float32)
    seconds = {16: 1.0, 64: 3.0}

    def timed(calls: Mapping[str, Callable[[], object]], device: torch.device) -> Mapping[str, float]:
        (kernel,) = calls
        calls[kernel]()
        now = tiles.tiles_for(kernel, arch="interpreter", dtype="fp32", head_dim=64, length=9)
        assert now is not None
        if now.sizes["BLOCK_M"] == 32:
            raise RuntimeError("out of registers")
        return {kernel: seconds[now.sizes["BLOCK_M"]]}

    kept = Kept(facts, environment)
    said = list(tune.tune_tiles([shape], facts, CPU, kept, timer=timed, attend=lambda qkv: qkv * 2))
    assert len(said) == 4
    assert "2 tried" in said[0]
    assert "3.00 times as fast" in said[0]
    rows = kept.get(start.TUNED_TILES)
    assert set(rows) == set(tune.ATTENTION_KERNELS)
    tiles.prefer(rows)
    found = tiles.tiles_for("attention_queries", arch="interpreter", dtype="fp32", head_dim=64, length=9)
    assert found is not None
    assert found.sizes["BLOCK_M"] == 16
    assert tiles.tiles_for("attention_queries", arch="interpreter", dtype="fp32", head_dim=64, length=10) != found


def test_candidates_are_all_tiles_of_the_table() -> None:
    found: Sequence[tiles.Tiles] = tune.candidates("attention_forward")
    assert len(found) >= 1
    assert all(found.count(one) == 1 for one in found)
