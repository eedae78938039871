"""benchmarks/kernels.py and gpu_suite.py end to end, tiny, on the CPU: what they count, what they say of errors."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import gpu_suite
import kernel_traffic
import kernel_trials
import kernels
import pytest
import result
import torch
from attention_case import AttentionCase, contender, usable
from operator_bytes import eager_bytes, planned_bytes
from torch import Tensor
from update_arms import EAGER, ArmResult, arms

from dinox_model.kernels.traffic import Traffic

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # in torch's compiler


def twice_plus_one(x: Tensor) -> Tensor:
    return (x * 2.0 + 1.0).transpose(0, 1)


def test_bytes_of_operators_and_of_their_plan() -> None:
    """A product, a sum, a view: eager reads and writes twice, the plan once; backward one product more."""
    x, size = torch.ones(64, 32), 64 * 32 * 4
    assert eager_bytes(twice_plus_one, [x], backward=False) == 4 * size
    assert planned_bytes(twice_plus_one, [x], backward=False) == 2 * size


@pytest.fixture
def one_case(monkeypatch: pytest.MonkeyPatch) -> kernel_traffic.TrafficCase:
    case = kernel_traffic.TrafficCase(
        name="made up",
        shape="64 x 32",
        kernel=Traffic(8192, 8192),
        reference=Traffic(16384, 16384),
        work=twice_plus_one,
        inputs=lambda: [torch.ones(64, 32)],
    )
    opaque = kernel_traffic.TrafficCase("opaque", "none", Traffic(1000, 0), Traffic(4000, 0))
    monkeypatch.setattr(kernel_traffic, "cases", lambda *, quick: [case, opaque])
    return case


def test_the_benchmark_of_bytes(
    one_case: kernel_traffic.TrafficCase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kernels.main(["--quick", "--output", str(tmp_path / "kernels.json")]) == 0
    figures = {figure.name: figure.value for figure in result.read(tmp_path / "kernels.json").figures}
    assert figures["made up (64 x 32): eager / kernel"] == 2.0
    assert figures["made up (64 x 32): torch.compile / kernel"] == 1.0
    assert figures["opaque (none): eager / kernel"] == 4.0
    assert "opaque (none): torch.compile" not in figures
    assert "no GPU: nothing was timed" in capsys.readouterr().out


def test_every_kernel_moves_less_than_eager_torch() -> None:
    found = kernel_traffic.cases(quick=False)
    assert {case.name for case in found} >= {"attention", "rotate", "residual_norm", "crop", "unfilter"}
    for case in found:
        assert 0 < case.kernel.bytes < case.reference.bytes, case.name


def test_attention_is_compared_before_it_is_timed() -> None:
    case = AttentionCase.of(9, 64, CPU)
    faults = usable(case, ("sdpa-flash", "sdpa-cudnn", "math"))
    assert faults["sdpa-flash"] == faults["math"] == ""
    assert "does not run" in faults["sdpa-cudnn"]
    for backward in (False, True):
        prepared = contender(case, "math", backward=backward)()
        assert prepared.run() == case.flops(backward=backward) == 4 * 81 * 64 * (2.5 if backward else 1)


def test_a_kernel_that_is_wrong_is_found() -> None:
    good, *_ = kernel_trials.trials(CPU, [torch.float32], quick=True)
    assert good.run().fault is None
    wrong = kernel_trials.KernelTrial(good.name, lambda qkv: 1.01 * good.plain(qkv), good.plain, good.inputs)
    assert "wrong: error of the outputs" in str(wrong.run().fault)
    assert kernel_trials.unfilter_difference(CPU, 16) == 0


def test_arms_of_an_update() -> None:
    assert arms(CPU) == (EAGER,)
    one, other = ArmResult([2.0, 4.0], [1.0], 0, 3), ArmResult([2.0, 5.0], [1.0], 0, 3)
    assert one.furthest_from(other) == pytest.approx(0.2)


def test_the_suite_runs_and_keeps_the_errors_of_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(self: gpu_suite.Suite) -> None:
        raise RuntimeError("no such instruction")

    trial, *_ = kernel_trials.trials(CPU, [torch.float32], quick=True)
    monkeypatch.setattr(kernel_trials, "trials", lambda *_, **__: [trial])
    monkeypatch.setattr(gpu_suite.Suite, "packed", fails)
    file = tmp_path / "suite.json"
    assert gpu_suite.main(["--device", "cpu", "--quick", "--output", str(file)]) == 1
    made = result.read(file)
    parts = made.conditions["parts"]
    assert list(parts) == ["correct", "update", "attention", "packed"]
    assert [name for name, part in parts.items() if part["error"]] == ["packed"]
    assert "RuntimeError: no such instruction" in parts["packed"]["error"]
    figures = {figure.name: figure.value for figure in made.figures}
    assert figures["kernels that are wrong, or do not run"] == 0
    assert figures["update, eager"] > 0
    assert any(name.endswith("forward: triton / sdpa-flash") for name in figures)
    assert len(made.conditions["losses"]["eager"]) == 2
    assert json.loads(file.read_text())["benchmark"] == "gpu_suite"
    assert "no such instruction" in capsys.readouterr().out


def test_a_suite_whose_time_is_up_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "BUDGET_S", -1.0)
    suite = gpu_suite.Suite(CPU, 1, quick=True)
    assert not suite.run()
    assert all(part["error"] == "not begun: the time was up" for part in suite.made.conditions["parts"].values())


WITHOUT_PACKAGES = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[2].split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
sys.path.insert(0, sys.argv[1])
import gpu_suite
"""


def test_the_suite_needs_torch_numpy_and_triton_only(repository: Path) -> None:
    described = tomllib.loads((repository / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    names = [re.split(r"[<>=]", line)[0] for line in described] + ["yaml", "PIL", "transformers", "psutil"]
    blocked = " ".join(name for name in names if name not in ("torch", "numpy"))
    command = [sys.executable, "-c", WITHOUT_PACKAGES, str(repository / "benchmarks"), blocked]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.main([]) == kernels.main(["--device", "cuda"]) == 2
    assert "there is no GPU here" in capsys.readouterr().err
