"""The trial that chooses among the forms of a kernel: first whether they are right, then which is fastest here.

Right: the error of the outputs is at most twice, that of the gradients at most three times, what plain torch operators
of the same dtype have, both against plain torch in fp64 (FlashAttention's rule; Dao et al., arXiv 2205.14135, tests).
Fastest: medians of interleaved runs, forward and backward, by events of the device. Invariant: a form that fails, or
raises, is never chosen by `auto`, and asking for it by name is an error.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Form = Callable[..., Tensor | tuple[Tensor, ...]]
"""One form of a kernel: a function of tensors."""
Timer = Callable[[Mapping[str, Callable[[], object]], torch.device], Mapping[str, float]]
"""Seconds of each of some calls, on a device."""

FORWARD_FACTOR, BACKWARD_FACTOR = 2.0, 3.0
SOONER = 0.98
"""A later form must take less than this share of an earlier one's time: a tie goes to the earlier."""
_ROUNDS = 15


@dataclass(frozen=True)
class Trial:
    """What came out for one form."""

    form: str
    forward_error: float | None = None
    """Largest difference of an output from fp64; None: it raised."""
    backward_error: float | None = None
    """Of a gradient."""
    seconds: float | None = None
    """Forward and backward; None: not timed."""
    fault: str | None = None
    """Why it is not to be used."""

    def words(self) -> str:
        """For the log."""
        if self.fault is not None:
            return f"{self.form}: {self.fault}"
        if self.seconds is None:
            return f"{self.form}: right"
        return f"{self.form}: {self.seconds * 1e3:.3g} ms"


def try_forms(
    forms: Mapping[str, Form],
    small: Sequence[Tensor],
    *,
    plain: Form,
    full: Sequence[Tensor] = (),
    timer: Timer | None = None,
    tolerance: float | None = None,
    device: torch.device | None = None,
) -> tuple[Trial, ...]:
    """One trial for each of `forms`, in order; those that are right are timed on `full`, where it and a timer is given.

    small, full: inputs; floating ones of them have gradients taken. plain: torch operators, which run in any dtype.
    tolerance: for forms that nothing is exact for, as they read integers: the largest difference from `plain`.
    device: where they are timed; None: where `full` lies.
    """
    dtype = small[0].dtype if small[0].is_floating_point() else torch.float32
    exact = _run(plain, [_wide(tensor) for tensor in small], dtype)
    ours = _errors(_run(plain, small, dtype), exact)
    floors = (_floor(exact[0], dtype), _floor(exact[1], dtype)) if tolerance is None else (tolerance, tolerance)
    trials = [_trial(name, form, small, dtype, exact, ours, floors) for name, form in forms.items()]
    right = {trial.form: forms[trial.form] for trial in trials if trial.fault is None}
    if timer is None or not full or not right:
        return tuple(trials)
    calls = {name: _timed_call(form, full) for name, form in right.items()}
    seconds = timer(calls, device or full[0].device)
    return tuple(
        trial if trial.fault else Trial(trial.form, trial.forward_error, trial.backward_error, seconds[trial.form])
        for trial in trials
    )


def fastest(trials: Sequence[Trial]) -> Trial | None:
    """The fastest of those that are right, the earlier of two within `SOONER`; None: none is right."""
    best: Trial | None = None
    for trial in trials:
        if trial.fault is not None:
            continue
        if best is None or (trial.seconds or 0.0) < SOONER * (best.seconds or 0.0):
            best = trial
    return best


def events_timer(calls: Mapping[str, Callable[[], object]], device: torch.device) -> Mapping[str, float]:
    """Medians of `_ROUNDS` interleaved rounds by the device's events, after two rounds that are not counted."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    with torch.cuda.device(device):
        for number in range(_ROUNDS + 2):
            for name, call in calls.items():
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                call()
                end.record()
                end.synchronize()
                if number >= 2:
                    taken[name].append(begin.elapsed_time(end) / 1e3)
    return {name: statistics.median(times) for name, times in taken.items()}


def clock_timer(calls: Mapping[str, Callable[[], object]], device: torch.device) -> Mapping[str, float]:
    """The same by the host's clock, for a CPU."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(_ROUNDS + 2):
        for name, call in calls.items():
            begin_s = time.perf_counter()
            call()
            if number >= 2:
                taken[name].append(time.perf_counter() - begin_s)
    return {name: statistics.median(times) for name, times in taken.items()}


def timer_of(device: torch.device) -> Timer:
    """By events on a GPU, by the clock on a CPU."""
    return events_timer if device.type == "cuda" else clock_timer


def _trial(
    name: str,
    form: Form,
    small: Sequence[Tensor],
    dtype: torch.dtype,
    exact: tuple[list[Tensor], list[Tensor]],
    ours: tuple[float, float],
    floors: tuple[float, float],
) -> Trial:
    try:
        forward, backward = _errors(_run(form, small, dtype), exact)
    except Exception as error:  # whatever a backend raises where it cannot run: that is what is to be found
        return Trial(name, fault=f"does not run: {str(error).strip().splitlines()[0] if str(error) else repr(error)}")
    for what, error, factor, plain_error, floor in (
        ("outputs", forward, FORWARD_FACTOR, ours[0], floors[0]),
        ("gradients", backward, BACKWARD_FACTOR, ours[1], floors[1]),
    ):
        if not error <= factor * plain_error + floor:  # a NaN is no right result
            fault = f"wrong: error of the {what} {error:.2e}, plain torch's is {plain_error:.2e}"
            return Trial(name, forward, backward, fault=fault)
    return Trial(name, forward, backward)


def _run(form: Form, inputs: Sequence[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients for a fixed random gradient of the outputs, whose values `dtype` can hold."""
    leaves = [tensor.detach().clone().requires_grad_(tensor.is_floating_point()) for tensor in inputs]
    made = form(*leaves)
    outputs = [made] if isinstance(made, Tensor) else list(made)
    generator = torch.Generator().manual_seed(len(outputs))
    heads = [torch.randn(out.shape, generator=generator).to(dtype).to(out.device, out.dtype) for out in outputs]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    gradients = torch.autograd.grad(outputs, wanted, heads, allow_unused=True) if wanted else ()
    return [out.detach() for out in outputs], [gradient for gradient in gradients if gradient is not None]


def _timed_call(form: Form, inputs: Sequence[Tensor]) -> Callable[[], object]:
    leaves = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in inputs]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]

    def call() -> object:
        made = form(*leaves)
        if not wanted:
            return made
        outputs = [made] if isinstance(made, Tensor) else list(made)
        return torch.autograd.grad(outputs, wanted, [torch.ones_like(out) for out in outputs], allow_unused=True)

    return call


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _errors(found: tuple[list[Tensor], list[Tensor]], exact: tuple[list[Tensor], list[Tensor]]) -> tuple[float, float]:
    return _largest(found[0], exact[0]), _largest(found[1], exact[1])


def _largest(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    differences = [(one.double() - other).abs().max() for one, other in zip(found, exact, strict=True)]
    return float(torch.stack(differences).max()) if differences else 0.0


def _floor(exact: Sequence[Tensor], dtype: torch.dtype) -> float:
    """Half a unit in the last place of the largest value: below that, errors say nothing."""
    size = max((float(part.abs().max()) for part in exact), default=0.0)
    return 0.5 * torch.finfo(dtype).eps * size
