"""The choosing of kernels for a network on a device: what was asked for, what there is, what the trial says, and why.

Invariant: asked for by name, a form is used or refused with a reason; `auto` takes the fastest of those that are right
(`probe.py`), and on a CPU torch's own operators. Nothing is chosen without a reason in words.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dinox_model.kernels import dispatch
from dinox_model.kernels.architecture import architecture
from dinox_model.kernels.dispatch import ATTENTION, FUSED, REFERENCE_BACKEND, SDPA, Kernels, attend_packed
from dinox_model.kernels.language import INTERPRETED, can_run_on
from dinox_model.kernels.probe import Form, Timer, Trial, fastest, timer_of, try_forms

AUTO = "auto"
AOTRITON = "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL"
_SMALL_SCORES, _FULL_ELEMENTS = 2**27, 2**26
"""Limits of what a trial allocates: attention weights in fp64 (1 GiB), and elements of the packed QKV that is timed."""


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """One kind of sequence that a network sees."""

    images: int
    tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen for one kernel, and why."""

    kernel: str
    """`attention`, `rotate` … as in the configuration."""
    backend: str
    reason: str
    about: str = ""
    """Which use of it: `201 tokens`."""
    warning: str | None = None
    """What is wrong with it, and the exact setting that mends it."""

    def words(self) -> str:
        """For the log."""
        return f"kernels: {' '.join(filter(None, (self.kernel, self.about)))}: {self.backend} ({self.reason})"


def choose_network_kernels(
    wanted: Mapping[str, str],
    shapes: Sequence[AttentionShape],
    device: torch.device,
    *,
    fused: Mapping[str, FusedTrial | None] | None = None,
    timer: Timer | None = None,
) -> tuple[Kernels, tuple[Choice, ...]]:
    """The kernels of a network that sees sequences of these shapes on `device`, and what was chosen for each, and why.

    wanted: `attention`, `rotate`, `residual_norm` to a backend or `auto`. fused: what to try for the latter two, where
    they can be chosen at all. timer: for tests; None: `timer_of(device)`. Raises ValueError where a backend that was
    asked for by name cannot run or is wrong.
    """
    choices = [choose_attention(wanted["attention"], shape, device, timer=timer) for shape in shapes]
    by_length = tuple((shape.tokens, choice.backend) for shape, choice in zip(shapes, choices, strict=True))
    taken = dict.fromkeys(("rotate", "residual_norm"), REFERENCE_BACKEND)
    for name in taken:
        choice = choose_fused(name, wanted[name], device, (fused or {}).get(name), timer=timer)
        taken[name] = choice.backend
        choices.append(choice)
    attention = wanted["attention"] if wanted["attention"] != AUTO else REFERENCE_BACKEND
    return Kernels(attention=attention, attention_by_length=by_length, **taken), tuple(choices)


def choose_attention(wanted: str, shape: AttentionShape, device: torch.device, *, timer: Timer | None = None) -> Choice:
    """The backend of attention for one kind of sequence: `wanted`, one of ATTENTION, or the fastest for `auto`.

    Raises ValueError where `wanted` is none, cannot run here, or is wrong; for `auto`, where nothing is right.
    """
    if wanted != AUTO:
        dispatch.check_backend("attention", wanted, (AUTO, *ATTENTION))
    about = f"{shape.tokens} tokens"
    if wanted == REFERENCE_BACKEND or (wanted == AUTO and device.type == "cpu"):
        taken = _torchs_own(shape, device)
        why = "as asked" if wanted != AUTO else "auto: on a CPU nothing is faster"
        warning = _math_warning(shape, device) if taken == "math" else None
        return Choice(
            kernel="attention",
            about=about,
            backend=REFERENCE_BACKEND,
            reason=f"{why}; torch takes {taken}",
            warning=warning,
        )
    names = _attention_candidates(device) if wanted == AUTO else (wanted,)
    forms = {name: _attention_form(name) for name in names}
    small, full = _attention_inputs(shape, device)
    timed = timer or timer_of(device) if wanted == AUTO else None
    trials = try_forms(forms, small, plain=_attention_form("math"), full=full, timer=timed)
    best = _best("attention", about, wanted, trials)
    math = best.form == "math" or (best.form == REFERENCE_BACKEND and _torchs_own(shape, device) == "math")
    return Choice(
        kernel="attention",
        about=about,
        backend=best.form,
        reason=_reason(wanted, trials),
        warning=_math_warning(shape, device) if math and wanted != "math" else None,
    )


@dataclass(frozen=True, kw_only=True)
class FusedTrial:
    """How to try a kernel that has one reference and one Triton form."""

    forms: Mapping[str, Form]
    """`reference`, plain torch in any dtype, and `triton`."""
    small: Sequence[Tensor]
    full: Sequence[Tensor] = ()
    """What is timed; empty: `small`."""
    tolerance: float | None = None
    """Of `try_forms`, for forms that read integers."""
    compiled: bool = False
    """The run compiles its networks: the reference is timed as the compiler makes it."""


def choose_fused(
    name: str, wanted: str, device: torch.device, trial: FusedTrial | None, *, timer: Timer | None = None
) -> Choice:
    """`reference` or `triton` for a kernel of that name; `auto` takes the faster on a GPU, the reference on a CPU.

    trial: None where this run has no use for the kernel. Raises ValueError as `choose_attention`.
    """
    if wanted != AUTO:
        dispatch.check_backend(name, wanted, (AUTO, *FUSED))
    simple = partial(Choice, kernel=name, backend=REFERENCE_BACKEND)
    if wanted == REFERENCE_BACKEND:
        return simple(reason="as asked")
    if wanted == AUTO and device.type == "cpu":
        return simple(reason="auto: on a CPU nothing is faster")
    if trial is None:
        return simple(reason="this run has no use for the kernel")
    if wanted == AUTO and not can_run_on(device):
        return simple(reason="auto: no Triton for this device; install the extra [kernels]")
    forms, reference = dict(trial.forms), trial.forms[REFERENCE_BACKEND]
    if wanted != AUTO:
        trials = try_forms({wanted: forms[wanted]}, trial.small, plain=reference, tolerance=trial.tolerance)
    else:
        if trial.compiled:
            forms[REFERENCE_BACKEND] = torch.compile(reference)
        trials = try_forms(
            forms,
            trial.small,
            plain=reference,
            full=trial.full or trial.small,
            timer=timer or timer_of(device),
            tolerance=trial.tolerance,
            device=device,
        )
    return Choice(kernel=name, backend=_best(name, "", wanted, trials).form, reason=_reason(wanted, trials))


def _attention_candidates(device: torch.device) -> tuple[str, ...]:
    """For `auto` on a GPU; the earlier wins a tie. Not math by name: torch's own choice may be it."""
    names = [REFERENCE_BACKEND, *(name for name in SDPA if name != "math")]
    if can_run_on(device):
        names.append("triton")
    if dispatch.has_flash_attn():
        names.append("flash-attn")
    return tuple(names)


def _attention_form(backend: str) -> Form:
    return lambda qkv: attend_packed(qkv, backend)


def _attention_inputs(shape: AttentionShape, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Packed QKV to compare on, with few images, and one to time, with as many as the run has, within limits."""
    tokens, heads = shape.tokens, shape.heads
    if device.type == "cpu" and INTERPRETED:  # minutes otherwise
        tokens, heads = min(tokens, 64), min(heads, 2)
    few = max(1, min(2, shape.images, _SMALL_SCORES // (heads * tokens * tokens)))
    many = max(1, min(shape.images, _FULL_ELEMENTS // (3 * tokens * heads * shape.head_dim)))
    generator = torch.Generator().manual_seed(tokens)

    def packed(images: int) -> list[Tensor]:
        numbers = torch.randn((images, tokens, 3, heads, shape.head_dim), generator=generator)
        return [numbers.to(device, shape.dtype)]

    return packed(few), packed(many) if device.type == "cuda" else []


def _torchs_own(shape: AttentionShape, device: torch.device) -> str:
    """Which backend SDPA takes by itself for this shape."""
    like = torch.empty(
        (1, shape.tokens, 3, shape.heads, shape.head_dim), device=device, dtype=shape.dtype, requires_grad=True
    )
    return dispatch.sdpa_choice(*like.transpose(1, 3).unbind(2))


def _math_warning(shape: AttentionShape, device: torch.device) -> str | None:
    """What to say where attention runs as plain matrix products on a GPU, whose memory then grows with tokens²."""
    if device.type == "cpu":
        return None
    return (
        f"attention of {shape.tokens} tokens falls to the math path on {architecture(device)}, which is several times "
        f"slower: {_mends(shape, device)}"
    )


def _mends(shape: AttentionShape, device: torch.device, environment: Mapping[str, str] = os.environ) -> str:
    """The setting that gives it another backend."""
    if architecture(device).startswith("gfx") and environment.get(AOTRITON) != "1":
        return f"start with {AOTRITON}=1 in the environment"
    if not torch.backends.cuda.flash_sdp_enabled():
        return "call torch.backends.cuda.enable_flash_sdp(True), which something has turned off"
    if shape.dtype == torch.float32:
        return "set precision=bf16"
    if can_run_on(device):
        return "set kernels={attention: triton} to see why ours does not run"
    return "install the extra [kernels] for our own (a GPU build of torch brings Triton)"


def _best(name: str, about: str, wanted: str, trials: Sequence[Trial]) -> Trial:
    best = fastest(trials)
    if best is None:
        faults = "; ".join(trial.words() for trial in trials)
        what = " ".join(filter(None, (name, about)))
        raise ValueError(f"kernels.{name}={wanted} ({what}): {faults}. Set kernels.{name}=auto or =reference.")
    return best


def _reason(wanted: str, trials: Sequence[Trial]) -> str:
    if wanted != AUTO:
        (trial,) = trials
        return f"as asked; right: errors {trial.forward_error:.1e} forward, {trial.backward_error:.1e} backward"
    return "auto: " + ", ".join(trial.words() for trial in trials)
