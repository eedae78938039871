"""Decoders for dense prediction: shapes at any patch size, and each stage against plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinox_model import ViTConfig, ViTFeatures
from dinox_model.heads import TransposedConvolutionDecoderConfig, UpsamplingDecoderConfig
from dinox_model.heads.dense import ChannelNorm, enlarging_convolution, prime_factors
from dinox_model.heads.head import initialise_convolution

WIDTH = 16


def network(patch_size: int) -> ViTConfig:
    return ViTConfig(width=WIDTH, num_layers=1, num_heads=2, mlp_hidden=8, patch_size=patch_size)


def features(grid: tuple[int, int], num_images: int = 1) -> ViTFeatures:
    x = torch.randn(num_images, math.prod(grid), WIDTH, generator=torch.Generator().manual_seed(1))
    return ViTFeatures(None, x[:, :0], x, grid)


@settings(max_examples=40)
@given(
    st.integers(1, 3), st.integers(1, 3), st.sampled_from([1, 2, 6, 7, 14, 16]), st.integers(1, 40), st.integers(0, 4)
)
def test_maps_have_the_inputs_resolution(h: int, w: int, patch_size: int, hidden: int, num_stages: int) -> None:
    num_stages = min(num_stages, len(prime_factors(patch_size)))
    for config in (
        TransposedConvolutionDecoderConfig(classes=5, hidden=hidden),
        UpsamplingDecoderConfig(classes=5, hidden=hidden, num_stages=num_stages),
    ):
        found = config.build(network(patch_size))(features((h, w), num_images=2))
        assert found.shape == (2, 5, h * patch_size, w * patch_size)
        assert found.isfinite().all()


@given(st.integers(1, 400))
def test_prime_factors_are_prime_and_make_the_number(number: int) -> None:
    factors = prime_factors(number)
    assert math.prod(factors) == number
    assert factors == sorted(factors)
    assert all(factor % divisor for factor in factors for divisor in range(2, factor))


@pytest.mark.parametrize("factor", [2, 3, 5])
def test_enlarging_convolution_is_the_definition_and_overlaps_evenly(factor: int) -> None:
    convolution = enlarging_convolution(2, 3, factor)
    x = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    weight, (kernel, _) = convolution.weight, convolution.kernel_size
    padding = convolution.padding[0]
    expected = torch.zeros(1, 3, 3 * factor, 4 * factor) + convolution.bias.view(1, -1, 1, 1)
    seen = torch.zeros(3 * factor, 4 * factor)
    for row in range(3):
        for column in range(4):
            for i in range(kernel):
                for j in range(kernel):
                    y, at = row * factor + i - padding, column * factor + j - padding
                    if 0 <= y < 3 * factor and 0 <= at < 4 * factor:
                        expected[0, :, y, at] += x[0, :, row, column] @ weight[:, :, i, j]
                        seen[y, at] += 1
    with torch.no_grad():
        torch.testing.assert_close(convolution(x), expected, atol=1e-5, rtol=1e-5)
    inner = seen[factor:-factor, factor:-factor]
    assert (inner == inner[0, 0]).all(), "each pixel is made of as many"
    assert inner[0, 0] == (kernel // factor) ** 2


def test_channel_norm_norms_each_pixel() -> None:
    norm = ChannelNorm(4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        norm.bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
        x = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
        found = norm(x)
        for image, y, at in ((0, 0, 0), (1, 2, 4), (0, 1, 3)):
            pixel = x[image, :, y, at]
            normed = (pixel - pixel.mean()) / (pixel.var(unbiased=False) + norm.eps).sqrt()
            torch.testing.assert_close(found[image, :, y, at], normed * norm.weight + norm.bias)


def bilinear_by_loops(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(c, y, x), with pixels as areas: centres at halves, edges repeated."""
    out = torch.empty(len(x), height, width)
    for y in range(height):
        for at in range(width):
            place_y = min(max((y + 0.5) * x.shape[1] / height - 0.5, 0.0), x.shape[1] - 1.0)
            place_x = min(max((at + 0.5) * x.shape[2] / width - 0.5, 0.0), x.shape[2] - 1.0)
            y0, x0 = int(place_y), int(place_x)
            y1, x1 = min(y0 + 1, x.shape[1] - 1), min(x0 + 1, x.shape[2] - 1)
            fy, fx = place_y - y0, place_x - x0
            upper, lower = x[:, y0, x0] * (1 - fx) + x[:, y0, x1] * fx, x[:, y1, x0] * (1 - fx) + x[:, y1, x1] * fx
            out[:, y, at] = upper * (1 - fy) + lower * fy
    return out


def test_without_stages_it_is_a_linear_probe_enlarged() -> None:
    head = UpsamplingDecoderConfig(classes=3, num_stages=0).build(network(4))
    seen = features((2, 3))
    with torch.no_grad():
        logits = seen.patches[0] @ head.classes.weight[:, :, 0, 0].T + head.classes.bias
        expected = bilinear_by_loops(logits.T.unflatten(1, (2, 3)), 8, 12)
        torch.testing.assert_close(head(seen)[0], expected, atol=1e-5, rtol=1e-5)


def test_a_stage_of_the_upsampling_decoder_is_the_definition() -> None:
    head = UpsamplingDecoderConfig(classes=3, hidden=6, num_stages=1).build(network(2))
    _, convolution, norm, _ = head.stages
    with torch.no_grad():
        convolution.bias.copy_(torch.arange(6.0))
        seen = features((2, 3))
        large = bilinear_by_loops(seen.patches[0].T.unflatten(1, (2, 3)), 4, 6)
        padded = torch.zeros(WIDTH, 6, 8)
        padded[:, 1:-1, 1:-1] = large
        found = head(seen)[0]
        for y, at in ((0, 0), (3, 5), (1, 2)):
            area = padded[:, y : y + 3, at : at + 3]
            value = (convolution.weight * area).sum(dim=(1, 2, 3)) + convolution.bias
            value = (value - value.mean()) / (value.var(unbiased=False) + norm.eps).sqrt()
            value = 0.5 * value * (1 + torch.erf(value / 2**0.5))
            expected = head.classes.weight[:, :, 0, 0] @ value + head.classes.bias
            torch.testing.assert_close(found[:, y, at], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["transposed", "upsampling"])
def test_patches_come_out_where_they_were(kind: str) -> None:
    config = {
        "transposed": TransposedConvolutionDecoderConfig(classes=2, hidden=16),
        "upsampling": UpsamplingDecoderConfig(classes=2, hidden=16, num_stages=2),
    }[kind]
    head, seen = config.build(network(4)), features((5, 6))
    changed = seen.patches.clone()
    changed[0, 1 * 6 + 4] += 1.0
    with torch.no_grad():
        difference = (head(seen) - head(seen._replace(patches=changed)))[0].abs().sum(0)
    weights = difference / difference.sum()
    y, at = (weights.sum(1 - axis) @ torch.arange(float(length)) for axis, length in enumerate((20, 24)))
    assert (y, at) == (pytest.approx(1.5 * 4 - 0.5, abs=2), pytest.approx(4.5 * 4 - 0.5, abs=2))
    assert not difference[16:, :8].any(), "and nothing far from it moves"


def test_channels_halve_but_not_below_sixteen() -> None:
    head = TransposedConvolutionDecoderConfig(classes=2, hidden=40).build(network(16))
    assert [part.out_channels for part in head.stages if isinstance(part, torch.nn.ConvTranspose2d)] == [40, 20, 16, 16]
    few = TransposedConvolutionDecoderConfig(classes=2, hidden=6).build(network(14))
    assert [part.out_channels for part in few.stages if isinstance(part, torch.nn.ConvTranspose2d)] == [6, 6]


@pytest.mark.parametrize("transposed", [False, True])
def test_first_convolutions_keep_the_variance(transposed: bool) -> None:
    convolution = enlarging_convolution(64, 48, 2) if transposed else torch.nn.Conv2d(64, 48, 3, padding=1)
    initialise_convolution(convolution, torch.Generator().manual_seed(0))
    x = torch.relu(torch.randn(4, 64, 16, 16, generator=torch.Generator().manual_seed(1))) * 2**0.5
    with torch.no_grad():
        inner = convolution(x)[:, :, 4:-4, 4:-4]
    assert x.square().mean() == pytest.approx(1.0, abs=0.05)
    assert inner.var() == pytest.approx(2.0, rel=0.15)


def test_more_stages_than_the_patch_has_factors_are_refused() -> None:
    with pytest.raises(ValueError, match="patches of 14 = 2 x 7 pixels has at most 2 stages, not 3"):
        UpsamplingDecoderConfig(classes=2, num_stages=3).build(network(14))
