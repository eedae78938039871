"""Centering against its formulae, over micro-batches and ranks."""

import pytest
import torch
from torch import Tensor

from dinox_train.objectives.centering import centred_targets, updated_centre


def random_logits(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + torch.arange(columns) * 0.1


def test_targets_equal_the_loop() -> None:
    logits, centre = random_logits(5, 7).double(), random_logits(1, 7, seed=1)[0].double()
    targets = centred_targets(logits, centre, 0.07)
    for n in range(5):
        powers = [float(torch.exp((logits[n, k] - centre[k]) / 0.07)) for k in range(7)]
        assert targets[n].tolist() == pytest.approx([power / sum(powers) for power in powers], rel=1e-10)
    assert not targets.requires_grad


def test_the_centre_takes_away_what_all_samples_share() -> None:
    logits = random_logits(64, 16) + 5 * torch.eye(16)[3]  # one prototype would take them all
    centre = torch.zeros(16)
    assert centred_targets(logits, centre, 0.5).mean(dim=0)[3] > 0.9
    for _ in range(60):
        centre = updated_centre(centre, logits, 0.9)
    torch.testing.assert_close(centre, logits.mean(dim=0), atol=2e-2, rtol=0)
    assert centred_targets(logits, centre, 0.5).mean(dim=0).max() < 0.2


def test_one_update_is_the_formula_and_leaves_the_old_centre() -> None:
    logits, centre = random_logits(6, 5), torch.arange(5.0)
    kept = centre.clone()
    moved = updated_centre(centre, logits, 0.9)
    torch.testing.assert_close(moved, 0.9 * centre + 0.1 * logits.mean(dim=0))
    assert torch.equal(centre, kept)
    assert torch.equal(updated_centre(centre, logits, 1.0), centre)


def test_unequal_micro_batches_and_ranks_make_the_mean_of_all_rows() -> None:
    logits, centre = random_logits(9, 5), torch.arange(5.0)
    whole = updated_centre(centre, logits, 0.8)
    pieces = logits.split([2, 0, 7])
    torch.testing.assert_close(updated_centre(centre, pieces, 0.8), whole)
    handed_in = []

    def collect(values: Tensor, operation: str) -> Tensor:
        assert operation == "sum"
        handed_in.append(values)
        return values

    for piece in pieces:
        updated_centre(centre, piece, 0.8, all_reduce=collect)
    total = torch.stack(handed_in).sum(dim=0)
    for piece in pieces:
        torch.testing.assert_close(updated_centre(centre, piece, 0.8, all_reduce=lambda _values, _: total), whole)


def test_bf16_logits_are_added_up_in_fp32() -> None:
    logits = torch.full((1000, 2), 1.0).bfloat16()  # a bf16 sum would stop at 256
    assert torch.equal(updated_centre(torch.zeros(2), logits, 0.0), torch.ones(2))
    assert centred_targets(logits, torch.zeros(2), 0.1).dtype == torch.float32


def test_without_rows_the_centre_stays_and_what_is_not_finite_shows() -> None:
    centre = torch.arange(3.0)
    assert torch.equal(updated_centre(centre, torch.zeros(0, 3), 0.9), centre)
    assert updated_centre(centre, torch.full((2, 3), torch.nan), 0.9).isnan().all()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="momentum"):
        updated_centre(torch.zeros(3), torch.zeros(2, 3), 1.1)
    with pytest.raises(ValueError, match="centre"):
        centred_targets(torch.zeros(2, 3), torch.zeros(4), 0.1)
