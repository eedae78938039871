"""Weights that two ranks share are those of one process: gradients, clipping, updates, averages, checkpoints."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinox_model import ViTConfig, build
from dinox_model.execution import Execution, prepare
from dinox_model.heads.prototype import PrototypeHead
from dinox_train.checkpoint import optimizer_tensors, restore_optimizer
from dinox_train.network import Network
from dinox_train.optimizer import clip_gradients, make_optimizer, set_group_values
from dinox_train.part import Part, part_of_rank, rows_of_rank, values_of, with_values
from dinox_train.platform import autocast
from dinox_train.working_weights import MasterWeights
from tests.train.gloo_ranks import run_ranks

COUNT, IMAGES, PIECES = 2, 4, 2
VIT = ViTConfig(width=32, num_layers=2, num_heads=2, mlp_hidden=40, layer_scale=0.5, num_registers=1)
MOMENTUM, CLIP, RATE = 0.9, 50.0, 1e-2
SCALE = 1000.0
"""Of the loss: gradients far above AdamW's eps, below which a step is made of their rounding."""


MASKS = torch.arange(16)[None] % 3 == 0


class Settings:
    beta1, beta2, layer_decay, patch_embed_scale = 0.9, 0.999, 0.9, 0.5


class Scaled(nn.Module):
    """A head with parameters of one element and of a row, which most ranks hold nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 1)
        self.token = nn.Parameter(torch.full((1, 7), 0.5))
        with torch.no_grad():
            self.linear.weight.copy_(torch.linspace(-1, 1, 7)[None])
            self.linear.bias.fill_(0.25)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x[..., :7] + self.token)


def network(seed: int) -> Network:
    return Network(build(VIT, seed=seed), {"dino": PrototypeHead(32, 25, 7, 11, seed=seed), "one": Scaled()})


def views(rank: int = 0, count: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Global and local views, by micro-batch; of each the rows of this rank."""
    random = torch.Generator().manual_seed(5)
    found = []
    for _ in range(PIECES):
        whole = torch.randn(IMAGES, 3, 64, 64, generator=random), torch.randn(IMAGES, 3, 32, 32, generator=random)
        rows = IMAGES // count
        found.append((whole[0][rank * rows : (rank + 1) * rows], whole[1][rank * rows : (rank + 1) * rows]))
    return found


def loss_of(student: Network, target: Tensor, large: Tensor, small: Tensor) -> Tensor:
    """A share of a loss that asks the backbone twice and the head three times before one backward."""
    seen, local = student.backbone(large, MASKS.expand(len(large), -1)), student.backbone(small)
    logits = [student.heads["dino"](x) for x in (seen.cls, local.cls, seen.patches[:, :2].flatten(0, 1))]
    wanted = [target, target, target.repeat_interleave(2, 0)]
    crosses = [-(to * torch.log_softmax(of.float(), -1)).sum() for to, of in zip(wanted, logits, strict=True)]
    return SCALE * (sum(crosses) + student.heads["one"](local.cls).float().square().sum()) / (IMAGES * PIECES)


def one_update(
    student: Any,
    teacher: Any,
    batches: list[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    *,
    precision: str,
    applied: float,
    all_reduce: Any = None,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """An update as train_step does it; the gradients before they were clipped, their norm, and the loss."""
    where = torch.device("cpu")
    with torch.no_grad(), autocast(where, precision):
        seen = [teacher.network.backbone(large).cls for large, _ in batches]
        targets = [teacher.network.heads["dino"](cls).softmax(-1) for cls in seen]
        for large, _ in batches:  # what ties images together asks the student without gradients first
            student.network.backbone(large)
    student.zero_gradients()
    total = torch.zeros(())
    for (large, small), target in zip(batches, targets, strict=True):
        with autocast(where, precision):
            share = loss_of(student.network, target, large, small)
        share.backward()
        student.gather_gradients()
        total += share.detach()
    gradients = {name: rows.grad.clone() for name, rows in student.named if rows.grad is not None}
    clipped = clip_gradients(student.named, CLIP, by_part=True, all_reduce=all_reduce)
    assert clipped.clipped == 1
    set_group_values(optimizer, RATE, 0.1)
    optimizer.found_inf = torch.tensor(1.0 - applied)  # type: ignore[attr-defined]
    optimizer.step()
    teacher.follow(student, MOMENTUM, torch.tensor(applied))
    for weights in (student, teacher):
        weights.refresh()
    return gradients, clipped.norm, total


def sum_or_maximum(values: Tensor, operation: str) -> Tensor:
    from torch import distributed

    found = values.clone()
    distributed.all_reduce(found, {"sum": distributed.ReduceOp.SUM, "max": distributed.ReduceOp.MAX}[operation])
    return found


def near(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    assert found.shape == wanted.shape, what
    if wanted.numel():
        largest, strayed = float(wanted.abs().max()), float((found - wanted).abs().max())
        assert strayed <= tolerance * max(1.0, largest), f"{what}: {strayed:.1e} off, of {largest:.1e}"


def sharded(seed: int, count: int, precision: str) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    from dinox_train.sharded_weights import ShardedWeights

    return ShardedWeights(network(seed), init_device_mesh("cpu", (count,)), precision)


def updates_equal(
    rank: int, count: int, precision: str, tolerance: float, execution: Execution, number_of_updates: int
) -> tuple[Any, torch.optim.Optimizer, Any]:
    """Updates of several ranks and of one process side by side, the second of them masked; student, its optimizer, and
    teacher of the ranks."""
    student, teacher = sharded(1, count, precision), sharded(2, count, precision)
    whole_student, whole_teacher = (MasterWeights(network(seed), precision) for seed in (1, 2))
    for weights in (teacher, whole_teacher):
        weights.network.requires_grad_(False)
    prepare(student.network.backbone, execution)
    optimizer, whole_optimizer = (make_optimizer(one.named, Settings()) for one in (student, whole_student))
    first = {name: rows.detach().clone() for name, rows in student.named}
    for number in range(number_of_updates):
        kept: dict[str, Any] = {"precision": precision, "applied": float(number != 1)}
        found = one_update(student, teacher, views(rank, count), optimizer, all_reduce=sum_or_maximum, **kept)
        wanted = one_update(whole_student, whole_teacher, views(), whole_optimizer, **kept)
        assert found[0].keys() == wanted[0].keys() == dict(student.named).keys()
        length = float(wanted[1])  # of the whole gradient; where sums cancel, a small one is its rounding
        for name, gradient in found[0].items():
            whole = student.parts[name].of(wanted[0][name])
            near(gradient / length, whole / length, tolerance, f"gradient of {name}, update {number}")
        near(found[1] / length, wanted[1] / length, tolerance, "norm")
        near(sum_or_maximum(found[2], "sum"), wanted[2], tolerance, "loss")
        for own, theirs in ((student, whole_student), (teacher, whole_teacher)):
            for (name, rows), (_, of_whole) in zip(own.named, theirs.named, strict=True):
                near(rows.detach(), own.parts[name].of(of_whole.detach()), tolerance, f"{name}, update {number}")
    assert all(not torch.equal(first[name], rows) for name, rows in student.named if rows.numel())
    for weights in (student, teacher):  # forwards are forgotten: no list grows over a run
        for root in (weights.network.backbone, *weights.network.heads.values()):
            assert not getattr(root._get_fsdp_state()._comm_ctx, "post_forward_order", [])
    return student, optimizer, teacher


def values_come_and_go(rank: int, count: int, folder: Path, student: Any, optimizer: Any, teacher: Any) -> None:
    """Whole tensors out and in, rows from network to network, and a checkpoint of student and optimizer."""
    from dinox_train import sharded_checkpoint
    from dinox_train.sharded_weights import ShardedWeights

    whole = student.gathered()
    assert (whole is None) == (rank != 0)
    if whole is not None:
        assert {name: value.shape for name, value in whole.items()} == shapes_of(network(1))
        backbone = {name.removeprefix("backbone."): value for name, value in whole.items() if "backbone." in name}
        build(VIT, seed=3).load_state_dict(backbone)
    held = {"student": student.state_dict(), "optimizer": student.moments(optimizer_tensors(optimizer, student.named))}
    sharded_checkpoint.write(folder / "saved", held, None)
    read = sharded_checkpoint.read(folder / "saved", "student")
    for name, value in (whole or {}).items():
        assert torch.equal(read[name], value), name
    other = sharded(5, count, "fp32")
    other.load_state_dict(read)
    again = sharded(6, count, "fp32")
    sharded_checkpoint.read_into(folder / "saved", "student", again.state_dict())
    moments = again.empty_moments(sharded_checkpoint.shapes(folder / "saved", "optimizer"))
    sharded_checkpoint.read_into(folder / "saved", "optimizer", moments)
    fresh = make_optimizer(again.named, Settings())
    restore_optimizer(fresh, again.named, values_of(moments))
    for (name, rows), (_, loaded), (_, filled) in zip(student.named, other.named, again.named, strict=True):
        assert torch.equal(rows, loaded), name
        assert torch.equal(rows, filled), name
        for kind, value in optimizer.state[rows].items():
            assert torch.equal(fresh.state[filled][kind], value), (kind, name)
    # What was loaded is what a forward gathers.
    large = views(rank, count)[0][0]
    with torch.no_grad():
        features = [one.network.backbone(large).cls for one in (student, other, again)]
    assert torch.equal(features[0], features[1])
    assert torch.equal(features[0], features[2])
    gram = ShardedWeights(build(VIT, seed=9).requires_grad_(False), student.mesh, "fp32")
    gram.take_from(teacher, "backbone.")
    with torch.no_grad():
        assert torch.equal(gram.network(large).patches, teacher.network.backbone(large).patches)
    for changed, said in (({"x": torch.zeros(1)}, "missing"), ({"heads.one.token": torch.zeros(2, 7)}, r"\(2, 7\)")):
        with pytest.raises(RuntimeError, match=said):
            other.load_state_dict(read | changed)


def shapes_of(of: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in of.state_dict().items()}


def what_each_rank_does(rank: int, count: int, folder: Path) -> None:
    """Every check that needs processes, in one start of them."""
    made = updates_equal(rank, count, "fp32", 1e-6, Execution(), 2)
    values_come_and_go(rank, count, folder, *made)
    updates_equal(rank, count, "bf16", 2e-2, Execution(), 1)
    updates_equal(rank, count, "fp32", 1e-6, Execution(checkpointing="selective"), 1)
    # What a rank compiles is its own matter, and takes its time: one does.
    torch.compile = partial(torch.compile, backend="eager")  # type: ignore[assignment]
    updates_equal(rank, count, "fp32", 1e-6, Execution(compile="off" if rank else "blocks"), 1)
    (folder / f"done-{rank}").touch()


def test_two_ranks_are_one_process(tmp_path: Path) -> None:
    run_ranks(what_each_rank_does, COUNT, tmp_path)
    assert len(list(tmp_path.glob("done-*"))) == COUNT


@pytest.mark.parametrize(("rows", "count"), [(7, 3), (2, 3), (1, 4), (6, 2), (5, 4), (0, 2)])
def test_rows_are_those_of_chunk(rows: int, count: int) -> None:
    whole = torch.arange(rows)
    pieces = whole.chunk(count) if rows else ()
    for rank in range(count):
        first, many = rows_of_rank(rows, rank, count)
        assert torch.equal(whole[first : first + many], pieces[rank] if rank < len(pieces) else whole[:0])


def test_a_part_knows_its_rows() -> None:
    part = part_of_rank(torch.zeros(2, 4), torch.Size((7, 4)), 1, 4)
    assert (part.first, part.offsets) == (2, (2, 0))
    assert torch.equal(part.of(torch.arange(28).view(7, 4)), torch.arange(28).view(7, 4)[2:4])
    with pytest.raises(ValueError, match="expected"):
        part.of(torch.zeros(6, 4))
    with pytest.raises(ValueError, match="not 2 rows"):
        part_of_rank(torch.zeros(3, 4), torch.Size((7, 4)), 1, 4)
    held = {"a": part, "b": torch.zeros(1)}
    copies = {name: value + 1 for name, value in values_of(held).items()}
    again = with_values(held, copies)
    assert isinstance(again["a"], Part)
    assert again["a"].values is copies["a"]
    assert (again["a"].first, again["b"]) == (2, torch.ones(1))


def test_a_graph_of_the_whole_network_is_refused() -> None:
    from dinox_train.sharded_weights import check_execution

    check_execution(Execution(compile="blocks", checkpointing="block"))
    with pytest.raises(ValueError, match="compile: full does not go with"):
        check_execution(Execution(compile="full"))


def test_a_norm_over_ranks_is_that_of_all_rows() -> None:
    whole = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))

    def clipped(rows: Tensor, all_reduce: Any) -> tuple[Any, Tensor]:
        parameter = nn.Parameter(torch.zeros_like(rows))
        parameter.grad = rows.clone()
        return clip_gradients([("backbone.x", parameter)], 0.5, by_part=True, all_reduce=all_reduce), parameter.grad

    other = whole[2:].square().sum()
    wanted, of_whole = clipped(whole, None)
    found, of_rows = clipped(whole[:2], lambda values, _: values + other)
    near(found.norm, wanted.norm, 1e-6, "norm")
    near(of_rows, of_whole[:2], 1e-6, "clipped")
    assert clipped(whole[:2], lambda values, _: values * torch.nan)[0].norm.isnan()
