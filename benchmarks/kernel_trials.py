"""Whether each kernel is right on this device, in fp32, fp16 and bf16: FlashAttention's rule, as
dinox_model/kernels/probe.py has it, against plain torch in fp64, forward and gradients; one of integers bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dinox_model.kernels import attention, residual_norm, rotate, unfilter
from dinox_model.kernels.probe import Form, Trial, try_forms
from dinox_model.positions import Rotations
from dinox_train.kernels import balanced_cross_entropy, prototype_potential
from dinox_train.objectives import sinkhorn

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TEMPERATURES = {"student_temperature": 0.1, "teacher_temperature": 0.07}


@dataclass(frozen=True)
class KernelTrial:
    """One kernel at one shape and dtype."""

    name: str
    form: Form
    plain: Form
    inputs: Sequence[Tensor]

    def run(self) -> Trial:
        """Errors, and what is wrong, if anything."""
        return try_forms({self.name: self.form}, self.inputs, plain=self.plain)[0]


def trials(device: torch.device, dtypes: Sequence[torch.dtype], *, quick: bool) -> Iterator[KernelTrial]:
    """Every kernel with floating inputs, at lengths that fill no tile, in each of `dtypes`."""
    for dtype in dtypes:
        yield from _attention(device, dtype, quick)
        yield _rotate(device, dtype)
        yield from _residual_norm(device, dtype, quick)
        yield from _prototypes(device, dtype, 256 if quick else 8192)


def unfilter_difference(device: torch.device, side: int) -> int:
    """Largest difference, in HU, of the unfiltered slices from those of the reference on the CPU; 0 is right."""
    generator = torch.Generator().manual_seed(0)
    filtered = torch.randint(0, 256, (3, 2, 2 * side * side), dtype=torch.uint8, generator=generator)
    sizes, filters = np.array([[side, side], [side - 3, side - 1], [side, side - 7]]), np.array(FILTERS)
    exact = unfilter.unfilter_reference(filtered, sizes, filters, (side, side))
    found = unfilter.unfilter(filtered.to(device), sizes, filters, (side, side)).cpu()
    return int((found.int() - exact.int()).abs().max())


FILTERS = (unfilter.NONE, unfilter.PLANES, unfilter.HILP)


def _numbers(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def _attention(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[KernelTrial]:
    """Dense and causal at each width of a head, packed and with dropout at one."""
    tokens, heads = (21, 1) if quick else (197, 3)
    for width in (64,) if quick else attention.HEAD_DIMS:
        for causal in (False, True):
            yield KernelTrial(
                f"attention d{width}{' causal' if causal else ''}",
                lambda qkv, causal=causal: attention.attention(qkv, causal=causal),
                lambda qkv, causal=causal: attention.attention_reference(qkv, causal=causal),
                [_numbers(2, tokens, 3, heads, width, device=device, dtype=dtype)],
            )
    packed = {"lengths": torch.tensor([0, tokens, tokens + 7], dtype=torch.int32, device=device), "max_length": tokens}
    yield KernelTrial(
        "attention d64 packed",
        lambda qkv: attention.attention(qkv, **packed),
        lambda qkv: attention.attention_reference(qkv, **packed),
        [_numbers(tokens + 7, 3, heads, 64, device=device, dtype=dtype)],
    )
    yield KernelTrial(
        "attention d64 dropout",
        lambda qkv: attention.attention(qkv, dropout=0.2, seed=5),
        lambda qkv: attention.attention_reference(qkv, dropout=0.2, seed=5),
        [_numbers(1, tokens, 3, heads, 64, device=device, dtype=dtype)],
    )


def _rotate(device: torch.device, dtype: torch.dtype) -> KernelTrial:
    angles = _numbers(17, 32, device=device, dtype=torch.float32)
    cos, sin = angles.cos(), angles.sin()
    by = Rotations(torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1))
    return KernelTrial(
        "rotate",
        lambda qkv: rotate.rotate_packed(qkv, by),
        lambda qkv: rotate.rotate_packed_reference(qkv, by),
        [_numbers(2, 17, 3, 2, 64, device=device, dtype=dtype)],
    )


def _residual_norm(device: torch.device, dtype: torch.dtype, quick: bool) -> Iterator[KernelTrial]:
    for width in (96,) if quick else (384, 1024, 1536, 4096):
        vectors = [_numbers(width, device=device, dtype=dtype) + 1 for _ in range(3)]
        rows = [_numbers(2, 33, width, device=device, dtype=dtype) for _ in range(2)]
        for kind in ("layer", "rms"):
            yield KernelTrial(
                f"residual_norm {kind} {width}",
                lambda *given, kind=kind: residual_norm.residual_norm(*given, eps=1e-5, kind=kind),
                lambda *given, kind=kind: residual_norm.residual_norm_reference(*given, eps=1e-5, kind=kind),
                [*rows, *vectors],
            )


def _prototypes(device: torch.device, dtype: torch.dtype, prototypes: int) -> Iterator[KernelTrial]:
    rows = [_numbers(33, prototypes, device=device, dtype=dtype) for _ in range(2)]
    yield KernelTrial(
        "prototype_potential",
        lambda logits: _with_gradient(prototype_potential.prototype_potential(logits, 0.07), logits),
        lambda logits: _with_gradient(sinkhorn.prototype_potential(logits, 0.07), logits),
        rows[:1],
    )
    pairs = torch.arange(33, device=device)[:, None]
    potential = torch.zeros(prototypes, device=device)
    yield KernelTrial(
        "balanced_cross_entropy",
        lambda ours, theirs: balanced_cross_entropy.balanced_cross_entropy(
            ours, theirs.detach(), potential, pairs, **TEMPERATURES
        ),
        lambda ours, theirs: balanced_cross_entropy.balanced_cross_entropy_reference(
            ours, theirs.detach(), potential, pairs, **TEMPERATURES
        ),
        rows,
    )


def _with_gradient(made: Tensor, given: Tensor) -> Tensor:
    """`made`, which has no gradient, with one of zeros: trials take gradients of what they are given."""
    return made + 0.0 * given.sum().to(made.dtype)
