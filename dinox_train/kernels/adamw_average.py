"""AdamW, the teacher's average and the bf16 copies of an update, in one pass over memory.

Legend: w a student's parameter, g its gradient, m and v its moments, a the teacher's parameter, c the clip's scale of
g, lambda the weight decay, t the step of this update.

    g <- c g                          w <- w - lr lambda w
    m <- m + (1 - beta1) (g - m)      v <- beta2 v + (1 - beta2) g^2
    w <- w - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    a <- a + (1 - momentum) (w - a)   copies of w and a <- rounded to bf16

(Loshchilov and Hutter, AdamW, arXiv 1711.05101, algorithm 2, as torch's fused AdamW computes it; then
dinox_train/teacher.py and `MasterWeights.refresh`.) The reference is what dinox_train/step.py does with
`make_optimizer`, `clip_gradients`, `update_teacher` and `refresh`: it moves 64 bytes a parameter, this 44 (`traffic`).

Parameters lie in one buffer (dinox_train/working_weights.py), and so do the moments here; gradients are autograd's own
tensors. So one launch goes over a fixed table of chunks of the buffer, each within one parameter, and finds a chunk's
gradient through a table of addresses, which goes to the device with the update's learning rates. Invariant: where an
update is not applied nothing changes, neither parameters, moments and steps nor the teacher; the host reads no flag.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dinox_model.host_to_device import to_device
from dinox_model.kernels.architecture import architecture
from dinox_model.kernels.language import can_run_on, kernel, tl
from dinox_model.kernels.tiles import Launch
from dinox_model.kernels.traffic import Traffic
from dinox_train.kernels.prototype_potential import tiles_of
from dinox_train.optimizer import (
    Clipped,
    OptimizerSettings,
    gradient_part_names,
    gradient_parts,
    parameter_groups,
)
from dinox_train.working_weights import MasterWeights


@kernel
def _update(
    student,
    teacher,
    first_moments,
    second_moments,
    student_copies,
    teacher_copies,
    chunk_begins,
    chunk_sizes,
    chunk_parameters,
    chunk_offsets,
    chunk_copied,
    gradients,
    clips,
    decays,
    step_sizes,
    second_roots,
    applied,
    average,
    beta1_rest,
    beta2,
    beta2_rest,
    epsilon,
    BLOCK: tl.constexpr,
):
    """One program a chunk of at most BLOCK elements. Of parameters: gradients int64 addresses (0: none), clips,
    decays lr lambda, step_sizes lr / (1 - beta1^t), second_roots sqrt(1 - beta2^t)."""
    if tl.load(applied) != 0:
        chunk = tl.program_id(0)
        lanes = tl.arange(0, BLOCK)
        size = tl.load(chunk_sizes + chunk)
        # Parameters begin at multiples of 16 elements in the buffers, with zeros between that stay zeros: up to the
        # next multiple all is read and written, so that no mask cuts a vector instruction.
        there = lanes < tl.multiple_of((size + 15) // 16 * 16, 16)
        begin = tl.multiple_of(tl.load(chunk_begins + chunk), 16)
        places = begin + lanes
        w = tl.load(student + places, mask=there)
        parameter = tl.load(chunk_parameters + chunk)
        address = tl.load(gradients + parameter)
        if address != 0:
            # The host hands on addresses of multiples of 16 bytes only, and BLOCK divides offsets.
            offset = tl.load(chunk_offsets + chunk)
            gradient = tl.multiple_of(address.to(tl.pointer_type(tl.float32)) + offset + lanes, 16)
            if size % 16 == 0:
                g = tl.load(gradient, mask=there, other=0.0)
            else:
                g = tl.load(gradient, mask=lanes < size, other=0.0)
            g *= tl.load(clips + parameter)
            m = tl.load(first_moments + places, mask=there)
            v = tl.load(second_moments + places, mask=there)
            w -= w * tl.load(decays + parameter)
            m += beta1_rest * (g - m)
            v = v * beta2 + beta2_rest * g * g
            w -= tl.load(step_sizes + parameter) * m / (tl.sqrt(v) / tl.load(second_roots + parameter) + epsilon)
            tl.store(first_moments + places, m, mask=there)
            tl.store(second_moments + places, v, mask=there)
            tl.store(student + places, w, mask=there)
        a = tl.load(teacher + places, mask=there)
        # As torch's lerp: the nearer end is what is added to, so that both ends are met exactly.
        a = tl.where(average < 0.5, a + average * (w - a), w - (w - a) * (1.0 - average))
        tl.store(teacher + places, a, mask=there)
        if tl.load(chunk_copied + chunk) != 0:
            tl.store(student_copies + places, w.to(tl.bfloat16), mask=there)
            tl.store(teacher_copies + places, a.to(tl.bfloat16), mask=there)


class OnePassAdamW(torch.optim.AdamW):
    """`make_optimizer`'s AdamW with the same groups, state and checkpoints, for networks whose update is one pass.

    An update is `clip`, then `update`. `step` remains torch's own, for the student alone.
    """

    def __init__(self, student: MasterWeights, teacher: MasterWeights, settings: OptimizerSettings) -> None:
        """Over the fp32 masters of `student`, on their device; the average goes to `teacher`'s. Raises ValueError
        where the two do not lie in memory alike; RuntimeError where Triton cannot run."""
        groups = parameter_groups(student.named, settings.layer_decay, settings.patch_embed_scale)
        super().__init__(groups, lr=0.0, betas=(settings.beta1, settings.beta2), weight_decay=0.0, fused=True)
        device = student.buffer.device
        if not can_run_on(device):
            raise RuntimeError(f"AdamW in one pass: Triton cannot run on {device}. Set kernels=reference.")
        if _places(student) != _places(teacher) or len(student.copies) != len(teacher.copies):
            raise ValueError("student and teacher have other parameters, or lie in memory in another order")
        self.student, self.teacher = student, teacher
        self._moments = {kind: torch.zeros_like(student.buffer) for kind in ("exp_avg", "exp_avg_sq")}
        self._steps_P = torch.zeros(len(student.named), device=device)
        self._state_of = [self._views(index) for index in range(len(student.named))]
        self._tiles = tiles_of("adamw_average", architecture(device), "fp32")
        self._chunks = _Chunks(student, self._tiles.sizes["BLOCK"])
        parts = gradient_part_names(student.named)
        self._parts = sorted(set(parts))
        self._part_of_P = torch.tensor([self._parts.index(part) for part in parts], device=device)
        self._clip_P = torch.ones(len(student.named), device=device)

    def clip(self, max_norm: float, *, by_part: bool) -> Clipped:
        """What `clip_gradients` finds; gradients stay as they are, and `update` scales them as it reads them."""
        parts = gradient_parts(self.student.named, by_part=by_part)
        norms = {
            part: nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
            for part, parameters in parts.items()
        }
        found = torch.stack(list(norms.values()))
        scales = (max_norm / (found + 1e-6)).clamp(max=1.0)  # torch's clip_grads_with_norm_
        if by_part:
            by_name = dict(zip(norms, scales, strict=True))
            one = torch.ones_like(scales[0])
            self._clip_P = torch.stack([by_name.get(part, one) for part in self._parts])[self._part_of_P]
        else:
            self._clip_P = scales.expand(len(self.student.named)).contiguous()
        return Clipped(torch.linalg.vector_norm(found), (found > max_norm).any().float())

    @torch.no_grad()
    def update(self, momentum: float, applied: Tensor) -> None:
        """Apply the gradients, then teacher += (1 - momentum) (student - teacher), then round both into their copies.

        applied: 0-dim, 1.0 or 0.0, which leaves everything as it is; the host does not read it.
        """
        addresses_P, rates_2P = self._of_this_update()
        self._steps_P += applied * (addresses_P != 0)
        beta1, beta2 = self.defaults["betas"]
        rest1_P = -torch.expm1(self._steps_P * math.log(beta1))  # 1 - beta^t, without its cancellation
        rest2_P = -torch.expm1(self._steps_P * math.log(beta2))
        student, teacher, chunks = self.student, self.teacher, self._chunks
        _update[(len(chunks.begins),)](
            student.buffer,
            teacher.buffer,
            self._moments["exp_avg"],
            self._moments["exp_avg_sq"],
            student.copies,
            teacher.copies,
            chunks.begins,
            chunks.sizes,
            chunks.parameters,
            chunks.offsets,
            chunks.copied,
            addresses_P,
            self._clip_P,
            rates_2P[0] * rates_2P[1],
            rates_2P[0] / rest1_P,
            rest2_P.sqrt(),
            applied,
            1.0 - momentum,
            1.0 - beta1,
            beta2,
            1.0 - beta2,
            self.defaults["eps"],
            **self._tiles.arguments(),
        )

    def _views(self, index: int) -> dict[str, Tensor]:
        """State of a parameter as torch keeps it, in the flat buffers."""
        parameter = self.student.named[index][1]
        begin, shape = parameter.storage_offset(), parameter.shape
        moments = {kind: flat[begin : begin + parameter.numel()].view(shape) for kind, flat in self._moments.items()}
        return {"step": self._steps_P[index], **moments}

    def _of_this_update(self) -> tuple[Tensor, Tensor]:
        """On the device: addresses of gradients (P,) int64, 0 for none; learning rates and weight decays (2, P)."""
        addresses, rates = [0] * len(self.student.named), [[0.0] * len(self.student.named) for _ in range(2)]
        group_of = {parameter: group for group in self.param_groups for parameter in group["params"]}
        for index, (_, parameter) in enumerate(self.student.named):
            group = group_of.get(parameter)
            if group is None or parameter.grad is None:
                continue
            self._keep_state(index, parameter)
            addresses[index] = _aligned_gradient(parameter).data_ptr()
            rates[0][index], rates[1][index] = group["lr"], group["weight_decay"]
        device = self.student.buffer.device
        return to_device(torch.tensor(addresses), device), to_device(torch.tensor(rates), device)

    def _keep_state(self, index: int, parameter: nn.Parameter) -> None:
        """Take in what a checkpoint, or torch's own step, has put in the place of the flat buffers' views."""
        state, ours = self.state[parameter], self._state_of[index]
        for kind, view in ours.items():
            if state.get(kind) is not view:
                if kind in state:
                    view.copy_(state[kind])
                state[kind] = view


class _Chunks:
    """The buffer in chunks of at most `size` elements of one parameter each; on the device, 28 bytes a chunk."""

    def __init__(self, weights: MasterWeights, size: int) -> None:
        rows = [
            (parameter.storage_offset() + offset, min(size, parameter.numel() - offset), index, offset)
            for index, (_, parameter) in enumerate(weights.named)
            for offset in range(0, parameter.numel(), size)
        ]
        device, columns = weights.buffer.device, list(zip(*rows, strict=True))
        self.begins = torch.tensor(columns[0], device=device)
        self.sizes, self.parameters = (torch.tensor(each, dtype=torch.int32, device=device) for each in columns[1:3])
        self.offsets = torch.tensor(columns[3], device=device)
        """Of the chunk in its parameter."""
        self.copied = (self.begins < len(weights.copies)).int()


def _places(weights: MasterWeights) -> list[tuple[str, int, torch.Size]]:
    return [(name, int(parameter.storage_offset()), parameter.shape) for name, parameter in weights.named]


def _aligned_gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient as the kernel reads it; where it lies otherwise, a copy takes its place."""
    gradient = parameter.grad
    assert gradient is not None
    if gradient.dtype != torch.float32 or not gradient.is_contiguous() or gradient.data_ptr() % 16:
        gradient = gradient.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        parameter.grad = gradient
    return gradient


def launches(arch: str) -> Iterator[Launch]:
    """The one way this kernel is shipped for `arch`."""
    flat = ("student", "teacher", "first_moments", "second_moments")
    types = {
        **dict.fromkeys(flat, "*fp32"),
        **dict.fromkeys(("student_copies", "teacher_copies"), "*bf16"),
        "chunk_begins": "*i64",
        **dict.fromkeys(("chunk_sizes", "chunk_parameters"), "*i32"),
        "chunk_offsets": "*i64",
        "chunk_copied": "*i32",
        "gradients": "*i64",
        **dict.fromkeys(("clips", "decays", "step_sizes", "second_roots", "applied"), "*fp32"),
        **dict.fromkeys(("average", "beta1_rest", "beta2", "beta2_rest", "epsilon"), "fp32"),
    }
    aligned = tuple(name for name, kind in types.items() if kind.startswith("*") and name != "applied")
    yield Launch(
        kernel="adamw_average",
        function=_update,
        signature=types,
        constants={},
        aligned=aligned,
        tiles=tiles_of("adamw_average", arch, "fp32"),
        dtype="fp32",
    )


def traffic(parameters: int, copied: int = 0) -> Traffic:
    """Of an update of so many parameters, `copied` of them with bf16 copies: the norm's reading and the one pass."""
    return Traffic((4 + 20) * parameters, 16 * parameters + 2 * 2 * copied, 22 * parameters)


def traffic_reference(parameters: int, copied: int = 0) -> Traffic:
    """Of the norm, the scaling, torch's fused AdamW, the teacher's lerp and the rounding of the copies."""
    reads, writes = (4 + 4 + 16 + 8) * parameters, (4 + 12 + 4) * parameters
    return Traffic(reads + 2 * 4 * copied, writes + 2 * 2 * copied, 22 * parameters)
