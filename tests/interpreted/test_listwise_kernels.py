"""The listwise kernels in Triton against their reference: every loss and option, hard case and edge of a tile.

The interpreter is slow, so lists are just long enough to cross each edge.
"""

import math
from itertools import pairwise

import pytest
import torch
from accuracy import poisoned_memory
from listwise_cases import CASES, VARIANTS, check, make, options_of, sums_and_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from fastrank import backend, ops
from fastrank.kernels.configuration import Table
from fastrank.kernels.listwise import gpu, reference
from fastrank.losses import LOSSES

SIZES = (0, 1, 2, 7, 31, 32, 33, 64, 130)  # around the blocks of rows and columns
ONE_PROGRAM_A_LIST = ("lce", "listnet", "kl", "pearson", "bce", "mse", "contrastive_imitation")


@pytest.mark.parametrize("variant", VARIANTS)
def test_accuracy(variant):
    # What the options of a loss change does not depend on the case.
    for case in CASES if variant in LOSSES else ("tied scores", "right by far"):
        check(variant, *make(variant, case, (33,)), "gpu")  # alone, since the rule looks at the largest error


@pytest.mark.parametrize("variant", LOSSES)
def test_accuracy_of_two_documents(variant):
    for case in ("distinct", "scores of 1e4", "right by far", "wrong by far"):
        check(variant, *make(variant, case, (2,), seed=2), "gpu")


@pytest.mark.parametrize("variant", VARIANTS)
def test_accuracy_of_a_ragged_batch(variant):
    check(variant, *make(variant, "three tiers", (*SIZES, 0) if variant in LOSSES else (0, 33, 1, 7)), "gpu")


@pytest.mark.parametrize("variant", LOSSES)
def test_accuracy_of_a_list_of_several_blocks(variant):
    check(variant, *make(variant, "right by far", (65,)), "gpu")


@pytest.mark.parametrize("variant", ONE_PROGRAM_A_LIST)
def test_accuracy_of_a_list_of_several_chunks(variant):
    check(variant, *make(variant, "distinct", (2 * gpu.BLOCK_DOCUMENTS + 33,)), "gpu")


def test_the_first_rows_of_a_list_longer_than_a_stretch_of_tiles():
    scores, labels, offsets = make("ranknet", "three tiers", (gpu.STRETCH + 33,))
    rates, rows, programs = (1.0, 0.0), gpu.BLOCK_ROWS, 1
    losses, pulls = torch.zeros(2, len(scores), dtype=torch.float64)
    gradients, bases, coefficients = torch.zeros(3, len(scores))
    num_lower = torch.zeros(len(scores), dtype=torch.int32)
    x, launch = scores.double(), gpu.CONFIGURATIONS.launch
    apart, prefers = x[None, :] - x[:rows, None], labels[:rows, None] > labels[None, :]

    launch("ranknet", programs, scores, labels, offsets, losses, num_lower, gradients, 1, *rates)
    expected = (torch.nn.functional.softplus(apart) * prefers).sum(1)
    torch.testing.assert_close(losses[:rows], expected, rtol=5e-7, atol=0)
    expected = torch.where(labels[:rows, None] < labels[None, :], torch.sigmoid(-apart), 0.0)
    expected = (expected - torch.where(prefers, torch.sigmoid(apart), 0.0)).sum(1)
    torch.testing.assert_close(gradients[:rows].double(), expected, rtol=5e-7, atol=1e-4)
    assert torch.equal(num_lower[:rows], prefers.sum(1).int())

    launch("smooth rank", programs, scores, offsets, losses, 1, *rates)
    torch.testing.assert_close(losses[:rows], reference.smooth_ranks(x, 1.0)[:rows], rtol=5e-7, atol=0)

    ones = torch.ones_like(scores)
    launch("draw", programs, scores, labels, ones, offsets, losses, bases, coefficients, pulls, 1, *rates)
    expected = torch.log1p((apart.exp() * prefers).sum(1))
    torch.testing.assert_close(losses[:rows], expected, rtol=5e-7, atol=0)


@pytest.mark.parametrize("variant", LOSSES)
def test_a_list_is_the_same_bit_for_bit_alone_in_a_batch_and_from_run_to_run(variant):
    sizes = (7, 0, 65, 1, 2)
    scores, labels, offsets = make(variant, "three tiers", sizes)
    upstream = torch.randn(len(sizes))
    with poisoned_memory():
        sums, terms, gradients = sums_and_gradients(variant, scores, labels, offsets, upstream, "gpu")
        again = sums_and_gradients(variant, scores, labels, offsets, upstream, "gpu")
    assert all(torch.equal(one, two) for one, two in zip((sums, terms, gradients), again, strict=True))
    for index, (begin, end) in enumerate(pairwise(offsets.tolist())):
        alone = torch.tensor([0, end - begin]).int()
        part = scores[begin:end], labels[begin:end], alone, upstream[index, None]
        one, count, gradient = sums_and_gradients(variant, *part, "gpu")
        assert torch.equal(one, sums[index, None]) and torch.equal(count, terms[index, None])
        assert torch.equal(gradient, gradients[begin:end])


@pytest.mark.parametrize("variant", LOSSES)
def test_terms_are_counted_as_by_the_reference(variant):
    name, options = options_of(variant)
    for case in ("three tiers", "no positive", "infinite labels"):
        scores, labels, offsets = make(variant, case, (0, 1, 7, 0))
        given = name, scores, labels, offsets
        terms = ops.listwise(*given, options=options, backend="gpu")[1]
        assert torch.equal(terms, ops.listwise_terms(name, labels, offsets))


@pytest.mark.parametrize("loss", ["ranknet", "lce"])
def test_a_nearly_right_list_keeps_its_digits(loss):
    labels, offsets = torch.tensor([0, 1]), torch.tensor([0, 2], dtype=torch.int32)
    for ahead in (5.0, 20.0, 40.0, 80.0):
        scores = torch.tensor([0.0, ahead], requires_grad=True)
        sums, _ = ops.listwise(loss, scores, labels, offsets, options={"temperature": 1.0}, backend="gpu")
        (gradient,) = torch.autograd.grad(sums, scores, torch.tensor([0.37]))
        share = 1 / (1 + math.exp(ahead))
        assert sums.item() == pytest.approx(math.log1p(math.exp(-ahead)), rel=5e-7, abs=0)
        assert gradient.tolist() == pytest.approx([0.37 * share, -0.37 * share], rel=5e-7, abs=0)


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([2**62, 2**62 + 1, 2**62 + 1]),
        torch.tensor([2**24, 2**24 + 1, 2**24 + 1], dtype=torch.int32),
        torch.tensor([1.0, 1 + 2**-50, 1 + 2**-50], dtype=torch.float64),
    ],
)
def test_labels_are_told_apart_beyond_float32(labels):
    offsets = torch.tensor([0, 3], dtype=torch.int32)
    for name in ("ranknet", "weighted_ranknet", "hinge", "listmle", "lce", "adr_mse"):
        options = LOSSES[name].fill({})
        scores = torch.tensor([0.5, 1.0, -1.0])
        expected = ops.listwise(name, scores, labels, offsets, options=options, backend="reference")
        actual = ops.listwise(name, scores, labels, offsets, options=options, backend="gpu")
        torch.testing.assert_close(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bfloat16, torch.float64]
)
def test_labels_of_any_dtype(dtype):
    scores, labels, offsets = torch.randn(9), (torch.arange(9) % 3 > 0).to(dtype), torch.tensor([0, 4, 9]).int()
    for name in ("ranknet", "lambda", "lce", "mse"):
        options = LOSSES[name].fill({})
        expected = ops.listwise(name, scores, labels.float(), offsets, options=options, backend="gpu")
        actual = ops.listwise(name, scores, labels, offsets, options=options, backend="gpu")
        assert all(torch.equal(one, two) for one, two in zip(actual, expected, strict=True)), name


def test_negative_zero_ties_with_zero():
    labels, offsets = torch.tensor([0.0, -0.0, 0.0]), torch.tensor([0, 3], dtype=torch.int32)
    scores = torch.tensor([1.0, 2.0, 3.0])
    for name in LOSSES:
        options = LOSSES[name].fill({})
        expected = ops.listwise(name, scores, labels, offsets, options=options, backend="reference")
        actual = ops.listwise(name, scores, labels, offsets, options=options, backend="gpu")
        assert torch.equal(actual[1], expected[1])
        torch.testing.assert_close(actual[0], expected[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_nan_flows_through_instead_of_vanishing(variant):
    offsets = torch.tensor([0, 3, 5], dtype=torch.int32)
    scores, labels = torch.tensor([0.0, math.nan, 1.0, 2.0, 3.0]), torch.tensor([1.0, 0, 1, 1, 0])
    sums, _, gradients = sums_and_gradients(variant, scores, labels, offsets, torch.tensor([0.3, 0.7]), "gpu")
    assert sums[0].isnan() and gradients[1].isnan()
    assert sums[1].isfinite() and gradients[3:].isfinite().all()


def test_labels_of_nan_do_no_harm():
    labels = torch.where(torch.rand(66, generator=torch.Generator().manual_seed(0)) < 0.5, math.nan, 1.0)
    offsets = torch.tensor([0, 66], dtype=torch.int32)
    for name in LOSSES:
        ops.listwise(name, torch.randn(66), labels, offsets, options=LOSSES[name].fill({}), backend="gpu")


@pytest.mark.parametrize("variant", LOSSES)
def test_strided_scores_and_labels(variant):
    scores, labels, offsets = make(variant, "distinct", (9, 8))
    name, options = options_of(variant)
    contiguous = ops.listwise(name, scores, labels, offsets, options=options, backend="gpu")
    scores, labels = torch.stack([scores] * 2, dim=1)[:, 0], torch.stack([labels] * 3, dim=1)[:, 1]
    strided = ops.listwise(name, scores, labels, offsets, options=options, backend="gpu")
    assert all(torch.equal(one, two) for one, two in zip(contiguous, strided, strict=True))


@pytest.mark.parametrize("variant", LOSSES)
def test_a_batch_of_nothing(variant):
    name, options = options_of(variant)
    for num_lists in (0, 1, 3):
        offsets = torch.zeros(num_lists + 1, dtype=torch.int32)
        with poisoned_memory():
            sums, terms = ops.listwise(name, torch.zeros(0), torch.zeros(0), offsets, options=options, backend="gpu")
        assert sums.tolist() == [0] * num_lists and terms.tolist() == [0] * num_lists


def test_bf16_scores_are_computed_in_float32():
    scores, labels, offsets = make("ranknet", "distinct", (9, 8))
    scores = scores.bfloat16()
    sums, _ = ops.listwise("ranknet", scores, labels, offsets, options={"temperature": 1.0}, backend="gpu")
    exact, _ = ops.listwise("ranknet", scores.float(), labels, offsets, options={"temperature": 1.0}, backend="gpu")
    assert sums.dtype == torch.bfloat16 and torch.equal(sums, exact.bfloat16())


class _Watch(TorchDispatchMode):
    """Fails where an operation would wait for the device or make a tensor that is not of size O(n)."""

    def __init__(self, most_elements: int):
        super().__init__()
        self.most_elements = most_elements

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2")
        result = function(*args, **(kwargs or {}))
        assert result.numel() <= self.most_elements, f"{function} makes {tuple(result.shape)}"
        return result


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_launcher_neither_waits_for_the_device_nor_stores_pairs(variant, monkeypatch):
    scores, labels, offsets = make(variant, "three tiers", (33, 0, 7))
    name, options = options_of(variant)
    monkeypatch.setattr(Table, "launch", lambda *arguments: None)
    for given in (labels, labels.double(), labels.long()):
        with _Watch(len(scores) + len(offsets)):
            gpu.listwise(name, scores, given, offsets, options)


def test_only_the_table_can_be_launched():
    offsets, ranks = torch.tensor([0, 2], dtype=torch.int32), [torch.zeros(2)]
    ranks += [torch.zeros(2, dtype=torch.int32) for _ in range(3)]
    with pytest.raises(KeyError, match="rank float16"):
        gpu.CONFIGURATIONS.launch("rank float16", 1, torch.zeros(2, dtype=torch.float16), offsets, *ranks, 1)
    with pytest.raises(TypeError, match=r"rank float32: values_ptr must be \*fp32, not \*fp64"):
        gpu.CONFIGURATIONS.launch("rank float32", 1, torch.zeros(2, dtype=torch.float64), offsets, *ranks, 1)
    gpu.CONFIGURATIONS.launch("rank float32", 1, torch.zeros(2), offsets, *ranks, 1)
    assert ranks[0].tolist() == [1.5, 1.5] and ranks[1].tolist() == [1, 2]


def test_the_interpreter_runs_only_where_it_is_asked_for():
    assert backend.refusals("listwise", "gpu", torch.zeros(1)) == []
    assert backend.choose("listwise", "gpu", torch.zeros(1)) is gpu
    assert backend.choose("listwise", "auto", torch.zeros(1)) is not gpu
    with pytest.warns(UserWarning, match="plain PyTorch"):
        assert backend.choose("listwise", "auto", torch.zeros(1).bfloat16()) is not gpu
