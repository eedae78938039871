"""optimizer.py from end to end on a tiny network, and that it times no two updates that differ."""

from pathlib import Path

import optimizer
import pytest
import result
import torch

import dinox_model

TINY = dinox_model.ViTConfig(width=32, num_layers=1, num_heads=2, mlp_hidden=64)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """`vit_ti` is a network that a test can afford, and copies are small."""
    monkeypatch.setitem(dinox_model.PRESETS, "vit_ti", TINY)
    monkeypatch.setattr(optimizer, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(optimizer, "HIDDEN", 32)


def test_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    assert optimizer.main(["--quick", "--prototypes", "16", "--output", str(tmp_path / "made.json")]) == 0
    made = result.read(tmp_path / "made.json")
    figures = {figure.name: figure.value for figure in made.figures}
    assert figures["update"] > figures["adamw"] > 0
    assert figures["update / byte floor"] > 0
    assert figures["floor: bytes a parameter"] == 40
    update = optimizer.Update("vit_ti", 16, CPU)
    assert made.conditions["parameters"] == sum(p.numel() for p in update.student.network.parameters())
    assert len(made.targets) == 2
    assert "update / torch foreach" in capsys.readouterr().out
    assert torch.get_num_threads() == threads


def test_the_clipped_update_is_clipped_each_time() -> None:
    update = optimizer.Update("vit_ti", 16, CPU)
    for _ in range(3):
        before = float(update.student.named[-1][1].grad.norm())  # type: ignore[union-attr]
        update.clipped()
        assert float(update.student.named[-1][1].grad.norm()) < before  # type: ignore[union-attr]


def test_updates_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer.check("vit_ti", 16, CPU)
    monkeypatch.setattr(optimizer.Update, "average", lambda self: None)
    with pytest.raises(ValueError, match="not the same work"):
        optimizer.check("vit_ti", 16, CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert optimizer.main(["--device", "cuda"]) == 2
    assert "no GPU" in capsys.readouterr().err
