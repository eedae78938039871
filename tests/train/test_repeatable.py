"""Equal config and seed give equal losses, and env.json says on what."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dinox_train.metrics import read_lines
from dinox_train.platform import describe, make_deterministic

pytestmark = pytest.mark.usefixtures("tiny_preset")


@pytest.fixture
def switches_put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    cudnn = torch.backends.cudnn
    kept = cudnn.deterministic, cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    cudnn.deterministic, cudnn.benchmark = kept


@pytest.mark.usefixtures("switches_put_back")
@pytest.mark.parametrize("key", ["deterministic=false", "deterministic=true"])
def test_two_runs_are_equal_bit_for_bit(tmp_path: Path, train: Callable[..., int], key: str) -> None:
    losses = []
    for name in ("one", "other"):
        assert train(tmp_path / name, key, "train.updates=4", "evaluate.windows=4") == 0
        losses.append([(line["loss"], line["grad_norm"]) for line in read_lines(tmp_path / name / "metrics.jsonl")])
    assert losses[0] == losses[1]
    assert torch.are_deterministic_algorithms_enabled() == (key == "deterministic=true")
    said = (tmp_path / "one/train.log").read_text()
    assert ("CUBLAS_WORKSPACE_CONFIG=:4096:8" in said) == (key == "deterministic=true")


@pytest.mark.usefixtures("switches_put_back")
def test_a_workspace_that_is_free_is_refused() -> None:
    with pytest.raises(ValueError, match="CUBLAS_WORKSPACE_CONFIG=:0:0 lets cuBLAS sum in any order"):
        make_deterministic({"CUBLAS_WORKSPACE_CONFIG": ":0:0"})
    environment: dict[str, str] = {}
    make_deterministic(environment)
    assert environment == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def test_the_environment_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    noted = describe(torch.device("cpu"))
    assert noted["kernel"] == os.uname().release
    assert {"driver", "commit", "dirty", "cuda", "rocm", "gpu"} <= noted.keys()
    assert noted["packages"].keys() >= {"dinox", "torch", "triton"}
    assert (noted["commit"] is None) == (noted["dirty"] is None)
    assert noted["commit"] is None or len(noted["commit"]) == 40
