"""Listwise losses in Triton: float32 inside, labels of any real dtype, nothing read back to the host.

Losses over pairs of documents sweep over row blocks (gpu_pairs.py, gpu_draws.py, gpu_smooth_ranks.py), the others over
lists (gpu_lists.py). CONFIGURATIONS holds every kernel that can be launched. Shapes of tiles and the order of sums
depend on a list alone and there are no atomics, so a list's result is the same bit for bit in any batch and any run.
"""

import struct
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastrank.kernels.configuration import Configuration, Table, configure, name_of
from fastrank.kernels.listwise import gpu_blocks, gpu_draws, gpu_lists, gpu_pairs, gpu_smooth_ranks

BLOCK_ROWS = 32
BLOCK_COLUMNS = 32
STRETCH = 1024  # columns that are summed in float32 before they join a float64 sum
BLOCK_DOCUMENTS = 512  # of a program that walks over a list

TYPES = {
    **dict.fromkeys(("scores", "keys", "labels", "values", "gains", "weights"), "*fp32"),
    **dict.fromkeys(("average_ranks", "teacher_ranks", "discounts", "neighbours"), "*fp32"),
    **dict.fromkeys(("slopes", "bases", "coefficients"), "*fp32"),
    **dict.fromkeys(("first_ranks", "ranks", "order", "num_lower", "list_offsets"), "*i32"),
    **dict.fromkeys(("row_losses", "own_pulls", "smooth_ranks", "shares"), "*fp64"),
    **{"sums": "*fp32", "terms": "*i64", "gradients": "*fp32"},
    **{"num_lists": "i32", "k": "i32", "margin": "fp32", "rate_hi": "fp32", "rate_lo": "fp32"},
}


def _configure(
    kernel: Callable, types: Mapping[str, str] | None = None, num_warps: int = 4, **constants: object
) -> Configuration:
    shape = {
        "BLOCK_ROWS": BLOCK_ROWS,
        "BLOCK_COLUMNS": BLOCK_COLUMNS,
        "STRETCH": STRETCH,
        "BLOCK_DOCUMENTS": BLOCK_DOCUMENTS,
    }
    constants |= {name: value for name, value in shape.items() if name in kernel.arg_names}
    return configure(kernel, TYPES | (types or {}), constants, num_warps)


CONFIGURATIONS = Table(
    {
        "rank float32": _configure(gpu_blocks.listwise_rank_kernel),
        "rank float64": _configure(gpu_blocks.listwise_rank_kernel, {"values": "*fp64"}),
        "rank int64": _configure(gpu_blocks.listwise_rank_kernel, {"values": "*i64"}),
        "sum pairs": _configure(gpu_blocks.listwise_sum_kernel, TERM="pair", MEAN_OF_PAIRS=False),
        "sum lists": _configure(gpu_blocks.listwise_sum_kernel, TERM="list", MEAN_OF_PAIRS=False),
        "sum means": _configure(gpu_blocks.listwise_sum_kernel, TERM="list", MEAN_OF_PAIRS=True),
        "ranknet": _configure(gpu_pairs.listwise_ranknet_kernel),
        "weighted_ranknet": _configure(gpu_pairs.listwise_weighted_kernel, WEIGHT="inverse_sum"),
        "teacher_order": _configure(gpu_pairs.listwise_weighted_kernel, WEIGHT="difference"),
        **{
            # with 4 warps some of these spill
            f"lambda {weighting}": _configure(gpu_pairs.listwise_lambda_kernel, num_warps=8, WEIGHTING=weighting)
            for weighting in ("none", "ndcg1", "ndcg2", "lambdarank", "ndcg2pp")
        },
        **{
            f"margin {loss}": _configure(gpu_pairs.listwise_margin_kernel, LOSS=loss)
            for loss in ("difference", "constant", "hinge", "squared_hinge")
        },
        "draw": _configure(gpu_draws.listwise_draw_kernel),
        "draw gradient": _configure(gpu_draws.listwise_draw_gradient_kernel),
        "smooth rank": _configure(gpu_smooth_ranks.listwise_smooth_rank_kernel),
        "smooth rank gradient": _configure(gpu_smooth_ranks.listwise_smooth_rank_gradient_kernel),
        **{
            f"adr_mse {discount}": _configure(gpu_smooth_ranks.listwise_rank_loss_kernel, DISCOUNT=discount)
            for discount in ("log2", "reciprocal", "none")
        },
        "approx_ndcg": _configure(gpu_smooth_ranks.listwise_approx_ndcg_kernel, {"gains": "*fp64"}),
        "approx_mrr": _configure(gpu_smooth_ranks.listwise_approx_mrr_kernel),
        "normalise exponential": _configure(gpu_smooth_ranks.listwise_normalise_kernel, GAIN="exponential"),
        "normalise linear": _configure(gpu_smooth_ranks.listwise_normalise_kernel, GAIN="linear"),
        "normalise p_listmle": _configure(
            gpu_smooth_ranks.listwise_normalise_kernel, {"ranks": "*fp32"}, GAIN="p_listmle"
        ),
        "lce": _configure(gpu_lists.listwise_target_kernel, WEIGHTED=False),
        "contrastive_imitation": _configure(gpu_lists.listwise_target_kernel, WEIGHTED=True),
        "listnet": _configure(gpu_lists.listwise_divergence_kernel, LESS_ENTROPY=False),
        "kl": _configure(gpu_lists.listwise_divergence_kernel, LESS_ENTROPY=True),
        "pearson": _configure(gpu_lists.listwise_pearson_kernel),
        "bce": _configure(gpu_lists.listwise_pointwise_kernel, LOSS="bce"),
        "mse": _configure(gpu_lists.listwise_pointwise_kernel, LOSS="mse"),
    }
)

EXACT_IN_FLOAT32 = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


class _Batch:
    """The tensors of one call, and what its kernels have in common."""

    def __init__(self, scores: Tensor, labels: Tensor, list_offsets: Tensor, temperature: float):
        self.scores = scores.detach().float().contiguous()
        self.labels = labels.detach().contiguous()
        self.list_offsets = list_offsets.contiguous()
        self.num_lists = len(list_offsets) - 1
        rate = 1 / temperature
        rate_hi = _round(rate)
        self.rate = rate_hi, _round(rate - rate_hi)
        self.sums = self.empty(torch.float32, self.num_lists)
        self.terms = self.empty(torch.int64, self.num_lists)
        self.gradients = self.empty(torch.float32)

    def empty(self, dtype: torch.dtype, size: int | None = None) -> Tensor:
        size = len(self.scores) if size is None else size
        return torch.empty(size, dtype=dtype, device=self.scores.device)

    def sweep(self, name: str, *arguments: Tensor | int | float) -> None:
        """A program for each block of rows; num_lists stands behind the tensors."""
        num_tensors = sum(isinstance(argument, Tensor) for argument in arguments)
        arguments = *arguments[:num_tensors], self.num_lists, *arguments[num_tensors:]
        num_programs = len(self.scores) // BLOCK_ROWS + self.num_lists if self.num_lists else 0
        CONFIGURATIONS.launch(name, num_programs, *arguments)

    def walk(self, name: str, *arguments: Tensor | int | float) -> None:
        """A program for each list."""
        CONFIGURATIONS.launch(name, self.num_lists, *arguments)

    def values(self) -> Tensor:
        """Labels as numbers."""
        return self.labels.float()

    def rank(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Average ranks, first ranks, the order and how many are lower, exact for every dtype."""
        if values.dtype in EXACT_IN_FLOAT32:
            values = values.float()
        elif values.dtype in (torch.int32, torch.int64):
            values = values.long()
        else:
            values = values.double()
        ranks = self.empty(torch.float32), *(self.empty(torch.int32) for _ in range(3))
        self.sweep(f"rank {name_of(values.dtype)}", values, self.list_offsets, *ranks)
        return ranks

    def keys(self) -> Tensor:
        """float32 numbers that order as the labels do: these themselves, or their ranks where float32 would merge
        some."""
        return self.values() if self.labels.dtype in EXACT_IN_FLOAT32 else -self.rank(self.labels)[0]

    def gains(self, gain: str, k: int, first_ranks: Tensor) -> Tensor:
        gains = self.empty(torch.float64)
        self.walk(f"normalise {gain}", self.values(), first_ranks, self.list_offsets, gains, k)
        return gains


def _round(number: float) -> float:
    return struct.unpack("f", struct.pack("f", number))[0]


def _ranknet(batch: _Batch) -> None:
    row_losses, num_lower = batch.empty(torch.float64), batch.empty(torch.int32)
    batch.sweep(
        "ranknet",
        batch.scores,
        batch.keys(),
        batch.list_offsets,
        row_losses,
        num_lower,
        batch.gradients,
        *batch.rate,
    )
    batch.walk("sum pairs", row_losses, num_lower, batch.list_offsets, batch.sums, batch.terms)


def _weighted_ranknet(batch: _Batch) -> None:
    average_ranks, _, _, num_lower = batch.rank(batch.labels)
    _sweep_weighted(batch, "weighted_ranknet", -average_ranks, average_ranks, num_lower, "sum pairs")


def _teacher_order(batch: _Batch) -> None:
    average_ranks, _, _, num_lower = batch.rank(batch.labels)
    _sweep_weighted(batch, "teacher_order", -average_ranks, batch.values(), num_lower, "sum means")


def _sweep_weighted(batch: _Batch, name: str, keys: Tensor, values: Tensor, num_lower: Tensor, total: str) -> None:
    row_losses = batch.empty(torch.float64)
    batch.sweep(
        name,
        batch.scores,
        keys,
        values,
        num_lower,
        batch.list_offsets,
        row_losses,
        batch.gradients,
        *batch.rate,
    )
    batch.walk(total, row_losses, num_lower, batch.list_offsets, batch.sums, batch.terms)


def _lambda(batch: _Batch, weighting: str, k: int | None, gain: str) -> None:
    k = 2**31 - 1 if k is None else min(k, 2**31 - 1)
    average_ranks, first_ranks, _, num_lower = batch.rank(batch.labels)
    order = batch.rank(batch.scores)[2]
    gains = batch.scores if weighting == "none" else batch.gains(gain, k, first_ranks).float()
    # In float64, since neighbours are differences of nearly equal numbers.
    ranks = torch.arange(1, len(batch.scores) + 2, dtype=torch.float64, device=batch.scores.device)
    discounts = 1 / torch.log2(ranks + 1)
    neighbours = (discounts[:-1] - discounts[1:]).roll(1)
    row_losses = batch.empty(torch.float64)
    batch.sweep(
        f"lambda {weighting}",
        batch.scores,
        -average_ranks,
        gains,
        order,
        discounts.float(),
        neighbours.float(),
        batch.list_offsets,
        row_losses,
        batch.gradients,
        k,
        *batch.rate,
    )
    batch.walk("sum pairs", row_losses, num_lower, batch.list_offsets, batch.sums, batch.terms)


def _margin(batch: _Batch, loss: str, margin: float) -> None:
    row_losses, num_lower = batch.empty(torch.float64), batch.empty(torch.int32)
    batch.sweep(
        f"margin {loss}",
        batch.scores,
        batch.keys(),
        batch.values(),
        batch.list_offsets,
        row_losses,
        num_lower,
        batch.gradients,
        margin,
        *batch.rate,
    )
    batch.walk("sum pairs", row_losses, num_lower, batch.list_offsets, batch.sums, batch.terms)


def _margin_mse(batch: _Batch, margin: float | None) -> None:
    if margin is None:
        _margin(batch, "difference", 0.0)
    else:
        _margin(batch, "constant", margin)


def _hinge(batch: _Batch, margin: float, squared: bool) -> None:
    _margin(batch, "squared_hinge" if squared else "hinge", margin)


def _listmle(batch: _Batch) -> None:
    _draw(batch, batch.keys(), torch.ones_like(batch.scores))


def _p_listmle(batch: _Batch) -> None:
    average_ranks = batch.rank(batch.labels)[0]
    weights = batch.empty(torch.float64)
    batch.walk("normalise p_listmle", average_ranks, average_ranks, batch.list_offsets, weights, 1)
    _draw(batch, -average_ranks, weights.float())


def _draw(batch: _Batch, keys: Tensor, weights: Tensor) -> None:
    row_losses, own_pulls = batch.empty(torch.float64), batch.empty(torch.float64)
    bases, coefficients = batch.empty(torch.float32), batch.empty(torch.float32)
    batch.sweep(
        "draw",
        batch.scores,
        keys,
        weights,
        batch.list_offsets,
        row_losses,
        bases,
        coefficients,
        own_pulls,
        *batch.rate,
    )
    batch.sweep(
        "draw gradient",
        batch.scores,
        keys,
        bases,
        coefficients,
        own_pulls,
        batch.list_offsets,
        batch.gradients,
        *batch.rate,
    )
    batch.walk("sum lists", row_losses, batch.empty(torch.int32, 1), batch.list_offsets, batch.sums, batch.terms)


def _adr_mse(batch: _Batch, discount: str, ties: str) -> None:
    average_ranks, first_ranks, _, _ = batch.rank(batch.labels)
    teacher_ranks = average_ranks if ties == "average" else first_ranks.float()
    _rank_smoothly(batch, f"adr_mse {discount}", teacher_ranks)


def _approx_ndcg(batch: _Batch, gain: str) -> None:
    first_ranks = batch.rank(batch.labels)[1]
    _rank_smoothly(batch, "approx_ndcg", batch.gains(gain, 2**31 - 1, first_ranks))


def _approx_mrr(batch: _Batch) -> None:
    _rank_smoothly(batch, "approx_mrr", batch.scores, batch.values())


def _rank_smoothly(batch: _Batch, name: str, *inputs: Tensor) -> None:
    smooth_ranks, slopes = batch.empty(torch.float64), batch.empty(torch.float32)
    batch.sweep("smooth rank", batch.scores, batch.list_offsets, smooth_ranks, *batch.rate)
    batch.walk(name, smooth_ranks, *inputs, batch.list_offsets, batch.sums, batch.terms, slopes)
    batch.sweep(
        "smooth rank gradient",
        batch.scores,
        slopes,
        batch.list_offsets,
        batch.gradients,
        *batch.rate,
    )


def _lce(batch: _Batch) -> None:
    positives = (batch.labels > 0).float()
    results = batch.sums, batch.terms, batch.gradients
    batch.walk("lce", batch.scores, batch.keys(), positives, batch.list_offsets, *results, *batch.rate)


def _contrastive_imitation(batch: _Batch) -> None:
    labels, results = batch.values(), (batch.sums, batch.terms, batch.gradients)
    batch.walk("contrastive_imitation", batch.scores, labels, labels, batch.list_offsets, *results, *batch.rate)


def _pearson(batch: _Batch) -> None:
    results = batch.sums, batch.terms, batch.gradients
    batch.walk("pearson", batch.scores, batch.values(), batch.list_offsets, *results)


def _walk_once(name: str) -> Callable[[_Batch], None]:
    def run(batch: _Batch) -> None:
        results = batch.sums, batch.terms, batch.gradients
        batch.walk(name, batch.scores, batch.values(), batch.list_offsets, *results, *batch.rate)

    return run


LOSSES: Mapping[str, Callable[..., None]] = {
    "ranknet": _ranknet,
    "weighted_ranknet": _weighted_ranknet,
    "lambda": _lambda,
    "margin_mse": _margin_mse,
    "hinge": _hinge,
    "teacher_order": _teacher_order,
    "listmle": _listmle,
    "p_listmle": _p_listmle,
    "adr_mse": _adr_mse,
    "approx_ndcg": _approx_ndcg,
    "approx_mrr": _approx_mrr,
    "lce": _lce,
    "contrastive_imitation": _contrastive_imitation,
    "pearson": _pearson,
    **{name: _walk_once(name) for name in ("listnet", "kl", "bce", "mse")},
}


def listwise(
    name: str, scores: Tensor, labels: Tensor, list_offsets: Tensor, options: Mapping[str, object]
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums (lists,), terms (lists,) and the gradients of the sums (documents,), computed in float32."""
    options = dict(options)
    with torch.cuda.device_of(scores):
        batch = _Batch(scores, labels, list_offsets, options.pop("temperature", 1.0))
        LOSSES[name](batch, **options)
    return batch.sums.to(scores.dtype), batch.terms, batch.gradients.to(scores.dtype)
