"""Bytes between ranks: by hand, and as a real update of two processes sends them; memory and tables follow."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import communication
import numpy as np
import pytest
import torch
from collective_bytes import Collective, Pieces, collectives_of, couples, pieces_of, sent_bytes
from communication import ARMS, LINKS, Arm, Case, Link
from rank_memory import RankMemory, items_of, memory_of_rank
from result import read

from dinox_model import PRESETS, Preprocess
from dinox_train.config import Config, load_config
from dinox_train.learner import Learner, make_objective, vit_config
from dinox_train.micro_batch import GlobalBatch
from dinox_train.parallel import Parallel
from dinox_train.plan_report import LARGER_BY, RUNTIME_BYTES
from dinox_train.prototype_counts import with_prototypes
from dinox_train.ranks import Ranks
from dinox_train.span import Span
from dinox_train.view_batch import ViewBatch
from tests.train.gloo_ranks import run_ranks

SETTINGS = (
    "device=cpu", "model.preset=vit_ti", "views.global_size=32", "views.local_size=16", "views.num_local=2",
    "objective.prototypes=48", "objective.ibot.prototypes=40", "objective.head_hidden=24",
    "objective.head_bottleneck=16", "train.batch_size=8", "train.accumulation=2",
)  # fmt: skip
TINY = replace(PRESETS["vit_ti"], num_layers=2, width=32, num_heads=2, mlp_hidden=64)
RANKS = 2


def config_of(mode: str, *settings: str) -> Config:
    PRESETS["vit_ti"] = TINY
    return with_prototypes(load_config([], [*SETTINGS, f"parallel.mode={mode}", *settings]))


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "vit_ti", TINY)


def counted(name: str, of: Callable[..., Any], found: list[tuple[str, int]]) -> Callable[..., Any]:
    """`of`, a function of torch.distributed, that notes the bytes of the whole tensor."""

    def call(*arguments: Any, **named: Any) -> Any:
        tensors = [one for one in (*arguments, *named.values()) if isinstance(one, torch.Tensor)]
        if tensors[0].dtype != torch.int64:  # what the hosts agree on goes between the hosts alone
            found.append((name, max(one.nbytes for one in tensors)))
        return of(*arguments, **named)

    return call


def sends(rank: int, count: int, folder: Path) -> None:
    """Do an update of each arm as a rank, and write what it sent: by operation, how often and how many bytes."""
    from torch import distributed

    found: list[tuple[str, int]] = []
    for name in NAMES.values():
        setattr(distributed, name, counted(name, getattr(distributed, name), found))
    for number, arm in enumerate(MEASURED):
        learner, parts = own_part(rank, count, *arm)
        learner.step(parts, 1)  # ddp makes its buckets anew after the first
        found.clear()
        learner.step(parts, 2)
        sums: Counter[str] = Counter()
        for name, size in found:
            sums[f"{name} calls"] += 1
            sums[name] += size
        (folder / f"sent-{number}-{rank}.json").write_text(json.dumps(sums))


def own_part(rank: int, count: int, mode: str, *settings: str) -> tuple[Learner, list[ViewBatch]]:
    """A rank's learner, and its part of a batch."""
    from torch.distributed.device_mesh import init_device_mesh

    from dinox_train import parallel

    config = config_of(mode, *settings)
    mesh = init_device_mesh("cpu", (count,)) if mode == "fsdp" else None
    ranks = Ranks(rank, count, parallel._all_reduce)
    alike = Parallel(torch.device("cpu"), mode, ranks, mesh=mesh)  # type: ignore[arg-type]
    learner = Learner(config, Preprocess(), torch.device("cpu"), parallel=alike)
    images, pieces = config.train.batch_size, config.train.accumulation
    own = images // pieces // count
    batch = GlobalBatch(learner.recipe(images), 0, gram=False)
    windows = torch.from_numpy(np.random.default_rng(0).integers(-1000, 1000, (images, 3, 48, 48)).astype(np.int16))
    parts = []
    for piece in range(pieces):
        rows = piece * own * count + rank * own + np.arange(own)
        parts.append(batch.micro_batch(windows[rows], rows, np.full((own, 2), 48), np.ones((own, 3)))[0])
    return learner, parts


NAMES = {"sum": "all_reduce", "gather": "all_gather_single", "scatter": "reduce_scatter_single"}
MEASURED = (
    ("ddp",),
    ("ddp", "objective.balance=centering", "objective.koleo.group=2"),
    ("fsdp",),
    (
        "fsdp",
        "objective.koleo.group=2",
        "views.num_local=0",
        "objective.ibot.head=shared",
        "objective.ibot.prototypes=null",
    ),
)


def test_a_real_update_sends_what_is_counted(tmp_path: Path) -> None:
    run_ranks(sends, RANKS, tmp_path)
    for number, (mode, *settings) in enumerate(MEASURED):
        wanted: Counter[str] = Counter()
        for one in collectives_of(config_of(mode, *settings), mode, RANKS):  # type: ignore[arg-type]
            wanted[f"{NAMES[one.operation]} calls"] += one.count
            wanted[NAMES[one.operation]] += one.bytes
        for rank in range(RANKS):
            assert json.loads((tmp_path / f"sent-{number}-{rank}.json").read_text()) == dict(wanted), (mode, settings)


def test_pieces_are_all_parameters() -> None:
    config = config_of("ddp")
    vit, objective = vit_config(config), make_objective(config)
    qkv, projection, mlp = 3 * 32 * 32 + 2 * 32, 32 * 32 + 32, 32 * 64 + 64 + 64 * 32 + 32
    block = qkv + projection + mlp + 2 * 2 * 32 + 2 * 32  # and norms and scales
    pieces = pieces_of(vit, objective, 1)
    learner = Learner(config, Preprocess(), torch.device("cpu"))
    numbers = {name: one.numel() for name, one in learner.student.named_parameters()}
    assert pieces.blocks == 2 * block
    assert pieces.blocks + pieces.root + sum(pieces.heads) == sum(numbers.values())
    padded = pieces_of(vit, objective, 64)
    assert padded.root - pieces.root >= 3 * (64 - 1) * 32  # CLS, mask and register tokens: their one row became 64
    assert padded.largest == max(padded.blocks // 2, padded.root, *padded.heads)


def test_bytes_by_hand() -> None:
    """A ring of 4: a sum sends 2 x 3/4 of the bytes, a gather 3/4; and as many messages as there are turns."""
    summed = Collective(what="", operation="sum", count=5, bytes=400, behind="nothing")
    gathered = Collective(what="", operation="gather", count=5, bytes=400, behind="compute")
    assert (summed.sent(4), gathered.sent(4)) == (600.0, 300.0)
    assert (summed.hops(4), gathered.hops(4)) == (30, 15)
    assert sent_bytes([summed, gathered], 4) == 900.0


def test_ddp_sends_gradients_once_an_update() -> None:
    """By hand: 4 bytes a parameter, whatever the micro-batches; Sinkhorn 3 turns of a maximum and a sum a head."""
    config = config_of("ddp", "objective.koleo.weight=0")
    found = {one.what: one for one in collectives_of(config, "ddp", 2)}
    pieces = pieces_of(vit_config(config), make_objective(config), 1)
    assert found["gradients"].bytes == 4 * (pieces.blocks + pieces.root + sum(pieces.heads))
    assert found["Sinkhorn"].count == 3 * 2 * 2
    assert found["Sinkhorn"].bytes == 3 * 2 * 4 * (48 + 40)
    assert found["figures of features"].bytes == 4 * 2 * 8 * 32
    assert collectives_of(config, "ddp", 1) == []


def test_fsdp_gathers_for_every_pass_of_every_micro_batch() -> None:
    config = config_of("fsdp", "objective.koleo.group=2")
    pieces = pieces_of(vit_config(config), make_objective(config), 2)
    found = {one.what: one for one in collectives_of(config, "fsdp", 2)}
    heads = sum(pieces.heads)
    assert found["teacher's weights"].bytes == 2 * 4 * (pieces.blocks + pieces.root + heads)
    assert found["student's weights"].bytes == 2 * 4 * (4 * pieces.blocks + 3 * pieces.root + 2 * heads)
    assert found["gradients"].bytes == 2 * 4 * (pieces.blocks + pieces.root + heads)
    assert "student's weights, for KoLeo's neighbours" not in found
    halved = {one.what: one for one in collectives_of(config_of("fsdp", "precision=bf16_weights"), "fsdp", 2)}
    assert halved["teacher's weights"].bytes == 2 * (2 * (pieces.blocks + heads) + 4 * pieces.root)
    assert halved["gradients"].bytes == found["gradients"].bytes
    assert "student's weights, for KoLeo's neighbours" in halved  # groups of 8 images, 2 in a rank's micro-batch
    alone = {one.what: one for one in collectives_of(config_of("fsdp", "views.num_local=0"), "fsdp", 2)}
    assert alone["student's weights"].bytes == 2 * 4 * (2 * pieces.blocks + 2 * pieces.root + 2 * heads)


def test_neighbours_beyond_a_rank() -> None:
    config = config_of("ddp", "objective.koleo.group=4", "train.accumulation=1")
    objective = make_objective(config)
    assert [couples(config, objective, ranks) for ranks in (1, 2, 4)] == [False, False, True]


def test_other_objectives_have_no_teacher_to_gather() -> None:
    config = config_of("fsdp", "objective.name=mae")
    assert {one.what for one in collectives_of(config, "fsdp", 2)} == {
        "student's weights", "gradients", "gradient norms", "losses",
    }  # fmt: skip


def test_seconds_and_shares() -> None:
    """1 s of backward hides 1 s of 1.5; what hides behind nothing counts in full."""
    collectives = [
        Collective(what="", operation="sum", count=1, bytes=150, behind="backward"),
        Collective(what="", operation="sum", count=1, bytes=50, behind="nothing"),
    ]
    case = Case(
        model="", arm=ARMS[0], ranks=2, micro_batches=1, fits=True, collectives=collectives, work_s=Span(2.0, 4.0),
        backward_share=0.5,
    )  # fmt: skip
    link = Link("", 100.0, 0.0)
    assert case.seconds(link) == pytest.approx(2.0)
    assert case.shares(link, 2.0) == pytest.approx((2 / 4, 1 / 3))
    assert case.shares(link, 4.0) == pytest.approx((2 / 6, 0.5 / 4.5))
    assert case.seconds(Link("", 1e99, 1.0)) == pytest.approx(4.0)  # two sums of two messages each


def test_memory_of_a_rank() -> None:
    memory = RankMemory(state=1600, gathered=10, waiting=40, rest=50)
    assert memory.wanted("ddp", 8) == LARGER_BY * 1690 + RUNTIME_BYTES
    assert memory.wanted("fsdp", 8) == LARGER_BY * 300 + RUNTIME_BYTES
    assert memory.fewest(LARGER_BY * 300 + RUNTIME_BYTES) == 8
    assert memory.fewest(LARGER_BY * 100 + RUNTIME_BYTES) is None
    assert memory.fewest_of_any(LARGER_BY * 165 + RUNTIME_BYTES) == 11  # 1650 of state and rest


def test_memory_follows_the_plan() -> None:
    config = config_of("fsdp", "precision=bf16")
    vit, objective = vit_config(config), make_objective(config)
    items = items_of(config, vit, objective)
    pieces = pieces_of(vit, objective, 1)
    exact, halved = (memory_of_rank(config, precision, items) for precision in ("bf16", "bf16_weights"))
    assert exact.state == 20 * (pieces.blocks + pieces.root + sum(pieces.heads))
    assert exact.waiting == 4 * (pieces.blocks + pieces.root) == 2 * halved.waiting
    assert exact.rest > halved.rest > 0
    assert items["weights"] * 5 == exact.state
    alone = config_of("fsdp", "precision=bf16", "views.num_local=0")
    assert memory_of_rank(alone, "bf16", items).waiting == 0


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "vit_s", TINY)
    monkeypatch.setattr(communication, "LARGE", ("vit_s",))
    output = tmp_path / "communication.json"
    arguments = ["--models", "vit_s", "--ranks", "8", "--images", "8", "--output", str(output)]
    assert communication.main(arguments) == 0
    said = capsys.readouterr().out
    assert said.count("| vit_s | ddp, bf16 |") == 2  # bytes, and shares
    found = read(output)
    assert found.figures[0].name == "vit_s, ddp, bf16, 8 ranks: bytes sent by each in an update"
    facts = found.contenders[0]["facts"]
    assert sum(facts["sent_bytes"].values()) == found.figures[0].value
    assert list(facts["links"]) == [link.name for link in LINKS]
    assert communication.main(["--ranks", "1"]) == 2


def test_micro_batches_get_smaller_until_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "vit_s", TINY)
    found = [communication.pieces_that_fit("vit_s", Arm("ddp", "bf16"), 2, 32, room) for room in (1e12, 1.0)]
    assert [(config.train.accumulation, fits) for config, fits in found] == [(1, True), (32, False)]
    assert Pieces(8, 2, 3, (5,)).largest == 5
