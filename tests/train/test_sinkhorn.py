"""Sinkhorn-Knopp against its textbook form in fp64, far beyond where that overflows, and over ranks."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from dinox_train.objectives import sinkhorn as module
from dinox_train.objectives.sinkhorn import balanced_targets, prototype_potential, sinkhorn


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


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 20),
    iterations=st.integers(1, 4),
    scale=st.floats(0.0, 20.0),
    temperature=st.floats(0.03, 1.0),
    seed=st.integers(0, 2**31),
)
def test_equals_the_textbook_form_wherever_that_can_be_computed(
    rows: int, columns: int, iterations: int, scale: float, temperature: float, seed: int
) -> None:
    logits = random_logits(rows, columns, scale * temperature, seed).double()
    targets = sinkhorn(logits, temperature, iterations)
    assert targets.dtype == torch.float64
    torch.testing.assert_close(targets, textbook(logits, temperature, iterations), atol=1e-10, rtol=1e-8)


def test_pieces_are_one_batch_and_targets_of_a_slice_need_its_logits_only() -> None:
    logits = random_logits(24, 32, scale=0.5)
    whole = sinkhorn(logits, 0.05)
    pieces = logits.split([5, 0, 12, 7])
    potential = prototype_potential(pieces, 0.05)
    assert potential.shape == (32,)
    made = torch.cat([balanced_targets(piece, potential, 0.05) for piece in pieces])
    torch.testing.assert_close(made, whole, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(balanced_targets(logits[3:9], potential, 0.05), whole[3:9], atol=1e-6, rtol=1e-5)


def test_a_batch_larger_than_what_is_in_work_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(40, 16, scale=0.5)
    whole = sinkhorn(logits, 0.05)
    lengths = []
    work = module._log_column_sums

    def counted(chunk: Tensor, *more: object) -> Tensor:
        lengths.append(len(chunk))
        return work(chunk, *more)

    monkeypatch.setattr(module, "_CHUNK_VALUES", 16 * 7)
    monkeypatch.setattr(module, "_log_column_sums", counted)
    torch.testing.assert_close(sinkhorn(logits, 0.05), whole, atol=1e-6, rtol=1e-5)
    assert lengths == 3 * [7, 7, 7, 7, 7, 5]


def test_no_rows_have_no_targets() -> None:
    assert sinkhorn(torch.zeros(0, 8), 0.05).shape == (0, 8)
    logits = random_logits(5, 8, scale=0.3)
    together, _ = on_ranks([logits, logits[:0]], 0.05, 3)  # a rank without a masked patch
    torch.testing.assert_close(together, sinkhorn(logits, 0.05), atol=1e-6, rtol=1e-5)


def test_the_exponential_form_overflows_where_this_does_not() -> None:
    logits = torch.full((4, 8), 1.0)
    logits[:, 0] = 3.6  # exp(3.6 / 0.04) is beyond fp32
    assert not torch.exp(logits / 0.04).isfinite().all()
    torch.testing.assert_close(sinkhorn(logits, 0.04).double(), textbook(logits, 0.04, 3), atol=1e-6, rtol=1e-4)


def test_taking_each_row_s_maximum_away_would_be_another_problem() -> None:
    """The shift that has been proposed against the overflow; a row's own constant does not cancel in three turns."""
    logits = random_logits(32, 16, scale=1.0)
    shifted = textbook(logits - logits.amax(dim=1, keepdim=True), 0.05, 3)
    exact = textbook(logits, 0.05, 3)
    assert (shifted - exact).abs().sum(dim=1).mean() > 0.01
    torch.testing.assert_close(sinkhorn(logits, 0.05).double(), exact, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "logits", [[torch.zeros(2, 3), torch.zeros(2, 4)], [], torch.zeros(3)], ids=["widths", "none", "a vector"]
)
def test_pieces_that_do_not_fit_are_refused(logits: object) -> None:
    with pytest.raises(ValueError, match="found shapes"):
        prototype_potential(logits, 0.05)  # type: ignore[arg-type]


def test_no_iteration_is_refused() -> None:
    with pytest.raises(ValueError, match="iterations"):
        sinkhorn(random_logits(4, 4, 1.0), 0.1, iterations=0)
