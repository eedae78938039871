"""Sinkhorn-Knopp against its textbook form in fp64, far beyond where that overflows, and over ranks."""

import threading

import pytest
import torch
from torch import Tensor

from dinox_train.objectives.sinkhorn import sinkhorn


def textbook(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """The matrix form: divide by column sums and K, then by row sums and N; finally times N."""
    q = torch.exp(logits.double() / temperature)
    q /= q.sum()
    num_samples, num_prototypes = q.shape
    for _ in range(iterations):
        q /= q.sum(dim=0, keepdim=True) * num_prototypes
        q /= q.sum(dim=1, keepdim=True) * num_samples
    return q * num_samples


def random_logits(rows: int, columns: int, scale: float, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


class FakeRanks:
    """Ranks as threads: `all_reduce` waits for every rank's values, and gives all the same result."""

    def __init__(self, world: int) -> None:
        self.world, self.calls = world, 0
        self.values: dict[int, Tensor] = {}
        self.barrier = threading.Barrier(world, timeout=30)

    def all_reduce_of(self, rank: int):
        def all_reduce(values: Tensor, operation: str) -> Tensor:
            self.values[rank] = values
            self.barrier.wait()
            stacked = torch.stack([self.values[r] for r in range(self.world)])
            self.barrier.wait()
            self.calls += rank == 0
            return stacked.sum(dim=0) if operation == "sum" else stacked.amax(dim=0)

        return all_reduce


def on_ranks(parts: list[Tensor], temperature: float, iterations: int) -> tuple[Tensor, FakeRanks]:
    ranks, results = FakeRanks(len(parts)), {}

    def work(rank: int) -> None:
        results[rank] = sinkhorn(parts[rank], temperature, iterations, ranks.all_reduce_of(rank))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return torch.cat([results[rank] for rank in range(len(parts))]), ranks


@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
@pytest.mark.parametrize(("rows", "columns"), [(1, 5), (24, 7), (16, 100)])
def test_equals_the_textbook_form(rows: int, columns: int, iterations: int) -> None:
    logits = random_logits(rows, columns, scale=0.3)
    targets = sinkhorn(logits, 0.07, iterations)
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets.double(), textbook(logits, 0.07, iterations), atol=1e-5, rtol=1e-4)


def test_temperature_is_that_of_the_logits() -> None:
    logits = random_logits(8, 16, scale=0.3)
    torch.testing.assert_close(sinkhorn(logits, 0.05), sinkhorn(logits * 20, 1.0))


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_rows_sum_to_one_and_nothing_overflows(scale: float) -> None:
    logits = random_logits(32, 64, scale)
    logits[0, :], logits[1, 0] = -scale, scale  # a sample far below all others, and a peak
    targets = sinkhorn(logits, 0.04)
    assert targets.isfinite().all()
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(32))
    assert (targets >= 0).all()


def test_prototypes_get_equal_shares_in_the_end() -> None:
    logits = random_logits(64, 16, scale=0.2) + torch.arange(16) * 0.1  # softmax alone would prefer the last ones
    shares = sinkhorn(logits, 0.1, iterations=50).mean(dim=0)
    torch.testing.assert_close(shares, torch.full((16,), 1 / 16), atol=1e-4, rtol=0)
    assert torch.softmax(logits / 0.1, dim=1).mean(dim=0).max() > 0.3


def test_bf16_logits_are_computed_in_fp32() -> None:
    logits = random_logits(16, 32, scale=0.3).bfloat16()
    assert torch.equal(sinkhorn(logits, 0.05), sinkhorn(logits.float(), 0.05))


@pytest.mark.parametrize("cuts", [[5, 19], [12, 12], [1, 2, 21]])
@pytest.mark.parametrize("scale", [0.3, 1e3])
def test_ranks_together_solve_the_whole_problem(cuts: list[int], scale: float) -> None:
    logits = random_logits(24, 32, scale)
    together, ranks = on_ranks(list(logits.split(cuts)), 0.05, 3)
    torch.testing.assert_close(together, sinkhorn(logits, 0.05), atol=1e-5, rtol=1e-3)
    assert ranks.calls == 2 * 3
    alone = torch.cat([sinkhorn(part, 0.05) for part in logits.split(cuts)])
    assert (alone - together).abs().max() > 1e-2  # it matters


def test_the_same_on_every_cut_of_the_batch_is_not_per_micro_batch() -> None:
    logits = random_logits(32, 16, scale=0.5)
    whole = sinkhorn(logits, 0.05)
    pieces = torch.cat([sinkhorn(part, 0.05) for part in logits.split(8)])
    assert (whole - pieces).abs().sum(dim=1).mean() > 0.1


def test_targets_carry_no_gradient() -> None:
    assert not sinkhorn(random_logits(4, 4, 1.0).requires_grad_(), 0.1).requires_grad


def test_not_a_number_stays_visible() -> None:
    logits = random_logits(4, 4, 1.0)
    logits[2, 1] = torch.nan
    assert not sinkhorn(logits, 0.1).isfinite().all()


def test_no_iteration_is_refused() -> None:
    with pytest.raises(ValueError, match="iterations"):
        sinkhorn(random_logits(4, 4, 1.0), 0.1, iterations=0)
