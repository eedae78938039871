"""The Triton kernel of attention's forward (FlashAttention-2), and the parts that it shares with the backward.

Source: Dao, FlashAttention-2 (arXiv 2307.08691, algorithm 1), on queries, keys and values as one GEMM leaves them.
Invariant: what a program computes does not depend on the tiles but for rounding: dropout draws from a counter made of
(key, query, sequence and head).

Layouts: qkv (tokens, 3, heads, HEAD_DIM), out (tokens, heads, HEAD_DIM), per_row (heads, tokens); tokens are those of
all sequences, one after the other. A program owns BLOCK_M queries of one head of one sequence.
"""

from __future__ import annotations

from functools import partial

from dinox_model.kernels.language import kernel, tl

COUNTS = ("tokens", "length", "num_heads", "drop_below")
"""Arguments that differ from batch to batch: one compiled kernel takes them all."""


@kernel
def loaded(base, at, row, length, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, MASKED: tl.constexpr):
    """Rows `at` of one head, (rows, PADDED_DIM): zeros beyond the head, and beyond the sequence where MASKED."""
    at_d = tl.arange(0, PADDED_DIM)
    pointers = base + at[:, None] * row + at_d[None, :]
    if PADDED_DIM > HEAD_DIM:
        if MASKED:
            tile = tl.load(pointers, mask=(at[:, None] < length) & (at_d[None, :] < HEAD_DIM), other=0.0)
        else:
            tile = tl.load(pointers, mask=at_d[None, :] < HEAD_DIM, other=0.0)
    else:
        if MASKED:
            tile = tl.load(pointers, mask=at[:, None] < length, other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@kernel
def stored(base, at, row, length, tile, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Writes what `loaded` reads, in the pointer's dtype; nothing beyond the sequence or the head."""
    at_d = tl.arange(0, PADDED_DIM)
    pointers = base + at[:, None] * row + at_d[None, :]
    mask = at[:, None] < length
    if PADDED_DIM > HEAD_DIM:
        mask = mask & (at_d[None, :] < HEAD_DIM)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@kernel
def rounded(tile, like, CHEAP_BF16: tl.constexpr):
    """fp32 to the dtype of `like`, as an operand of a product.

    CHEAP_BF16: to the nearest, ties away from zero, in two operations, where hardware cannot convert (gfx11, gfx942).
    NaNs and infinities that arithmetic makes stay what they are.
    """
    if CHEAP_BF16:
        bits = tile.to(tl.uint32, bitcast=True) + 0x8000
        narrow = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        narrow = tile.to(like.dtype)
    return narrow


@kernel
def kept(seed, drop_below, at_n, at_m, sequence_and_head):
    """Which weights dropout keeps: 7 rounds of Philox 4x32 (Salmon et al., SC11), 31 bits compared with drop_below."""
    words = tl.philox(seed, at_n, at_m, sequence_and_head, 0, 7)
    return (words[0] >> 1).to(tl.int32) >= drop_below


@kernel
def _onto(
    mixed, sums, peaks, q, keys, values, at_m, start_n, length, row, scale_log2, seed, drop_below, sequence_and_head,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    CHEAP_BF16: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of keys taken into the running softmax: (mixed, sums, peaks) after it."""
    at_n = start_n + tl.arange(0, BLOCK_N)
    k = loaded(keys, at_n, row, length, HEAD_DIM, PADDED_DIM, MASKED)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        allowed = at_n[None, :] < length
        if CAUSAL:
            allowed = allowed & (at_n[None, :] <= at_m[:, None])
        logits = tl.where(allowed, logits, float("-inf"))
    new_peaks = tl.maximum(peaks, tl.max(logits, 1) * scale_log2)
    weights = tl.exp2(logits * scale_log2 - new_peaks[:, None])
    decay = tl.exp2(peaks - new_peaks)
    new_sums = sums * decay + tl.sum(weights, 1)
    if DROPOUT:
        keep = kept(seed, drop_below, at_n[None, :], at_m[:, None], sequence_and_head)
        weights = tl.where(keep, weights, 0.0)
    v = loaded(values, at_n, row, length, HEAD_DIM, PADDED_DIM, MASKED)
    new_mixed = tl.dot(rounded(weights, v, CHEAP_BF16), v, mixed * decay[:, None], input_precision="ieee")
    return new_mixed, new_sums, new_peaks


@partial(kernel, do_not_specialize=COUNTS)
def attention_forward(
    qkv, out, per_row, lengths, seed, tokens, length, num_heads, scale_log2, drop_below, keep_scale,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
    DROPOUT: tl.constexpr, CHEAP_BF16: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = dropout(softmax(scale · q k^T)) v; per_row = log2 of the sum of exp2 of a query's logits · log2(e).

    length: of each sequence, or of the longest where PACKED. scale_log2: scale · log2(e), > 0. The grid is one axis:
    tiles of queries, then heads, then sequences.
    """
    program = tl.program_id(0)
    num_tiles = tl.cdiv(length, BLOCK_M)
    start_m = (program % num_tiles) * BLOCK_M
    head = (program // num_tiles) % num_heads
    sequence = program // (num_tiles * num_heads)
    first = sequence * length
    if PACKED:
        first = tl.load(lengths + sequence)
        length = tl.load(lengths + sequence + 1) - first
        if start_m >= length:
            return
    row = 3 * num_heads * HEAD_DIM
    queries = qkv + first.to(tl.int64) * row + head * HEAD_DIM
    keys = queries + num_heads * HEAD_DIM
    values = keys + num_heads * HEAD_DIM
    at_m = start_m + tl.arange(0, BLOCK_M)
    q = loaded(queries, at_m, row, length, HEAD_DIM, PADDED_DIM, True)
    drawn = 0
    if DROPOUT:
        drawn = tl.load(seed)
    sequence_and_head = sequence * num_heads + head

    mixed = tl.zeros((BLOCK_M, PADDED_DIM), tl.float32)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    peaks = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    last = length
    whole = (length // BLOCK_N) * BLOCK_N
    if CAUSAL:
        last = tl.minimum(length, start_m + BLOCK_M)
        whole = ((start_m + 1) // BLOCK_N) * BLOCK_N
        whole = tl.minimum(whole, (length // BLOCK_N) * BLOCK_N)
    for start_n in range(0, whole, BLOCK_N):
        mixed, sums, peaks = _onto(
            mixed, sums, peaks, q, keys, values, at_m, start_n, length, row, scale_log2, drawn, drop_below,
            sequence_and_head, HEAD_DIM, PADDED_DIM, CAUSAL, DROPOUT, CHEAP_BF16, False, BLOCK_N,
        )  # fmt: skip
    for start_n in range(whole, last, BLOCK_N):
        mixed, sums, peaks = _onto(
            mixed, sums, peaks, q, keys, values, at_m, start_n, length, row, scale_log2, drawn, drop_below,
            sequence_and_head, HEAD_DIM, PADDED_DIM, CAUSAL, DROPOUT, CHEAP_BF16, True, BLOCK_N,
        )  # fmt: skip

    outputs = out + first.to(tl.int64) * (num_heads * HEAD_DIM) + head * HEAD_DIM
    shares = mixed * (keep_scale / sums)[:, None]
    stored(outputs, at_m, num_heads * HEAD_DIM, length, shares, HEAD_DIM, PADDED_DIM)
    at_row = per_row + head.to(tl.int64) * tokens + first
    tl.store(at_row + at_m, peaks + tl.log2(sums), mask=at_m < length)
