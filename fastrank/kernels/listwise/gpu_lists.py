"""Losses that walk over a list a few times: softmax cross-entropies, correlation, and those of single documents.

One program a list, in chunks, so that lists may have any length. All of it in float64, which costs nothing here.
"""

import triton
from triton import language as tl

from fastrank.kernels.configuration import kernel
from fastrank.kernels.listwise.gpu_blocks import find_list
from fastrank.kernels.listwise.gpu_exponentials import join_rate, log1p_in_float64


@triton.jit
def load_others(scores_ptr, labels_ptr, documents, is_other, rate, WEIGHTED: tl.constexpr):
    """Score / temperature, times 1 - label where it is weighted, of the documents beside the target."""
    x = tl.load(scores_ptr + documents, mask=is_other, other=0.0).to(tl.float64) * rate
    if WEIGHTED:
        x *= 1.0 - tl.load(labels_ptr + documents, mask=is_other, other=0.0).to(tl.float64)
    return x


@kernel
def listwise_target_kernel(
    scores_ptr,
    keys_ptr,
    labels_ptr,
    list_offsets_ptr,
    sums_ptr,
    terms_ptr,
    gradients_ptr,
    rate_hi,
    rate_lo,
    WEIGHTED: tl.constexpr,
    BLOCK_DOCUMENTS: tl.constexpr,
):
    """Cross-entropy against the first document of the highest key: LCE, where some label must be above 0, or
    contrastive imitation, whose scores weigh the target's label and 1 - another's."""
    index, begin, end = find_list(list_offsets_ptr)
    rate = join_rate(rate_hi, rate_lo)
    highest_key = tl.full((), float("-inf"), tl.float32)
    target = begin
    num_positives = tl.zeros((BLOCK_DOCUMENTS,), tl.int32)
    for start in range(begin, end, BLOCK_DOCUMENTS):
        documents = start + tl.arange(0, BLOCK_DOCUMENTS)
        keys = tl.load(keys_ptr + documents, mask=documents < end, other=float("-inf"))
        labels = tl.load(labels_ptr + documents, mask=documents < end, other=0.0)
        num_positives += (labels > 0.0).to(tl.int32)
        key = tl.max(keys, 0)
        first = tl.min(tl.where(keys == key, documents, end), 0)
        target = tl.where(key > highest_key, first, target)
        highest_key = tl.maximum(highest_key, key)
    if WEIGHTED:
        has_term = end > begin
    else:
        has_term = tl.sum(num_positives, 0) > 0
    target_x = tl.load(scores_ptr + target, mask=target < end, other=0.0).to(tl.float64) * rate
    target_weight = tl.full((), 1.0, tl.float64)
    if WEIGHTED:
        target_weight = tl.load(labels_ptr + target, mask=target < end, other=0.0).to(tl.float64)
    target_x *= target_weight

    highest = tl.full((BLOCK_DOCUMENTS,), float("-inf"), tl.float64)
    for start in range(begin, end, BLOCK_DOCUMENTS):
        documents = start + tl.arange(0, BLOCK_DOCUMENTS)
        is_other = (documents < end) & (documents != target)
        x = load_others(scores_ptr, labels_ptr, documents, is_other, rate, WEIGHTED)
        highest = tl.maximum(highest, tl.where(is_other, x, float("-inf")))
    base = tl.maximum(target_x, tl.max(highest, 0))

    total = tl.zeros((BLOCK_DOCUMENTS,), tl.float64)
    for start in range(begin, end, BLOCK_DOCUMENTS):
        documents = start + tl.arange(0, BLOCK_DOCUMENTS)
        is_other = (documents < end) & (documents != target)
        x = load_others(scores_ptr, labels_ptr, documents, is_other, rate, WEIGHTED)
        total += tl.where(is_other, tl.exp(x - base), 0.0)
    others = tl.sum(total, 0)
    behind = base - target_x
    own = tl.exp(-behind)
    loss = behind + tl.where(behind == 0.0, log1p_in_float64(others), tl.log(others + own))

    for start in range(begin, end, BLOCK_DOCUMENTS):
        documents = start + tl.arange(0, BLOCK_DOCUMENTS)
        x = tl.load(scores_ptr + documents, mask=documents < end, other=0.0).to(tl.float64) * rate
        weights = tl.full((BLOCK_DOCUMENTS,), 1.0, tl.float64)
        if WEIGHTED:
            weights -= tl.load(labels_ptr + documents, mask=documents < end, other=0.0).to(tl.float64)
        pull = weights * tl.exp(weights * x - base)
        pull = tl.where(documents == target, -target_weight * others, pull)
        pull = tl.where(has_term, pull / (others + own) * rate, 0.0)
        tl.store(gradients_ptr + documents, pull.to(tl.float32), mask=documents < end)
    tl.store(sums_ptr + index, tl.where(has_term, loss, 0.0).to(tl.float32))
    tl.store(terms_ptr + index, has_term.to(tl.int64))


@kernel
def listwise_divergence_kernel(
    scores_ptr,
    labels_ptr,
    list_offsets_ptr,
    sums_ptr,
    terms_ptr,
    gradients_ptr,
    rate_hi,
    rate_lo,
    LESS_ENTROPY: tl.constexpr,
    BLOCK_DOCUMENTS: tl.constexpr,
):
    """Cross-entropy of softmax(scores / temperature) against softmax(labels), or less the latter's entropy."""
    index, begin, end = find_list(list_offsets_ptr)
    rate = join_rate(rate_hi, rate_lo)
    highest_x = tl.full((BLOCK_DOCUMENTS,), float("-inf"), tl.float64)
    highest_label = tl.full((BLOCK_DOCUMENTS,), float("-inf"), tl.float64)
    for start in range(begin, end, BLOCK_DOCUMENTS):
        documents = start + tl.arange(0, BLOCK_DOCUMENTS)
        x = tl.load(scores_ptr + documents, mask=documents < end, other=float("-inf")).to(tl.float64) * rate
        labels = tl.load(labels_ptr + documents, mask=documents < end, other=float("-inf")).to(tl.float64)
        highest_x = tl.maximum(highest_x, x)
        highest_label = tl.maximum(highest_label, labels)
    base_x = tl.max(highest_x, 0)
    base_label = tl.max(highest_label, 0)

    total_x = tl.zeros((BLOCK_DOCUMENTS,), tl.float64)
    total_label = tl.zeros((BLOCK_DOCUMENTS,), tl.float64)
    for start in range(begin, end, BLOCK_DOCUMENTS):
        documents = start + tl.arange(0, BLOCK_DOCUMENTS)
        x = tl.load(scores_ptr + documents, mask=documents < end, other=0.0).to(tl.float64) * rate
        labels = tl.load(labels_ptr + documents, mask=documents < end, other=0.0).to(tl.float64)
        total_x += tl.where(documents < end, tl.exp(x - base_x), 0.0)
        total_label += tl.where(documents < end, tl.exp(labels - base_label), 0.0)
    sum_x = tl.sum(total_x, 0)
    sum_label = tl.sum(total_label, 0)
    # The largest adds exactly 1, and what is left keeps its digits.
    log_x = log1p_in_float64(sum_x - 1.0)
    log_label = log1p_in_float64(sum_label - 1.0)

    losses = tl.zeros((BLOCK_DOCUMENTS,), tl.float64)
    for start in range(begin, end, BLOCK_DOCUMENTS):
        documents = start + tl.arange(0, BLOCK_DOCUMENTS)
        x = tl.load(scores_ptr + documents, mask=documents < end, other=0.0).to(tl.float64) * rate
        labels = tl.load(labels_ptr + documents, mask=documents < end, other=0.0).to(tl.float64)
        target = tl.exp(labels - base_label) / sum_label
        behind = base_x - x + log_x
        if LESS_ENTROPY:
            behind += labels - base_label - log_label
        losses += tl.where(documents < end, target * behind, 0.0)
        pull = (tl.exp(x - base_x) / sum_x - target) * rate
        tl.store(gradients_ptr + documents, pull.to(tl.float32), mask=documents < end)
    tl.store(sums_ptr + index, tl.sum(losses, 0).to(tl.float32))
    tl.store(terms_ptr + index, (end > begin).to(tl.int64))


@kernel
def listwise_pearson_kernel(
    scores_ptr,
    labels_ptr,
    list_offsets_ptr,
    sums_ptr,
    terms_ptr,
    gradients_ptr,
    BLOCK_DOCUMENTS: tl.constexpr,
):
    """1 - correlation; where either is constant, 1 with a gradient of 0."""
    index, begin, end = find_list(list_offsets_ptr)
    has_document = end > begin
    first_score = tl.load(scores_ptr + begin, mask=has_document, other=0.0).to(tl.float64)
    first_label = tl.load(labels_ptr + begin, mask=has_document, other=0.0).to(tl.float64)
    score_sums = tl.zeros((BLOCK_DOCUMENTS,), tl.float64)
    label_sums = tl.zeros((BLOCK_DOCUMENTS,), tl.float64)
    other_scores = tl.zeros((BLOCK_DOCUMENTS,), tl.int32)
    other_labels = tl.zeros((BLOCK_DOCUMENTS,), tl.int32)
    for start in range(begin, end, BLOCK_DOCUMENTS):
        documents = start + tl.arange(0, BLOCK_DOCUMENTS)
        scores = tl.load(scores_ptr + documents, mask=documents < end, other=0.0).to(tl.float64)
        labels = tl.load(labels_ptr + documents, mask=documents < end, other=0.0).to(tl.float64)
        other_scores += ((documents < end) & (scores != first_score)).to(tl.int32)
        other_labels += ((documents < end) & (labels != first_label)).to(tl.int32)
        score_sums += tl.where(documents < end, scores - first_score, 0.0)
        label_sums += tl.where(documents < end, labels - first_label, 0.0)
    size = tl.maximum(end - begin, 1).to(tl.float64)
    score_mean = first_score + tl.sum(score_sums, 0) / size
    label_mean = first_label + tl.sum(label_sums, 0) / size
    varies = (tl.sum(other_scores, 0) > 0) & (tl.sum(other_labels, 0) > 0)

    score_squares = tl.zeros((BLOCK_DOCUMENTS,), tl.float64)
    label_squares = tl.zeros((BLOCK_DOCUMENTS,), tl.float64)
    products = tl.zeros((BLOCK_DOCUMENTS,), tl.float64)
    for start in range(begin, end, BLOCK_DOCUMENTS):
        documents = start + tl.arange(0, BLOCK_DOCUMENTS)
        scores = tl.load(scores_ptr + documents, mask=documents < end, other=0.0).to(tl.float64) - score_mean
        labels = tl.load(labels_ptr + documents, mask=documents < end, other=0.0).to(tl.float64) - label_mean
        scores = tl.where(documents < end, scores, 0.0)
        labels = tl.where(documents < end, labels, 0.0)
        score_squares += scores * scores
        label_squares += labels * labels
        products += scores * labels
    score_norm = tl.sqrt(tl.sum(score_squares, 0))
    label_norm = tl.sqrt(tl.sum(label_squares, 0))
    correlation = tl.sum(products, 0) / tl.where(varies, score_norm * label_norm, 1.0)

    for start in range(begin, end, BLOCK_DOCUMENTS):
        documents = start + tl.arange(0, BLOCK_DOCUMENTS)
        scores = tl.load(scores_ptr + documents, mask=documents < end, other=0.0).to(tl.float64) - score_mean
        labels = tl.load(labels_ptr + documents, mask=documents < end, other=0.0).to(tl.float64) - label_mean
        pull = (correlation * scores / score_norm - labels / label_norm) / score_norm
        tl.store(gradients_ptr + documents, tl.where(varies, pull, 0.0).to(tl.float32), mask=documents < end)
    loss = tl.where(varies, 1.0 - correlation, 1.0)
    tl.store(sums_ptr + index, tl.where(has_document, loss, 0.0).to(tl.float32))
    tl.store(terms_ptr + index, has_document.to(tl.int64))


@kernel
def listwise_pointwise_kernel(
    scores_ptr,
    labels_ptr,
    list_offsets_ptr,
    sums_ptr,
    terms_ptr,
    gradients_ptr,
    rate_hi,
    rate_lo,
    LOSS: tl.constexpr,
    BLOCK_DOCUMENTS: tl.constexpr,
):
    """Binary cross-entropy of sigmoid(score / temperature), or (score / temperature - label)^2."""
    index, begin, end = find_list(list_offsets_ptr)
    rate = join_rate(rate_hi, rate_lo)
    losses = tl.zeros((BLOCK_DOCUMENTS,), tl.float64)
    for start in range(begin, end, BLOCK_DOCUMENTS):
        documents = start + tl.arange(0, BLOCK_DOCUMENTS)
        x = tl.load(scores_ptr + documents, mask=documents < end, other=0.0).to(tl.float64) * rate
        labels = tl.load(labels_ptr + documents, mask=documents < end, other=0.0).to(tl.float64)
        if LOSS == "bce":
            power = tl.exp(-tl.abs(x))
            # x's sign says which of log(1 + e^x) and log(1 + e^-x) has the linear part.
            loss = log1p_in_float64(power) + tl.where(x > 0.0, (1.0 - labels) * x, -labels * x)
            most = 1.0 / (1.0 + power)
            rises = tl.where(x > 0.0, most, power * most)
            falls = tl.where(x > 0.0, power * most, most)
            pull = ((1.0 - labels) * rises - labels * falls) * rate
        else:
            loss = (x - labels) * (x - labels)
            pull = 2.0 * (x - labels) * rate
        losses += tl.where(documents < end, loss, 0.0)
        tl.store(gradients_ptr + documents, pull.to(tl.float32), mask=documents < end)
    tl.store(sums_ptr + index, tl.sum(losses, 0).to(tl.float32))
    tl.store(terms_ptr + index, (end - begin).to(tl.int64))
