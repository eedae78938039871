"""Bytes that each kernel moves, and the same work in eager torch and as torch.compile plans it: counted, on any CPU.

Bytes of kernels come from their own `traffic`, those of eager torch from its operators (`operator_bytes`) or, where an
operator count would need a whole pipeline, from the file's `traffic_reference`. Invariant: all columns of a case are
about the same shapes, forward and backward together where the work has a backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from operator_bytes import Work, eager_bytes, planned_bytes
from torch import Tensor

from dinox_model.kernels import attention, residual_norm, rotate, unfilter
from dinox_model.kernels.traffic import Traffic
from dinox_model.positions import Rotations
from dinox_train.kernels import adamw_average, balanced_cross_entropy, crop, prototype_potential
from dinox_train.objectives import sinkhorn


@dataclass(frozen=True)
class TrafficCase:
    """One kernel at one shape."""

    name: str
    shape: str
    kernel: Traffic
    reference: Traffic
    """By the file's own count, operator by operator."""
    work: Work | None = None
    """The reference, to be counted; None: it is a pipeline of numpy and torch."""
    opaque: bool = False
    """To the compiler it is one operator: nothing is planned."""
    inputs: Callable[[], Sequence[Tensor]] = tuple
    backward: bool = False


@dataclass(frozen=True)
class Counted:
    """Bytes of one case."""

    case: TrafficCase
    eager: int
    planned: int | None
    """None: not to be planned."""

    @property
    def saved_of_eager(self) -> float:
        """Times less than eager torch moves."""
        return self.eager / self.case.kernel.bytes

    @property
    def saved_of_plan(self) -> float | None:
        """Times less than what torch.compile leaves."""
        return None if self.planned is None else self.planned / self.case.kernel.bytes


def count(case: TrafficCase) -> Counted:
    """Counts what can be counted of a case."""
    if case.work is None:
        return Counted(case, case.reference.bytes, None)
    inputs = case.inputs()
    eager = eager_bytes(case.work, inputs, backward=case.backward)
    planned = None if case.opaque else planned_bytes(case.work, inputs, backward=case.backward)
    return Counted(case, eager, planned)


def cases(*, quick: bool) -> list[TrafficCase]:
    """The kernels at a ViT-L's shapes with 256 px views, few of them; `quick`: tiny."""
    images, tokens, heads = (1, 21, 2) if quick else (4, 261, 16)
    rows, prototypes = (8, 256) if quick else (256, 65536)
    parameters = 1_000_000
    side, views = (64, 1) if quick else (512, 4)
    width = heads * 64
    return [
        _attention(images, tokens, heads),
        _rotate(images, tokens, heads),
        _residual_norm(images * tokens, width),
        _potential(rows, prototypes),
        _cross_entropy(rows, prototypes),
        TrafficCase(
            "adamw_average", f"{parameters / 1e6:g} M parameters, bf16 copies",
            adamw_average.traffic(parameters, parameters), adamw_average.traffic_reference(parameters, parameters),
        ),
        TrafficCase(
            "unfilter", f"{views} x 3 x {side} x {side}", unfilter.traffic(views, 3, side, side),
            unfilter.traffic_reference(views, 3, side, side),
        ),
        TrafficCase(
            "crop", f"{views} x 3, {side // 2} px to 224", crop.traffic(views, 3, side // 2, 224, 0),
            crop.traffic_reference(views, 3, side // 2, 224, 0),
        ),
    ]  # fmt: skip


def _attention(images: int, tokens: int, heads: int) -> TrafficCase:
    """SDPA is one operator to the compiler; what it can save lies around it."""
    shape = (images, tokens, heads, 64, 2)

    def work(qkv: Tensor) -> Tensor:
        query, key, value = qkv.transpose(1, 3).unbind(2)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)

    return TrafficCase(
        name="attention",
        shape=f"{images} x {tokens} x {heads} x 64 bf16",
        kernel=sum(attention.traffic(*shape), Traffic()),
        reference=sum(attention.reference_traffic(*shape), Traffic()),
        work=work,
        opaque=True,
        inputs=lambda: [torch.randn(images, tokens, 3, heads, 64, dtype=torch.bfloat16)],
        backward=True,
    )


def _rotate(images: int, tokens: int, heads: int) -> TrafficCase:
    one = rotate.traffic(images, tokens, heads, 64, in_place=True)
    forward = rotate.traffic(images, tokens, heads, 64, in_place=False)
    reference = rotate.traffic_reference(images, tokens, heads, 64)

    def work(qkv: Tensor) -> Tensor:
        table = torch.ones(tokens, 64)
        return rotate.rotate_packed_reference(qkv, Rotations(table, table))

    return TrafficCase(
        name="rotate",
        shape=f"{images} x {tokens} x {heads} x 64 bf16",
        kernel=forward + one,
        reference=reference + reference,
        work=work,
        inputs=lambda: [torch.randn(images, tokens, 3, heads, 64, dtype=torch.bfloat16)],
        backward=True,
    )


def _residual_norm(rows: int, width: int) -> TrafficCase:
    def work(x: Tensor, residual: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor) -> Sequence[Tensor]:
        return residual_norm.residual_norm_reference(
            x, residual, gamma, weight, bias, eps=1e-5, normed_dtype=torch.bfloat16
        )

    def inputs() -> Sequence[Tensor]:
        return [torch.randn(rows, width), torch.randn(rows, width).bfloat16(), *torch.ones(3, width)]

    return TrafficCase(
        name="residual_norm",
        shape=f"{rows} x {width}, fp32 and bf16",
        kernel=residual_norm.traffic(rows, width) + residual_norm.traffic(rows, width, backward=True),
        reference=residual_norm.traffic_reference(rows, width)
        + residual_norm.traffic_reference(rows, width, backward=True),
        work=work,
        inputs=inputs,
        backward=True,
    )


def _potential(rows: int, prototypes: int) -> TrafficCase:
    return TrafficCase(
        name="prototype_potential",
        shape=f"{rows} x {prototypes} bf16",
        kernel=prototype_potential.traffic(rows, prototypes),
        reference=prototype_potential.traffic_reference(rows, prototypes),
        work=lambda logits: sinkhorn.prototype_potential(logits, 0.07),
        inputs=lambda: [torch.randn(rows, prototypes, dtype=torch.bfloat16)],
    )


def _cross_entropy(rows: int, prototypes: int) -> TrafficCase:
    """A row of the student to a row of the teacher, as in iBOT."""
    pairs = torch.arange(rows)[:, None]

    def work(student: Tensor, teacher: Tensor) -> Tensor:
        return balanced_cross_entropy.balanced_cross_entropy_reference(
            student,
            teacher.detach(),
            torch.zeros(prototypes),
            pairs,
            student_temperature=0.1,
            teacher_temperature=0.07,
        )

    return TrafficCase(
        name="balanced_cross_entropy",
        shape=f"{rows} x {prototypes} bf16",
        kernel=balanced_cross_entropy.traffic(rows, rows, prototypes),
        reference=balanced_cross_entropy.traffic_reference(rows, rows, prototypes),
        work=work,
        inputs=lambda: [torch.randn(rows, prototypes, dtype=torch.bfloat16) for _ in range(2)],
        backward=True,
    )
