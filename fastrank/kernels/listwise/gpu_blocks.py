"""What the sweeps over pairs share: which rows a program owns, ranks by counting, and the sum of a list's rows.

A program owns BLOCK_ROWS rows of one list and walks over all its columns in tiles, so that every row's result is
complete without atomics. Tiles begin where the list begins: no list sees another.
"""

import triton
from triton import language as tl

from fastrank.kernels.configuration import kernel
from fastrank.kernels.listwise.gpu_exponentials import join_rate


@triton.jit
def find_rows(list_offsets_ptr, num_lists, BLOCK_ROWS: tl.constexpr):
    """The first document of this program's list, the one behind its last, and the first row of its block.

    List l has the programs from offset // BLOCK_ROWS + l on, as many as its rows need or one more, which finds its row
    behind the end. So the grid, documents // BLOCK_ROWS + lists, is known without reading an offset on the host.
    """
    program = tl.program_id(0)
    low = program * 0
    high = low + num_lists - 1
    while low < high:
        middle = (low + high + 1) // 2
        starts_behind = tl.load(list_offsets_ptr + middle) // BLOCK_ROWS + middle > program
        low = tl.where(starts_behind, low, middle)
        high = tl.where(starts_behind, middle - 1, high)
    begin = tl.load(list_offsets_ptr + low)
    end = tl.load(list_offsets_ptr + low + 1)
    return begin, end, begin + (program - begin // BLOCK_ROWS - low) * BLOCK_ROWS


@triton.jit
def load_keyed(scores_ptr, keys_ptr, documents, end):
    """Scores and keys of documents; behind the end 0 and NaN, which is above and below nothing."""
    scores = tl.load(scores_ptr + documents, mask=documents < end, other=0.0)
    keys = tl.load(keys_ptr + documents, mask=documents < end, other=float("nan"))
    return scores, keys


@triton.jit
def store_gradients(gradients_ptr, documents, is_document, pulls, rate_hi, rate_lo):
    """Gradients of the scores from those of scores / temperature, float64."""
    tl.store(gradients_ptr + documents, (pulls * join_rate(rate_hi, rate_lo)).to(tl.float32), mask=is_document)


@triton.jit
def find_list(list_offsets_ptr):
    """This program's list: its index, its first document and the one behind its last."""
    index = tl.program_id(0)
    return index, tl.load(list_offsets_ptr + index), tl.load(list_offsets_ptr + index + 1)


@kernel
def listwise_rank_kernel(
    values_ptr,
    list_offsets_ptr,
    average_ranks_ptr,
    first_ranks_ptr,
    order_ptr,
    num_lower_ptr,
    num_lists,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Ranks by value, 1 for the highest: averaged over ties, and in input order; the documents in that order; how many
    are lower. NaN counts as the highest value, so that the order is always a permutation."""
    begin, end, first_row = find_rows(list_offsets_ptr, num_lists, BLOCK_ROWS)
    if first_row < end:
        rows = first_row + tl.arange(0, BLOCK_ROWS)
        own = tl.load(values_ptr + rows, mask=rows < end, other=0)[:, None]
        higher = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.int32)
        equal = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.int32)
        before = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.int32)
        for column in range(begin, end, BLOCK_COLUMNS):
            columns = column + tl.arange(0, BLOCK_COLUMNS)
            is_column = (columns < end)[None, :]
            values = tl.load(values_ptr + columns, mask=columns < end, other=0)[None, :]
            ties = ((values == own) | ((values != values) & (own != own))) & is_column
            higher += (((values > own) | ((values != values) & (own == own))) & is_column).to(tl.int32)
            equal += ties.to(tl.int32)
            before += (ties & (columns[None, :] <= rows[:, None])).to(tl.int32)
        num_higher = tl.sum(higher, 1)
        num_equal = tl.sum(equal, 1)
        first = num_higher + tl.sum(before, 1)
        average = num_higher.to(tl.float32) + 0.5 * (num_equal + 1).to(tl.float32)
        tl.store(average_ranks_ptr + rows, average, mask=rows < end)
        tl.store(first_ranks_ptr + rows, first, mask=rows < end)
        tl.store(order_ptr + begin + first - 1, rows, mask=rows < end)
        tl.store(num_lower_ptr + rows, end - begin - num_higher - num_equal, mask=rows < end)


@kernel
def listwise_sum_kernel(
    row_losses_ptr,
    num_lower_ptr,
    list_offsets_ptr,
    sums_ptr,
    terms_ptr,
    TERM: tl.constexpr,
    MEAN_OF_PAIRS: tl.constexpr,
    BLOCK_DOCUMENTS: tl.constexpr,
):
    """The sum of each list's rows and the number of its terms: its pairs, or 1 where it has a document."""
    index, begin, end = find_list(list_offsets_ptr)
    losses = tl.zeros((BLOCK_DOCUMENTS,), tl.float64)
    counts = tl.zeros((BLOCK_DOCUMENTS,), tl.int64)
    for start in range(begin, end, BLOCK_DOCUMENTS):
        documents = start + tl.arange(0, BLOCK_DOCUMENTS)
        losses += tl.load(row_losses_ptr + documents, mask=documents < end, other=0.0)
        if TERM == "pair" or MEAN_OF_PAIRS:
            counts += tl.load(num_lower_ptr + documents, mask=documents < end, other=0).to(tl.int64)
    total = tl.sum(losses, 0)
    num_pairs = tl.sum(counts, 0)
    if MEAN_OF_PAIRS:
        total /= tl.maximum(num_pairs, 1).to(tl.float64)
    tl.store(sums_ptr + index, total.to(tl.float32))
    if TERM == "pair":
        tl.store(terms_ptr + index, num_pairs)
    else:
        tl.store(terms_ptr + index, (end > begin).to(tl.int64))
