"""Small facts on their way to a device."""

import numpy as np
import pytest
import torch

from dinox_model.host_to_device import to_device


def test_values_and_types_arrive() -> None:
    turned = np.arange(6, dtype=np.int32).reshape(2, 3).T
    assert torch.equal(to_device(turned, "cpu"), torch.tensor([[0, 3], [1, 4], [2, 5]], dtype=torch.int32))
    assert to_device(torch.zeros(2, 3), torch.device("meta")).shape == (2, 3)


@pytest.mark.gpu
def test_a_gpu_gets_them_without_the_host_waiting() -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = to_device(np.arange(4), "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert moved.tolist() == [0, 1, 2, 3]
