"""Losses that are sums over pairs with label_i > label_j: RankNet and its weighted kin, LambdaLoss, margins and hinges.

A program owns the rows of gpu_blocks.find_rows and meets every pair of one of its documents, once: as its row's loss
where the row's label is the higher one, as a pull on its row's score in any case. float32 inside a stretch of tiles,
float64 between them. Labels come as float32 keys that order as they do; columns behind the end have the key NaN, which
is above and below nothing.
"""

from triton import language as tl

from fastrank.kernels.configuration import kernel
from fastrank.kernels.listwise import reference
from fastrank.kernels.listwise.gpu_blocks import find_rows, load_keyed, store_gradients
from fastrank.kernels.listwise.gpu_exponentials import log1p, log1p_of_exponential, split_power, weigh_pair

LAMBDA_MU = tl.constexpr(reference.LAMBDA_MU)


@kernel
def listwise_ranknet_kernel(
    scores_ptr,
    keys_ptr,
    list_offsets_ptr,
    row_losses_ptr,
    num_lower_ptr,
    gradients_ptr,
    num_lists,
    rate_hi,
    rate_lo,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    STRETCH: tl.constexpr,
):
    """log(1 + e_1) + log(1 + e_2) + ... is one logarithm of the product; product holds it less 1, so that small
    exponentials are not lost. A stretch of up to 64 tiles keeps it below 2^64."""
    begin, end, first_row = find_rows(list_offsets_ptr, num_lists, BLOCK_ROWS)
    if first_row < end:
        power_hi, power_lo = split_power(rate_hi, rate_lo)
        rows = first_row + tl.arange(0, BLOCK_ROWS)
        own_scores, own_keys = load_keyed(scores_ptr, keys_ptr, rows[:, None], end)
        losses = tl.zeros((BLOCK_ROWS,), tl.float64)
        pulls = tl.zeros((BLOCK_ROWS,), tl.float64)
        num_lower = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.int32)
        for stretch in range(begin, end, STRETCH):
            product = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            distance = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            pull = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            for column in range(stretch, tl.minimum(stretch + STRETCH, end), BLOCK_COLUMNS):
                columns = column + tl.arange(0, BLOCK_COLUMNS)
                scores, keys = load_keyed(scores_ptr, keys_ptr, columns[None, :], end)
                prefers = own_keys > keys
                yields = own_keys < keys
                apart = scores - own_scores
                power, wrong = weigh_pair(apart, prefers, power_hi, power_lo)
                pull += tl.where(prefers, -wrong, tl.where(yields, wrong, 0.0))
                product = tl.fma(tl.where(prefers, power, 0.0), product + 1.0, product)
                distance += tl.where(prefers & (apart > 0.0), apart, 0.0)
                num_lower += prefers.to(tl.int32)
            loss = tl.fma(distance, rate_hi, tl.fma(distance, rate_lo, log1p(product)))
            losses += tl.sum(loss, 1).to(tl.float64)
            pulls += tl.sum(pull, 1).to(tl.float64)
        tl.store(row_losses_ptr + rows, losses, mask=rows < end)
        tl.store(num_lower_ptr + rows, tl.sum(num_lower, 1), mask=rows < end)
        store_gradients(gradients_ptr, rows, rows < end, pulls, rate_hi, rate_lo)


@kernel
def listwise_weighted_kernel(
    scores_ptr,
    keys_ptr,
    values_ptr,
    num_lower_ptr,
    list_offsets_ptr,
    row_losses_ptr,
    gradients_ptr,
    num_lists,
    rate_hi,
    rate_lo,
    WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    STRETCH: tl.constexpr,
):
    """RankNet whose pairs weigh 1 / (sum of the two values) or the difference of the two values, the latter's gradient
    over the number of the list's pairs."""
    begin, end, first_row = find_rows(list_offsets_ptr, num_lists, BLOCK_ROWS)
    if first_row < end:
        power_hi, power_lo = split_power(rate_hi, rate_lo)
        rows = first_row + tl.arange(0, BLOCK_ROWS)
        own_scores, own_keys = load_keyed(scores_ptr, keys_ptr, rows[:, None], end)
        own_values = tl.load(values_ptr + rows, mask=rows < end, other=1.0)[:, None]
        losses = tl.zeros((BLOCK_ROWS,), tl.float64)
        pulls = tl.zeros((BLOCK_ROWS,), tl.float64)
        num_pairs = tl.zeros((BLOCK_COLUMNS,), tl.int64)
        for stretch in range(begin, end, STRETCH):
            logarithm = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            distance = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            pull = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            for column in range(stretch, tl.minimum(stretch + STRETCH, end), BLOCK_COLUMNS):
                columns = column + tl.arange(0, BLOCK_COLUMNS)
                scores, keys = load_keyed(scores_ptr, keys_ptr, columns[None, :], end)
                values = tl.load(values_ptr + columns, mask=columns < end, other=1.0)[None, :]
                prefers = own_keys > keys
                apart = scores - own_scores
                power, wrong = weigh_pair(apart, prefers, power_hi, power_lo)
                if WEIGHT == "inverse_sum":
                    weights = 1.0 / (own_values + values)
                else:
                    weights = tl.abs(own_values - values)
                    num_pairs += tl.load(num_lower_ptr + columns, mask=columns < end, other=0).to(tl.int64)
                weights = tl.where(prefers | (own_keys < keys), weights, 0.0)
                pull += tl.where(prefers, -wrong, wrong) * weights
                weights = tl.where(prefers, weights, 0.0)
                logarithm += weights * log1p_of_exponential(power)
                distance += tl.where(apart > 0.0, apart, 0.0) * weights
            loss = tl.fma(distance, rate_hi, tl.fma(distance, rate_lo, logarithm))
            losses += tl.sum(loss, 1).to(tl.float64)
            pulls += tl.sum(pull, 1).to(tl.float64)
        if WEIGHT == "difference":
            pulls /= tl.maximum(tl.sum(num_pairs, 0), 1).to(tl.float64)
        tl.store(row_losses_ptr + rows, losses, mask=rows < end)
        store_gradients(gradients_ptr, rows, rows < end, pulls, rate_hi, rate_lo)


@kernel
def listwise_lambda_kernel(
    scores_ptr,
    keys_ptr,
    gains_ptr,
    order_ptr,
    discounts_ptr,
    neighbours_ptr,
    list_offsets_ptr,
    row_losses_ptr,
    gradients_ptr,
    num_lists,
    k,
    rate_hi,
    rate_lo,
    WEIGHTING: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    STRETCH: tl.constexpr,
):
    """Rows and columns in the order of the scores, so that a position is a rank, its discount stands in a table, and
    rows behind the cut-off k meet only the first k columns.

    discounts: at p, the discount of position p from 0. neighbours: at d, what d ranks apart weigh in NDCGLoss2.
    """
    begin, end, first_row = find_rows(list_offsets_ptr, num_lists, BLOCK_ROWS)
    if first_row < end:
        power_hi, power_lo = split_power(rate_hi, rate_lo)
        own_positions = first_row - begin + tl.arange(0, BLOCK_ROWS)
        is_row = own_positions < end - begin
        rows = tl.load(order_ptr + begin + own_positions, mask=is_row, other=0)
        own_scores = tl.load(scores_ptr + rows, mask=is_row, other=0.0)[:, None]
        own_keys = tl.load(keys_ptr + rows, mask=is_row, other=float("nan"))[:, None]
        own_gains = tl.load(gains_ptr + rows, mask=is_row, other=0.0)[:, None]
        own_discounts = tl.load(discounts_ptr + own_positions, mask=is_row, other=0.0)[:, None]
        losses = tl.zeros((BLOCK_ROWS,), tl.float64)
        pulls = tl.zeros((BLOCK_ROWS,), tl.float64)
        num_columns = end - begin
        if first_row - begin >= k:
            num_columns = tl.minimum(num_columns, k)
        for stretch in range(0, num_columns, STRETCH):
            logarithm = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            distance = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            pull = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            for column in range(stretch, tl.minimum(stretch + STRETCH, num_columns), BLOCK_COLUMNS):
                positions = column + tl.arange(0, BLOCK_COLUMNS)
                is_column = positions < num_columns
                columns = tl.load(order_ptr + begin + positions, mask=is_column, other=0)
                scores = tl.load(scores_ptr + columns, mask=is_column, other=0.0)[None, :]
                keys = tl.load(keys_ptr + columns, mask=is_column, other=float("nan"))[None, :]
                prefers = own_keys > keys
                counts = (prefers | (own_keys < keys)) & ((own_positions < k)[:, None] | (positions < k)[None, :])
                apart = scores - own_scores
                power, wrong = weigh_pair(apart, prefers, power_hi, power_lo)
                if WEIGHTING == "none":
                    weights = 1.0
                else:
                    gains = tl.load(gains_ptr + columns, mask=is_column, other=0.0)[None, :]
                    discounts = tl.load(discounts_ptr + positions, mask=is_column, other=0.0)[None, :]
                    if WEIGHTING == "ndcg1":
                        weights = tl.where(prefers, own_gains * own_discounts, gains * discounts)
                    elif WEIGHTING == "lambdarank":
                        weights = tl.abs(own_discounts - discounts) * tl.abs(own_gains - gains)
                    else:
                        ranks_apart = tl.abs(own_positions[:, None] - positions[None, :])
                        weights = tl.load(neighbours_ptr + ranks_apart, mask=counts, other=0.0)
                        if WEIGHTING == "ndcg2pp":
                            weights = LAMBDA_MU * weights + tl.abs(own_discounts - discounts)
                        weights *= tl.abs(own_gains - gains)
                weights = tl.where(counts, weights, 0.0)
                pull += tl.where(prefers, -wrong, wrong) * weights
                weights = tl.where(prefers, weights, 0.0)
                logarithm += weights * log1p_of_exponential(power)
                distance += tl.where(apart > 0.0, apart, 0.0) * weights
            loss = tl.fma(distance, rate_hi, tl.fma(distance, rate_lo, logarithm))
            losses += tl.sum(loss, 1).to(tl.float64)
            pulls += tl.sum(pull, 1).to(tl.float64)
        # Positions and documents anew: kept through the sweep they would take registers that it lacks.
        positions = first_row + tl.arange(0, BLOCK_ROWS)
        rows = tl.load(order_ptr + positions, mask=positions < end, other=0)
        tl.store(row_losses_ptr + rows, losses, mask=positions < end)
        store_gradients(gradients_ptr, rows, positions < end, pulls, rate_hi, rate_lo)


@kernel
def listwise_margin_kernel(
    scores_ptr,
    keys_ptr,
    labels_ptr,
    list_offsets_ptr,
    row_losses_ptr,
    num_lower_ptr,
    gradients_ptr,
    num_lists,
    margin,
    rate_hi,
    rate_lo,
    LOSS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    STRETCH: tl.constexpr,
):
    """The squared distance from a margin, which is `margin` or the difference of the labels, or what is missing to it,
    squared or not."""
    begin, end, first_row = find_rows(list_offsets_ptr, num_lists, BLOCK_ROWS)
    if first_row < end:
        rows = first_row + tl.arange(0, BLOCK_ROWS)
        own_scores, own_keys = load_keyed(scores_ptr, keys_ptr, rows[:, None], end)
        own_labels = tl.load(labels_ptr + rows, mask=rows < end, other=0.0)[:, None]
        losses = tl.zeros((BLOCK_ROWS,), tl.float64)
        pulls = tl.zeros((BLOCK_ROWS,), tl.float64)
        num_lower = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.int32)
        for stretch in range(begin, end, STRETCH):
            loss = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            pull = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            for column in range(stretch, tl.minimum(stretch + STRETCH, end), BLOCK_COLUMNS):
                columns = column + tl.arange(0, BLOCK_COLUMNS)
                scores, keys = load_keyed(scores_ptr, keys_ptr, columns[None, :], end)
                prefers = own_keys > keys
                # the preferred document's score less the other's, over the temperature
                ahead = tl.where(prefers, own_scores - scores, scores - own_scores)
                ahead = tl.fma(ahead, rate_hi, ahead * rate_lo)
                if LOSS == "difference":
                    labels = tl.load(labels_ptr + columns, mask=columns < end, other=0.0)[None, :]
                    missing = tl.abs(own_labels - labels) - ahead
                else:
                    missing = margin - ahead
                if LOSS == "hinge":  # NaN is not below 0, so it stays
                    short = tl.where(missing <= 0.0, 0.0, missing)
                    slope = tl.where(missing <= 0.0, 0.0, 1.0 + 0.0 * missing)
                elif LOSS == "squared_hinge":
                    short = tl.where(missing <= 0.0, 0.0, missing * missing)
                    slope = tl.where(missing <= 0.0, 0.0, 2.0 * missing)
                else:
                    short = missing * missing
                    slope = 2.0 * missing
                pull += tl.where(prefers, -slope, tl.where(own_keys < keys, slope, 0.0))
                loss += tl.where(prefers, short, 0.0)
                num_lower += prefers.to(tl.int32)
            losses += tl.sum(loss, 1).to(tl.float64)
            pulls += tl.sum(pull, 1).to(tl.float64)
        tl.store(row_losses_ptr + rows, losses, mask=rows < end)
        tl.store(num_lower_ptr + rows, tl.sum(num_lower, 1), mask=rows < end)
        store_gradients(gradients_ptr, rows, rows < end, pulls, rate_hi, rate_lo)
