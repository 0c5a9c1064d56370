"""ListMLE in two sweeps: what each document loses to the lower labels, then what each of those pulls back.

The first sweep leaves of every document numbers from which the second finds each share exp(x_k - x_i) / (exp(x_i) + sum
of the lower) as exp(x_k - base_i) * coefficient_i: base_i is the largest score among them, so nothing overflows.
"""

from triton import language as tl

from fastrank.kernels.configuration import kernel
from fastrank.kernels.listwise.gpu_blocks import find_rows, load_keyed, store_gradients
from fastrank.kernels.listwise.gpu_exponentials import exp_of_minus, join_rate, log1p_in_float64, split_power


@kernel
def listwise_draw_kernel(
    scores_ptr,
    keys_ptr,
    weights_ptr,
    list_offsets_ptr,
    row_losses_ptr,
    bases_ptr,
    coefficients_ptr,
    own_pulls_ptr,
    num_lists,
    rate_hi,
    rate_lo,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    STRETCH: tl.constexpr,
):
    begin, end, first_row = find_rows(list_offsets_ptr, num_lists, BLOCK_ROWS)
    if first_row < end:
        power_hi, power_lo = split_power(rate_hi, rate_lo)
        rows = first_row + tl.arange(0, BLOCK_ROWS)
        own_scores, own_keys = load_keyed(scores_ptr, keys_ptr, rows, end)
        own_keys = own_keys[:, None]
        highest = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), float("-inf"), tl.float32)
        for column in range(begin, end, BLOCK_COLUMNS):
            columns = column + tl.arange(0, BLOCK_COLUMNS)
            scores, keys = load_keyed(scores_ptr, keys_ptr, columns[None, :], end)
            highest = tl.maximum(highest, tl.where(own_keys > keys, scores, float("-inf")))
        bases = tl.maximum(own_scores, tl.max(highest, 1))
        lower = tl.zeros((BLOCK_ROWS,), tl.float64)
        for stretch in range(begin, end, STRETCH):
            total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            for column in range(stretch, tl.minimum(stretch + STRETCH, end), BLOCK_COLUMNS):
                columns = column + tl.arange(0, BLOCK_COLUMNS)
                scores, keys = load_keyed(scores_ptr, keys_ptr, columns[None, :], end)
                power = exp_of_minus(bases[:, None] - scores, power_hi, power_lo)
                total += tl.where(own_keys > keys, power, 0.0)
            lower += tl.sum(total, 1).to(tl.float64)
        behind = (bases.to(tl.float64) - own_scores.to(tl.float64)) * join_rate(rate_hi, rate_lo)
        own = tl.exp(-behind)
        weights = tl.load(weights_ptr + rows, mask=rows < end, other=0.0).to(tl.float64)
        losses = behind + tl.where(behind == 0.0, log1p_in_float64(lower), tl.log(lower + own))
        tl.store(row_losses_ptr + rows, weights * losses, mask=rows < end)
        tl.store(bases_ptr + rows, bases, mask=rows < end)
        tl.store(coefficients_ptr + rows, (weights / (lower + own)).to(tl.float32), mask=rows < end)
        tl.store(own_pulls_ptr + rows, -weights * lower / (lower + own), mask=rows < end)


@kernel
def listwise_draw_gradient_kernel(
    scores_ptr,
    keys_ptr,
    bases_ptr,
    coefficients_ptr,
    own_pulls_ptr,
    list_offsets_ptr,
    gradients_ptr,
    num_lists,
    rate_hi,
    rate_lo,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    STRETCH: tl.constexpr,
):
    begin, end, first_row = find_rows(list_offsets_ptr, num_lists, BLOCK_ROWS)
    if first_row < end:
        power_hi, power_lo = split_power(rate_hi, rate_lo)
        rows = first_row + tl.arange(0, BLOCK_ROWS)
        own_scores, own_keys = load_keyed(scores_ptr, keys_ptr, rows[:, None], end)
        pulls = tl.load(own_pulls_ptr + rows, mask=rows < end, other=0.0)
        for stretch in range(begin, end, STRETCH):
            pull = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            for column in range(stretch, tl.minimum(stretch + STRETCH, end), BLOCK_COLUMNS):
                columns = column + tl.arange(0, BLOCK_COLUMNS)
                keys = tl.load(keys_ptr + columns, mask=columns < end, other=float("nan"))[None, :]
                bases = tl.load(bases_ptr + columns, mask=columns < end, other=0.0)[None, :]
                coefficients = tl.load(coefficients_ptr + columns, mask=columns < end, other=0.0)[None, :]
                power = exp_of_minus(bases - own_scores, power_hi, power_lo)
                pull += tl.where(own_keys < keys, power * coefficients, 0.0)
            pulls += tl.sum(pull, 1).to(tl.float64)
        store_gradients(gradients_ptr, rows, rows < end, pulls, rate_hi, rate_lo)
