"""Losses of smooth ranks: a sweep for the ranks, one program a list for the loss and its slopes, a sweep for the
gradient.

r_i = 1 + sum over the others of sigmoid(x_other - x_i); with slopes c_i = d loss / d r_i the gradient of document k is
the sum over i of (c_i - c_k) sigmoid'(x_k - x_i), so a constant added to all scores changes nothing.
"""

import triton
from triton import language as tl

from fastrank.kernels.configuration import kernel
from fastrank.kernels.listwise.gpu_blocks import find_list, find_rows, store_gradients
from fastrank.kernels.listwise.gpu_exponentials import LN_2, exp_of_minus, reciprocal, split_power


@kernel
def listwise_smooth_rank_kernel(
    scores_ptr,
    list_offsets_ptr,
    smooth_ranks_ptr,
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
        own_scores = tl.load(scores_ptr + rows, mask=rows < end, other=0.0)[:, None]
        ranks = tl.full((BLOCK_ROWS,), 1.0, tl.float64)
        for stretch in range(begin, end, STRETCH):
            # Whole ranks apart from their small rests: sigmoid(x) = 1 - sigmoid(-x).
            num_ahead = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.int32)
            rest = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            for column in range(stretch, tl.minimum(stretch + STRETCH, end), BLOCK_COLUMNS):
                columns = column + tl.arange(0, BLOCK_COLUMNS)
                scores = tl.load(scores_ptr + columns, mask=columns < end, other=0.0)[None, :]
                is_other = (columns < end)[None, :] & (columns[None, :] != rows[:, None])
                apart = scores - own_scores
                power = exp_of_minus(tl.abs(apart), power_hi, power_lo)
                share = power * reciprocal(1.0 + power)
                is_ahead = is_other & (apart > 0.0)
                num_ahead += is_ahead.to(tl.int32)
                rest += tl.where(is_ahead, -share, tl.where(is_other, share, 0.0))
            ranks += tl.sum(num_ahead, 1).to(tl.float64) + tl.sum(rest, 1).to(tl.float64)
        tl.store(smooth_ranks_ptr + rows, ranks, mask=rows < end)


@kernel
def listwise_smooth_rank_gradient_kernel(
    scores_ptr,
    slopes_ptr,
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
        own_scores = tl.load(scores_ptr + rows, mask=rows < end, other=0.0)[:, None]
        own_slopes = tl.load(slopes_ptr + rows, mask=rows < end, other=0.0)[:, None]
        pulls = tl.zeros((BLOCK_ROWS,), tl.float64)
        for stretch in range(begin, end, STRETCH):
            pull = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
            for column in range(stretch, tl.minimum(stretch + STRETCH, end), BLOCK_COLUMNS):
                columns = column + tl.arange(0, BLOCK_COLUMNS)
                scores = tl.load(scores_ptr + columns, mask=columns < end, other=0.0)[None, :]
                slopes = tl.load(slopes_ptr + columns, mask=columns < end, other=0.0)[None, :]
                power = exp_of_minus(tl.abs(scores - own_scores), power_hi, power_lo)
                share = reciprocal(1.0 + power)
                steepness = power * share * share
                pull += tl.where((columns < end)[None, :], (slopes - own_slopes) * steepness, 0.0)
            pulls += tl.sum(pull, 1).to(tl.float64)
        store_gradients(gradients_ptr, rows, rows < end, pulls, rate_hi, rate_lo)


@kernel
def listwise_rank_loss_kernel(
    smooth_ranks_ptr,
    teacher_ranks_ptr,
    list_offsets_ptr,
    sums_ptr,
    terms_ptr,
    slopes_ptr,
    DISCOUNT: tl.constexpr,
    BLOCK_DOCUMENTS: tl.constexpr,
):
    """(smooth rank - teacher rank)^2 / discount."""
    index, begin, end = find_list(list_offsets_ptr)
    losses = tl.zeros((BLOCK_DOCUMENTS,), tl.float64)
    for start in range(begin, end, BLOCK_DOCUMENTS):
        documents = start + tl.arange(0, BLOCK_DOCUMENTS)
        is_document = documents < end
        teacher = tl.load(teacher_ranks_ptr + documents, mask=is_document, other=1.0).to(tl.float64)
        apart = tl.load(smooth_ranks_ptr + documents, mask=is_document, other=1.0) - teacher
        if DISCOUNT == "log2":
            scaled = apart * LN_2 / tl.log(teacher + 1.0)
        elif DISCOUNT == "reciprocal":
            scaled = apart / teacher
        else:
            scaled = apart
        losses += apart * scaled
        tl.store(slopes_ptr + documents, (2.0 * scaled).to(tl.float32), mask=is_document)
    tl.store(sums_ptr + index, tl.sum(losses, 0).to(tl.float32))
    tl.store(terms_ptr + index, (end - begin).to(tl.int64))


@kernel
def listwise_approx_ndcg_kernel(
    smooth_ranks_ptr,
    gains_ptr,
    list_offsets_ptr,
    sums_ptr,
    terms_ptr,
    slopes_ptr,
    BLOCK_DOCUMENTS: tl.constexpr,
):
    """1 - the sum of gain / log2(smooth rank + 1)."""
    index, begin, end = find_list(list_offsets_ptr)
    measure = tl.zeros((BLOCK_DOCUMENTS,), tl.float64)
    for start in range(begin, end, BLOCK_DOCUMENTS):
        documents = start + tl.arange(0, BLOCK_DOCUMENTS)
        is_document = documents < end
        gains = tl.load(gains_ptr + documents, mask=is_document, other=0.0)
        ranks = tl.load(smooth_ranks_ptr + documents, mask=is_document, other=1.0)
        logarithm = tl.log(ranks + 1.0)
        discounted = gains * LN_2 / logarithm
        measure += discounted
        tl.store(slopes_ptr + documents, (discounted / logarithm / (ranks + 1.0)).to(tl.float32), mask=is_document)
    has_document = end > begin
    tl.store(sums_ptr + index, tl.where(has_document, 1.0 - tl.sum(measure, 0), 0.0).to(tl.float32))
    tl.store(terms_ptr + index, has_document.to(tl.int64))


@triton.jit
def load_clipped(labels_ptr, documents, end):
    """Labels cut to [0, 1]."""
    labels = tl.load(labels_ptr + documents, mask=documents < end, other=0.0)
    return tl.minimum(tl.maximum(labels, 0.0), 1.0)


@kernel
def listwise_approx_mrr_kernel(
    smooth_ranks_ptr,
    scores_ptr,
    labels_ptr,
    list_offsets_ptr,
    sums_ptr,
    terms_ptr,
    slopes_ptr,
    BLOCK_DOCUMENTS: tl.constexpr,
):
    """1 - the mean of min(label, 1) / smooth rank over the documents like the one where it is largest."""
    index, begin, end = find_list(list_offsets_ptr)
    best_value = tl.full((), float("-inf"), tl.float64)
    best = begin
    for start in range(begin, end, BLOCK_DOCUMENTS):
        documents = start + tl.arange(0, BLOCK_DOCUMENTS)
        labels = load_clipped(labels_ptr, documents, end).to(tl.float64)
        ranks = tl.load(smooth_ranks_ptr + documents, mask=documents < end, other=1.0)
        values = tl.where(documents < end, labels / ranks, float("-inf"))
        value = tl.max(values, 0)
        first = tl.min(tl.where(values == value, documents, end), 0)
        best = tl.where(value > best_value, first, best)
        best_value = tl.maximum(best_value, value)
    best_score = tl.load(scores_ptr + best, mask=best < end, other=0.0)
    best_label = load_clipped(labels_ptr, best, end)
    total = tl.zeros((BLOCK_DOCUMENTS,), tl.float64)
    count = tl.zeros((BLOCK_DOCUMENTS,), tl.int32)
    for start in range(begin, end, BLOCK_DOCUMENTS):
        documents = start + tl.arange(0, BLOCK_DOCUMENTS)
        scores = tl.load(scores_ptr + documents, mask=documents < end, other=0.0)
        labels = load_clipped(labels_ptr, documents, end)
        ranks = tl.load(smooth_ranks_ptr + documents, mask=documents < end, other=1.0)
        alike = (documents < end) & (labels == best_label) & (scores == best_score)
        total += tl.where(alike, labels / ranks, 0.0)
        count += alike.to(tl.int32)
    num_alike = tl.sum(count, 0).to(tl.float64)
    for start in range(begin, end, BLOCK_DOCUMENTS):
        documents = start + tl.arange(0, BLOCK_DOCUMENTS)
        scores = tl.load(scores_ptr + documents, mask=documents < end, other=0.0)
        labels = load_clipped(labels_ptr, documents, end)
        ranks = tl.load(smooth_ranks_ptr + documents, mask=documents < end, other=1.0)
        alike = (labels == best_label) & (scores == best_score)
        slopes = tl.where(alike, labels / (ranks * ranks) / num_alike, 0.0)
        tl.store(slopes_ptr + documents, slopes.to(tl.float32), mask=documents < end)
    has_document = end > begin
    # Without a document alike, as where every score is NaN, this is 0 / 0: the NaN goes on.
    loss = 1.0 - tl.sum(total, 0) / tl.where(has_document, num_alike, 1.0)
    tl.store(sums_ptr + index, tl.where(has_document, loss, 0.0).to(tl.float32))
    tl.store(terms_ptr + index, has_document.to(tl.int64))


@triton.jit
def load_unnormalised(labels_ptr, ranks_ptr, documents, begin, end, largest, GAIN: tl.constexpr):
    """Gains, or p-ListMLE's weights, over 2^(highest label) or 2^(documents)."""
    if GAIN == "p_listmle":
        ranks = tl.load(ranks_ptr + documents, mask=documents < end, other=1).to(tl.float64)
        values = tl.exp(-ranks * LN_2) - tl.exp((begin - end).to(tl.float64) * LN_2)
    else:
        labels = tl.load(labels_ptr + documents, mask=documents < end, other=0.0).to(tl.float64)
        values = tl.maximum(labels, 0.0)
        if GAIN == "exponential":
            values = tl.exp((values - largest) * LN_2) - tl.exp(-largest * LN_2)
    return values


@kernel
def listwise_normalise_kernel(
    labels_ptr,
    ranks_ptr,
    list_offsets_ptr,
    shares_ptr,
    k,
    GAIN: tl.constexpr,
    BLOCK_DOCUMENTS: tl.constexpr,
):
    """Gains over the ideal DCG at k (ranks: by label, in input order), or p-ListMLE's weights over their sum (ranks: by
    label, averaged over ties)."""
    _index, begin, end = find_list(list_offsets_ptr)
    highest = tl.zeros((BLOCK_DOCUMENTS,), tl.float64)
    if GAIN == "exponential":
        for start in range(begin, end, BLOCK_DOCUMENTS):
            documents = start + tl.arange(0, BLOCK_DOCUMENTS)
            labels = tl.load(labels_ptr + documents, mask=documents < end, other=0.0).to(tl.float64)
            highest = tl.maximum(highest, labels)
    largest = tl.max(highest, 0)
    total = tl.zeros((BLOCK_DOCUMENTS,), tl.float64)
    for start in range(begin, end, BLOCK_DOCUMENTS):
        documents = start + tl.arange(0, BLOCK_DOCUMENTS)
        values = load_unnormalised(labels_ptr, ranks_ptr, documents, begin, end, largest, GAIN)
        if GAIN == "p_listmle":
            total += tl.where(documents < end, values, 0.0)
        else:
            ranks = tl.load(ranks_ptr + documents, mask=documents < end, other=1).to(tl.float64)
            total += tl.where((documents < end) & (ranks <= k), values * LN_2 / tl.log(ranks + 1.0), 0.0)
    divisor = tl.sum(total, 0)
    for start in range(begin, end, BLOCK_DOCUMENTS):
        documents = start + tl.arange(0, BLOCK_DOCUMENTS)
        values = load_unnormalised(labels_ptr, ranks_ptr, documents, begin, end, largest, GAIN)
        tl.store(shares_ptr + documents, tl.where(divisor > 0.0, values / divisor, 0.0), mask=documents < end)
