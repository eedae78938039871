"""Platform: the precision key changes what runs, and a lie about it is found."""

import re
from collections.abc import Callable

import pytest
import torch

import dinox_model
from dinox_train.platform import PrecisionError, assert_precision, autocast, choose_device, describe
from dinox_train.working_weights import MasterWeights

CPU = torch.device("cpu")


def network_of(model: dinox_model.VisionTransformer) -> Callable[[torch.Tensor], torch.Tensor]:
    head = dinox_model.PrototypeHead(192, 32, 16, 8)
    return lambda images: head(model(images).cls)


def small(precision: str) -> MasterWeights:
    """A network of two blocks whose weights are as `precision` has them."""
    config = dinox_model.ViTConfig(width=32, num_layers=2, num_heads=2, mlp_hidden=64)
    return MasterWeights(dinox_model.build(config), precision)


def test_weights_are_cast_in_bf16_only() -> None:
    def seen_in(precision: str) -> str:
        network = small(precision).network
        return assert_precision(lambda x: network(x).cls, torch.randn(1, 3, 32, 32), precision, network.parameters())

    seen = {precision: seen_in(precision) for precision in ("fp32", "bf16", "bf16_weights")}
    products, casts = seen["bf16"].split("; ")
    assert casts == "9 weights cast"  # of two blocks four each, and the patch embedding's
    assert seen["bf16_weights"] == f"{products}; 0 weights cast"
    assert seen["fp32"].endswith("; 0 weights cast")


@pytest.mark.parametrize(("held", "asked"), [("bf16_weights", "bf16"), ("bf16", "bf16_weights")])
def test_weights_of_another_dtype_than_asked_for_are_an_error(held: str, asked: str) -> None:
    network = small(held).network
    with pytest.raises(PrecisionError, match=rf"{asked} was asked for, and \d weights are cast"):
        assert_precision(lambda x: network(x).cls, torch.randn(1, 3, 32, 32), asked, network.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_precision_key_changes_the_dtype_of_every_product(precision: str) -> None:
    model = dinox_model.build("vit_ti")
    seen = assert_precision(network_of(model), torch.randn(1, 3, 32, 32), precision, model.parameters())
    # 12 blocks with QKV, projection and two layers of an MLP, the patch embedding and the head's four, forward.
    assert re.search(r"\b5\d addmm|\b\d\d mm", seen)
    assert "_scaled_dot_product" in seen


def test_a_product_in_another_dtype_is_an_error_that_names_it() -> None:
    model = dinox_model.build("vit_ti")
    forward = model.blocks[7].attention.forward

    def in_fp32(*arguments: object) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return forward(arguments[0].float(), *arguments[1:])  # type: ignore[attr-defined]

    model.blocks[7].attention.forward = in_fp32
    with pytest.raises(PrecisionError, match=r"bf16 was asked for, and \d+ \w+ run in torch\.float32"):
        assert_precision(network_of(model), torch.randn(1, 3, 32, 32), "bf16", model.parameters())


def test_a_precision_that_nobody_knows_is_no_fp32() -> None:
    with pytest.raises(KeyError, match="fp16"):
        autocast(CPU, "fp16")


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
