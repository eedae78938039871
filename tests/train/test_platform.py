"""Platform: the precision key changes what runs, and a lie about it is found."""

import pytest
import torch
from torch import nn

from dinox_train.platform import PrecisionError, asserted_precision, autocast, choose_device, describe

CPU = torch.device("cpu")


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_precision_key_changes_the_dtype_of_matrix_products(precision: str, dtype: torch.dtype) -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2))
    with autocast(CPU, precision), asserted_precision(network, precision) as seen:
        network(torch.ones(3, 4))
    assert seen == [dtype, dtype]


def test_a_network_that_runs_in_another_dtype_is_an_error_that_names_the_layer() -> None:
    network = nn.Sequential(nn.Linear(4, 4))
    with (
        pytest.raises(PrecisionError, match=r"bf16 was asked for, and 0 computes in torch\.float32"),
        asserted_precision(network, "bf16"),
    ):
        network(torch.ones(3, 4))
    network(torch.ones(3, 4))


def test_a_gpu_that_is_not_there_is_refused_in_words() -> None:
    if torch.cuda.is_available():
        assert choose_device("auto").type == "cuda"
    else:
        assert choose_device("auto") == CPU
        with pytest.raises(ValueError, match="device=cpu"):
            choose_device("cuda:0")


def test_the_description_names_software_and_not_the_host() -> None:
    import platform

    found = describe(CPU)
    assert found["packages"]["torch"] == torch.__version__
    assert platform.node() not in str(found) or len(platform.node()) < 4
