"""The Triton kernels of attention's backward (FlashAttention-2): queries' gradients, then keys' and values'.

Source: Dao, FlashAttention-2 (arXiv 2307.08691, algorithm 2), as two kernels, so that no sum is taken with atomics.
Invariant: the weights are computed again from the logarithms that the forward left, and dropout's choice from its
counter; two runs give the same bits.

Layouts: as in attention_forward.py; d_qkv has qkv's. `attention_queries` runs first and leaves, for each query, the sum
over the features of out · d_out, which `attention_keys_values` reads.
"""

from __future__ import annotations

from functools import partial

from dinox_model.kernels.attention_forward import COUNTS, kept, loaded, rounded, stored
from dinox_model.kernels.language import kernel, tl


@kernel
def _onto_queries(
    d_q, q, d_o, logs, shift, keys, values, at_m, start_n, length, row, scale_log2, seed, drop_below, keep_scale,
    sequence_and_head,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    CHEAP_BF16: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """d_q with what one tile of keys adds (without the scale)."""
    at_n = start_n + tl.arange(0, BLOCK_N)
    k = loaded(keys, at_n, row, length, HEAD_DIM, PADDED_DIM, MASKED)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2 - logs[:, None]
    if MASKED:
        allowed = at_n[None, :] < length
        if CAUSAL:
            allowed = allowed & (at_n[None, :] <= at_m[:, None])
        logits = tl.where(allowed, logits, float("-inf"))
    weights = tl.exp2(logits)
    v = loaded(values, at_n, row, length, HEAD_DIM, PADDED_DIM, MASKED)
    d_weights = tl.dot(d_o, tl.trans(v), input_precision="ieee")
    if DROPOUT:
        keep = kept(seed, drop_below, at_n[None, :], at_m[:, None], sequence_and_head)
        d_weights = tl.where(keep, d_weights * keep_scale, 0.0)
    d_logits = weights * (d_weights - shift[:, None])
    return tl.dot(rounded(d_logits, k, CHEAP_BF16), k, d_q, input_precision="ieee")


@partial(kernel, do_not_specialize=COUNTS)
def attention_queries(
    qkv, out, d_out, d_qkv, per_row, shifts, lengths, seed, tokens, length, num_heads, scale, scale_log2, drop_below,
    keep_scale,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
    DROPOUT: tl.constexpr, CHEAP_BF16: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The queries' third of d_qkv, and shifts; a program owns BLOCK_M queries of one head of one sequence."""
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
    width = num_heads * HEAD_DIM
    row = 3 * num_heads * HEAD_DIM
    queries = first.to(tl.int64) * row + head * HEAD_DIM
    keys = qkv + queries + width
    values = keys + width
    outputs = first.to(tl.int64) * width + head * HEAD_DIM
    at_row = head.to(tl.int64) * tokens + first
    at_m = start_m + tl.arange(0, BLOCK_M)
    o = loaded(out + outputs, at_m, width, length, HEAD_DIM, PADDED_DIM, True)
    d_o = loaded(d_out + outputs, at_m, width, length, HEAD_DIM, PADDED_DIM, True)
    shift = tl.sum(o.to(tl.float32) * d_o.to(tl.float32), 1)
    tl.store(shifts + at_row + at_m, shift, mask=at_m < length)
    q = loaded(qkv + queries, at_m, row, length, HEAD_DIM, PADDED_DIM, True)
    logs = tl.load(per_row + at_row + at_m, mask=at_m < length, other=float("inf"))
    drawn = 0
    if DROPOUT:
        drawn = tl.load(seed)
    sequence_and_head = sequence * num_heads + head

    d_q = tl.zeros((BLOCK_M, PADDED_DIM), tl.float32)
    last = length
    whole = (length // BLOCK_N) * BLOCK_N
    if CAUSAL:
        last = tl.minimum(length, start_m + BLOCK_M)
        whole = tl.minimum(whole, ((start_m + 1) // BLOCK_N) * BLOCK_N)
    for start_n in range(0, whole, BLOCK_N):
        d_q = _onto_queries(
            d_q, q, d_o, logs, shift, keys, values, at_m, start_n, length, row, scale_log2, drawn, drop_below,
            keep_scale, sequence_and_head,
            HEAD_DIM, PADDED_DIM, CAUSAL, DROPOUT, CHEAP_BF16, False, BLOCK_N,
        )  # fmt: skip
    for start_n in range(whole, last, BLOCK_N):
        d_q = _onto_queries(
            d_q, q, d_o, logs, shift, keys, values, at_m, start_n, length, row, scale_log2, drawn, drop_below,
            keep_scale, sequence_and_head,
            HEAD_DIM, PADDED_DIM, CAUSAL, DROPOUT, CHEAP_BF16, True, BLOCK_N,
        )  # fmt: skip
    stored(d_qkv + queries, at_m, row, length, d_q * scale, HEAD_DIM, PADDED_DIM)


@kernel
def loaded_transposed(base, at, row, length, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, MASKED: tl.constexpr):
    """What `loaded` gives, as (PADDED_DIM, rows): fewer loads from shared memory on gfx11 than transposing it."""
    at_d = tl.arange(0, PADDED_DIM)
    pointers = base + at[None, :] * row + at_d[:, None]
    if PADDED_DIM > HEAD_DIM:
        if MASKED:
            tile = tl.load(pointers, mask=(at[None, :] < length) & (at_d[:, None] < HEAD_DIM), other=0.0)
        else:
            tile = tl.load(pointers, mask=at_d[:, None] < HEAD_DIM, other=0.0)
    else:
        if MASKED:
            tile = tl.load(pointers, mask=at[None, :] < length, other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@kernel
def _onto_keys_values(
    d_k, d_v, k, v, queries, d_outputs, logs, shifts, at_n, start_m, length, row, width, scale_log2, seed, drop_below,
    keep_scale, sequence_and_head,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    CHEAP_BF16: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """(d_k, d_v) with what one tile of queries adds (d_k without the scale). Weights are (keys, queries) here.

    Nothing is masked by the number of keys: what a key beyond the sequence collects stays its own, and is not stored.
    A query beyond it has an infinite logarithm, so its weights are 0.
    """
    at_m = start_m + tl.arange(0, BLOCK_M)
    q_transposed = loaded_transposed(queries, at_m, row, length, HEAD_DIM, PADDED_DIM, MASKED)
    d_o_transposed = loaded_transposed(d_outputs, at_m, width, length, HEAD_DIM, PADDED_DIM, MASKED)
    if MASKED:
        log = tl.load(logs + at_m, mask=at_m < length, other=float("inf"))
        shift = tl.load(shifts + at_m, mask=at_m < length, other=0.0)
    else:
        log = tl.load(logs + at_m)
        shift = tl.load(shifts + at_m)
    logits = tl.dot(k, q_transposed, input_precision="ieee") * scale_log2 - log[None, :]
    if MASKED and CAUSAL:
        logits = tl.where(at_n[:, None] <= at_m[None, :], logits, float("-inf"))
    weights = tl.exp2(logits)
    d_weights = tl.dot(v, d_o_transposed, input_precision="ieee")
    mixing = weights
    if DROPOUT:
        keep = kept(seed, drop_below, at_n[:, None], at_m[None, :], sequence_and_head)
        mixing = tl.where(keep, weights * keep_scale, 0.0)
        d_weights = tl.where(keep, d_weights * keep_scale, 0.0)
    d_o = tl.trans(d_o_transposed)
    new_d_v = tl.dot(rounded(mixing, d_o, CHEAP_BF16), d_o, d_v, input_precision="ieee")
    d_logits = weights * (d_weights - shift[None, :])
    q = tl.trans(q_transposed)
    new_d_k = tl.dot(rounded(d_logits, q, CHEAP_BF16), q, d_k, input_precision="ieee")
    return new_d_k, new_d_v


@partial(kernel, do_not_specialize=COUNTS)
def attention_keys_values(
    qkv, d_out, d_qkv, per_row, shifts, lengths, seed, tokens, length, num_heads, scale, scale_log2, drop_below,
    keep_scale,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr,
    DROPOUT: tl.constexpr, CHEAP_BF16: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The keys' and values' thirds of d_qkv; a program owns BLOCK_N keys of one head of one sequence."""
    program = tl.program_id(0)
    num_tiles = tl.cdiv(length, BLOCK_N)
    start_n = (program % num_tiles) * BLOCK_N
    head = (program // num_tiles) % num_heads
    sequence = program // (num_tiles * num_heads)
    first = sequence * length
    if PACKED:
        first = tl.load(lengths + sequence)
        length = tl.load(lengths + sequence + 1) - first
        if start_n >= length:
            return
    width = num_heads * HEAD_DIM
    row = 3 * num_heads * HEAD_DIM
    queries = first.to(tl.int64) * row + head * HEAD_DIM
    d_outputs = d_out + first.to(tl.int64) * width + head * HEAD_DIM
    at_row = head.to(tl.int64) * tokens + first
    at_n = start_n + tl.arange(0, BLOCK_N)
    k = loaded(qkv + queries + width, at_n, row, length, HEAD_DIM, PADDED_DIM, True)
    v = loaded(qkv + queries + 2 * width, at_n, row, length, HEAD_DIM, PADDED_DIM, True)
    drawn = 0
    if DROPOUT:
        drawn = tl.load(seed)
    sequence_and_head = sequence * num_heads + head

    d_k = tl.zeros((BLOCK_N, PADDED_DIM), tl.float32)
    d_v = tl.zeros((BLOCK_N, PADDED_DIM), tl.float32)
    begin = 0
    if CAUSAL:  # queries before `seen` see some of these keys, those from it on all of them
        begin = (start_n // BLOCK_M) * BLOCK_M
        seen = tl.minimum(tl.cdiv(start_n + BLOCK_N, BLOCK_M) * BLOCK_M, length)
        for start_m in range(begin, seen, BLOCK_M):
            d_k, d_v = _onto_keys_values(
                d_k, d_v, k, v, qkv + queries, d_outputs, per_row + at_row, shifts + at_row, at_n, start_m, length,
                row, width, scale_log2, drawn, drop_below, keep_scale, sequence_and_head,
                HEAD_DIM, PADDED_DIM, CAUSAL, DROPOUT, CHEAP_BF16, True, BLOCK_M,
            )  # fmt: skip
        begin = tl.cdiv(start_n + BLOCK_N, BLOCK_M) * BLOCK_M
    whole = tl.maximum((length // BLOCK_M) * BLOCK_M, begin)
    for start_m in range(begin, whole, BLOCK_M):
        d_k, d_v = _onto_keys_values(
            d_k, d_v, k, v, qkv + queries, d_outputs, per_row + at_row, shifts + at_row, at_n, start_m, length,
            row, width, scale_log2, drawn, drop_below, keep_scale, sequence_and_head,
            HEAD_DIM, PADDED_DIM, CAUSAL, DROPOUT, CHEAP_BF16, False, BLOCK_M,
        )  # fmt: skip
    for start_m in range(whole, length, BLOCK_M):
        d_k, d_v = _onto_keys_values(
            d_k, d_v, k, v, qkv + queries, d_outputs, per_row + at_row, shifts + at_row, at_n, start_m, length,
            row, width, scale_log2, drawn, drop_below, keep_scale, sequence_and_head,
            HEAD_DIM, PADDED_DIM, CAUSAL, DROPOUT, CHEAP_BF16, True, BLOCK_M,
        )  # fmt: skip
    stored(d_qkv + queries + width, at_n, row, length, d_k * scale, HEAD_DIM, PADDED_DIM)
    stored(d_qkv + queries + 2 * width, at_n, row, length, d_v, HEAD_DIM, PADDED_DIM)
