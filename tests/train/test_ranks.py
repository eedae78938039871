"""An update that is spread over ranks is the update of one: here ranks are threads, which meet in their collectives."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from dinox_train.objectives.dinov3 import DINOv3, DINOv3Settings, GramSettings, IBOTSettings, KoLeoSettings
from dinox_train.objectives.masked_autoencoder import MAESettings, MaskedAutoencoder
from dinox_train.objectives.objective import Objective
from dinox_train.ranks import ALONE, Ranks
from dinox_train.step import StepResult, train_step
from dinox_train.view_batch import ViewBatch
from tests.train import small_step as small

IMAGES = 8
BASE = DINOv3Settings(prototypes=32, head_hidden=32, head_bottleneck=16)


class Meeting:
    """A collective among threads."""

    def __init__(self, count: int) -> None:
        self._barrier, self._given = threading.Barrier(count, timeout=60), [torch.empty(0)] * count

    def of(self, rank: int) -> Ranks:
        return Ranks(rank, len(self._given), lambda values, operation: self._reduce(rank, values, operation))

    def _reduce(self, rank: int, values: Tensor, operation: Literal["sum", "max"]) -> Tensor:
        self._given[rank] = values.detach().clone()
        self._barrier.wait()
        stacked = torch.stack(self._given)
        self._barrier.wait()
        return stacked.sum(0) if operation == "sum" else stacked.amax(0)


def update(
    make: Callable[[Ranks], Objective], ranks: Ranks, parts: list[ViewBatch], settings: small.StepSettings
) -> tuple[StepResult, Tensor]:
    """An update of fresh networks, and the gradient before it was clipped."""
    objective = make(ranks)
    networks = small.networks(objective)
    if objective.needs.gram:
        networks.take_gram_teacher()
    result = train_step(
        networks,
        small.optimizer_of(networks, lr=0.0),
        objective,
        objective.first_state(),
        parts,
        settings,
        values=objective.values(1),
        teacher_momentum=0.9,
        ranks=ranks,
    )
    return result, small.gradient(networks)


OBJECTIVES: dict[str, Callable[[Ranks], Objective]] = {
    "whole recipe": lambda ranks: DINOv3(replace(BASE, gram=GramSettings(weight=1.0)), ranks=ranks),
    "KoLeo over all images": lambda ranks: DINOv3(
        replace(BASE, koleo=KoLeoSettings(weight=1.0, group=None)), ranks=ranks
    ),
    "KoLeo within a rank": lambda ranks: DINOv3(replace(BASE, koleo=KoLeoSettings(weight=1.0, group=2)), ranks=ranks),
    "centering": lambda ranks: DINOv3(replace(BASE, balance="centering"), ranks=ranks),
    "few masks": lambda ranks: DINOv3(replace(BASE, ibot=IBOTSettings(masked_crops=0.1)), ranks=ranks),
    "masked autoencoder": lambda ranks: MaskedAutoencoder(MAESettings()),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(("count", "pieces"), [(2, 1), (2, 2), (4, 1)])
def test_shares_of_ranks_add_up_to_the_update_of_one(name: str, count: int, pieces: int) -> None:
    make = OBJECTIVES[name]
    no_clip = replace(small.SETTINGS, clip_norm=1e9)
    whole, gradient = update(make, ALONE, small.batch_of(make(ALONE), IMAGES), no_clip)
    # Rank r has the r-th part of each micro-batch.
    cut = small.batch_of(make(ALONE), IMAGES, count * pieces)
    meeting = Meeting(count)
    with ThreadPoolExecutor(count) as threads:
        jobs = [threads.submit(update, make, meeting.of(rank), cut[rank::count], no_clip) for rank in range(count)]
        found = [job.result() for job in jobs]
    summed = torch.stack([own for _, own in found]).sum(0)
    scale = gradient.abs().max()
    torch.testing.assert_close(summed / scale, gradient / scale, rtol=0, atol=2e-5)
    expected = whole.to_host()
    for result, _ in found:
        figures = result.to_host()
        del figures["grad_norm"]  # of this rank's gradient: what sums gradients is not part of a step
        assert figures == {name: pytest.approx(expected[name], rel=2e-5, abs=1e-7) for name in figures}


def test_rows_of_ranks_stand_in_the_order_of_ranks() -> None:
    meeting = Meeting(3)
    own = [torch.full((2, 1), float(rank)) for rank in range(3)]
    with ThreadPoolExecutor(3) as threads:
        whole = list(threads.map(lambda rank: meeting.of(rank).rows(own[rank]), range(3)))
    for rank in range(3):
        assert whole[rank][:, 0].tolist() == [0, 0, 1, 1, 2, 2]
        assert torch.equal(meeting.of(rank).own_rows(whole[rank]), own[rank])


def test_alone_nothing_is_copied() -> None:
    values = torch.ones(2, 3)
    assert ALONE.rows(values) is values
    assert ALONE.sum(values) is values
    assert ALONE.mean(values) is values
