"""A run whose networks are compiled or recompute: the same mathematics and names, and a resume may change it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dinox_train import platform
from dinox_train.config import ConfigError, difference, validate
from dinox_train.metrics import VARYING, read_lines

Train = Callable[..., int]
SHORT = (
    "train.updates=3",
    "evaluate.every=3",
    "evaluate.windows=4",
    "objective.gram.weight=1.0",
    "objective.gram.start=1",
)

pytestmark = [
    pytest.mark.usefixtures("tiny_preset"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


def lines(folder: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in line.items() if k not in VARYING} for line in read_lines(folder / "metrics.jsonl")]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = folder / "checkpoints/step-00000003"
    found = sorted(checkpoint.rglob("*.safetensors"))
    return {f"{file.stem}/{name}": value for file in found for name, value in load_file(file).items()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plain") / "run"


@pytest.fixture
def run(train: Train, plain: Path) -> Train:
    """`train`, once `plain` holds the same run as it is without any of this."""
    if not plain.exists():
        assert train(plain, *SHORT) == 0
    return train


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """torch.compile with all of its tracing and none of its code generation; the graphs that were made."""
    found: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.compiler.reset()
    return found


@pytest.mark.parametrize("kind", ["block", "selective"])
def test_recomputing_changes_no_bit_and_a_resume_may_begin_with_it(
    tmp_path: Path, run: Train, plain: Path, kind: str
) -> None:
    assert run(tmp_path, *SHORT, "train.updates=1", "evaluate.every=99") == 0
    assert run(tmp_path, *SHORT, f"execution.activation_checkpointing={kind}") == 0
    ours, theirs = lines(tmp_path), lines(plain)
    for name in ("loss_val", "knn_z"):
        ours[0][name] = theirs[0][name]  # the first part was evaluated at its end
    assert ours == theirs
    one, other = tensors(plain), tensors(tmp_path)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert f"activation checkpointing {kind}" in (tmp_path / "train.log").read_text()


@pytest.mark.parametrize("kind", ["blocks", "full"])
def test_a_compiled_run_has_the_same_losses_and_names(
    tmp_path: Path, run: Train, plain: Path, kind: str, graphs: list[torch.fx.GraphModule]
) -> None:
    assert run(tmp_path, *SHORT, f"execution.compile={kind}") == 0
    assert graphs
    for ours, theirs in zip(lines(tmp_path), lines(plain), strict=True):
        for name in ("loss", "loss_gram", "loss_val", "grad_norm"):
            assert ours[name] == (None if theirs[name] is None else pytest.approx(theirs[name], rel=1e-4)), name
    assert tensors(tmp_path).keys() == tensors(plain).keys()


def test_a_stage_may_have_its_own_and_it_is_no_mathematics() -> None:
    stages = ({"updates": 2}, {"execution": {"activation_checkpointing": "block"}})
    other = ({"updates": 2}, {"execution": {"activation_checkpointing": "none"}})
    assert difference(validate({"stages": stages}), validate({"stages": other, "execution": {"compile": "full"}})) == []
    with pytest.raises(ConfigError, match="'blocks'"):
        validate({"stages": ({"execution": {"compile": "all"}},)})


def test_a_machine_without_a_compiler_is_told_before_anything_begins(
    tmp_path: Path, run: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    assert run(tmp_path, "execution.compile=blocks") == 2
    assert "g++" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"execution\.compile"):
        platform.check_compiler(torch.device("cpu"))
