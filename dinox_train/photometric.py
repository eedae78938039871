"""What happens to a view's gray beside its HU window: noise on the HU before it, a gamma curve on [0, 1] after it.

(The blur stands in `resample`: it is linear, and so a part of the same two matrix products.)

Invariant: a row whose plan asks for nothing keeps its bits; which rows are touched is known on the host, so that
nothing waits for the device.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from dinox_model.host_to_device import to_device
from dinox_train.keyed_normal import keyed_normal


def add_noise_(hu: Tensor, sigma_hu: np.ndarray, keys: np.ndarray) -> None:
    """Add white Gaussian noise to rows of HU, in place.

    hu: float32 (b, k, y, x); sigma_hu: float64 (b,), standard deviation of each row's noise, 0 for none; keys:
    uint32 (b, 2). A pixel's noise is a function of its row's key and its place (k, y, x).
    """
    rows = np.flatnonzero(sigma_hu)
    if not len(rows):
        return
    noise = keyed_normal(to_device(keys[rows].view(np.int32), hu.device), hu[0].numel())
    noise *= to_device(sigma_hu[rows].astype(np.float32), hu.device)[:, None]
    noise = noise.view(len(rows), *hu.shape[1:])
    if len(rows) == len(hu):
        hu += noise
    else:
        hu.index_add_(0, to_device(rows, hu.device), noise)


def apply_gamma_(shown: Tensor, gamma: np.ndarray) -> None:
    """Raise rows of windowed values in [0, 1], float32 (b, ...), to their exponents (b,), in place; 1 is left alone."""
    rows = np.flatnonzero(gamma != 1.0)
    if not len(rows):
        return
    exponents = to_device(gamma[rows].astype(np.float32), shown.device).view(-1, *(1,) * (shown.ndim - 1))
    if len(rows) == len(shown):
        shown.pow_(exponents)
    else:
        chosen = to_device(rows, shown.device)
        shown.index_copy_(0, chosen, shown.index_select(0, chosen).pow_(exponents))
