from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import model
import model_figures
import network_case
import numpy as np
import peak_memory
import pytest
import result
import torch
from matrix_floor import Floor, Tensors
from network_case import Case, CaseError
from our_networks import OurNetwork, part_contenders, parts
from torch.utils._python_dispatch import TorchDispatchMode

from dinox_model import ViTConfig
from dinox_model.memory_plan import plan_pass

CPU = torch.device("cpu")
TINY = ViTConfig(width=32, num_layers=2, num_heads=2, mlp_hidden=64, patch_size=8)


class Products(TorchDispatchMode):
    """Counts matrix products by the lengths of their three sides, and attentions by their shape."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0].removeprefix("aten::")
        if name in ("mm", "addmm"):
            left, right = args[-2:]
            self.found[tuple(sorted((*left.shape, right.shape[1])))] += 1
        elif name.startswith("_scaled_dot_product"):
            query = args[1] if name.endswith("_backward") else args[0]
            self.found[name, *query.shape] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads and the process's way with memory stay what they are."""
    monkeypatch.setattr(model, "keep_freed_memory", lambda: False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def case() -> Case:
    return Case(name="tiny", config=TINY, size=32, batch=2, precision="fp32", device=CPU, threads=1)


def floor_of(config: ViTConfig, images: int, size: int, *, backward: bool) -> Floor:
    floor = Floor(Tensors(CPU, torch.float32), backward=backward)
    floor.network(config, images, size)
    return floor


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_the_floor_has_the_networks_products_and_no_others(case: Case, mlp: Any) -> None:
    config = replace(TINY, mlp=mlp)
    ours = OurNetwork(replace(case, config=config), replace(case, config=config).model())
    for run, backward in ((ours.forward, False), (ours.both, True)):
        floor = floor_of(config, 2, 32, backward=backward)
        with Products() as in_network:
            run()
        with Products() as in_floor:
            floor.run()
        assert in_floor.found == in_network.found
        assert sum(in_floor.found.values()) == (3 if backward else 1) * (1 + 2 * (6 if mlp == "swiglu" else 5)) - (
            1 + 2 if backward else 0
        ), "the first product has no gradient of its input; attention is one operation in the backward"


def test_a_floor_runs_again_and_keeps_no_gradients() -> None:
    floor = floor_of(TINY, 1, 16, backward=True)
    peaks = [peak_memory.peak_bytes(floor.run, CPU, ()) for _ in range(2)]
    assert peaks[0] == peaks[1] > 0


def test_peak_memory_counts_what_is_there_at_once() -> None:
    def run() -> None:
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        third = torch.empty(250)
        del second, third

    held = torch.empty(10)
    assert peak_memory.peak_bytes(run, CPU, [held, held[:5]]) == 4 * (1500 + 10)


@pytest.mark.parametrize("which", ["forward", "both"])
def test_measured_memory_is_the_plans(case: Case, which: Any) -> None:
    wide = replace(case, size=64, config=replace(TINY, width=64, mlp_hidden=256))
    planned = plan_pass(wide.config, wide.batch, wide.size, backward=which == "both").peak
    measured = OurNetwork(wide, wide.model()).memory(which)
    assert measured == pytest.approx(planned, rel=0.05)


def test_parts_are_all_of_a_block(case: Case) -> None:
    """Put together, they do what the network does: each is called as often as counted, on what it really gets."""
    ours = OurNetwork(case, case.model())
    found = {part.name: part for part in parts(ours)}
    counts, setups = part_contenders(ours, "both")
    assert counts == {name: part.count for name, part in found.items()}
    for setup in setups.values():
        assert setup().run() == 1.0
    with Products() as in_parts, torch.no_grad():
        for part in found.values():
            for _ in range(part.count):
                part.run(*part.inputs)
    with Products() as in_network:
        ours.forward()
    assert in_parts.found == in_network.found
    calls: Counter[str] = Counter()
    for name, module in ours.model.named_modules():
        kind = "norm" if name.rpartition(".")[2] in ("norm", "norm1", "norm2") else name.rpartition(".")[2]
        module.register_forward_hook(lambda *_, kind=kind: calls.update([kind]))
    ours.forward()
    for part, module in (("norm", "norm"), ("mlp", "mlp"), ("projection", "projection"), ("qkv", "qkv")):
        assert calls[module] == counts[part]


def test_other_features_are_refused(case: Case, tmp_path: Path) -> None:
    mine = case.model()
    features = network_case.all_tokens(mine(case.input())).detach()
    features.requires_grad_(False)
    hidden = network_case.all_tokens(mine(case.input()))
    hidden.sum().backward()
    bias = mine.patch_embed.bias.grad
    assert bias is not None
    np.save(tmp_path / "gradient.npy", (bias / bias.abs().max()).numpy())
    mine.zero_grad()
    np.save(tmp_path / "hidden.npy", features.numpy())
    assert case.compare(tmp_path, mine) < 1e-5
    np.save(tmp_path / "hidden.npy", features.numpy() + 0.01)
    with pytest.raises(CaseError, match="hidden of transformers differ"):
        case.compare(tmp_path, mine)
    np.save(tmp_path / "hidden.npy", np.full_like(features.numpy(), np.nan))
    with pytest.raises(CaseError, match="hidden"):
        case.compare(tmp_path, mine)


def test_what_transformers_cannot_be(case: Case) -> None:
    assert case.peer_cannot() is None
    assert "norm" in str(replace(case, config=replace(TINY, norm="rms")).peer_cannot())
    learned = replace(TINY, positions="learned", learned_grid=(4, 4))
    assert "rotary" in str(replace(case, config=learned).peer_cannot())


def measured(tmp_path: Path, *options: str) -> result.Result:
    config = tmp_path / "mine.yaml"
    config.write_text(TINY.to_yaml(), encoding="utf-8")
    output = tmp_path / "out" / "model.json"
    arguments = ["--config", str(config), "--sizes", "16,32", "--batch", "2", "--threads", "1", "--quick"]
    assert model.main([*arguments, "--output", str(output), *options]) == 0
    return result.read(output)


def test_a_users_own_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = measured(tmp_path)
    assert [one["name"] for one in made.data] == ["mine 16", "mine 32"]
    figures = {figure.name: figure for figure in made.figures}
    for label in ("mine 16", "mine 32"):
        for which in ("forward", "forward+backward"):
            prefix = f"{label} {which}: "
            assert figures[f"{prefix}ours / floor"].value > 0.5
            assert figures[f"{prefix}memory, measured and planned apart"].value < model_figures.MEMORY_LIMIT
            assert figures[f"{prefix}part rotation, 4 x"].unit == "% of the time"
    assert [target.passed for target in made.targets] == [True] * 4
    assert any("no peer" in note for note in made.notes)
    said = capsys.readouterr().out
    assert "| mlp | 2 |" in said
    rows = (tmp_path / "out" / "model.csv").read_text("utf-8").splitlines()
    assert len(rows) == 1 + len(made.figures)
    assert (tmp_path / "out" / "model.png").stat().st_size > 1000


def test_forward_only(tmp_path: Path) -> None:
    made = measured(tmp_path, "--pass", "forward")
    assert not any("backward" in figure.name for figure in made.figures)


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed here")
def test_beside_transformers(tmp_path: Path, repository: Path) -> None:
    import sys

    made = measured(tmp_path, "--peers", sys.executable)
    figures = {figure.name: figure for figure in made.figures}
    assert figures["mine 32 forward: ours, throughput over transformers"].value > 0.1
    assert made.conditions["largest difference, mine 32"] < 1e-4
    assert set(made.versions["peers"]) == {"torch", "transformers", "numpy"}


def test_targets_of_vit_s(case: Case) -> None:
    made = result.begin("model", data=[], conditions={}, versions={})
    for which in ("forward", "forward+backward"):
        made.exact(f"vit_s 224 {which}: ours / floor", 1.06, "× the time", better="lower")
        made.exact(f"vit_s 224 {which}: memory, measured and planned apart", 1.02, "×", better="lower")
    model_figures.targets(made, [replace(case, name="vit_s", size=224)], ["forward", "both"])
    assert [(target.limit, target.passed) for target in made.targets] == [(1.05, False), (1.1, True)] * 2


def test_what_cannot_be_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("widht: 32\n", encoding="utf-8")
    assert model.main(["--config", str(wrong), "--output", str(tmp_path / "a.json")]) == 2
    assert "widht" in capsys.readouterr().err
    assert model.main(["--config", str(tmp_path / "none.yaml"), "--output", str(tmp_path / "a.json")]) == 2
    with pytest.raises(SystemExit):
        model.main(["--help"])
    assert "examples:" in capsys.readouterr().out
