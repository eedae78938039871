"""Sinkhorn's potential over prototypes, from the teacher's logits as they lie in memory (bf16): nothing of their size
is written. The reference is dinox_train/objectives/sinkhorn.py, which says what is computed.

Legend: n samples, K prototypes, L logits, tau temperature, G groups of rows.

    rows      v_n  = logsumexp_k(L_nk / tau - u_k)                              a program for each sample
    columns   u_gk = logsumexp_n in group g (L_nk / tau - v_n)                  a program for each group and tile of K
    then      u_k  = logsumexp_g(u_gk)                                          in torch, G x K values

The first turn needs no rows (v = 0), each later one reads the logits twice. Both in one kernel would read them once
from memory and once from the cache, but then each program must hold K sums, 256 KiB at 65,536 prototypes: more than
there is. Invariant: which rows are summed together depends on their number alone (`GROUP`), no program waits for or
adds to another, so the same logits give the same bits on every run.

Logarithms are to base 2 inside the kernels, since that is what hardware has: "bits" are nats / ln 2. A sum of
exponentials is kept for each lane as (largest, sum) and costs one exponential for a value: with d = x - largest, either
exp(d) is added, or the sum so far is multiplied by exp(-d).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dinox_model.kernels.architecture import architecture
from dinox_model.kernels.language import can_run_on, kernel, tl
from dinox_model.kernels.tiles import Launch, Tiles, tiles_for
from dinox_model.kernels.traffic import Traffic
from dinox_train.objectives.sinkhorn import logsumexp_over_ranks
from dinox_train.ranks import AllReduce

GROUP = 1024
"""Rows whose column sums one program adds up."""
BITS = 1 / math.log(2)
"""Of one nat."""
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
"""Of logits that the kernels read; they compute in fp32."""


@kernel
def _rows(
    logits,
    potential,
    log_sums,
    num_prototypes,
    scale,
    BLOCK_K: tl.constexpr,
):
    """One program a sample: log_sums[n] = log2 sum_k 2^(scale L_nk - potential_k). All but logits are in bits."""
    row = tl.program_id(0)
    begin = row.to(tl.int64) * num_prototypes
    # Far below any value, but finite: lanes beyond K read -inf, and their sums stay 0.
    largest = tl.full([BLOCK_K], -3e38, tl.float32)
    sums = tl.zeros([BLOCK_K], tl.float32)
    for first in range(0, num_prototypes, BLOCK_K):
        columns = first + tl.arange(0, BLOCK_K)
        inside = columns < num_prototypes
        x = tl.load(logits + begin + columns, mask=inside, other=float("-inf")).to(tl.float32)
        x = x * scale - tl.load(potential + columns, mask=inside, other=0.0)
        d = x - largest
        e = tl.exp2(-tl.abs(d))
        sums = tl.where(d > 0, sums * e + 1.0, sums + e)
        largest = tl.maximum(largest, x)
    most = tl.max(largest, axis=0)
    tl.store(log_sums + row, most + tl.log2(tl.sum(sums * tl.exp2(largest - most), axis=0)))


@partial(kernel, do_not_specialize=("num_rows",))  # of masked patches: another in each update
def _columns(
    logits,
    row_sums,
    log_sums,
    num_rows,
    num_prototypes,
    scale,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program a group of rows and a tile of columns: log_sums[g, k] = log2 sum_n 2^(scale L_nk - row_sums_n)."""
    group = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = columns < num_prototypes
    largest = tl.full([BLOCK_N, BLOCK_K], -3e38, tl.float32)
    sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    last = tl.minimum((group + 1) * GROUP, num_rows)
    for first in range(group * GROUP, last, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        there = rows < last
        places = rows.to(tl.int64)[:, None] * num_prototypes + columns[None, :]
        both = there[:, None] & inside[None, :]
        x = tl.load(logits + places, mask=both, other=float("-inf")).to(tl.float32)
        x = x * scale - tl.load(row_sums + rows, mask=there, other=0.0)[:, None]
        d = x - largest
        e = tl.exp2(-tl.abs(d))
        sums = tl.where(d > 0, sums * e + 1.0, sums + e)
        largest = tl.maximum(largest, x)
    most = tl.max(largest, axis=0)
    total = tl.sum(sums * tl.exp2(largest - most[None, :]), axis=0)
    found = most + tl.log2(tl.where(inside, total, 1.0))
    tl.store(log_sums + group.to(tl.int64) * num_prototypes + columns, found, mask=inside)


@torch.no_grad()
def prototype_potential(
    logits: Tensor | Sequence[Tensor],
    temperature: float,
    iterations: int = 3,
    *,
    all_reduce: AllReduce | None = None,
) -> Tensor:
    """u of the file's docstring: (K,) fp32, in nats, without gradients; what the reference of this name finds.

    logits: (n, K) bf16, fp16 or fp32, contiguous rows, or a list of such pieces (micro-batches, which are one batch
    here), n may be 0. `all_reduce` as in the reference. Raises ValueError for less than one iteration, pieces that do
    not fit together and other dtypes; RuntimeError where Triton cannot run on the logits' device.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, not {iterations}: without one, nothing is balanced")
    pieces = [logits] if isinstance(logits, Tensor) else list(logits)
    _check_pieces(pieces)
    potential_K = None
    for _ in range(iterations):
        sums = torch.cat([prototype_log_sums(piece, potential_K, temperature) for piece in pieces])
        potential_K = logsumexp_over_ranks(torch.logsumexp(sums, dim=0), all_reduce)
    assert potential_K is not None
    return potential_K


def _groups(rows: int) -> int:
    return max(1, -(-rows // GROUP))


@torch.library.custom_op("dinox::prototype_log_sums", mutates_args=())
def prototype_log_sums(logits: Tensor, potential: Tensor | None, temperature: float) -> Tensor:
    """One turn over logits (n, K): column sums (G, K) fp32 in nats, each of `GROUP` rows at most, as logarithms.

    potential: u of the turn before, (K,) fp32; None in the first. No row: one group, -inf. Has no gradient.
    """
    n, num_prototypes = logits.shape
    check_runnable("prototype_log_sums", logits)
    if not n:
        return logits.new_full((1, num_prototypes), -math.inf, dtype=torch.float32)
    logits = logits.contiguous()
    arch, dtype = architecture(logits.device), DTYPES[logits.dtype]
    row_sums_N = torch.zeros(n, dtype=torch.float32, device=logits.device)
    if potential is not None:
        tiles = tiles_of("prototype_rows", arch, dtype)
        _rows[(n,)](
            logits,
            potential.float() * BITS,
            row_sums_N,
            num_prototypes,
            BITS / temperature,
            **tiles.arguments(),
        )
    tiles = tiles_of("prototype_columns", arch, dtype)
    groups = _groups(n)
    sums_GK = torch.empty(groups, num_prototypes, dtype=torch.float32, device=logits.device)
    _columns[(-(-num_prototypes // tiles.sizes["BLOCK_K"]), groups)](
        logits,
        row_sums_N,
        sums_GK,
        n,
        num_prototypes,
        BITS / temperature,
        GROUP=GROUP,
        **tiles.arguments(),
    )
    return sums_GK / BITS


@prototype_log_sums.register_fake
def _(logits: Tensor, potential: Tensor | None, temperature: float) -> Tensor:
    n, num_prototypes = logits.shape
    return logits.new_empty((_groups(n), num_prototypes), dtype=torch.float32)


def launches(arch: str) -> Iterator[Launch]:
    """Each way these kernels are shipped for `arch`."""
    kinds: dict[str, tuple[Any, dict[str, str], dict[str, int], tuple[str, ...]]] = {
        "prototype_rows": (
            _rows,
            {"potential": "*fp32", "log_sums": "*fp32", "num_prototypes": "i32", "scale": "fp32"},
            {},
            ("logits", "potential", "log_sums", "num_prototypes"),
        ),
        "prototype_columns": (
            _columns,
            {
                "row_sums": "*fp32",
                "log_sums": "*fp32",
                "num_rows": "i32",
                "num_prototypes": "i32",
                "scale": "fp32",
            },
            {"GROUP": GROUP},
            ("logits", "row_sums", "log_sums", "num_prototypes"),
        ),
    }
    for name, (function, signature, constants, aligned) in kinds.items():
        for dtype in DTYPES.values():
            yield Launch(
                kernel=name,
                function=function,
                signature={"logits": f"*{dtype}", **signature},
                constants=constants,
                aligned=aligned,
                tiles=tiles_of(name, arch, dtype),
                dtype=dtype,
            )


def traffic(rows: int, prototypes: int, iterations: int = 3, value_bytes: int = 2) -> Traffic:
    """Of `prototype_potential` over logits (rows, prototypes) of `value_bytes` each."""
    size, groups = rows * prototypes, _groups(rows)
    reads = (2 * iterations - 1) * size * value_bytes
    # What goes between kernels: row sums, column sums of groups, the potential.
    small = 4 * iterations * (2 * rows + 2 * groups * prototypes + 2 * prototypes)
    return Traffic(reads + small // 2, small // 2, (2 * iterations - 1) * 8 * size)


def traffic_reference(rows: int, prototypes: int, iterations: int = 3, value_bytes: int = 2) -> Traffic:
    """Of the reference in eager torch, operator by operator: a logsumexp is a maximum, a difference, an exponential in
    place and a sum, so it reads 16 bytes and writes 8 for a value."""
    size = rows * prototypes
    first = Traffic((value_bytes + 4 + 16) * size, (4 + 4 + 8) * size, 5 * size)
    later = Traffic((value_bytes + 4 + 4 + 16 + 4 + 16) * size, (4 + 4 + 4 + 8 + 4 + 8) * size, 11 * size)
    return sum([later] * (iterations - 1), first)


def check_runnable(name: str, logits: Tensor) -> None:
    """ValueError: a dtype that the kernels do not read. RuntimeError: Triton cannot run on the device."""
    if logits.dtype not in DTYPES:
        raise ValueError(f"{name}: logits are {logits.dtype}, the kernel reads fp32, fp16 and bf16: use the reference")
    if not can_run_on(logits.device):
        raise RuntimeError(
            f"{name}: Triton cannot run on {logits.device} in this process. Set kernels=reference, or use a GPU with "
            "Triton (on the CPU kernels run interpreted only, with TRITON_INTERPRET=1, for tests)."
        )


def tiles_of(name: str, arch: str, dtype: str) -> Tiles:
    """Of a kernel of this package. RuntimeError: it has none for `arch`."""
    tiles = tiles_for(name, arch=arch, dtype=dtype)
    if tiles is None:
        raise RuntimeError(f"{name}: no tiles for {arch}: set kernels=reference")
    return tiles


def _check_pieces(pieces: Sequence[Tensor]) -> None:
    shapes = [tuple(piece.shape) for piece in pieces]
    if not shapes or any(len(shape) != 2 or shape[1] != shapes[0][-1] for shape in shapes):
        raise ValueError(f"logits: found shapes {shapes}, needed at least one (n, K), K the same in all")
