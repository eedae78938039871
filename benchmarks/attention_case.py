"""Attention on a GPU: our kernels against each of SDPA's backends and FlexAttention, at one length and head width.

All contenders get the same packed QKV, as the network's GEMM leaves it, and give (b, t, a, e); in backward the gradient
of the packed QKV. They are compared with each other before one is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from timing import Prepared, Setup
from torch import Tensor

from dinox_model.kernels.dispatch import attend_packed
from dinox_model.kernels.probe import try_forms

LENGTHS = (197, 261, 1029, 1374, 4101)
HEAD_DIMS = (64, 128)
OURS, FLEX = "triton", "flex"
PEERS = ("sdpa-flash", "sdpa-cudnn", "sdpa-efficient", FLEX)
MODEL_WIDTH = 1024
TOKENS = 32768
"""About so many tokens are in a batch of any length."""


@dataclass(frozen=True)
class AttentionCase:
    """One shape, bf16."""

    tokens: int
    head_dim: int
    images: int
    heads: int
    device: torch.device

    @classmethod
    def of(cls, tokens: int, head_dim: int, device: torch.device) -> AttentionCase:
        """As much work as a GPU needs to be busy; on a CPU, as little as shows that it runs."""
        if device.type == "cpu":
            return cls(tokens, head_dim, 1, 1, device)
        return cls(tokens, head_dim, max(1, TOKENS // tokens), MODEL_WIDTH // head_dim, device)

    @property
    def name(self) -> str:
        """In figures."""
        return f"attention {self.tokens} d{self.head_dim}"

    def flops(self, *, backward: bool) -> float:
        """4 b a t² e forward; backward 2.5 times that (FlashAttention-2's convention: five products for two)."""
        forward = 4.0 * self.images * self.heads * self.tokens**2 * self.head_dim
        return 2.5 * forward if backward else forward

    def input(self, images: int | None = None) -> Tensor:
        """Packed QKV, the same for the same case."""
        generator = torch.Generator().manual_seed(self.tokens)
        shape = (images or self.images, self.tokens, 3, self.heads, self.head_dim)
        return torch.randn(shape, generator=generator).to(self.device, torch.bfloat16)


def form(backend: str) -> Callable[[Tensor], Tensor]:
    """Attention of packed QKV by a backend of dispatch, or by FlexAttention, compiled."""
    if backend != FLEX:
        return lambda qkv: attend_packed(qkv, backend)
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention)

    def run(qkv: Tensor) -> Tensor:
        query, key, value = qkv.transpose(1, 3).unbind(2)
        made = compiled(query, key, value)
        assert isinstance(made, Tensor)
        return made.transpose(1, 2)

    return run


def contenders(device: torch.device) -> tuple[str, ...]:
    """What is tried on this device. On a CPU FlexAttention is left out: a minute of compiling for each shape."""
    return tuple(name for name in (OURS, *PEERS) if name != FLEX or device.type != "cpu")


def usable(case: AttentionCase, names: tuple[str, ...]) -> dict[str, str]:
    """Why each of `names` cannot be timed at this shape, or "" where it can: it runs, and it is right."""
    small = case.input(images=1)
    trials = try_forms({name: form(name) for name in names}, [small], plain=form("math"))
    return {trial.form: trial.fault or "" for trial in trials}


def contender(case: AttentionCase, backend: str, *, backward: bool) -> Setup:
    """Forward alone, or backward alone. Work: floating-point operations."""
    flops = case.flops(backward=backward)

    def setup() -> Prepared:
        run, qkv = form(backend), case.input().requires_grad_(backward)
        if not backward:
            return Prepared(lambda: _no_gradient(run, qkv, flops), {})
        out = run(qkv)
        gradient = torch.randn_like(out)

        def back() -> float:
            torch.autograd.grad(out, qkv, gradient, retain_graph=True)
            return flops

        return Prepared(back, {})

    return setup


def _no_gradient(run: Callable[[Tensor], Tensor], qkv: Tensor, flops: float) -> float:
    with torch.no_grad():
        run(qkv)
    return flops


def packed_launch(case: AttentionCase, crops: int, *, dense: bool) -> Setup:
    """DINO's crop mix: for each image of the case two global views and `crops` local ones, in one packed
    launch, or `dense`: one launch a size. Forward and backward. Work: images."""
    from dinox_model.kernels.attention import attention

    lengths = torch.tensor([case.tokens] * (2 * case.images) + [LOCAL_TOKENS] * (crops * case.images))
    edges = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])

    def setup() -> Prepared:
        total, first = int(edges[-1]), 2 * case.images * case.tokens
        qkv = torch.randn(total, 3, case.heads, case.head_dim, device=case.device, dtype=torch.bfloat16)
        qkv.requires_grad_(True)
        ends = edges.to(case.device, torch.int32)

        def run() -> float:
            if dense:
                long = attention(qkv[:first].unflatten(0, (-1, case.tokens)))
                short = attention(qkv[first:].unflatten(0, (-1, LOCAL_TOKENS)))
                made = [long, short]
            else:
                made = [attention(qkv, lengths=ends, max_length=case.tokens)]
            torch.autograd.grad(made, qkv, [torch.ones_like(one) for one in made])
            return case.images

        return Prepared(run, {})

    return setup


LOCAL_TOKENS = 41
"""A local view of 96 px: 36 patches, CLS, 4 registers."""


def device_clock(device: torch.device, clock: Callable[[], float]) -> Callable[[], float]:
    """`clock`, read when the device is done."""

    def read() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock()

    return read
