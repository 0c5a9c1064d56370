"""fastrank.losses: reductions, dtypes, degenerate batches, errors, and parity with what others compute."""

import math
import sys
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastrank.kernels.listwise import reference
from fastrank.losses import LOSSES, UnknownLoss, count_terms, resolve_loss

OPTIONS = {
    "ranknet": {"temperature": 1.5},
    "lce": {"temperature": 0.5},
    "adr_mse": {"temperature": 2.0, "discount": "reciprocal", "ties": "first"},
}
# Lists of 4, 0, 3, 1 and 5 documents. The third has one tier, the second and the third have no positive.
SIZES = (4, 0, 3, 1, 5)
LABELS = torch.tensor([2.0, 0, 1, 0, -1, -1, -1, 1, 3, 0, 3, 3, 1])
OFFSETS = torch.tensor([0, 4, 4, 7, 8, 13])
NUM_TERMS = {"ranknet": [5, 0, 0, 0, 7], "lce": [1, 0, 0, 1, 1], "adr_mse": [4, 0, 3, 1, 5]}


def draw_scores(seed: int = 0, size: int = 13) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2


def list_sums(name: str, scores: Tensor, **options: object) -> Tensor:
    formula = reference.LOSSES[name][0]
    parts = [formula(scores[begin:end], LABELS[begin:end], **options) for begin, end in pairwise(OFFSETS.tolist())]
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
            scores, LABELS, OFFSETS.to(offsets_dtype), reduction=reduction, backend=backend, **OPTIONS[name]
        )
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), value, rtol=1e-6, atol=1e-7)
        exact_gradient = torch.autograd.grad(value, exact_scores, torch.full_like(value, 0.37), retain_graph=True)[0]
        torch.testing.assert_close(gradient_of(loss, scores).double(), exact_gradient, rtol=1e-5, atol=1e-7)
    mean = LOSSES[name](scores, LABELS, OFFSETS, **OPTIONS[name])
    assert mean == LOSSES[name](scores, LABELS, OFFSETS, reduction="mean", **OPTIONS[name])


def test_default_options():
    scores = draw_scores()
    defaults = {
        "ranknet": {"temperature": 1.0},
        "lce": {"temperature": 1},
        "adr_mse": {"temperature": 1.0, "discount": "log2", "ties": "average"},
    }
    assert set(defaults) == set(LOSSES)
    for name, options in defaults.items():
        assert LOSSES[name](scores, LABELS, OFFSETS) == LOSSES[name](scores, LABELS, OFFSETS, **options)
        assert LOSSES[name](scores, LABELS, OFFSETS, temperature=3) != LOSSES[name](scores, LABELS, OFFSETS)


@pytest.mark.parametrize("name", LOSSES)
def test_terms_are_what_the_mean_divides_by(name):
    assert count_terms(name, LABELS, OFFSETS, **OPTIONS[name]).tolist() == NUM_TERMS[name]
    scores = draw_scores().requires_grad_()
    whole = LOSSES[name](scores, LABELS, OFFSETS)
    # The same step in two parts, as a trainer takes it where memory is short.
    num_terms = count_terms(name, LABELS, OFFSETS.int()).sum()
    parts = LOSSES[name](scores[:4], LABELS[:4], OFFSETS[:2], reduction="sum") / num_terms
    parts = parts + LOSSES[name](scores[4:], LABELS[4:], OFFSETS[1:] - 4, reduction="sum") / num_terms
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(gradient_of(parts, scores), gradient_of(whole, scores))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32(name, dtype):
    half = draw_scores().to(dtype).requires_grad_()
    full = half.detach().float().requires_grad_()
    loss, expected = (LOSSES[name](scores, LABELS, OFFSETS, **OPTIONS[name]) for scores in (half, full))
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    gradient = gradient_of(loss, half)
    assert gradient.dtype == dtype
    assert torch.equal(gradient, gradient_of(expected, full).to(dtype))


@pytest.mark.filterwarnings("ignore:listwise runs in plain PyTorch")
@pytest.mark.parametrize("name", LOSSES)
def test_float64_stays_float64(name):
    scores = draw_scores().double().requires_grad_()
    loss = LOSSES[name](scores, LABELS, OFFSETS, **OPTIONS[name])
    expected = list_sums(name, scores, **OPTIONS[name]).sum() / sum(NUM_TERMS[name])
    assert loss.dtype == torch.float64 and loss.item() == pytest.approx(expected.item(), rel=1e-14)
    torch.testing.assert_close(gradient_of(loss, scores), gradient_of(expected, scores), rtol=1e-13, atol=1e-15)
    one_list = torch.tensor([0, len(scores)])
    assert torch.autograd.gradcheck(lambda scores: LOSSES[name](scores, LABELS, one_list), (scores,))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("name", LOSSES)
def test_labels_of_any_dtype(name, dtype):
    labels = LABELS.clamp(min=0)
    labels = labels.bool() if dtype == torch.bool else labels
    expected = LOSSES[name](draw_scores(), labels.float(), OFFSETS)
    assert torch.equal(LOSSES[name](draw_scores(), labels.to(dtype), OFFSETS), expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("reduction", ["mean", "list_mean", "none", "sum"])
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        *((name, sizes) for name in LOSSES for sizes in ((), (0,), (0, 0, 0))),
        *((name, sizes) for name in ("ranknet", "lce") for sizes in ((1,), (3,), (0, 2, 1, 0))),
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


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_single_document(backend):
    scores, offsets = torch.tensor([3.0], requires_grad=True), torch.tensor([0, 1])
    for name in LOSSES:  # rank 1 of 1; the only document is the target
        loss = LOSSES[name](scores, torch.tensor([1.0]), offsets, backend=backend)
        assert loss == 0 and gradient_of(loss, scores) == 0


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_all_tied_adr_mse_is_at_rest_where_the_scores_tie_too(backend):
    scores = torch.full((5,), 7.0, requires_grad=True)
    loss = LOSSES["adr_mse"](scores, torch.ones(5), torch.tensor([0, 5]), backend=backend)
    assert loss.abs() < 1e-12 and gradient_of(loss, scores).abs().max() < 1e-6
    assert LOSSES["adr_mse"](scores, torch.ones(5), torch.tensor([0, 5]), backend=backend, ties="first") > 0.5


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", LOSSES)
def test_infinite_labels_only_order(name, backend):
    scores, offsets = draw_scores(size=5), torch.tensor([0, 5])
    infinite = torch.tensor([math.inf, -math.inf, 1.0, math.inf, 0.0])
    finite = torch.tensor([9.0, -9, 1, 9, 0])
    loss = LOSSES[name](scores, infinite, offsets, backend=backend)
    assert loss.isfinite() and torch.equal(loss, LOSSES[name](scores, finite, offsets, backend=backend))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", LOSSES)
def test_far_scores_neither_overflow_nor_saturate(name, backend):
    labels, offsets = torch.tensor([2.0, 1, 0]), torch.tensor([0, 3])
    for scores in ([1e4, 0, -1e4], [-1e4, 0, 1e4], [1e4, 1e4, -1e4], [-1e30, 1e30, 0]):
        scores = torch.tensor(scores, requires_grad=True)
        loss = LOSSES[name](scores, labels, offsets, backend=backend)
        assert loss.isfinite() and gradient_of(loss, scores).isfinite().all()
    wrong_way = torch.tensor([-1e4, 0, 1e4], requires_grad=True)
    if name != "adr_mse":  # a hopeless list still pulls with full force
        gradient = gradient_of(LOSSES[name](wrong_way, labels, offsets, reduction="sum"), wrong_way) / 0.37
        assert gradient.tolist() == ([-2.0, 0.0, 2.0] if name == "ranknet" else [-1.0, 0.0, 1.0])


def test_unknown_names_point_to_the_nearest():
    with pytest.raises(
        UnknownLoss, match=r"no loss 'rank_net' \(did you mean 'ranknet'\?\); known are adr_mse, lce"
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
        ({"temperature": 0}, "temperature=0: must be a finite number above 0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": "2"}, "temperature='2'"),
        ({"temperature": True}, "temperature=True"),
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
        LOSSES[name](scores, LABELS, OFFSETS, backend=backend)
    with pytest.raises(ValueError, match=message):
        LOSSES[name](scores.half(), LABELS, OFFSETS, backend=backend, check=True)
    labels = LABELS.clone()
    labels[4] = math.nan
    labels[0] = math.inf
    with pytest.raises(ValueError, match=r"labels\[4\] is nan \(document 0 of list 2\): labels must be numbers\."):
        LOSSES[name](draw_scores(), labels, OFFSETS, backend=backend)


def test_without_the_check_a_nan_flows_into_the_loss():
    scores = draw_scores()
    scores[9] = math.nan
    for name in LOSSES:
        assert LOSSES[name](scores, LABELS, OFFSETS, check=False).isnan()


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


class Scores(torch.nn.Module):
    """What sentence-transformers' losses want of a model: it returns scores that are already there."""

    num_labels = 1
    device = torch.device("cpu")

    def __init__(self, scores: Tensor):
        super().__init__()
        self.scores = scores

    def preprocess(self, pairs: list, **_: object) -> dict:
        return {}

    def forward(self, _: dict) -> dict[str, Tensor]:
        return {"scores": self.scores[:, None]}


def sentence_transformers_loss(kind: str, scores: Tensor, labels: Tensor, sizes: tuple[int, ...], **options: object):
    from sentence_transformers.cross_encoder import losses

    loss = getattr(losses, kind)(Scores(scores), mini_batch_size=-1, **options)
    return loss([["query"] * len(sizes), [["document"] * size for size in sizes]], list(labels.split(sizes)))


@pytest.mark.parametrize("size_seed", range(3))
def test_parity_with_sentence_transformers(size_seed):
    random = torch.Generator().manual_seed(size_seed)
    sizes = tuple(torch.randint(1, 30, (6,), generator=random).tolist())
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    scores = draw_scores(size_seed, sum(sizes)).requires_grad_()
    labels = torch.randint(4, (sum(sizes),), generator=random).float()
    # Their RankNet takes the logarithm to base 2; both pool the pairs of the batch.
    theirs = sentence_transformers_loss("RankNetLoss", scores, labels, sizes) * math.log(2)
    ours = LOSSES["ranknet"](scores, labels, offsets)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient_of(ours, scores), gradient_of(theirs, scores))
    # Their alpha is the inverse of the temperature; both give tied labels their average rank.
    theirs = sentence_transformers_loss("ADRMSELoss", scores, labels, sizes, alpha=4.0)
    ours = LOSSES["adr_mse"](scores, labels, offsets, temperature=0.25)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient_of(ours, scores), gradient_of(theirs, scores))


def test_lce_is_torch_cross_entropy():
    scores = draw_scores(size=24).requires_grad_()
    labels = torch.zeros(4, 6)
    labels[torch.arange(4), torch.tensor([0, 5, 2, 2])] = 1
    ours = LOSSES["lce"](scores, labels.flatten(), torch.arange(5) * 6)
    theirs = torch.nn.functional.cross_entropy(scores.view(4, 6), labels.argmax(1))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient_of(ours, scores), gradient_of(theirs, scores))
