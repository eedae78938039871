"""Cross-entropy of the student's logits and the teacher's balanced targets, from both logits as they lie in memory.

Legend: r rows of the student, p pairs of a row, q rows of the teacher, K prototypes, z the student's logits, L the
teacher's, u their potential (Sinkhorn's, or centre / tau for centering), tau and sigma the temperatures of teacher and
student.

    target_qk = exp(L_qk / tau - u_k - v_q)      v_q = logsumexp_k(L_qk / tau - u_k)
    loss_r    = sum over the teacher rows q that r is paired with of
                logsumexp_k(z_rk / sigma) - sum_k target_qk z_rk / sigma
    d loss_r / d z_rk = (pairs of r x softmax_k(z_rk / sigma) - sum_q target_qk) / sigma

(dinox_train/objectives/dino.py and ibot.py, which are what this computes.) The forward kernel reads z, L and u once: a
target's sum and its dot product with z are found together, both relative to the largest value so far. What is kept for
the backward are v and the student's logsumexp, one number a row; the backward kernel makes the targets again and writes
the gradient in the dtype of z. Targets never lie in memory. Logarithms are to base 2 inside, as in
prototype_potential.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dinox_model.kernels.architecture import architecture
from dinox_model.kernels.language import kernel, tl
from dinox_model.kernels.tiles import Launch
from dinox_model.kernels.traffic import Traffic
from dinox_train.kernels.prototype_potential import BITS, DTYPES, check_runnable, tiles_of
from dinox_train.objectives.numerics import full_precision


@kernel
def _forward(
    student,
    teacher,
    potential,
    pairs,
    losses,
    student_sums,
    teacher_sums,
    num_prototypes,
    student_scale,
    teacher_scale,
    PAIRS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program a row of the student. losses in nats, sums in bits; pairs (R, PAIRS), -1 for none."""
    row = tl.program_id(0)
    begin = row.to(tl.int64) * num_prototypes
    places = row * PAIRS + tl.arange(0, PAIRS)
    partner = tl.load(pairs + places)
    paired = partner >= 0
    partners_begin = partner[:, None] * num_prototypes
    # Far below any value, but finite: lanes beyond K, and pairs that are none, read -inf, and their sums stay 0.
    most_z = tl.full([BLOCK_K], -3e38, tl.float32)
    sum_z = tl.zeros([BLOCK_K], tl.float32)
    most_t = tl.full([PAIRS, BLOCK_K], -3e38, tl.float32)
    sum_t = tl.zeros([PAIRS, BLOCK_K], tl.float32)
    dot_t = tl.zeros([PAIRS, BLOCK_K], tl.float32)
    for first in range(0, num_prototypes, BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K)
        inside = columns < num_prototypes
        z = tl.load(student + begin + columns, mask=inside, other=float("-inf")).to(tl.float32) * student_scale
        d = z - most_z
        e = tl.exp2(-tl.abs(d))
        sum_z = tl.where(d > 0, sum_z * e + 1.0, sum_z + e)
        most_z = tl.maximum(most_z, z)

        both = paired[:, None] & inside[None, :]
        x = tl.load(teacher + partners_begin + columns[None, :], mask=both, other=float("-inf")).to(tl.float32)
        x = x * teacher_scale - tl.load(potential + columns, mask=inside, other=0.0)[None, :]
        finite_z = tl.where(inside, z, 0.0)[None, :]
        d_t = x - most_t
        e_t = tl.exp2(-tl.abs(d_t))
        grows = d_t > 0
        sum_t = tl.where(grows, sum_t * e_t + 1.0, sum_t + e_t)
        dot_t = tl.where(grows, dot_t * e_t + finite_z, dot_t + e_t * finite_z)
        most_t = tl.maximum(most_t, x)

    top_z = tl.max(most_z, axis=0)
    log_z = top_z + tl.log2(tl.sum(sum_z * tl.exp2(most_z - top_z), axis=0))
    top_t = tl.max(most_t, axis=1)
    factor = tl.exp2(most_t - top_t[:, None])
    # A pair that is none: sums of 0 become 1, its logarithm 0, and it adds 0.
    total = tl.where(paired, tl.sum(sum_t * factor, axis=1), 1.0)
    log_t = tl.where(paired, top_t + tl.log2(total), 0.0)
    lost = tl.where(paired, log_z - tl.sum(dot_t * factor, axis=1) / total, 0.0)
    tl.store(losses + row, tl.sum(lost, axis=0) * 0.6931471805599453)
    tl.store(student_sums + row, log_z)
    tl.store(teacher_sums + places, log_t)


@kernel
def _backward(
    student,
    teacher,
    potential,
    pairs,
    student_sums,
    teacher_sums,
    gradients,
    result,
    num_prototypes,
    student_scale,
    teacher_scale,
    PAIRS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program a row of the student and a tile of columns: result = gradients[r] d loss_r / d z_rk."""
    row = tl.program_id(0)
    begin = row.to(tl.int64) * num_prototypes
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = columns < num_prototypes
    places = row * PAIRS + tl.arange(0, PAIRS)
    partner = tl.load(pairs + places)
    paired = partner >= 0
    z = tl.load(student + begin + columns, mask=inside, other=float("-inf")).to(tl.float32) * student_scale
    ours = tl.exp2(z - tl.load(student_sums + row)) * tl.sum(paired.to(tl.float32), axis=0)
    both = paired[:, None] & inside[None, :]
    x = tl.load(teacher + partner[:, None] * num_prototypes + columns[None, :], mask=both, other=float("-inf"))
    x = x.to(tl.float32) * teacher_scale - tl.load(potential + columns, mask=inside, other=0.0)[None, :]
    theirs = tl.sum(tl.exp2(x - tl.load(teacher_sums + places)[:, None]), axis=0)
    # student_scale is 1 / (sigma ln 2), in bits: the derivative is by nats.
    found = tl.load(gradients + row) * (student_scale * 0.6931471805599453) * (ours - theirs)
    tl.store(result + begin + columns, found.to(result.dtype.element_ty), mask=inside)


def balanced_cross_entropy(
    student_logits: Tensor,
    teacher_logits: Tensor,
    potential: Tensor,
    pairs: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """loss_r of the file's docstring: (R,) fp32 in nats, with gradients to `student_logits`, in its dtype.

    student_logits (R, K), teacher_logits (Q, K): fp32, fp16 or bf16; potential: (K,), nats; pairs: int64 (R, P), P a
    power of two: rows of the teacher, -1 for none (not looked at, since the host would wait: others must be in [0, Q)).
    R may be 0. Raises ValueError for shapes and dtypes that do not fit, RuntimeError where Triton cannot run.
    """
    _check(student_logits, teacher_logits, potential, pairs)
    if pairs.shape[1].bit_count() != 1:
        raise ValueError(f"pairs are {tuple(pairs.shape)}: the kernel needs a power of two, filled up with -1")
    losses_R, _, _ = cross_entropy_of_rows(
        student_logits, teacher_logits.detach(), potential.detach(), pairs, student_temperature, teacher_temperature
    )
    return losses_R


def balanced_cross_entropy_reference(
    student_logits: Tensor,
    teacher_logits: Tensor,
    potential: Tensor,
    pairs: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """The same in torch, on any device; fp32, fp64 for fp64 logits. P may be any number."""
    _check(student_logits, teacher_logits, potential, pairs)
    z_RK = full_precision(student_logits) / student_temperature
    with torch.no_grad():
        targets_QK = torch.softmax(full_precision(teacher_logits) / teacher_temperature - potential, dim=1)
        paired_RP = pairs >= 0
        summed_RK = (targets_QK[pairs.clamp(min=0)] * paired_RP[..., None]).sum(dim=1).to(z_RK.dtype)
    return paired_RP.sum(dim=1) * torch.logsumexp(z_RK, dim=1) - (summed_RK * z_RK).sum(dim=1)


@torch.library.custom_op("dinox::balanced_cross_entropy", mutates_args=())
def cross_entropy_of_rows(
    student: Tensor,
    teacher: Tensor,
    potential: Tensor,
    pairs: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss (R,) in nats, the student's logsumexp (R,) and v (R, P), both in bits; only the loss has a gradient."""
    check_runnable("balanced_cross_entropy", student)
    check_runnable("balanced_cross_entropy", teacher)
    student, teacher = student.contiguous(), teacher.contiguous()
    losses_R, log_z_R, log_t_RP = _outputs(student, pairs)
    tiles = tiles_of("cross_entropy_forward", architecture(student.device), DTYPES[student.dtype])
    if len(student):
        _forward[(len(student),)](
            student,
            teacher,
            potential.float() * BITS,
            pairs.contiguous(),
            losses_R,
            log_z_R,
            log_t_RP,
            student.shape[1],
            BITS / student_temperature,
            BITS / teacher_temperature,
            PAIRS=pairs.shape[1],
            **tiles.arguments(),
        )
    return losses_R, log_z_R, log_t_RP


@cross_entropy_of_rows.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    potential: Tensor,
    pairs: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(student, pairs)


def _outputs(student: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    new = {"dtype": torch.float32, "device": student.device}
    rows = student.shape[0]
    return torch.empty(rows, **new), torch.empty(rows, **new), torch.empty(rows, pairs.shape[1], **new)


@torch.library.custom_op("dinox::balanced_cross_entropy_backward", mutates_args=())
def cross_entropy_gradient(
    student: Tensor,
    teacher: Tensor,
    potential: Tensor,
    pairs: Tensor,
    student_sums: Tensor,
    teacher_sums: Tensor,
    gradients: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """The gradient by `student` (R, K), in its dtype, where that by the losses is `gradients` (R,)."""
    check_runnable("balanced_cross_entropy_backward", student)
    student, teacher = student.contiguous(), teacher.contiguous()
    result = torch.empty_like(student)
    tiles = tiles_of("cross_entropy_backward", architecture(student.device), DTYPES[student.dtype])
    rows, num_prototypes = student.shape
    if rows:
        _backward[(rows, -(-num_prototypes // tiles.sizes["BLOCK_K"]))](
            student,
            teacher,
            potential.float() * BITS,
            pairs.contiguous(),
            student_sums,
            teacher_sums,
            gradients.float().contiguous(),
            result,
            num_prototypes,
            BITS / student_temperature,
            BITS / teacher_temperature,
            PAIRS=pairs.shape[1],
            **tiles.arguments(),
        )
    return result


@cross_entropy_gradient.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    potential: Tensor,
    pairs: Tensor,
    student_sums: Tensor,
    teacher_sums: Tensor,
    gradients: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, potential, pairs, *ctx.temperatures = inputs
    _, student_sums, teacher_sums = output
    ctx.mark_non_differentiable(student_sums, teacher_sums)
    ctx.save_for_backward(student, teacher, potential, pairs, student_sums, teacher_sums)


def _differentiate(ctx: Any, gradients: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    found = cross_entropy_gradient(*ctx.saved_tensors, gradients, *ctx.temperatures)
    return found, None, None, None, None, None


cross_entropy_of_rows.register_autograd(_differentiate, setup_context=_keep)


def launches(arch: str) -> Iterator[Launch]:
    """Each way these kernels are shipped for `arch`."""
    vectors = {"potential": "*fp32", "pairs": "*i64"}
    scalars = {"num_prototypes": "i32", "student_scale": "fp32", "teacher_scale": "fp32"}
    kinds: dict[str, tuple[Any, tuple[str, ...]]] = {
        "cross_entropy_forward": (_forward, ("losses", "student_sums", "teacher_sums")),
        "cross_entropy_backward": (_backward, ("student_sums", "teacher_sums", "gradients")),
    }
    for name, (function, sums) in kinds.items():
        for dtype in DTYPES.values():
            logits = {each: f"*{dtype}" for each in ("student", "teacher", "result") if each in function.arg_names}
            signature = {**logits, **vectors, **dict.fromkeys(sums, "*fp32"), **scalars}
            for pairs in (1, 2):
                yield Launch(
                    kernel=name,
                    function=function,
                    signature=signature,
                    constants={"PAIRS": pairs},
                    aligned=(*logits, *vectors, *sums, "num_prototypes"),
                    tiles=tiles_of(name, arch, dtype),
                    dtype=dtype,
                    facts={"pairs": pairs},
                )


def traffic(student_rows: int, pairs: int, prototypes: int, value_bytes: int = 2) -> Traffic:
    """Forward and backward over student logits (student_rows, prototypes), `pairs` pairs of rows in all."""
    ours, theirs = student_rows * prototypes, pairs * prototypes
    reads = 2 * (ours + theirs) * value_bytes + 2 * 4 * (prototypes + 2 * student_rows + 3 * pairs)
    writes = ours * value_bytes + 4 * (2 * student_rows + pairs)
    return Traffic(reads, writes, 14 * ours + 16 * theirs)


def traffic_reference(student_rows: int, teacher_rows: int, prototypes: int, value_bytes: int = 2) -> Traffic:
    """Of targets and `ibot_loss` in eager torch, operator by operator, forward and backward; a softmax reads its rows
    once and writes them once. `dino_loss` takes as much, and the sums of its pairs of views besides."""
    b, ours, theirs = value_bytes, student_rows * prototypes, teacher_rows * prototypes
    targets = Traffic((b + 4 + 4 + 4) * theirs, (4 + 4 + 4 + 4) * theirs, 7 * theirs)
    # cast, divide, logsumexp (maximum, difference, exponential, sum), product, sum
    forward = Traffic((b + 4 + 16 + 8 + 4) * ours, (4 + 4 + 8 + 4) * ours, 8 * ours)
    # product with the targets; difference, exponential, product of the logsumexp; their sum; divide; cast
    backward = Traffic((4 + 12 + 8 + 4 + 4) * ours, (4 + 12 + 4 + 4 + b) * ours, 6 * ours)
    return targets + forward + backward


def _check(student: Tensor, teacher: Tensor, potential: Tensor, pairs: Tensor) -> None:
    fit = (
        student.ndim == teacher.ndim == pairs.ndim == 2
        and student.shape[1] == teacher.shape[1] == potential.shape[-1]
        and potential.ndim == 1
        and pairs.shape[0] == student.shape[0]
    )
    if not fit or student.dtype != teacher.dtype or pairs.dtype != torch.int64:
        described = ", ".join(f"{each.dtype} {tuple(each.shape)}" for each in (student, teacher, potential, pairs))
        raise ValueError(
            f"student logits, teacher logits, potential and pairs are {described}; needed (R, K) and (Q, K) of one "
            "dtype, (K,), and int64 (R, P)"
        )
