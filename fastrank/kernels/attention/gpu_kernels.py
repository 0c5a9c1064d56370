"""Packed attention as Triton kernels: a program owns a tile of one head of one pair and walks over the other side.

Which rows are a pair's say begins and ends, so packed and padded batches run the same kernels. Tokens and heads of q,
k and v lie `step` apart, counted in STEPs of 8 elements, so that the compiler knows rows to be aligned to 16 bytes and
loads them whole. Probabilities are 2^(scale * (score - highest) - log_total): scale holds log2(e) and is positive, and
scores of any size keep the digits of their differences. Sums are float32; products take the inputs' own dtype.
"""

import triton
from triton import language as tl

from fastrank.kernels.configuration import STEP, kernel

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def find_heads(num_heads, heads_each):
    """Which tile or pair is this program's, its first head and number of heads: groups of heads_each of one follow each
    other, since their rows lie side by side."""
    groups = (num_heads + heads_each - 1) // heads_each
    program = tl.program_id(0)
    first_head = program % groups * heads_each
    return program // groups, first_head, tl.minimum(heads_each, num_heads - first_head)


@triton.jit
def find_tile(tiles_ptr, tile):
    """Pair, -1 behind the last, and first row of a tile."""
    return tl.load(tiles_ptr + 2 * tile), tl.load(tiles_ptr + 2 * tile + 1)


@triton.jit
def find_rows(begins_ptr, ends_ptr, pair):
    """The first row of a pair, and how many it has."""
    begin = tl.load(begins_ptr + pair)
    return begin, tl.load(ends_ptr + pair) - begin


@triton.jit
def place(ptr, begin, token_step, head, head_step):
    """Where a head of a pair begins."""
    return ptr + (begin.to(tl.int64) * token_step + head.to(tl.int64) * head_step) * STEP


@triton.jit
def load_rows(ptr, rows, count, token_step, HEAD_DIM: tl.constexpr):
    """(rows, HEAD_DIM), 0 behind the pair's last."""
    offsets = rows[:, None] * (token_step * STEP) + tl.arange(0, HEAD_DIM)[None, :]
    return tl.load(ptr + offsets, mask=rows[:, None] < count, other=0.0)


@triton.jit
def load_columns(ptr, rows, count, token_step, HEAD_DIM: tl.constexpr):
    """(HEAD_DIM, rows), 0 behind the pair's last."""
    offsets = rows[None, :] * (token_step * STEP) + tl.arange(0, HEAD_DIM)[:, None]
    return tl.load(ptr + offsets, mask=rows[None, :] < count, other=0.0)


@triton.jit
def store_rows(ptr, values, rows, count, token_step, HEAD_DIM: tl.constexpr):
    offsets = rows[:, None] * (token_step * STEP) + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(ptr + offsets, values.to(ptr.dtype.element_ty), mask=rows[:, None] < count)


@kernel(aligned=("q", "k", "v", "out", "dout", "dq", "dk", "dv"))
def attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    highest_ptr,
    log_totals_ptr,
    query_begins_ptr,
    query_ends_ptr,
    key_begins_ptr,
    key_ends_ptr,
    tiles_ptr,
    num_heads,
    heads_each,
    num_queries,
    q_token_step,
    q_head_step,
    k_token_step,
    k_head_step,
    v_token_step,
    v_head_step,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    IS_EXACT: tl.constexpr,
):
    """out (queries, heads, HEAD_DIM), and (heads, queries) the logarithm of what a row is divided by; IS_EXACT: with
    the highest score beside it, which is part of it otherwise."""
    tile, first_head, heads_here = find_heads(num_heads, heads_each)
    pair, first_row = find_tile(tiles_ptr, tile)
    if pair < 0:
        return
    query_begin, length = find_rows(query_begins_ptr, query_ends_ptr, pair)
    key_begin, num_keys = find_rows(key_begins_ptr, key_ends_ptr, pair)
    rows = first_row + tl.arange(0, BLOCK_QUERIES)
    out_step = num_heads * (HEAD_DIM // STEP)
    for step in tl.range(heads_here, disable_licm=True):  # hoisting costs registers
        head = first_head + step
        q_at = place(q_ptr, query_begin, q_token_step, head, q_head_step)
        k_at = place(k_ptr, key_begin, k_token_step, head, k_head_step)
        v_at = place(v_ptr, key_begin, v_token_step, head, v_head_step)
        q = load_rows(q_at, rows, length, q_token_step, HEAD_DIM)
        highest = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_QUERIES,), tl.float32)
        out = tl.zeros((BLOCK_QUERIES, HEAD_DIM), tl.float32)
        for first_key in range(0, num_keys, BLOCK_KEYS):
            keys = first_key + tl.arange(0, BLOCK_KEYS)
            k = load_columns(k_at, keys, num_keys, k_token_step, HEAD_DIM)
            v = load_rows(v_at, keys, num_keys, v_token_step, HEAD_DIM)
            scores = tl.where(keys[None, :] < num_keys, tl.dot(q, k, input_precision="ieee"), float("-inf"))
            if IS_EXACT:
                above = tl.maximum(highest, tl.max(scores, 1))
                shrink = tl.exp2((highest - above) * scale)
                powers = tl.exp2((scores - above[:, None]) * scale)
            else:  # highest is scaled: one fused multiplication and addition a score
                above = tl.maximum(highest, tl.max(scores, 1) * scale)
                shrink = tl.exp2(highest - above)
                powers = tl.exp2(scores * scale - above[:, None])
            total = total * shrink + tl.sum(powers, 1)
            out = tl.dot(powers.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
            highest = above
        total = tl.where(num_keys > 0, total, 1.0)  # a query without a key gives 0
        out *= (1.0 / total)[:, None]
        out_at = place(out_ptr, query_begin, out_step, head, HEAD_DIM // STEP)
        store_rows(out_at, out, rows, length, out_step, HEAD_DIM)
        statistics_at = head.to(tl.int64) * num_queries + query_begin
        if IS_EXACT:
            tl.store(highest_ptr + statistics_at + rows, highest, mask=rows < length)
            tl.store(log_totals_ptr + statistics_at + rows, tl.log2(total), mask=rows < length)
        else:
            tl.store(log_totals_ptr + statistics_at + rows, highest + tl.log2(total), mask=rows < length)


@kernel(aligned=("q", "k", "v", "out", "dout", "dq", "dk", "dv"))
def attention_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    dout_ptr,
    highest_ptr,
    log_totals_ptr,
    delta_ptr,
    dq_ptr,
    query_begins_ptr,
    query_ends_ptr,
    key_begins_ptr,
    key_ends_ptr,
    tiles_ptr,
    num_heads,
    num_queries,
    q_token_step,
    q_head_step,
    k_token_step,
    k_head_step,
    v_token_step,
    v_head_step,
    dq_token_step,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    IS_EXACT: tl.constexpr,
    MENDS_DELTA: tl.constexpr,
):
    """dq, and delta (heads, queries) = the sum of out * dout of each row, which attention_dkdv_kernel reads.

    Where one key has all the weight, delta equals its dp but for rounding, and that is all that is left of ds.
    MENDS_DELTA takes it out again: ds must sum to 0, so what is missing there was missing in delta."""
    program = tl.program_id(0)
    head = program % num_heads
    pair, first_row = find_tile(tiles_ptr, program // num_heads)
    if pair < 0:
        return
    query_begin, length = find_rows(query_begins_ptr, query_ends_ptr, pair)
    key_begin, num_keys = find_rows(key_begins_ptr, key_ends_ptr, pair)
    rows = first_row + tl.arange(0, BLOCK_QUERIES)
    q = load_rows(place(q_ptr, query_begin, q_token_step, head, q_head_step), rows, length, q_token_step, HEAD_DIM)
    out_step = num_heads * (HEAD_DIM // STEP)
    out_at = place(out_ptr, query_begin, out_step, head, HEAD_DIM // STEP)
    dout_at = place(dout_ptr, query_begin, out_step, head, HEAD_DIM // STEP)
    out = load_rows(out_at, rows, length, out_step, HEAD_DIM)
    dout = load_rows(dout_at, rows, length, out_step, HEAD_DIM)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    statistics_at = head.to(tl.int64) * num_queries + query_begin
    if IS_EXACT:
        highest = tl.load(highest_ptr + statistics_at + rows, mask=rows < length, other=0.0)
    log_total = tl.load(log_totals_ptr + statistics_at + rows, mask=rows < length, other=0.0)
    k_at = place(k_ptr, key_begin, k_token_step, head, k_head_step)
    v_at = place(v_ptr, key_begin, v_token_step, head, v_head_step)
    dq = tl.zeros((BLOCK_QUERIES, HEAD_DIM), tl.float32)
    if MENDS_DELTA:
        missing = tl.zeros((BLOCK_QUERIES,), tl.float32)
        mean_key = tl.zeros((BLOCK_QUERIES, HEAD_DIM), tl.float32)
    for first_key in range(0, num_keys, BLOCK_KEYS):
        keys = first_key + tl.arange(0, BLOCK_KEYS)
        k = load_rows(k_at, keys, num_keys, k_token_step, HEAD_DIM)
        v = load_rows(v_at, keys, num_keys, v_token_step, HEAD_DIM)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.where(keys[None, :] < num_keys, scores, float("-inf"))
        if IS_EXACT:
            scores -= highest[:, None]
        p = tl.exp2(scores * scale - log_total[:, None])
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        if MENDS_DELTA:
            missing += tl.sum(ds, 1)
            mean_key = tl.dot(p.to(k.dtype), k, mean_key, input_precision="ieee")
    if MENDS_DELTA:
        dq -= missing[:, None] * mean_key
        delta += missing
    tl.store(delta_ptr + statistics_at + rows, delta, mask=rows < length)
    dq_at = place(dq_ptr, query_begin, dq_token_step, head, HEAD_DIM // STEP)
    store_rows(dq_at, dq * (scale * LN_2), rows, length, dq_token_step, HEAD_DIM)


@kernel(aligned=("q", "k", "v", "out", "dout", "dq", "dk", "dv"))
def attention_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    highest_ptr,
    log_totals_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    query_begins_ptr,
    query_ends_ptr,
    key_begins_ptr,
    key_ends_ptr,
    tiles_ptr,
    num_heads,
    num_queries,
    q_token_step,
    q_head_step,
    k_token_step,
    k_head_step,
    v_token_step,
    v_head_step,
    dk_token_step,
    dv_token_step,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    IS_EXACT: tl.constexpr,
):
    """dk and dv, a program for each tile of keys. IS_EXACT: everything is transposed, keys are rows."""
    program = tl.program_id(0)
    head = program % num_heads
    pair, first_row = find_tile(tiles_ptr, program // num_heads)
    if pair < 0:
        return
    query_begin, length = find_rows(query_begins_ptr, query_ends_ptr, pair)
    key_begin, num_keys = find_rows(key_begins_ptr, key_ends_ptr, pair)
    keys = first_row + tl.arange(0, BLOCK_KEYS)
    k = load_rows(place(k_ptr, key_begin, k_token_step, head, k_head_step), keys, num_keys, k_token_step, HEAD_DIM)
    v = load_rows(place(v_ptr, key_begin, v_token_step, head, v_head_step), keys, num_keys, v_token_step, HEAD_DIM)
    q_at = place(q_ptr, query_begin, q_token_step, head, q_head_step)
    dout_step = num_heads * (HEAD_DIM // STEP)
    dout_at = place(dout_ptr, query_begin, dout_step, head, HEAD_DIM // STEP)
    statistics_at = head.to(tl.int64) * num_queries + query_begin
    dk = tl.zeros((BLOCK_KEYS, HEAD_DIM), tl.float32)
    dv = tl.zeros((BLOCK_KEYS, HEAD_DIM), tl.float32)
    for first_query in range(0, length, BLOCK_QUERIES):
        rows = first_query + tl.arange(0, BLOCK_QUERIES)
        q = load_rows(q_at, rows, length, q_token_step, HEAD_DIM)
        dout = load_rows(dout_at, rows, length, dout_step, HEAD_DIM)
        log_total = tl.load(log_totals_ptr + statistics_at + rows, mask=rows < length, other=0.0)
        delta = tl.load(delta_ptr + statistics_at + rows, mask=rows < length, other=0.0)
        # Rows behind the last query have dout = 0 and delta = 0, so what stands in p there counts for nothing.
        if IS_EXACT:
            highest = tl.load(highest_ptr + statistics_at + rows, mask=rows < length, other=0.0)
            scores = tl.dot(k, tl.trans(q), input_precision="ieee")
            p = tl.exp2((scores - highest[None, :]) * scale - log_total[None, :])
            # The order of sums that attention_dq_kernel has, to which delta belongs.
            dp = tl.trans(tl.dot(dout, tl.trans(v), input_precision="ieee"))
            ds = p * (dp - delta[None, :])
        else:
            scores = tl.dot(q, tl.trans(k))
            p = tl.exp2(scores * scale - log_total[:, None])
            dp = tl.dot(dout, tl.trans(v))
            ds = tl.trans((p * (dp - delta[:, None])).to(q.dtype))
            p = tl.trans(p.to(q.dtype))
        dv = tl.dot(p, dout, dv, input_precision="ieee")
        dk = tl.dot(ds, q, dk, input_precision="ieee")
    dk *= scale * LN_2
    dk_at = place(dk_ptr, key_begin, dk_token_step, head, HEAD_DIM // STEP)
    store_rows(dk_at, dk, keys, num_keys, dk_token_step, HEAD_DIM)
    dv_at = place(dv_ptr, key_begin, dv_token_step, head, HEAD_DIM // STEP)
    store_rows(dv_at, dv, keys, num_keys, dv_token_step, HEAD_DIM)


@kernel(aligned=("q", "k", "v", "out", "dout", "dq", "dk", "dv"))
def attention_short_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    highest_ptr,
    log_totals_ptr,
    begins_ptr,
    ends_ptr,
    num_heads,
    heads_each,
    num_queries,
    q_token_step,
    q_head_step,
    k_token_step,
    k_head_step,
    v_token_step,
    v_head_step,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    QUERY_TILES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    MORE_KEYS: tl.constexpr,
    MIN_KEYS: tl.constexpr,
):
    """out (queries, heads, HEAD_DIM), and (heads, queries) the logarithm of what a row is divided by, of the pairs of
    MIN_KEYS to BLOCK_KEYS + MORE_KEYS tokens: a program walks over some heads of one, and loads the next head's rows
    while it computes. With MORE_KEYS the keys are two tiles, the first of them full."""
    pair, first_head, heads_here = find_heads(num_heads, heads_each)
    begin, length = find_rows(begins_ptr, ends_ptr, pair)
    if (length < MIN_KEYS) | (length > BLOCK_KEYS + MORE_KEYS):
        return
    keys = tl.arange(0, BLOCK_KEYS)
    first_end = length if MORE_KEYS == 0 else BLOCK_KEYS
    if MORE_KEYS > 0:
        more = BLOCK_KEYS + tl.arange(0, MORE_KEYS)
    out_step = num_heads * (HEAD_DIM // STEP)
    q_at = place(q_ptr, begin, q_token_step, first_head, q_head_step)
    k_at = place(k_ptr, begin, k_token_step, first_head, k_head_step)
    v_at = place(v_ptr, begin, v_token_step, first_head, v_head_step)
    out_at = place(out_ptr, begin, out_step, first_head, HEAD_DIM // STEP)
    log_totals_at = log_totals_ptr + first_head.to(tl.int64) * num_queries + begin
    for _ in tl.range(heads_here, disable_licm=True):  # hoisting costs registers
        k = load_columns(k_at, keys, first_end, k_token_step, HEAD_DIM)
        v = load_rows(v_at, keys, first_end, v_token_step, HEAD_DIM)
        if MORE_KEYS > 0:
            more_k = load_columns(k_at, more, length, k_token_step, HEAD_DIM)
            more_v = load_rows(v_at, more, length, v_token_step, HEAD_DIM)
        for tile in tl.static_range(QUERY_TILES):
            rows = tile * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
            q = load_rows(q_at, rows, length, q_token_step, HEAD_DIM)
            scores = tl.dot(q, k)
            if MORE_KEYS > 0:
                more_scores = tl.where(more[None, :] < length, tl.dot(q, more_k), float("-inf"))
                highest = tl.maximum(tl.max(scores, 1), tl.max(more_scores, 1)) * scale
            else:
                scores = tl.where(keys[None, :] < length, scores, float("-inf"))
                highest = tl.max(scores, 1) * scale
            powers = tl.exp2(scores * scale - highest[:, None])
            total = tl.sum(powers, 1)
            out = tl.dot(powers.to(v.dtype), v)
            if MORE_KEYS > 0:
                more_powers = tl.exp2(more_scores * scale - highest[:, None])
                total += tl.sum(more_powers, 1)
                out = tl.dot(more_powers.to(v.dtype), more_v, out)
            out *= (1.0 / total)[:, None]
            store_rows(out_at, out, rows, length, out_step, HEAD_DIM)
            tl.store(log_totals_at + rows, highest + tl.log2(total), mask=rows < length)
        q_at += q_head_step * STEP
        k_at += k_head_step * STEP
        v_at += v_head_step * STEP
        out_at += HEAD_DIM
        log_totals_at += num_queries


@kernel(aligned=("q", "k", "v", "out", "dout", "dq", "dk", "dv"))
def attention_short_backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    dout_ptr,
    log_totals_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    begins_ptr,
    ends_ptr,
    num_heads,
    num_queries,
    q_token_step,
    q_head_step,
    k_token_step,
    k_head_step,
    v_token_step,
    v_head_step,
    dq_token_step,
    dk_token_step,
    dv_token_step,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    KEY_TILES: tl.constexpr,
    MIN_KEYS: tl.constexpr,
):
    """dq, dk and dv of the pairs of MIN_KEYS to BLOCK_QUERIES tokens: a program has the queries of a whole head of one
    on the chip and meets its keys tile by tile."""
    program = tl.program_id(0)
    head = program % num_heads
    pair = program // num_heads
    begin, length = find_rows(begins_ptr, ends_ptr, pair)
    if (length < MIN_KEYS) | (length > BLOCK_QUERIES):
        return
    rows = tl.arange(0, BLOCK_QUERIES)
    q = load_rows(place(q_ptr, begin, q_token_step, head, q_head_step), rows, length, q_token_step, HEAD_DIM)
    out_step = num_heads * (HEAD_DIM // STEP)
    dout_at = place(dout_ptr, begin, out_step, head, HEAD_DIM // STEP)
    dout = load_rows(dout_at, rows, length, out_step, HEAD_DIM)
    log_totals_at = log_totals_ptr + head.to(tl.int64) * num_queries + begin
    log_total = tl.load(log_totals_at + rows, mask=rows < length, other=0.0)
    k_at = place(k_ptr, begin, k_token_step, head, k_head_step)
    v_at = place(v_ptr, begin, v_token_step, head, v_head_step)
    dk_at = place(dk_ptr, begin, dk_token_step, head, HEAD_DIM // STEP)
    dv_at = place(dv_ptr, begin, dv_token_step, head, HEAD_DIM // STEP)
    natural_scale = scale * LN_2
    if KEY_TILES > 1:
        out_at = place(out_ptr, begin, out_step, head, HEAD_DIM // STEP)
        out = load_rows(out_at, rows, length, out_step, HEAD_DIM)
        delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    dq = tl.zeros((BLOCK_QUERIES, HEAD_DIM), tl.float32)
    for first_key in range(0, KEY_TILES * BLOCK_KEYS if KEY_TILES < 4 else length, BLOCK_KEYS):
        keys = first_key + tl.arange(0, BLOCK_KEYS)
        k = load_rows(k_at, keys, length, k_token_step, HEAD_DIM)
        v = load_rows(v_at, keys, length, v_token_step, HEAD_DIM)
        scores = tl.where(keys[None, :] < length, tl.dot(q, tl.trans(k)), float("-inf"))
        p = tl.exp2(scores * scale - log_total[:, None])
        dv = tl.dot(tl.trans(p.to(q.dtype)), dout)
        store_rows(dv_at, dv, keys, length, dv_token_step, HEAD_DIM)
        dp = tl.dot(dout, tl.trans(v))
        if KEY_TILES == 1:
            delta = tl.sum(p * dp, 1)
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        dk = tl.dot(tl.trans(ds), q) * natural_scale
        dq = tl.dot(ds, k, dq)
        store_rows(dk_at, dk, keys, length, dk_token_step, HEAD_DIM)
    dq_at = place(dq_ptr, begin, dq_token_step, head, HEAD_DIM // STEP)
    store_rows(dq_at, dq * natural_scale, rows, length, dq_token_step, HEAD_DIM)
