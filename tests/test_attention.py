"""Packed attention against its reference: instruction sets, ragged lengths, head dimensions, strides and scales."""

import re

import pytest
import torch
from accuracy import assert_accurate, outputs_and_gradients, poisoned_memory, skip_unless_runs
from attention_cases import cut, draw, integers, run_fused
from torch import Tensor

from fastrank import ops

# Around the vectors of 8 and 16 keys, the tiles of 4 and 6 queries and the blocks of 24.
LENGTHS = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 128, 0)
DTYPES = (torch.float32, torch.bfloat16)
HEAD_DIMS = (1, 8, 24, 32, 33, 64, 80, 128)


@pytest.fixture
def backend(isa):
    """The cpu backend, by instruction set."""
    skip_unless_runs("attention", "cpu", torch.empty(0, 1, 1))
    return "cpu"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_accuracy(backend, head_dim, dtype):
    qkv = draw(sum(LENGTHS), 3, 2, head_dim, seed=head_dim).to(dtype).float()
    assert_accurate(run_fused(LENGTHS), {"qkv": qkv}, backend=backend, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [*LENGTHS[1:-1], 4, 5, 6, 10, 11, 13, 25, 47, 49, 511, 512])
def test_accuracy_of_each_length_alone(backend, length, dtype):
    # The rule looks at the largest error, which in a batch is that of the shortest pairs.
    qkv = draw(length, 3, 1, 32, seed=length).to(dtype).float()
    assert_accurate(run_fused([length]), {"qkv": qkv}, backend=backend, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "scale"), [(32, 1.0), (32, 0.01), (24, -0.3), (64, 0.0)])
def test_accuracy_with_a_scale(backend, head_dim, scale, dtype):
    qkv = draw(86, 3, 2, head_dim).to(dtype).float()
    assert_accurate(run_fused((17, 64, 5), scale), {"qkv": qkv}, backend=backend, dtype=dtype)


def test_bf16_is_float32_rounded(backend):
    """Outputs and gradients are those of float32 for the same numbers, rounded to the nearest even."""
    qkv = draw(sum(LENGTHS), 3, 2, 33).bfloat16()
    low, high = (
        outputs_and_gradients(lambda qkv: run_fused(LENGTHS)(backend, qkv), {"qkv": qkv}, dtype)
        for dtype in DTYPES[::-1]
    )
    assert torch.equal(low["output 0"], high["output 0"].bfloat16())
    # The gradient from above was rounded, too: the same one for both.
    upstream = torch.randn(low["output 0"].shape).bfloat16()
    gradients = []
    for dtype in DTYPES:
        leaf = qkv.to(dtype).requires_grad_()
        gradients += torch.autograd.grad(run_fused(LENGTHS)(backend, leaf), leaf, upstream.to(dtype))
    assert torch.equal(gradients[1], gradients[0].bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 32, 64])
@pytest.mark.parametrize("largest", [3, 30])
def test_saturated_softmax_keeps_its_digits(backend, head_dim, largest, dtype):
    # Whole numbers: float32 holds every score exactly, up to 30,000, however it is summed; what is left is the softmax.
    lengths = (1, 2, 9, 40, 100, 3)
    q, k = integers(2, sum(lengths), 2, head_dim, largest=largest)
    inputs = {"q": q, "k": k, "v": draw(*k.shape).to(dtype).float()}
    offsets = cut(lengths)
    run = lambda backend, q, k, v: ops.attention(q, k, v, offsets, scale=0.5, backend=backend)  # noqa: E731
    assert_accurate(run, inputs, backend=backend, dtype=dtype)


def test_scores_far_below_zero(backend):
    # Lanes past the last key must not count as scores of 0: e^(0 - maximum) may be anything, infinity and NaN included.
    qkv = draw(30, 3, 2, 32)
    qkv[:, 0, :, 0], qkv[:, 1, :, 0] = 100, -100
    assert_accurate(run_fused((13, 17)), {"qkv": qkv}, backend=backend)
    qkv = draw(4000, 3, 1, 1)
    qkv[:, 0, 0, 0], qkv[:, 1, 0, 0] = torch.linspace(-400, 0, 4000), 1
    out, gradient = gradients_of(qkv, [1] * 4000, backend)
    assert torch.equal(out, qkv[:, 2]) and not gradient[:, :2].any() and gradient[:, 2].isfinite().all()


def test_small_probabilities_keep_their_relative_accuracy(backend):
    # Two keys with the scores 0 and x, the values 0 and 1: the output is e^x / (1 + e^x), the exponential almost bare.
    x = torch.linspace(-86, 0, 20_001)
    k = v = torch.tensor([0.0, 1.0])[:, None, None]
    out = ops.attention(x[:, None, None], k, v, cut([2]), query_offsets=cut([len(x)]), scale=1, backend=backend)
    exact = torch.sigmoid(x.double())
    assert ((out.flatten().double() - exact).abs() / exact).max() < 3e-7
    x = torch.tensor([-87.0, -104.0, -1e3, -1e30, -torch.inf])
    out = ops.attention(x[:, None, None], k + 1, v, cut([2]), query_offsets=cut([len(x)]), scale=1, backend=backend)
    assert (out[:3] < 1e-37).all() and out[3] == 0 and out[4].isnan()


def test_one_key_far_above_the_others_takes_all(backend):
    k = draw(50, 1, 32)
    k[7] = 0
    k[7, 0, 0] = 1e4
    q = torch.zeros(50, 1, 32)
    q[..., 0] = 1e3
    k[[index for index in range(50) if index != 7], :, 0] = -1e4
    v = draw(50, 1, 32, seed=1)
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    out = ops.attention(*leaves, cut([50]), backend=backend)
    assert torch.equal(out, v[7].expand(50, 1, 32))
    upstream = draw(50, 1, 32, seed=2)
    dq, dk, dv = torch.autograd.grad(out, leaves, upstream)
    assert not dq.any() and not dk.any()
    torch.testing.assert_close(dv[7], upstream.sum(0))
    assert not dv[:7].any() and not dv[8:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_views_are_read_in_place(backend, dtype):
    offsets = cut((9, 0, 33, 20))
    inputs = {"wide": draw(62, 5, 3, 40).to(dtype).float(), "values": draw(3, 62, 24, seed=1).to(dtype).float()}

    def run(backend, wide, values):
        q, k = wide[:, 1, :, 8:32], wide[:, 4, :, 3:27]
        return ops.attention(q, k, values.transpose(0, 1), offsets, backend=backend)

    assert_accurate(run, inputs, backend=backend, dtype=dtype)


def test_an_upstream_gradient_of_any_stride(backend):
    offsets = cut((5, 12))
    q, k, v = (draw(17, 2, 32, seed=seed).requires_grad_() for seed in range(3))
    out = ops.attention(q, k, v, offsets, backend=backend)
    upstream = draw(2, 17, 64, seed=3)[..., ::2].transpose(0, 1)
    expected = torch.autograd.grad(out, (q, k, v), upstream.contiguous(), retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True), expected))
    expected = torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(out.sum(), (q, k, v)), expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [(1, 1, 1, 1, 1), (0, 3, 1, 30, 0), (2, 0, 7, 5, 1)])
def test_queries_of_their_own(backend, queries, dtype):
    keys = (40, 1, 65, 9, 0)
    inputs = {"q": draw(sum(queries), 2, 32), "k": draw(sum(keys), 2, 32, seed=1), "v": draw(sum(keys), 2, 32, seed=2)}
    inputs = {name: value.to(dtype).float() for name, value in inputs.items()}
    offsets, query_offsets = cut(keys), cut(queries)

    def run(backend, q, k, v):
        return ops.attention(q, k, v, offsets, query_offsets=query_offsets, backend=backend)

    assert_accurate(run, inputs, backend=backend, dtype=dtype)
    if queries[4]:
        out = run(backend, **inputs)
        assert not out[query_offsets[4] :].any(), "a query without a key gives 0"


def test_the_scored_token_alone_equals_its_row_of_the_whole(backend):
    lengths = (12, 1, 100, 37)
    q, k, v = (draw(150, 4, 32, seed=seed) for seed in range(3))
    offsets = cut(lengths)
    whole = ops.attention(q, k, v, offsets, backend=backend)
    first = offsets[:-1].long()
    alone = ops.attention(q[first], k, v, offsets, query_offsets=cut([1] * 4), backend=backend)
    assert torch.equal(alone, whole[first])


def gradients_of(qkv: Tensor, lengths, backend: str) -> list[Tensor]:
    results = outputs_and_gradients(lambda qkv: run_fused(lengths)(backend, qkv), {"qkv": qkv}, torch.float32)
    return list(results.values())


def test_a_pair_is_the_same_bit_for_bit_alone_and_in_any_order(backend):
    lengths = (3, 129, 0, 64, 1, 30, 77)
    offsets = cut(lengths).tolist()
    qkv, upstream = draw(sum(lengths), 3, 4, 32), draw(sum(lengths), 4, 32, seed=1)

    def both(pairs: list[int]) -> list[list[Tensor]]:
        rows = torch.cat([torch.arange(offsets[pair], offsets[pair + 1]) for pair in pairs])
        leaf = qkv[rows].requires_grad_()
        with poisoned_memory():
            out = run_fused([lengths[pair] for pair in pairs])(backend, leaf)
            (gradient,) = torch.autograd.grad(out, leaf, upstream[rows])
        sizes = [lengths[pair] for pair in pairs]
        return [list(parts) for parts in zip(out.detach().split(sizes), gradient.split(sizes), strict=True)]

    together = both(list(range(len(lengths))))
    order = [5, 3, 0, 6, 2, 1, 4]
    permuted = both(order)
    for place, pair in enumerate(order):
        assert all(map(torch.equal, permuted[place], together[pair]))
    for pair in range(len(lengths)):
        assert all(map(torch.equal, both([pair])[0], together[pair]))


def test_threads_change_no_bit(backend):
    lengths = (200, 3, 64, 0, 100, 31)
    qkv = draw(sum(lengths), 3, 4, 32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(gradients_of(qkv, lengths, backend))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_a_nan_stays_in_its_pair_and_out_of_the_next_call(backend):
    lengths = (20, 33, 64)
    clean = draw(117, 3, 2, 32)
    before = gradients_of(clean, lengths, backend)
    spoilt = clean.clone()
    spoilt[20:53, 1] = torch.nan
    out, gradient = gradients_of(spoilt, lengths, backend)
    assert out[20:53].isnan().all() and gradient[20:53, :2].isnan().all()
    for rows in (slice(0, 20), slice(53, 117)):
        assert torch.equal(out[rows], before[0][rows]) and torch.equal(gradient[rows], before[1][rows])
    gradients_of(torch.full_like(clean, torch.nan), lengths, backend)
    assert all(map(torch.equal, gradients_of(clean, lengths, backend), before))


def test_fused_and_separate_projections_agree(backend):
    lengths = (10, 1, 50)
    offsets = cut(lengths)
    fused = draw(61, 3, 2, 64).requires_grad_()
    views = fused.detach().clone().requires_grad_()
    upstream = draw(61, 2, 64, seed=1)
    one = ops.fused_attention(fused, offsets, backend=backend)
    other = ops.attention(*views.unbind(1), offsets, backend=backend)
    assert torch.equal(one, other)
    one.backward(upstream)
    other.backward(upstream)
    assert torch.equal(fused.grad, views.grad)


@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_a_padded_batch_equals_the_packed_one(backend, integer):
    lengths = torch.tensor([5, 33, 0, 40, 1], dtype=integer)
    real = torch.arange(40) < lengths[:, None]
    projection = draw(5, 40, 3, 2, 32)
    projection[~real] = torch.nan  # padding is not read
    projection.requires_grad_()
    upstream = draw(5, 40, 2, 32, seed=1)
    q, k, v = projection.unbind(2)
    with poisoned_memory():
        padded = ops.padded_attention(q, k, v, lengths, backend=backend)
        (gradient,) = torch.autograd.grad(padded, projection, upstream)
    packed_leaf = projection.detach()[real].requires_grad_()
    packed = ops.fused_attention(packed_leaf, cut(lengths), backend=backend)
    (packed_gradient,) = torch.autograd.grad(packed, packed_leaf, upstream[real])
    assert torch.equal(padded[real], packed) and not padded[~real].any()
    assert torch.equal(gradient[real], packed_gradient) and not gradient[~real].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_of_a_padded_batch(backend, dtype):
    lengths = torch.tensor([7, 0, 30])
    inputs = {name: draw(3, 30, 2, 33, seed=seed).to(dtype).float() for seed, name in enumerate("qkv")}

    def run(backend, **qkv):
        return ops.padded_attention(**qkv, lengths=lengths, backend=backend)

    assert_accurate(run, inputs, backend=backend, dtype=dtype)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_wanted_gradients_are_computed(backend, wanted):
    tensors = [draw(30, 2, 32, seed=seed) for seed in range(3)]
    offsets, upstream = cut((10, 20)), draw(30, 2, 32, seed=3)
    every = [tensor.clone().requires_grad_() for tensor in tensors]
    expected = torch.autograd.grad(ops.attention(*every, offsets, backend=backend), every, upstream)
    some = [tensor.clone().requires_grad_(needed) for tensor, needed in zip(tensors, wanted, strict=True)]
    ops.attention(*some, offsets, backend=backend).backward(upstream)
    for tensor, needed, gradient in zip(some, wanted, expected, strict=True):
        assert torch.equal(tensor.grad, gradient) if needed else tensor.grad is None


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_in_nothing_out(backend):
    no_pair, no_token = torch.zeros(1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    for offsets in (no_pair, no_token):
        qkv = torch.empty(0, 3, 2, 32, requires_grad=True)
        out = ops.fused_attention(qkv, offsets, backend=backend)
        assert out.shape == (0, 2, 32)
        out.sum().backward()
        assert qkv.grad.shape == qkv.shape
    for shape in ((5, 3, 0, 8), (5, 3, 2, 0)):
        assert ops.fused_attention(torch.empty(shape), cut([5]), scale=1, backend=backend).shape == (5, *shape[2:])
    empty = torch.empty(0, 9, 2, 32)
    assert (
        ops.padded_attention(empty, empty, empty, torch.empty(0, dtype=torch.int64), backend=backend).shape
        == empty.shape
    )
    empty = torch.empty(2, 0, 2, 32)
    assert (
        ops.padded_attention(empty, empty, empty, torch.zeros(2, dtype=torch.int64), backend=backend).shape
        == empty.shape
    )


def test_no_second_derivative():
    qkv = draw(5, 3, 1, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(run_fused([5])("cpu", qkv).square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_inference_mode_gives_the_same(backend):
    qkv, offsets = draw(30, 3, 2, 32), cut((10, 20))
    expected = ops.fused_attention(qkv.clone().requires_grad_(), offsets, backend=backend)
    with torch.inference_mode():
        assert torch.equal(ops.fused_attention(qkv.clone(), offsets.clone(), backend=backend), expected)


GOOD = cut((2, 3))


@pytest.mark.parametrize(
    ("offsets", "sentence"),
    [
        (GOOD.long(), "offsets must be torch.int32 on cpu, where the values are, not torch.int64 on cpu"),
        (GOOD[None], "offsets must have the shape (pairs + 1,), not (1, 3)"),
        (GOOD[:0], "offsets must have the shape (pairs + 1,), not (0,)"),
        (torch.tensor([1, 5], dtype=torch.int32), "offsets must begin at 0, not at 1"),
        (torch.tensor([0, 4], dtype=torch.int32), "offsets must end at the number of tokens, 5, not at 4"),
        (torch.tensor([0, 6], dtype=torch.int32), "offsets must end at the number of tokens, 5, not at 6"),
        (torch.tensor([0, 9, 3, 5], dtype=torch.int32), "offsets must not decrease, but pair 1 reaches from 9 to 3"),
    ],
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_offsets(offsets, sentence, backend):
    x = torch.zeros(5, 2, 8)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ops.attention(x, x, x, offsets, backend=backend)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ops.fused_attention(torch.zeros(5, 3, 2, 8), offsets, backend=backend)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ops.attention(x, x, x, GOOD, query_offsets=offsets, backend=backend)


def test_a_wrong_span():
    for span in ((1, 2), (3, 3)):
        with pytest.raises(ValueError, match=re.escape(f"span says {span}, but the pairs have from 2 to 3 tokens")):
            ops.fused_attention(torch.zeros(5, 3, 2, 8), GOOD, span=span)
    assert ops.fused_attention(torch.zeros(5, 3, 2, 8), GOOD, span=(2, 3)).shape == (5, 2, 8)


def test_bad_shapes_and_dtypes():
    x, y = torch.zeros(5, 2, 8), torch.zeros(5, 2, 16)
    with pytest.raises(ValueError, match=re.escape("given: q (5, 2, 8), k (5, 2, 16), v (5, 2, 16)")):
        ops.attention(x, y, y, GOOD)
    with pytest.raises(ValueError, match=re.escape("given: q (5, 2, 8), k (4, 2, 8), v (5, 2, 8)")):
        ops.attention(x, x[:4], x, GOOD)
    with pytest.raises(ValueError, match="q has 4 tokens and k 5"):
        ops.attention(x[:4], x, x, GOOD)
    with pytest.raises(ValueError, match="query_offsets must cut as many pairs"):
        ops.attention(x, x, x, GOOD, query_offsets=cut((5,)))
    with pytest.raises(ValueError, match=r"k torch\.float64 on cpu"):
        ops.attention(x, x.double(), x, GOOD)
    with pytest.raises(ValueError, match=re.escape("The last dimension of v must be contiguous, not of stride 2")):
        ops.attention(x, x, y[..., ::2], GOOD)
    with pytest.raises(ValueError, match=re.escape("given: qkv (5, 2, 2, 8)")):
        ops.fused_attention(torch.zeros(5, 2, 2, 8), GOOD)
    batch = torch.zeros(2, 5, 2, 8)
    with pytest.raises(ValueError, match="lengths must lie in"):
        ops.padded_attention(batch, batch, batch, torch.tensor([5, 6]))
    with pytest.raises(ValueError, match="lengths must lie in"):
        ops.padded_attention(batch, batch, batch, torch.tensor([-1, 5]))
    with pytest.raises(ValueError, match="one number for each of the 2 pairs"):
        ops.padded_attention(batch, batch, batch, torch.tensor([5]))
    with pytest.raises(ValueError, match=r"lengths must be torch\.int32 or torch\.int64"):
        ops.padded_attention(batch, batch, batch, torch.tensor([5.0, 5.0]))
