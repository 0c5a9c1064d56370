"""The attention kernels in Triton against their reference: every length at an edge of a tile, alone and in a batch.

The interpreter is slow, so heads are few and batches short.
"""

import re

import pytest
import torch
from accuracy import assert_accurate, outputs_and_gradients, poisoned_memory
from attention_cases import cut, draw, integers, run_fused
from torch import Tensor

from fastrank import backend, ops
from fastrank.kernels.attention import gpu
from fastrank.kernels.configuration import Table

# Around the buckets of lengths and the tiles of long pairs; float32 has no buckets, and tiles of 16 and 32.
LENGTHS = {torch.float32: (0, 1, 15, 16, 33, 0), torch.float16: (0, 1, 31, 32, 33, 64, 65, 96, 97, 128, 129, 0)}
DTYPES = tuple(LENGTHS)


def exact(tensor: Tensor) -> Tensor:
    """Numbers that float16 holds too."""
    return tensor.half().float()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", gpu.HEAD_DIMS)
def test_accuracy_of_a_ragged_batch(head_dim, dtype):
    lengths = LENGTHS[dtype] if head_dim == 32 or dtype == torch.float32 else (0, 33, 1, 96, 97, 129, 20)
    qkv = exact(draw(sum(lengths), 3, 2, head_dim, seed=head_dim))
    assert_accurate(run_fused(lengths), {"qkv": qkv}, backend="gpu", dtype=dtype)


@pytest.mark.parametrize(
    ("length", "dtype"),
    [
        *((length, torch.float16) for length in (1, 2, 16, 32, 33, 64, 100, 128, 130, 193)),
        *((length, torch.float32) for length in (1, 16, 17, 32, 65)),
    ],
)
def test_accuracy_of_each_length_alone(length, dtype):
    # The rule looks at the largest error, which in a batch is that of the shortest pairs.
    qkv = exact(draw(length, 3, 1, 32, seed=length))
    assert_accurate(run_fused([length]), {"qkv": qkv}, backend="gpu", dtype=dtype)


@pytest.mark.parametrize("length", [5, 40, 70])
@pytest.mark.parametrize("largest", [3, 30])
def test_saturated_softmax_keeps_its_digits(length, largest):
    q, k = integers(2, length, 1, 32, largest=largest)
    inputs, offsets = {"q": q, "k": k, "v": draw(*k.shape)}, cut([length])
    run = lambda backend, q, k, v: ops.attention(q, k, v, offsets, scale=0.5, backend=backend)  # noqa: E731
    assert_accurate(run, inputs, backend="gpu")


@pytest.mark.parametrize("scale", [1.0, -0.3, 0.0])
def test_accuracy_with_a_scale(scale):
    inputs = {"qkv": exact(draw(86, 3, 1, 32))}
    assert_accurate(run_fused((17, 64, 5), scale), inputs, backend="gpu", dtype=torch.half)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [(1, 1, 1, 1, 1), (0, 3, 1, 20, 2)])
def test_queries_of_their_own(queries, dtype):
    keys = (40, 1, 65, 9, 0)
    inputs = {"q": exact(draw(sum(queries), 2, 32))}
    inputs |= {name: exact(draw(sum(keys), 2, 32, seed=seed)) for seed, name in ((1, "k"), (2, "v"))}
    offsets, query_offsets = cut(keys), cut(queries)

    def run(backend, q, k, v):
        return ops.attention(q, k, v, offsets, query_offsets=query_offsets, backend=backend)

    assert_accurate(run, inputs, backend="gpu", dtype=dtype)
    assert not run("gpu", **inputs)[query_offsets[4] :].any(), "a query without a key gives 0"


def test_strided_views_and_rows_that_are_not_aligned():
    offsets = cut((9, 0, 33, 20))
    inputs = {"wide": draw(62, 5, 2, 48), "odd": draw(2, 62, 37, seed=1)}

    def run(backend, wide, odd):
        q, k, v = wide[:, 1, :, 8:40], wide[:, 4, :, 3:35], odd.transpose(0, 1)[..., 5:]
        return ops.attention(q, k, v, offsets, backend=backend)

    assert_accurate(run, inputs, backend="gpu")


def both(qkv: Tensor, upstream: Tensor, lengths, span=None) -> list[tuple[Tensor, Tensor]]:
    """Output and gradient of each pair."""
    leaf = qkv.requires_grad_()
    with poisoned_memory():
        out = run_fused(lengths, span=span)("gpu", leaf)
        (gradient,) = torch.autograd.grad(out, leaf, upstream)
    assert out.isfinite().all() and gradient.isfinite().all()
    return list(zip(out.detach().split(lengths), gradient.split(lengths), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pair_is_the_same_bit_for_bit_alone_and_in_any_order(dtype):
    lengths = (3, 129, 0, 64, 100) if dtype == torch.half else (3, 33, 0, 16)
    starts = cut(lengths).tolist()
    qkv, upstream = draw(sum(lengths), 3, 1, 32).to(dtype), draw(sum(lengths), 1, 32, seed=1).to(dtype)

    def of(pairs: list[int]) -> list[tuple[Tensor, Tensor]]:
        rows = torch.cat([torch.arange(starts[pair], starts[pair + 1]) for pair in pairs])
        return both(qkv[rows], upstream[rows], [lengths[pair] for pair in pairs])

    together = of(list(range(len(lengths))))
    order = [3, 0, *range(4, len(lengths)), 2, 1]
    permuted = of(order)
    for place, pair in enumerate(order):
        assert all(map(torch.equal, permuted[place], together[pair]))
    for pair in range(len(lengths)):
        assert all(map(torch.equal, of([pair])[0], together[pair]))


def test_heads_that_a_program_walks_over_are_the_same_bits(monkeypatch):
    """Three heads by two a program: a next head, and a rest."""
    lengths = (20, 50, 90, 110)
    qkv, upstream = draw(sum(lengths), 3, 3, 32).half(), draw(sum(lengths), 3, 32, seed=1).half()
    expected = both(qkv.clone(), upstream, lengths)
    monkeypatch.setattr(gpu, "PROGRAMS", len(lengths) * 3 // 2)
    for one, other in zip(both(qkv.clone(), upstream, lengths), expected, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("scale", [1, 8])
def test_gradients_of_few_queries_are_as_good_as_the_references(scale):
    """Where one key has nearly all the weight, and upstream is small, rounding of the output would be all that is left
    of the gradient of q."""
    keys = (40, 70)
    inputs = {"q": scale * exact(draw(2, 1, 32))}
    inputs |= {
        name: exact(draw(sum(keys), 1, 32, seed=seed)) + 2 * (name == "k") for seed, name in ((1, "k"), (2, "v"))
    }

    def run(backend, q, k, v):
        return ops.attention(q, k, v, cut(keys), query_offsets=cut([1, 1]), backend=backend)

    exactly = outputs_and_gradients(lambda **given: run("reference", **given), inputs, torch.float64)
    rounded = outputs_and_gradients(lambda **given: run("reference", **given), inputs, torch.half)
    actual = outputs_and_gradients(lambda **given: run("gpu", **given), inputs, torch.half)
    for name in ("gradient of q", "gradient of k"):  # by norm: the largest error is that of v
        allowed = 2 * (rounded[name] - exactly[name]).norm() + 2**-9 * exactly[name].norm()
        assert (actual[name] - exactly[name]).norm() <= allowed, name


@pytest.mark.parametrize(("lengths", "kernels"), [((3, 32), 1), ((40, 64), 1), ((20, 64), 2), ((150, 200), 1)])
def test_a_known_span_starts_only_the_kernels_that_it_needs_and_changes_no_bit(lengths, kernels, monkeypatch):
    qkv, upstream = draw(sum(lengths), 3, 1, 32).half(), draw(sum(lengths), 1, 32, seed=1).half()
    expected = both(qkv.clone(), upstream, lengths)
    started = []
    prepare = Table.prepare
    monkeypatch.setattr(Table, "prepare", lambda self, name, *more: started.append(name) or prepare(self, name, *more))
    known = both(qkv.clone(), upstream, lengths, span=(min(lengths), max(lengths)))
    assert len([name for name in started if name.startswith("forward")]) == kernels
    assert len([name for name in started if name.startswith(("backward", "dkdv"))]) == kernels
    for one, other in zip(known, expected, strict=True):
        assert all(map(torch.equal, one, other))


def test_a_padded_batch_equals_the_packed_one():
    lengths = torch.tensor([5, 33, 0, 140])
    real = torch.arange(140) < lengths[:, None]
    projection = draw(4, 140, 3, 1, 32).half()
    projection[~real] = torch.nan  # padding is not read
    projection.requires_grad_()
    upstream = draw(4, 140, 1, 32, seed=1).half()
    with poisoned_memory():
        padded = ops.padded_attention(*projection.unbind(2), lengths, backend="gpu")
        (gradient,) = torch.autograd.grad(padded, projection, upstream)
    packed_leaf = projection.detach()[real].requires_grad_()
    packed = ops.fused_attention(packed_leaf, cut(lengths), backend="gpu")
    (packed_gradient,) = torch.autograd.grad(packed, packed_leaf, upstream[real])
    assert torch.equal(padded[real], packed) and not padded[~real].any()
    assert torch.equal(gradient[real], packed_gradient) and not gradient[~real].any()


def test_a_nan_stays_in_its_pair():
    lengths = (20, 33, 140)
    clean = draw(193, 3, 1, 32)

    def of(qkv: Tensor) -> list[Tensor]:
        return list(
            outputs_and_gradients(lambda qkv: run_fused(lengths)("gpu", qkv), {"qkv": qkv}, torch.half).values()
        )

    before = of(clean)
    for rows in (slice(20, 53), slice(53, 193)):
        spoilt = clean.clone()
        spoilt[rows, 1] = torch.nan
        out, gradient = of(spoilt)
        assert out[rows].isnan().all() and gradient[rows, :2].isnan().all()
        rest = torch.ones(193, dtype=torch.bool)
        rest[rows] = False
        assert torch.equal(out[rest], before[0][rest]) and torch.equal(gradient[rest], before[1][rest])


def test_offsets_that_change_in_place_are_seen():
    qkv, offsets = draw(200, 3, 1, 32).half(), cut((150, 50))
    ops.fused_attention(qkv, offsets, backend="gpu")
    offsets.copy_(cut((20, 180)))
    expected = ops.fused_attention(qkv, cut((20, 180)), backend="gpu")
    assert torch.equal(ops.fused_attention(qkv, offsets, backend="gpu"), expected)
    with torch.inference_mode():
        offsets = cut((150, 50))
        ops.fused_attention(qkv, offsets, backend="gpu")
        offsets.copy_(cut((20, 180)))
        with poisoned_memory():
            assert torch.equal(ops.fused_attention(qkv, offsets, backend="gpu"), expected)


def test_a_batch_keeps_its_tiles_and_leaves_none_behind():
    before = len(gpu._known_cuts)
    offsets = cut((150, 20))
    ops.fused_attention(draw(170, 3, 1, 32).half(), offsets, backend="gpu")
    tiles = gpu._known_cuts[offsets][1].tiles
    known = dict(tiles)
    ops.fused_attention(draw(170, 3, 1, 32, seed=1).half(), offsets, backend="gpu")
    assert known and all(tiles[key] is value for key, value in known.items())
    del offsets, tiles
    assert len(gpu._known_cuts) == before


def test_nothing_in_nothing_out():
    for offsets in (cut(()), cut((0, 0, 0))):
        qkv = torch.empty(0, 3, 2, 32, requires_grad=True)
        out = ops.fused_attention(qkv, offsets, backend="gpu")
        assert out.shape == (0, 2, 32)
        out.sum().backward()
        assert qkv.grad.shape == qkv.shape
    empty = torch.empty(2, 0, 2, 32)
    lengths = torch.zeros(2, dtype=torch.int64)
    assert ops.padded_attention(empty, empty, empty, lengths, backend="gpu").shape == empty.shape


def test_head_dimensions_without_a_kernel_are_refused():
    for head_dim in (8, 33, 256):
        with pytest.raises(backend.BackendRefused, match=re.escape(f"of 32, 64, 128, not of {head_dim}.")):
            run_fused([5])("gpu", torch.zeros(5, 3, 1, head_dim))
