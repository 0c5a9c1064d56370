"""The listwise kernels against their reference, for every loss, instruction set, hard case and length of list."""

import math
import subprocess
import sys
import textwrap
from itertools import pairwise

import pytest
import torch
from accuracy import assert_accurate, poisoned_memory, skip_unless_runs
from listwise_cases import CASES, VARIANTS, check, make, options_of, sums_and_gradients
from torch import Tensor

from fastrank import _cpu, ops
from fastrank.kernels.listwise import reference
from fastrank.losses import LOSSES

PLAIN = tuple(LOSSES)
SIZES = (0, 1, 2, 7, 8, 9, 63, 66, 100, 1000)  # around the vector, the tile of rows and the block of rows


@pytest.fixture(autouse=True)
def runs():
    skip_unless_runs("listwise", "cpu", torch.zeros(1))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES)
def test_accuracy(isa, case, variant):
    for size in SIZES[:-1]:  # each alone, since the rule looks at the largest error
        check(variant, *make(variant, case, (size,), seed=size), "cpu")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", ["distinct", "three tiers", "right by far"])
def test_accuracy_of_a_thousand_documents(isa, case, variant):
    check(variant, *make(variant, case, (1000,)), "cpu")


@pytest.mark.parametrize("variant", PLAIN)
def test_accuracy_of_a_long_list(variant):
    check(variant, *make(variant, "three tiers" if variant == "adr_mse" else "distinct", (2500,)), "cpu")


@pytest.mark.parametrize("variant", VARIANTS)
def test_accuracy_of_a_ragged_batch(isa, variant):
    check(variant, *make(variant, "three tiers", (*SIZES, 0)), "cpu")


@pytest.mark.parametrize("variant", PLAIN)
@pytest.mark.parametrize("case", ["distinct", "three tiers"])
def test_a_list_is_the_same_bit_for_bit_alone_in_a_batch_and_on_any_number_of_threads(isa, case, variant):
    sizes = (7, 0, 5000, 1, 100, 2, 1300, 9)
    scores, labels, offsets = make(variant, case, sizes)
    upstream = torch.randn(len(sizes))
    threads = torch.get_num_threads()
    try:
        packed = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            with poisoned_memory():
                packed.append(sums_and_gradients(variant, scores, labels, offsets, upstream, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in packed[1:]:
        assert all(torch.equal(one, two) for one, two in zip(packed[0], other, strict=True))
    sums, terms, gradients = packed[0]
    for index, (begin, end) in enumerate(pairwise(offsets.tolist())):
        alone = sums_and_gradients(
            variant,
            scores[begin:end],
            labels[begin:end],
            torch.tensor([0, end - begin]).int(),
            upstream[index, None],
            "cpu",
        )
        assert torch.equal(alone[0], sums[index, None]) and torch.equal(alone[1], terms[index, None])
        assert torch.equal(alone[2], gradients[begin:end])


# The first of equally labelled or scored documents counts as the target or ranks first, which no permutation keeps.
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "adr_mse, none, first"])
def test_permuting_documents_permutes_gradients(isa, variant):
    first_counts = options_of(variant)[0] in ("lce", "contrastive_imitation")
    scores, labels, offsets = make(
        variant, "distinct" if first_counts else "three tiers", (20 if first_counts else 66,)
    )
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(3))
    name, options = options_of(variant)

    def run(backend: str, scores: Tensor) -> tuple[Tensor, Tensor]:
        if backend == "reference":
            return ops.listwise(name, scores, labels, offsets, options=options, backend=backend)
        return ops.listwise(name, scores[order], labels[order], offsets, options=options, backend=backend)

    assert_accurate(run, {"scores": scores}, backend="cpu")


# Of the losses, these depend on more than differences of scores.
ABSOLUTE = ("bce", "mse", "contrastive_imitation")


@pytest.mark.parametrize("variant", [name for name in VARIANTS if options_of(name)[0] not in ABSOLUTE])
def test_a_constant_added_to_the_scores_changes_nothing(isa, variant):
    scores, labels, offsets = make(variant, "three tiers", (100, 7))
    scores = (scores * 64).round() / 64  # so that the sum with 512 is exact, and so are all differences
    name, options = options_of(variant)

    def run(backend: str, scores: Tensor) -> tuple[Tensor, Tensor]:
        shift = 0 if backend == "reference" else 512
        return ops.listwise(name, scores + shift, labels, offsets, options=options, backend=backend)

    assert_accurate(run, {"scores": scores}, backend="cpu")


@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_passes_gradcheck(variant):
    scores, labels, offsets = make(variant, "three tiers", (7, 0, 1, 9, 2))
    if LOSSES[options_of(variant)[0]].labels != "probabilities":
        labels[-2:] = -1.0  # a list without a positive
    scores = scores.double().requires_grad_()
    name, options = options_of(variant)

    def run(scores: Tensor) -> Tensor:
        return ops.listwise(name, scores, labels, offsets, options=options, backend="reference")[0]

    assert torch.autograd.gradcheck(run, (scores,))


def _softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _by_hand() -> list[tuple[str, dict, list[float], list[float], float, int]]:
    adr = {"temperature": 2.0, "discount": "log2", "ties": "average"}
    # Scores 1, 3, 0 at temperature 2: smooth ranks by hand.
    smooth = [1 + _sigmoid(1) + _sigmoid(-0.5), 1 + _sigmoid(-1) + _sigmoid(-1.5), 1 + _sigmoid(0.5) + _sigmoid(1.5)]
    return [
        ("ranknet", {"temperature": 1.0}, [1, 3, 0], [2, 1, 0], _softplus(2) + _softplus(-1) + _softplus(-3), 3),
        ("ranknet", {"temperature": 2.0}, [1, 3, 0], [5, 0, 0], _softplus(1) + _softplus(-0.5), 2),
        ("ranknet", {"temperature": 1.0}, [0, 40], [1, 0], 40.0, 1),
        ("ranknet", {"temperature": 1.0}, [40, 0], [1, 0], math.exp(-40), 1),
        ("lce", {"temperature": 1.0}, [1, 3, 0], [0, 2, 2], math.log(1 + math.exp(-2) + math.exp(-3)), 1),
        ("lce", {"temperature": 2.0}, [1, 3, 0], [0, 0, 1], math.log(math.exp(0.5) + math.exp(1.5) + 1), 1),
        ("lce", {"temperature": 1.0}, [1, 3, 0], [0, -1, 0], 0.0, 0),
        ("lce", {"temperature": 1.0}, [0, 30], [0, 1], math.exp(-30), 1),
        (
            "adr_mse",
            adr,
            [1, 3, 0],
            [7, 4, 1],
            (smooth[0] - 1) ** 2 + (smooth[1] - 2) ** 2 / math.log2(3) + (smooth[2] - 3) ** 2 / 2,
            3,
        ),
        (
            "adr_mse",  # the first two share rank 1.5
            {**adr, "discount": "reciprocal"},
            [1, 3, 0],
            [4, 4, 1],
            (smooth[0] - 1.5) ** 2 / 1.5 + (smooth[1] - 1.5) ** 2 / 1.5 + (smooth[2] - 3) ** 2 / 3,
            3,
        ),
        (
            "adr_mse",  # the last two rank in input order
            {**adr, "discount": "none", "ties": "first"},
            [1, 3, 0],
            [4, 1, 1],
            (smooth[0] - 1) ** 2 + (smooth[1] - 2) ** 2 + (smooth[2] - 3) ** 2,
            3,
        ),
    ]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("loss", "options", "scores", "labels", "expected", "num_terms"), _by_hand())
def test_small_cases_worked_by_hand(backend, loss, options, scores, labels, expected, num_terms):
    dtype = torch.float64 if backend == "reference" else torch.float32
    scores, labels = torch.tensor(scores, dtype=dtype), torch.tensor(labels)
    offsets = torch.tensor([0, 3 if len(scores) == 3 else 2], dtype=torch.int32)
    sums, terms = ops.listwise(loss, scores, labels, offsets, options=options, backend=backend)
    assert sums.item() == pytest.approx(expected, rel=1e-12 if backend == "reference" else 3e-7, abs=0)
    assert terms.tolist() == [num_terms]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("loss", ["ranknet", "lce"])
def test_a_nearly_right_list_keeps_its_digits(loss, backend):
    labels, offsets = torch.tensor([0, 1]), torch.tensor([0, 2], dtype=torch.int32)
    for ahead in (5.0, 20.0, 40.0, 80.0):
        scores = torch.tensor([0.0, ahead], requires_grad=True)
        sums, _ = ops.listwise(loss, scores, labels, offsets, options={"temperature": 1.0}, backend=backend)
        (gradient,) = torch.autograd.grad(sums, scores, torch.tensor([0.37]))
        share = 1 / (1 + math.exp(ahead))
        assert sums.item() == pytest.approx(math.log1p(math.exp(-ahead)), rel=1e-6, abs=0)
        assert gradient.tolist() == pytest.approx([0.37 * share, -0.37 * share], rel=1e-6, abs=0)


def test_teacher_ranks():
    labels = torch.tensor([3.0, 9.0, 3.0, math.inf, 3.0, -math.inf])
    assert reference.ranks(labels, "average").tolist() == [4, 2, 4, 1, 4, 6]
    assert reference.ranks(labels, "first").tolist() == [3, 2, 4, 1, 5, 6]


@pytest.mark.parametrize("variant", PLAIN)
def test_terms_are_counted_alike_everywhere(isa, variant):
    name, options = options_of(variant)
    for case in CASES:
        scores, labels, offsets = make(variant, case, SIZES)
        expected = []
        for begin, end in pairwise(offsets.tolist()):
            part = labels[begin:end]
            counts = {
                "pairs": int((part[:, None] > part[None, :]).sum()),
                "documents": len(part),
                "lists with a document": int(end > begin),
                "lists with a label above 0": int((part > 0).any()),
            }
            expected.append(counts[LOSSES[name].term])
        assert ops.listwise(name, scores, labels, offsets, options=options, backend="cpu")[1].tolist() == expected
        assert ops.listwise_terms(name, labels, offsets).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_labels_are_told_apart_beyond_float32(dtype):
    labels = torch.tensor([2**40, 2**40 + 1, 2**40 + 1], dtype=dtype)
    offsets = torch.tensor([0, 3], dtype=torch.int32)
    sums, terms = ops.listwise("ranknet", torch.zeros(3), labels, offsets, options={"temperature": 1.0}, backend="cpu")
    assert terms.tolist() == [2]
    assert sums.item() == pytest.approx(2 * math.log(2))


def test_negative_zero_ties_with_zero(isa):
    labels, offsets = torch.tensor([0.0, -0.0, 0.0]), torch.tensor([0, 3], dtype=torch.int32)
    scores = torch.tensor([1.0, 2.0, 3.0])
    for name, options in map(options_of, PLAIN):
        cpu = ops.listwise(name, scores, labels, offsets, options=options, backend="cpu")
        expected = ops.listwise(name, scores, labels, offsets, options=options, backend="reference")
        assert torch.equal(cpu[1], expected[1])
        torch.testing.assert_close(cpu[0], expected[0])


def test_a_nan_flows_through_instead_of_vanishing(isa):
    offsets = torch.tensor([0, 3, 5], dtype=torch.int32)
    scores, labels = torch.tensor([0.0, math.nan, 1.0, 2.0, 3.0]), torch.tensor([1.0, 0, 2, 1, 0])
    for variant in PLAIN:
        upstream = torch.tensor([0.3, 0.7])
        sums, _, gradients = sums_and_gradients(variant, scores, labels.clamp(max=1), offsets, upstream, "cpu")
        assert sums[0].isnan() and gradients[1].isnan()
        assert sums[1].isfinite() and gradients[3:].isfinite().all()


def test_labels_of_nan_do_no_harm(isa):
    # Losses refuse them on a CPU; whoever calls the operation itself may get any number, but never a crash.
    labels = torch.where(torch.rand(500, generator=torch.Generator().manual_seed(0)) < 0.5, math.nan, 1.0)
    offsets = torch.tensor([0, 500], dtype=torch.int32)
    for name, options in map(options_of, PLAIN):
        sums, terms = ops.listwise(name, torch.randn(500), labels, offsets, options=options, backend="cpu")
        assert sums.shape == terms.shape == (1,)


def test_strided_scores_and_labels(isa):
    for variant in PLAIN:
        scores, labels, offsets = make(variant, "distinct", (9, 8))
        wide = torch.stack([scores, scores + 1], dim=1)[:, 0]
        assert not wide.is_contiguous()
        name, options = options_of(variant)
        one = sums_and_gradients(variant, scores, labels, offsets, torch.tensor([0.3, -0.7]), "cpu")
        strided = ops.listwise(
            name, wide, torch.stack([labels] * 3, dim=1)[:, 1], offsets, options=options, backend="cpu"
        )
        assert torch.equal(one[0], strided[0]) and torch.equal(one[1], strided[1])


def test_extension_takes_no_silent_copies():
    good = [torch.zeros(2), torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int32)]
    good += [torch.zeros(1), torch.zeros(1, dtype=torch.int64), torch.zeros(2)]
    arrays = [tensor.numpy() for tensor in good]
    _cpu.ranknet(*arrays, 1, temperature=1.0)
    for position in range(len(arrays)):
        wrong = list(arrays)
        wrong[position] = arrays[position].astype("float16")
        with pytest.raises(TypeError):
            _cpu.ranknet(*wrong, 1, temperature=1.0)
        wrong[position] = torch.zeros(4, dtype=good[position].dtype)[::2].numpy()
        with pytest.raises(TypeError):
            _cpu.ranknet(*wrong, 1, temperature=1.0)
    with pytest.raises(ValueError, match="log2, reciprocal, none"):
        _cpu.adr_mse(*arrays, 1, temperature=1.0, discount="log10")


def test_operation_names_what_does_not_fit():
    options = {"temperature": 1.0}
    scores, offsets = torch.zeros(3), torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"scores \(3,\), labels \(4,\)"):
        ops.listwise("ranknet", scores, torch.zeros(4), offsets, options=options)
    with pytest.raises(ValueError, match="number of documents, 3, not at 2"):
        ops.listwise("ranknet", scores, scores, torch.tensor([0, 2], dtype=torch.int32), options=options)
    with pytest.raises(ValueError, match="list 1 reaches from 4 to 3"):
        ops.listwise("ranknet", scores, scores, torch.tensor([0, 4, 3], dtype=torch.int32), options=options)
    with pytest.raises(ValueError, match=r"\(lists \+ 1,\)"):
        ops.listwise_terms("ranknet", scores, torch.zeros(0, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"torch\.int64"):
        ops.listwise("ranknet", torch.zeros(3, dtype=torch.int64), scores, offsets, options=options)
    for backend in ("cpu", "reference"):
        with pytest.raises(ValueError, match="no listwise loss 'isa'; known are adr_mse, approx_mrr, approx_ndcg, "):
            ops.listwise("isa", scores, scores, offsets, options={}, backend=backend)
    with pytest.raises(ValueError, match="no listwise loss 'isa'"):
        ops.listwise_terms("isa", scores, offsets)


def test_memory_grows_with_documents_not_with_pairs():
    script = """
        import resource
        import torch
        from fastrank.losses import LOSSES

        def peak_mebibytes():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

        def step(size):
            scores = torch.randn(size, requires_grad=True)
            offsets = torch.tensor([0, size])
            for loss in LOSSES.values():
                loss(scores, torch.arange(size) / size, offsets).backward()

        torch.manual_seed(0)
        step(100)
        before = peak_mebibytes()
        step(20_000)
        print(peak_mebibytes() - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 40  # 20,000 documents; a byte for each pair would be 381
