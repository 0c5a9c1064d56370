"""fastrank.losses: reductions, dtypes, degenerate batches, errors, and parity with what others compute."""

import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastrank.kernels.listwise import reference
from fastrank.losses import LOSSES, UnknownLoss, WeightedSum, count_terms, resolve_loss
from fastrank.ops import UNUSED_OPTIONS

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from peer_losses import lightning_ir_loss, sentence_transformers_loss

OPTIONS = {  # none of them a default
    "ranknet": {"temperature": 1.5},
    "weighted_ranknet": {"temperature": 0.7},
    "lambda": {"temperature": 0.7, "weighting": "lambdarank", "k": 2, "gain": "linear"},
    "margin_mse": {"temperature": 1.5, "margin": 0.5},
    "hinge": {"temperature": 1.5, "margin": 2.0, "squared": True},
    "lce": {"temperature": 0.5},
    "listnet": {"temperature": 2.0},
    "kl": {"temperature": 2.0},
    "listmle": {"temperature": 1.5},
    "p_listmle": {"temperature": 1.5},
    "adr_mse": {"temperature": 2.0, "discount": "reciprocal", "ties": "first"},
    "approx_ndcg": {"temperature": 0.5, "gain": "linear"},
    "approx_mrr": {"temperature": 0.5},
    "pearson": {},
    "bce": {"temperature": 2.0},
    "mse": {"temperature": 2.0},
    "contrastive_imitation": {"temperature": 0.5},
    "teacher_order": {"temperature": 1.5},
}
# Lists of 4, 0, 3, 1 and 5 documents. The third has one tier, the second and the third have no positive.
SIZES = (4, 0, 3, 1, 5)
LABELS = torch.tensor([2.0, 0, 1, 0, -1, -1, -1, 1, 3, 0, 3, 3, 1])
OFFSETS = torch.tensor([0, 4, 4, 7, 8, 13])
TERMS = {
    "pairs": [5, 0, 0, 0, 7],
    "lists with a label above 0": [1, 0, 0, 1, 1],
    "lists with a document": [1, 0, 1, 1, 1],
    "documents": [4, 0, 3, 1, 5],
}
NUM_TERMS = {name: TERMS[loss.term] for name, loss in LOSSES.items()}


def labels_of(name: str) -> Tensor:
    """The same order, from 0 to 1 where the loss wants probabilities."""
    return (LABELS + 1) / 4 if LOSSES[name].labels == "probabilities" else LABELS


def draw_scores(seed: int = 0, size: int = 13) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2


def list_sums(name: str, scores: Tensor, **options: object) -> Tensor:
    formula, options, labels = reference.LOSSES[name][0], LOSSES[name].fill(options), labels_of(name)
    parts = [
        formula(scores[begin:end], labels[begin:end], **options) if end > begin else scores[:0].sum()
        for begin, end in pairwise(OFFSETS.tolist())
    ]
    return torch.stack(parts)


def gradient_of(loss: Tensor, scores: Tensor) -> Tensor:
    return torch.autograd.grad(loss, scores, torch.full_like(loss, 0.37))[0]


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
@pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", LOSSES)
def test_reductions(name, offsets_dtype, backend):
    scores = draw_scores().requires_grad_()
    exact_scores = draw_scores().double().requires_grad_()
    sums = list_sums(name, exact_scores, **OPTIONS[name])
    terms = torch.tensor(NUM_TERMS[name])
    has_terms = terms > 0
    expected = {
        "mean": sums.sum() / terms.sum(),
        "list_mean": (sums[has_terms] / terms[has_terms]).mean(),
        "none": sums,
        "sum": sums.sum(),
    }
    for reduction, value in expected.items():
        loss = LOSSES[name](
            scores, labels_of(name), OFFSETS.to(offsets_dtype), reduction=reduction, backend=backend, **OPTIONS[name]
        )
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), value, rtol=1e-6, atol=1e-7)
        exact_gradient = torch.autograd.grad(value, exact_scores, torch.full_like(value, 0.37), retain_graph=True)[0]
        torch.testing.assert_close(gradient_of(loss, scores).double(), exact_gradient, rtol=1e-5, atol=1e-7)
    mean = LOSSES[name](scores, labels_of(name), OFFSETS, **OPTIONS[name])
    assert mean == LOSSES[name](scores, labels_of(name), OFFSETS, reduction="mean", **OPTIONS[name])


def test_default_options():
    defaults = {
        "lambda": {"temperature": 1, "weighting": "ndcg2pp", "k": None, "gain": "exponential"},
        "margin_mse": {"temperature": 1, "margin": None},
        "hinge": {"temperature": 1, "margin": 1, "squared": False},
        "adr_mse": {"temperature": 1, "discount": "log2", "ties": "average"},
        "approx_ndcg": {"temperature": 1, "gain": "exponential"},
        "pearson": {},
    }
    scores = draw_scores()
    for name, loss in LOSSES.items():
        default = loss(scores, labels_of(name), OFFSETS)
        assert loss.fill({}) == defaults.get(name, {"temperature": 1})
        assert default == loss(scores, labels_of(name), OFFSETS, **defaults.get(name, {"temperature": 1}))
        for option, value in OPTIONS[name].items():  # and each option matters
            if (name, option) == ("lambda", "gain"):  # grades below 3 make it a matter of weights alone
                continue
            assert loss(scores, labels_of(name), OFFSETS, **{option: value}) != default, (name, option)


@pytest.mark.parametrize("name", LOSSES)
def test_terms_are_what_the_mean_divides_by(name):
    labels = labels_of(name)
    assert count_terms(name, labels, OFFSETS, **OPTIONS[name]).tolist() == NUM_TERMS[name]
    scores = draw_scores().requires_grad_()
    whole = LOSSES[name](scores, labels, OFFSETS)
    # The same step in two parts, as a trainer takes it where memory is short.
    num_terms = count_terms(name, labels, OFFSETS.int()).sum()
    parts = LOSSES[name](scores[:4], labels[:4], OFFSETS[:2], reduction="sum") / num_terms
    parts = parts + LOSSES[name](scores[4:], labels[4:], OFFSETS[1:] - 4, reduction="sum") / num_terms
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(gradient_of(parts, scores), gradient_of(whole, scores))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32(name, dtype):
    half = draw_scores().to(dtype).requires_grad_()
    full = half.detach().float().requires_grad_()
    loss, expected = (LOSSES[name](scores, labels_of(name), OFFSETS, **OPTIONS[name]) for scores in (half, full))
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    gradient = gradient_of(loss, half)
    assert gradient.dtype == dtype
    assert torch.equal(gradient, gradient_of(expected, full).to(dtype))


@pytest.mark.filterwarnings("ignore:listwise runs in plain PyTorch")
@pytest.mark.parametrize("name", LOSSES)
def test_float64_stays_float64(name):
    scores = draw_scores().double().requires_grad_()
    labels = labels_of(name)
    loss = LOSSES[name](scores, labels, OFFSETS, **OPTIONS[name])
    expected = list_sums(name, scores, **OPTIONS[name]).sum() / sum(NUM_TERMS[name])
    assert loss.dtype == torch.float64 and loss.item() == pytest.approx(expected.item(), rel=1e-14)
    torch.testing.assert_close(gradient_of(loss, scores), gradient_of(expected, scores), rtol=1e-13, atol=1e-15)
    one_list = torch.tensor([0, len(scores)])
    assert torch.autograd.gradcheck(lambda scores: LOSSES[name](scores, labels, one_list), (scores,))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("name", LOSSES)
def test_labels_of_any_dtype(name, dtype):
    labels = labels_of(name).round().clamp(min=0)
    labels = labels.bool() if dtype == torch.bool else labels
    expected = LOSSES[name](draw_scores(), labels.float(), OFFSETS)
    assert torch.equal(LOSSES[name](draw_scores(), labels.to(dtype), OFFSETS), expected)


NO_PAIRS = [(1,), (3,), (0, 2, 1, 0)]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("reduction", ["mean", "list_mean", "none", "sum"])
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        *((name, sizes) for name in LOSSES for sizes in ((), (0,), (0, 0, 0))),
        *(
            (name, sizes)
            for name in LOSSES
            if LOSSES[name].term in ("pairs", "lists with a label above 0")
            for sizes in NO_PAIRS
        ),
    ],
    ids=str,
)
def test_a_batch_without_terms_is_zero_with_zero_gradient(name, sizes, reduction, backend):
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    scores = draw_scores(size=sum(sizes)).requires_grad_()
    labels = torch.zeros(sum(sizes))  # one tier, no positive
    loss = LOSSES[name](scores, labels, offsets, reduction=reduction, backend=backend)
    assert torch.equal(loss, torch.zeros(len(sizes) if reduction == "none" else ()))
    assert torch.equal(gradient_of(loss, scores), torch.zeros(sum(sizes)))
    assert count_terms(name, labels, offsets).tolist() == [0] * len(sizes)


# Losses of a list that tells nothing about order: what they are, and whether their gradient is 0.
AT_REST = {
    "pearson": 1.0,
    "listmle": 0.0,
    "p_listmle": 0.0,
    "teacher_order": 0.0,
    "approx_ndcg": 1.0,
    "approx_mrr": 1.0,
}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(("name", "value"), AT_REST.items())
def test_one_tier_without_a_positive_is_at_rest(name, value, backend):
    scores = draw_scores(size=6).requires_grad_()
    loss = LOSSES[name](scores, torch.zeros(6), torch.tensor([0, 1, 6]), backend=backend, reduction="none")
    assert loss.tolist() == [value] * 2 and not gradient_of(loss, scores).any()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_single_document(backend):
    scores, offsets = torch.tensor([3.0], requires_grad=True), torch.tensor([0, 1])
    # Rank 1 of 1, and the only document is the target; pearson has nothing to correlate, bce and mse are of points.
    expected = {"pearson": 1.0, "bce": math.log1p(math.exp(-3)), "mse": 4.0}
    slopes = {"bce": -1 / (1 + math.exp(3)), "mse": 4.0}
    for name in LOSSES:
        loss = LOSSES[name](scores, torch.tensor([1.0]), offsets, backend=backend)
        assert loss.item() == pytest.approx(expected.get(name, 0), rel=1e-6)
        assert gradient_of(loss, scores).item() == pytest.approx(0.37 * slopes.get(name, 0), rel=1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_all_tied_adr_mse_is_at_rest_where_the_scores_tie_too(backend):
    scores = torch.full((5,), 7.0, requires_grad=True)
    loss = LOSSES["adr_mse"](scores, torch.ones(5), torch.tensor([0, 5]), backend=backend)
    assert loss.abs() < 1e-12 and gradient_of(loss, scores).abs().max() < 1e-6
    assert LOSSES["adr_mse"](scores, torch.ones(5), torch.tensor([0, 5]), backend=backend, ties="first") > 0.5


ORDER_ALONE = {"margin_mse": {"margin": 1.0}, "lambda": {"weighting": "none"}}  # options with which no value counts


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", LOSSES)
def test_infinite_labels_only_order(name, backend):
    scores, offsets = draw_scores(size=5), torch.tensor([0, 5])
    infinite = torch.tensor([math.inf, -math.inf, 1.0, math.inf, 0.0])
    finite = torch.tensor([9.0, -9, 1, 9, 0])
    if LOSSES[name].labels != "ordered":
        with pytest.raises(ValueError, match=r"labels\[0\] is inf \(document 0 of list 0\): .*labels must be"):
            LOSSES[name](scores, infinite, offsets, backend=backend)
        if name not in ORDER_ALONE:
            return
    options = ORDER_ALONE.get(name, {})
    loss = LOSSES[name](scores, infinite, offsets, backend=backend, **options)
    assert loss.isfinite() and torch.equal(loss, LOSSES[name](scores, finite, offsets, backend=backend, **options))


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].labels == "probabilities"])
@pytest.mark.parametrize("bad", [-0.25, 1.125, 3.0])
def test_probabilities_lie_between_0_and_1(name, bad):
    labels = labels_of(name).clone()
    labels[4] = bad
    with pytest.raises(ValueError, match=rf"labels\[4\] is {bad}.* probabilities, from 0 to 1"):
        LOSSES[name](draw_scores(), labels.double(), OFFSETS)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", LOSSES)
def test_far_scores_neither_overflow_nor_saturate(name, backend):
    labels, offsets = torch.tensor([2.0, 1, 0]), torch.tensor([0, 3])
    if LOSSES[name].labels == "probabilities":
        labels = labels / 2
    squares = name in ("mse", "margin_mse")  # 1e60 is no float32
    for scores in ([1e4, 0, -1e4], [-1e4, 0, 1e4], [1e4, 1e4, -1e4], *([] if squares else [[-1e30, 1e30, 0]])):
        scores = torch.tensor(scores, requires_grad=True)
        loss = LOSSES[name](scores, labels, offsets, backend=backend)
        assert loss.isfinite() and gradient_of(loss, scores).isfinite().all()
    wrong_way = torch.tensor([-1e4, 0, 1e4], requires_grad=True)
    full_force = {"ranknet": [-2.0, 0, 2], "hinge": [-2.0, 0, 2], "lce": [-1.0, 0, 1], "listmle": [-1.0, -1, 2]}
    if name in full_force:  # a hopeless list still pulls
        gradient = gradient_of(LOSSES[name](wrong_way, labels, offsets, reduction="sum"), wrong_way) / 0.37
        assert gradient.tolist() == full_force[name]


def test_unknown_names_point_to_the_nearest():
    with pytest.raises(
        UnknownLoss, match=r"no loss 'rank_net' \(did you mean 'ranknet'\?\); known are adr_mse, approx_mrr"
    ) as error:
        LOSSES["rank_net"]
    assert isinstance(error.value, KeyError) and isinstance(error.value, ValueError)
    assert not str(error.value).startswith(("'", '"'))  # a KeyError would show its message in quotes
    with pytest.raises(ValueError, match="did you mean 'adr_mse'"):
        count_terms("adrmse", LABELS, OFFSETS)
    assert LOSSES.get("rank_net") is None and "rank_net" not in LOSSES
    with pytest.raises(ValueError, match=r"ranknet has no option 'temprature' \(did you mean 'temperature'\?\)"):
        LOSSES["ranknet"](draw_scores(), LABELS, OFFSETS, temprature=2)
    with pytest.raises(ValueError, match=r"lce has no option 'discount'.*it knows temperature"):
        count_terms("lce", LABELS, OFFSETS, discount="log2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature=0: must be a finite number above 1e-30"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": "2"}, "temperature='2'"),
        ({"temperature": True}, "temperature=True"),
        ({"temperature": 1e-50}, "temperature=1e-50"),
        ({"discount": "log10"}, "discount='log10': choose one of log2, reciprocal, none"),
        ({"ties": None}, "ties=None: choose one of average, first"),
        ({"reduction": "avg"}, "reduction='avg': choose one of mean, list_mean, none, sum"),
        ({"backend": "cuda"}, "no backend 'cuda'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        LOSSES["adr_mse"](draw_scores(), LABELS, OFFSETS, **options)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", LOSSES)
def test_bad_values_are_named_with_their_place(name, bad, backend):
    scores = draw_scores()
    scores[9] = bad
    message = rf"scores\[9\] is {bad} \(document 1 of list 4\): scores must be finite numbers\."
    with pytest.raises(ValueError, match=message):
        LOSSES[name](scores, labels_of(name), OFFSETS, backend=backend)
    with pytest.raises(ValueError, match=message):
        LOSSES[name](scores.half(), labels_of(name), OFFSETS, backend=backend, check=True)
    labels = labels_of(name).clone()
    labels[4] = math.nan
    labels[0] = math.inf if LOSSES[name].labels == "ordered" else 0
    with pytest.raises(ValueError, match=r"labels\[4\] is nan \(document 0 of list 2\): .*labels must be"):
        LOSSES[name](draw_scores(), labels, OFFSETS, backend=backend)


def test_without_the_check_a_nan_flows_into_the_loss():
    scores = draw_scores()
    scores[9] = math.nan
    for name in LOSSES:
        assert LOSSES[name](scores, labels_of(name), OFFSETS, check=False).isnan()


def test_large_finite_values_pass_the_check():
    scores, labels = torch.full((4,), 3e38), torch.tensor([3e38, 3e38, 0, 0])
    assert LOSSES["ranknet"](scores, labels, torch.tensor([0, 4])) == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("scores", "labels", "offsets", "message"),
    [
        (draw_scores(), LABELS[:12], OFFSETS, r"scores \(13,\), labels \(12,\), list_offsets \(6,\)"),
        (draw_scores()[:, None], LABELS[:, None], OFFSETS, r"scores \(13, 1\)"),
        (draw_scores(), LABELS, OFFSETS[:-1], r"list_offsets must end at the number of documents, 13, not at 8"),
        (draw_scores(), LABELS, OFFSETS + 1, r"list_offsets must begin at 0, not at 1"),
        (draw_scores(), LABELS, torch.tensor([0, 9, 5, 13]), r"must not decrease, but list 1 reaches from 9 to 5"),
        (draw_scores(), LABELS, OFFSETS[None], r"list_offsets must have the shape \(lists \+ 1,\), not \(1, 6\)"),
        (draw_scores(), LABELS, torch.empty(0, dtype=torch.int64), r"\(lists \+ 1,\), not \(0,\)"),
        (draw_scores(), LABELS, OFFSETS.float(), r"list_offsets must be torch.int32.*not torch.float32"),
        (draw_scores().int(), LABELS, OFFSETS, r"scores must be floating point numbers, not torch.int32"),
        (draw_scores(), LABELS.to("meta"), OFFSETS, r"labels must be on cpu, where the scores are, not on meta"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(scores, labels, offsets, message):
    with pytest.raises(ValueError, match=message) as error:
        LOSSES["ranknet"](scores, labels, offsets)
    assert "\n" not in str(error.value)


def test_resolve_loss(tmp_path, monkeypatch):
    assert resolve_loss("lce") is LOSSES["lce"]
    (tmp_path / "my_losses.py").write_text(
        "import torch\n"
        "def pointwise(scores, labels, list_offsets, *, weight=1.0):\n"
        "    return weight * (scores - labels).square().mean()\n"
        "CONSTANT = 3\n"
    )
    (tmp_path / "broken_losses.py").write_text("import no_such_module_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    pointwise = resolve_loss("my_losses.pointwise")
    assert pointwise(torch.zeros(2), torch.ones(2), torch.tensor([0, 2]), weight=2.0) == 2
    assert resolve_loss(pointwise) is pointwise
    with pytest.raises(ValueError, match="did you mean 'adr_mse'"):
        resolve_loss("adr-mse")
    with pytest.raises(ValueError, match="the module 'my_losses' has no function 'pointwize'"):
        resolve_loss("my_losses.pointwize")
    with pytest.raises(ValueError, match="no function 'CONSTANT'"):
        resolve_loss("my_losses.CONSTANT")
    with pytest.raises(ValueError, match="finds no module 'my_lossez'"):
        resolve_loss("my_lossez.pointwise")
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):  # the user's own mistake keeps its trace
        resolve_loss("broken_losses.anything")
    sys.modules.pop("my_losses", None)


def assert_parity(ours: Tensor, theirs: Tensor, scores: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(gradient_of(ours, scores), gradient_of(theirs, scores), rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("size_seed", range(3))
@pytest.mark.parametrize(
    ("name", "options", "kind", "their_options", "factor"),
    [
        ("ranknet", {}, "RankNetLoss", {}, math.log(2)),  # theirs is in bits; both pool the pairs of the batch
        ("adr_mse", {"temperature": 0.25}, "ADRMSELoss", {"alpha": 4.0}, 1),  # alpha is the inverse of the temperature
        ("listnet", {}, "ListNetLoss", {}, 1),
        ("listmle", {}, "ListMLELoss", {"respect_input_order": False}, 1),  # theirs leaves ties to sort: distinct
        ("p_listmle", {}, "PListMLELoss", {"respect_input_order": False}, 1),
        ("lambda", {}, "LambdaLoss", {"reduction_log": "natural"}, 1),
        ("lambda", {}, "LambdaLoss", {}, math.log(2)),
        (
            "lambda",
            {"weighting": "none", "temperature": 0.5},
            "LambdaLoss",
            {"weighting_scheme": None, "sigma": 2.0},
            math.log(2),
        ),
        ("lambda", {"weighting": "ndcg2"}, "LambdaLoss", {"weighting_scheme": "NDCGLoss2Scheme"}, math.log(2)),
        ("lambda", {"weighting": "lambdarank"}, "LambdaLoss", {"weighting_scheme": "LambdaRankScheme"}, math.log(2)),
        ("lambda", {"k": 3}, "LambdaLoss", {"k": 3}, math.log(2)),
    ],
    ids=str,
)
def test_parity_with_sentence_transformers(size_seed, name, options, kind, their_options, factor):
    random = torch.Generator().manual_seed(size_seed)
    sizes = tuple(torch.randint(1, 30, (6,), generator=random).tolist())
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    scores = draw_scores(size_seed, sum(sizes)).requires_grad_()
    labels = torch.randint(4, (sum(sizes),), generator=random).float()
    if "listmle" in name:
        labels = torch.randperm(sum(sizes), generator=random).float()
    theirs = sentence_transformers_loss(kind, scores, labels, sizes, **their_options) * factor
    ours = LOSSES[name](scores, labels, offsets, **options)
    if "k" in options:  # they divide by the pairs within k, we by all pairs with label_i > label_j
        within = 0
        for begin, end in pairwise(offsets.tolist()):
            top = (-scores[begin:end]).argsort().argsort() < options["k"]
            part = labels[begin:end]
            within += int(((part[:, None] > part[None, :]) & (top[:, None] | top[None, :])).sum())
        ours = ours * count_terms(name, labels, offsets, **options).sum() / within
    assert_parity(ours, theirs, scores)


@pytest.mark.parametrize(
    ("name", "options", "kind", "their_options"),
    [
        ("ranknet", {"temperature": 0.5}, "RankNet", {"temperature": 2.0}),  # theirs multiplies
        ("margin_mse", {"margin": 1.0}, "ConstantMarginMSE", {}),
        ("margin_mse", {}, "SupervisedMarginMSE", {}),
        ("kl", {}, "KLDivergence", {}),
        ("pearson", {}, "PearsonCorrelation", {}),
        ("lce", {}, "InfoNCE", {}),
        ("approx_ndcg", {"temperature": 0.5}, "ApproxNDCG", {"temperature": 0.5}),
        ("approx_ndcg", {"gain": "linear"}, "ApproxNDCG", {"scale_gains": False}),
        ("approx_mrr", {"temperature": 0.5}, "ApproxMRR", {"temperature": 0.5}),
        # Theirs ranks tied labels as argsort happens to: distinct labels.
        ("adr_mse", {}, "ApproxRankMSE", {"discount": "log2"}),
        (
            "adr_mse",
            {"discount": "reciprocal", "temperature": 0.5},
            "ApproxRankMSE",
            {"discount": "reciprocal", "temperature": 0.5},
        ),
        ("adr_mse", {"discount": "none"}, "ApproxRankMSE", {}),
    ],
    ids=str,
)
def test_parity_with_lightning_ir(name, options, kind, their_options):
    random = torch.Generator().manual_seed(1)
    scores = draw_scores(1, 60).requires_grad_()
    labels = torch.stack([torch.randperm(15, generator=random) for _ in range(4)]).float()
    if name != "adr_mse":
        labels = (labels / 4).round()
    labels = labels.flatten()
    theirs = lightning_ir_loss(kind, scores, labels, [15] * 4, **their_options)
    assert_parity(LOSSES[name](scores, labels, torch.arange(5) * 15, **options), theirs, scores)


def test_pointwise_losses_are_torch_s():
    scores, labels = draw_scores(size=24).requires_grad_(), torch.rand(24, generator=torch.Generator().manual_seed(0))
    for name, theirs in (
        ("bce", torch.nn.functional.binary_cross_entropy_with_logits),
        ("mse", torch.nn.functional.mse_loss),
    ):
        assert_parity(LOSSES[name](scores, labels, torch.tensor([0, 10, 24])), theirs(scores, labels), scores)


def test_lce_is_torch_cross_entropy():
    scores = draw_scores(size=24).requires_grad_()
    labels = torch.zeros(4, 6)
    labels[torch.arange(4), torch.tensor([0, 5, 2, 2])] = 1
    ours = LOSSES["lce"](scores, labels.flatten(), torch.arange(5) * 6)
    theirs = torch.nn.functional.cross_entropy(scores.view(4, 6), labels.argmax(1))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient_of(ours, scores), gradient_of(theirs, scores))


def test_options_of_every_kind_are_checked():
    for name, options, message in (
        ("lambda", {"k": 0}, "k=0: must be a whole number above 0 or None"),
        ("lambda", {"k": 2.0}, "k=2.0"),
        ("lambda", {"weighting": "ndcg3"}, "weighting='ndcg3': choose one of ndcg2pp"),
        ("approx_ndcg", {"gain": "square"}, "gain='square': choose one of exponential, linear"),
        ("hinge", {"squared": 1}, "squared=1: must be True or False"),
        ("hinge", {"margin": None}, "margin=None: must be a finite number"),
        ("margin_mse", {"margin": math.inf}, "margin=inf: must be a finite number or None"),
        ("pearson", {"temperature": 1.0}, "pearson has no option 'temperature'"),
    ):
        with pytest.raises(ValueError, match=message):
            LOSSES[name](draw_scores(), labels_of(name), OFFSETS, **options)


def test_weighted_sum():
    scores = draw_scores().requires_grad_()
    loss = WeightedSum({"ranknet": 1, "mse": 0.5}, {"mse": {"temperature": 2.0}})
    expected = LOSSES["ranknet"](scores, LABELS, OFFSETS) + 0.5 * LOSSES["mse"](scores, LABELS, OFFSETS, temperature=2)
    assert_parity(loss(scores, LABELS, OFFSETS), expected, scores)
    assert resolve_loss({"ranknet": 1, "mse": 0.5})(scores, LABELS, OFFSETS, reduction="none").shape == (5,)
    for weights, options, message in (
        ({}, {}, "needs a loss"),
        ({"rank_net": 1}, {}, "did you mean 'ranknet'"),
        ({"ranknet": -1}, {}, "the weight of ranknet=-1"),
        ({"ranknet": 1}, {"ranknet": {"k": 1}}, "ranknet has no option 'k'"),
        ({"ranknet": 1}, {"mse": {}}, "options for mse, which the sum does not contain"),
    ):
        with pytest.raises(ValueError, match=message):
            WeightedSum(weights, options)


@pytest.mark.parametrize("name", ["ranknet", "lambda", "kl", "approx_mrr"])  # all take the same way
def test_a_compiled_step_stays_one_graph(name):
    labels, weight = labels_of(name), torch.randn(4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    inputs = torch.randn(13, 4, generator=torch.Generator().manual_seed(1))

    def step(weight: Tensor, offsets: Tensor) -> Tensor:
        return LOSSES[name](torch.tanh(inputs @ weight), labels, offsets, **OPTIONS[name]) * 2

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for offsets in (OFFSETS, torch.tensor([0, 2, 13])):
        assert_parity(compiled(weight, offsets), step(weight, offsets), weight)
    with pytest.raises(ValueError, match="must end at the number of documents"):
        compiled(weight, torch.tensor([0, 2, 12]))


@pytest.mark.parametrize("name", ["ranknet", "lambda", "kl"])
def test_the_operator_passes_opcheck(name):
    options = UNUSED_OPTIONS | LOSSES[name].fill(OPTIONS[name])
    for scores, labels in ((draw_scores(), LABELS), (draw_scores(size=26)[::2], LABELS.double())):
        arguments = (scores.requires_grad_(), labels, OFFSETS.int(), name, "auto", "finite")
        torch.library.opcheck(torch.ops.fastrank.listwise.default, arguments, options)


@pytest.mark.parametrize("name", LOSSES)
def test_tiers_have_no_order_inside(name):
    """A partial teacher ranking as tiers: ranked above missing above bottom. Which of two documents of a tier has which
    score changes nothing; where a pair is needed, a tier alone has none."""
    ranked, missing, bottom = [4.0, 3.0, 2.0], [1.0] * 3, [0.0] * 2
    labels = torch.tensor(ranked + missing + bottom)
    if LOSSES[name].labels == "probabilities":
        labels = labels / 4
    offsets = torch.tensor([0, 8])
    scores = draw_scores(size=8).requires_grad_()
    swapped = scores.detach()[[0, 1, 2, 5, 3, 4, 7, 6]].requires_grad_()
    one, other = (LOSSES[name](values, labels, offsets) for values in (scores, swapped))
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(gradient_of(one, scores)[[0, 1, 2, 5, 3, 4, 7, 6]], gradient_of(other, swapped))
    if LOSSES[name].term == "pairs" or "listmle" in name or name == "teacher_order":
        tier = draw_scores(size=3).requires_grad_()
        loss = LOSSES[name](tier, labels[3:6], torch.tensor([0, 3]))
        assert loss == 0 and not gradient_of(loss, tier).any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", LOSSES)
def test_tensors_of_inference_mode(name, backend):
    """What a teacher's forward pass returns there: as labels and offsets of a training step, and to be measured."""
    scores, labels, offsets = torch.randn(5), torch.tensor([0.9, 0.1, 0.5, 0.2, 0.7]), torch.tensor([0, 2, 5])
    expected = LOSSES[name](scores, labels, offsets, backend=backend)
    with torch.inference_mode():
        made = scores * 1, labels * 1, offsets * 1
        assert torch.equal(LOSSES[name](*made, backend=backend), expected)
    with torch.no_grad():
        assert torch.equal(LOSSES[name](*made, backend=backend), expected)
    for reduction in ("mean", "list_mean", "none", "sum"):
        leaf = scores.clone().requires_grad_()
        LOSSES[name](leaf, *made[1:], reduction=reduction, backend=backend).sum().backward()
        other = scores.clone().requires_grad_()
        LOSSES[name](other, labels, offsets, reduction=reduction, backend=backend).sum().backward()
        assert torch.equal(leaf.grad, other.grad)


def test_offsets_may_be_written_over_before_the_backward_pass():
    for reduction in ("mean", "none"):
        scores, offsets = torch.randn(5, requires_grad=True), torch.tensor([0, 2, 5])
        loss = LOSSES["mse"](scores, torch.ones(5), offsets, reduction=reduction)
        offsets.zero_()
        loss.sum().backward()
        factor = 5 if reduction == "mean" else 1
        torch.testing.assert_close(scores.grad, 2 * (scores.detach() - 1) / factor)


def test_what_is_no_tensor_or_lies_elsewhere():
    scores, labels, offsets = torch.zeros(5), torch.ones(5), torch.tensor([0, 2, 5])
    with pytest.raises(TypeError, match="list_offsets must be a torch tensor, not list"):
        LOSSES["ranknet"](scores, labels, [0, 2, 5])
    with pytest.raises(TypeError, match="labels must be a torch tensor, not ndarray"):
        LOSSES["ranknet"](scores, labels.numpy(), offsets)
    with pytest.raises(ValueError, match="list_offsets must be on cpu, where the scores are, not on meta"):
        LOSSES["ranknet"](scores, labels, offsets.to("meta"))
    for options in ({"temperature": 10**400}, {"k": 2**70}):
        with pytest.raises(ValueError, match="must be a"):
            LOSSES["lambda"](scores, labels, offsets, **options)
    assert not LOSSES["mse"](scores, labels.requires_grad_(), offsets).requires_grad
