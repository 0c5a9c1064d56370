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
def find_tile(tiles_ptr, num_heads, TILES_PER_PAIR: tl.constexpr, BLOCK: tl.constexpr):
    """Pair, head and first row of this program; neighbours are heads of one pair, whose rows lie side by side. Without
    a fixed number of tiles a pair, tiles_ptr lists pair and first row of each; pair is -1 behind the last."""
    program = tl.program_id(0)
    head = program % num_heads
    tile = program // num_heads
    if TILES_PER_PAIR > 0:
        pair = tile // TILES_PER_PAIR
        first_row = tile % TILES_PER_PAIR * BLOCK
    else:
        pair = tl.load(tiles_ptr + 2 * tile)
        first_row = tl.load(tiles_ptr + 2 * tile + 1)
    return pair, head, first_row


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
    TILES_PER_PAIR: tl.constexpr,
    MIN_KEYS: tl.constexpr,
):
    """out (queries, heads, HEAD_DIM), and (heads, queries) the highest score and the logarithm of what a row is divided
    by, of the pairs of MIN_KEYS keys or more; with TILES_PER_PAIR of those up to BLOCK_KEYS, whose keys are one tile.
    """
    pair, head, first_row = find_tile(tiles_ptr, num_heads, TILES_PER_PAIR, BLOCK_QUERIES)
    if pair < 0:
        return
    query_begin, length = find_rows(query_begins_ptr, query_ends_ptr, pair)
    key_begin, num_keys = find_rows(key_begins_ptr, key_ends_ptr, pair)
    if TILES_PER_PAIR > 0:
        if (num_keys < MIN_KEYS) | (num_keys > BLOCK_KEYS) | (first_row >= length):
            return
    rows = first_row + tl.arange(0, BLOCK_QUERIES)
    q = load_rows(place(q_ptr, query_begin, q_token_step, head, q_head_step), rows, length, q_token_step, HEAD_DIM)
    k_at = place(k_ptr, key_begin, k_token_step, head, k_head_step)
    v_at = place(v_ptr, key_begin, v_token_step, head, v_head_step)
    if TILES_PER_PAIR > 0:
        keys = tl.arange(0, BLOCK_KEYS)
        k = load_columns(k_at, keys, num_keys, k_token_step, HEAD_DIM)
        v = load_rows(v_at, keys, num_keys, v_token_step, HEAD_DIM)
        scores = tl.where(keys[None, :] < num_keys, tl.dot(q, k, input_precision="ieee"), float("-inf"))
        highest = tl.max(scores, 1)
        powers = tl.exp2((scores - highest[:, None]) * scale)
        total = tl.sum(powers, 1)
        out = tl.dot(powers.to(v.dtype), v, input_precision="ieee")
    else:
        highest = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_QUERIES,), tl.float32)
        out = tl.zeros((BLOCK_QUERIES, HEAD_DIM), tl.float32)
        for first_key in range(0, num_keys, BLOCK_KEYS):
            keys = first_key + tl.arange(0, BLOCK_KEYS)
            k = load_columns(k_at, keys, num_keys, k_token_step, HEAD_DIM)
            v = load_rows(v_at, keys, num_keys, v_token_step, HEAD_DIM)
            scores = tl.where(keys[None, :] < num_keys, tl.dot(q, k, input_precision="ieee"), float("-inf"))
            above = tl.maximum(highest, tl.max(scores, 1))
            shrink = tl.exp2((highest - above) * scale)
            powers = tl.exp2((scores - above[:, None]) * scale)
            total = total * shrink + tl.sum(powers, 1)
            out = tl.dot(powers.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
            highest = above
    total = tl.where(num_keys > 0, total, 1.0)  # a query without a key gives 0
    out /= total[:, None]
    out_step = num_heads * (HEAD_DIM // STEP)
    store_rows(place(out_ptr, query_begin, out_step, head, HEAD_DIM // STEP), out, rows, length, out_step, HEAD_DIM)
    statistics_at = head.to(tl.int64) * num_queries + query_begin
    tl.store(highest_ptr + statistics_at + rows, highest, mask=rows < length)
    tl.store(log_totals_ptr + statistics_at + rows, tl.log2(total), mask=rows < length)


@kernel(aligned=("q", "k", "v", "out", "dout", "dq", "dk", "dv"))
def attention_backward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    highest_ptr,
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
    MIN_KEYS: tl.constexpr,
):
    """dq, dk and dv of the pairs of MIN_KEYS to BLOCK_KEYS tokens: a program has the keys of a whole head of one on the
    chip and meets its queries tile by tile. Scores are transposed, keys are rows, so that only dq needs a turn."""
    program = tl.program_id(0)
    head = program % num_heads
    pair = program // num_heads
    begin, length = find_rows(begins_ptr, ends_ptr, pair)
    if (length < MIN_KEYS) | (length > BLOCK_KEYS):
        return
    keys = tl.arange(0, BLOCK_KEYS)
    k = load_rows(place(k_ptr, begin, k_token_step, head, k_head_step), keys, length, k_token_step, HEAD_DIM)
    v = load_rows(place(v_ptr, begin, v_token_step, head, v_head_step), keys, length, v_token_step, HEAD_DIM)
    q_at = place(q_ptr, begin, q_token_step, head, q_head_step)
    dout_step = num_heads * (HEAD_DIM // STEP)
    dout_at = place(dout_ptr, begin, dout_step, head, HEAD_DIM // STEP)
    dq_at = place(dq_ptr, begin, dq_token_step, head, HEAD_DIM // STEP)
    statistics_at = head.to(tl.int64) * num_queries + begin
    natural_scale = scale * LN_2
    dk = tl.zeros((BLOCK_KEYS, HEAD_DIM), tl.float32)
    dv = tl.zeros((BLOCK_KEYS, HEAD_DIM), tl.float32)
    for first_row in range(0, length if BLOCK_QUERIES < BLOCK_KEYS else 1, BLOCK_QUERIES):
        rows = first_row + tl.arange(0, BLOCK_QUERIES)
        q = load_rows(q_at, rows, length, q_token_step, HEAD_DIM)
        dout = load_rows(dout_at, rows, length, dout_step, HEAD_DIM)
        highest = tl.load(highest_ptr + statistics_at + rows, mask=rows < length, other=0.0)
        log_total = tl.load(log_totals_ptr + statistics_at + rows, mask=rows < length, other=0.0)
        scores = tl.where(keys[:, None] < length, tl.dot(k, tl.trans(q), input_precision="ieee"), float("-inf"))
        p = tl.exp2((scores - highest[None, :]) * scale - log_total[None, :])
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        dv = tl.dot(p.to(q.dtype), dout, dv, input_precision="ieee")
        ds = (p * (dp - tl.sum(p * dp, 0)[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
        dq = tl.dot(tl.trans(ds), k, input_precision="ieee") * natural_scale
        store_rows(dq_at, dq, rows, length, dq_token_step, HEAD_DIM)
    dk_at = place(dk_ptr, begin, dk_token_step, head, HEAD_DIM // STEP)
    store_rows(dk_at, dk * natural_scale, keys, length, dk_token_step, HEAD_DIM)
    dv_at = place(dv_ptr, begin, dv_token_step, head, HEAD_DIM // STEP)
    store_rows(dv_at, dv, keys, length, dv_token_step, HEAD_DIM)


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
):
    """dq, and delta (heads, queries) = the sum of out * dout of each row, which attention_dkdv_kernel reads.

    Where one key has all the weight, delta equals its dp but for rounding, and that is all that is left of ds. IS_EXACT
    takes it out again: ds must sum to 0, so what is missing there was missing in delta."""
    pair, head, first_row = find_tile(tiles_ptr, num_heads, 0, BLOCK_QUERIES)
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
    highest = tl.load(highest_ptr + statistics_at + rows, mask=rows < length, other=0.0)
    log_total = tl.load(log_totals_ptr + statistics_at + rows, mask=rows < length, other=0.0)
    k_at = place(k_ptr, key_begin, k_token_step, head, k_head_step)
    v_at = place(v_ptr, key_begin, v_token_step, head, v_head_step)
    dq = tl.zeros((BLOCK_QUERIES, HEAD_DIM), tl.float32)
    if IS_EXACT:
        missing = tl.zeros((BLOCK_QUERIES,), tl.float32)
        mean_key = tl.zeros((BLOCK_QUERIES, HEAD_DIM), tl.float32)
    for first_key in range(0, num_keys, BLOCK_KEYS):
        keys = first_key + tl.arange(0, BLOCK_KEYS)
        k = load_rows(k_at, keys, num_keys, k_token_step, HEAD_DIM)
        v = load_rows(v_at, keys, num_keys, v_token_step, HEAD_DIM)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores = tl.where(keys[None, :] < num_keys, scores, float("-inf"))
        p = tl.exp2((scores - highest[:, None]) * scale - log_total[:, None])
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        if IS_EXACT:
            missing += tl.sum(ds, 1)
            mean_key = tl.dot(p, k, mean_key, input_precision="ieee")
    if IS_EXACT:
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
    """dk and dv, a program for each tile of keys; everything is transposed: keys are rows."""
    pair, head, first_row = find_tile(tiles_ptr, num_heads, 0, BLOCK_KEYS)
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
        highest = tl.load(highest_ptr + statistics_at + rows, mask=rows < length, other=0.0)
        log_total = tl.load(log_totals_ptr + statistics_at + rows, mask=rows < length, other=0.0)
        delta = tl.load(delta_ptr + statistics_at + rows, mask=rows < length, other=0.0)
        # Rows behind the last query have dout = 0 and delta = 0, so what stands in p there counts for nothing.
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        p = tl.exp2((scores - highest[None, :]) * scale - log_total[None, :])
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        if IS_EXACT:  # the order of sums that attention_dq_kernel has, to which delta belongs
            dp = tl.trans(tl.dot(dout, tl.trans(v), input_precision="ieee"))
        else:
            dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
    dk *= scale * LN_2
    dk_at = place(dk_ptr, key_begin, dk_token_step, head, HEAD_DIM // STEP)
    store_rows(dk_at, dk, keys, num_keys, dk_token_step, HEAD_DIM)
    dv_at = place(dv_ptr, key_begin, dv_token_step, head, HEAD_DIM // STEP)
    store_rows(dv_at, dv, keys, num_keys, dv_token_step, HEAD_DIM)
