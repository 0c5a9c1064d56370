"""Listwise losses by name: scores, labels and list_offsets in, one number out.

Documents of all lists stand behind one another, cut by list_offsets; labels: higher is better; natural logarithm. A
loss sums over its terms and counts them, and the reduction divides (fastrank.ops.listwise). A batch without any term
has the loss 0 and a gradient of zeros. The formulas, as code: fastrank/kernels/listwise/reference.py.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real

import torch
from torch import Tensor

from fastrank import ops

__all__ = ["LOSSES", "Loss", "UnknownLoss", "WeightedSum", "count_terms", "resolve_loss"]

SMALLEST = 1e-30  # of positive options: usual scores over it are still float32 numbers
LARGEST_COUNT = 2**62


class UnknownLoss(KeyError, ValueError):
    """There is no loss of this name."""

    def __str__(self) -> str:
        return self.args[0]


@dataclass(frozen=True)
class Option:
    """An option of a loss.

    Attributes:
        default: Its value where none is given.
        kind: "choice" (one of `choices`), "positive" (a finite number above 0), "number" (a finite number), "count" (a
            whole number above 0) or "flag" (True or False).
        choices: The values of a "choice".
        optional: Whether None is a value, too.
    """

    default: object
    kind: str = "positive"
    choices: tuple[str, ...] = ()
    optional: bool = False

    def check(self, name: str, value: object) -> object:
        if self.optional and value is None:
            return None
        if self.kind == "choice":
            holds, rule = value in self.choices, f"choose one of {', '.join(self.choices)}"
        elif self.kind == "flag":
            holds, rule = isinstance(value, bool), "must be True or False"
        elif self.kind == "count":
            holds = isinstance(value, Integral) and not isinstance(value, bool) and 0 < value <= LARGEST_COUNT
            rule = "must be a whole number above 0"
        else:
            holds = isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
            holds = holds and (self.kind == "number" or value > SMALLEST)
            rule = "must be a finite number" + (f" above {SMALLEST}" if self.kind == "positive" else "")
        if not holds:
            raise ValueError(f"{name}={value!r}: {rule}{' or None' if self.optional else ''}.")
        if value is None or self.kind in ("choice", "flag"):
            return value
        return int(value) if self.kind == "count" else float(value)  # of NumPy's numbers, too


@dataclass(frozen=True)
class Loss:
    """A listwise loss; calling it gives its value.

    Attributes:
        name: Its key in LOSSES.
        term: What it sums, and so what reduction="mean" divides by the number of: pairs, documents or lists.
        formula: One term, in words. Ranks count from 1; gains are normalised by the ideal DCG.
        options: Its options, by name.
        labels: What it does with labels, and so which it takes: "ordered" (it compares them, so infinite ones are
            welcome), "finite" (it uses their values) or "probabilities" (from 0 to 1).
    """

    name: str
    term: str
    formula: str
    options: Mapping[str, Option] = field(default_factory=dict)
    labels: str = "ordered"

    def __call__(
        self,
        scores: Tensor,
        labels: Tensor,
        list_offsets: Tensor,
        *,
        reduction: str = "mean",
        backend: str = "auto",
        check: bool | None = None,
        **options: object,
    ) -> Tensor:
        """The loss of a ragged batch of lists, differentiable once in the scores: a second derivative of a step leaves
        out what the loss itself has of one.

        Args:
            scores: (documents,) float32, bf16 or fp16, computed in float32, as which the loss comes out; float64 stays
                float64. The gradient has the scores' dtype. Constants far from 0 (1e4) do no harm.
            labels: (documents,) bool, integers up to 2^53 or floating point, higher is better. Equal labels are a tier
                without order inside: no pair lies in it, and in losses of ranks its documents share their average rank.
                `labels` says whether infinite ones are welcome.
            list_offsets: (lists + 1,) int32 or int64; lists of 2, 0 and 3 documents are [0, 2, 2, 5].
            reduction: "mean" over all terms of the batch; "list_mean" = the mean of the means of the lists that have a
                term; "none" = the sum over each list's terms, (lists,); "sum" over all terms.
            backend: "auto", "reference", "cpu" or "gpu".
            check: Whether to look for scores and labels that the loss cannot take, such as NaN. Default: on a CPU only,
                since elsewhere it waits for the device.
            options: As `options` lists them.

        Returns:
            A number, or (lists,) for "none". An empty list has no part in any loss; single documents and lists of one
            tier have no pair and so none in a loss over pairs.

        Raises:
            TypeError: What is no tensor.
            ValueError: Shapes, dtypes or offsets that do not fit, values that are not numbers (with their position), an
                unknown reduction or option.
        """
        options = self.fill(options)
        for name, value in (("scores", scores), ("labels", labels), ("list_offsets", list_offsets)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a torch tensor, not {type(value).__name__}.")
        if scores.dtype in (torch.bfloat16, torch.float16):
            scores = scores.float()
        check = self.allowed_labels(options) if check or (check is None and scores.device.type == "cpu") else ""
        value, _ = ops.listwise(
            self.name,
            scores,
            labels,
            list_offsets,
            options=options,
            reduction=reduction,
            backend=backend,
            check=check,
        )
        return value

    def fill(self, options: Mapping[str, object]) -> dict[str, object]:
        """All options of the loss: the given ones, checked, and the defaults of the others."""
        for name in options:
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                raise ValueError(f"{self.name} has no option {name!r}{_nearest(name, self.options)}; it knows {known}.")
        return {name: option.check(name, options.get(name, option.default)) for name, option in self.options.items()}

    def allowed_labels(self, options: Mapping[str, object]) -> str:
        """Which labels the loss takes with these options (all of them): margin_mse with a margin of its own and lambda
        without weights only compare them."""
        if options.get("margin") is not None or options.get("weighting") == "none":
            return "ordered"
        return self.labels


class _Losses(dict[str, Loss]):
    def __missing__(self, name: str) -> Loss:
        raise UnknownLoss(f"There is no loss {name!r}{_nearest(name, self)}; known are {', '.join(sorted(self))}.")


PAIRS, DOCUMENTS, LISTS = "pairs", "documents", "lists with a document"  # a pair has label_i > label_j
TEMPERATURE = {"temperature": Option(1.0)}  # divides the scores; x below is score / temperature
GAIN = {"gain": Option("exponential", "choice", ("exponential", "linear"))}
WEIGHTINGS = ("ndcg2pp", "ndcg2", "ndcg1", "lambdarank", "none")

LOSSES: Mapping[str, Loss] = _Losses(
    (loss.name, loss)
    for loss in (
        Loss("ranknet", PAIRS, "log(1 + exp(x_j - x_i))", TEMPERATURE),
        Loss("weighted_ranknet", PAIRS, "log(1 + exp(x_j - x_i)) / (rank_i + rank_j), ranks by label", TEMPERATURE),
        Loss(
            "lambda",
            PAIRS,
            "weight * log(1 + exp(x_j - x_i)); the weight is what exchanging the two does to nDCG (LambdaLoss)",
            {
                **TEMPERATURE,
                "weighting": Option("ndcg2pp", "choice", WEIGHTINGS),
                "k": Option(None, "count", optional=True),
                **GAIN,
            },
            labels="finite",
        ),
        Loss(
            "margin_mse",
            PAIRS,
            "(x_i - x_j - margin)^2; margin None is label_i - label_j",
            {**TEMPERATURE, "margin": Option(None, "number", optional=True)},
            labels="finite",
        ),
        Loss(
            "hinge",
            PAIRS,
            "max(0, margin - (x_i - x_j)), or its square",
            {**TEMPERATURE, "margin": Option(1.0, "number"), "squared": Option(False, "flag")},
        ),
        Loss(
            "lce",
            "lists with a label above 0",
            "cross-entropy of softmax(x) against the first document of the highest label",
            TEMPERATURE,
        ),
        Loss("listnet", LISTS, "cross-entropy of softmax(x) against softmax(labels)", TEMPERATURE, labels="finite"),
        Loss("kl", LISTS, "KL(softmax(labels) || softmax(x))", TEMPERATURE, labels="finite"),
        Loss(
            "listmle",
            LISTS,
            "sum over i of log(1 + sum over label_j < label_i of exp(x_j - x_i))",
            TEMPERATURE,
        ),
        Loss(
            "p_listmle",
            LISTS,
            "listmle whose documents weigh 2^(n - rank) - 1, normalised to sum 1; ranks by label",
            TEMPERATURE,
        ),
        Loss(
            "adr_mse",
            DOCUMENTS,
            "(r - t)^2 / discount(t), t = rank by label, r = 1 + sum over the others of sigmoid(x_other - x)",
            {
                **TEMPERATURE,
                "discount": Option("log2", "choice", ("log2", "reciprocal", "none")),
                "ties": Option("average", "choice", ("average", "first")),
            },
        ),
        Loss("approx_ndcg", LISTS, "1 - nDCG of r, the ranks of adr_mse", {**TEMPERATURE, **GAIN}, labels="finite"),
        Loss("approx_mrr", LISTS, "1 - max of min(label, 1) / r, the ranks of adr_mse", TEMPERATURE, labels="finite"),
        Loss("pearson", LISTS, "1 - correlation of scores and labels", labels="finite"),
        Loss("bce", DOCUMENTS, "log(1 + exp(x)) - label * x", TEMPERATURE, labels="probabilities"),
        Loss("mse", DOCUMENTS, "(x - label)^2", TEMPERATURE, labels="finite"),
        Loss(
            "contrastive_imitation",
            LISTS,
            "cross-entropy of softmax(w * x) against the first document of the highest label; w = label there, else "
            "1 - label (D2LLM)",
            TEMPERATURE,
            labels="probabilities",
        ),
        Loss(
            "teacher_order",
            LISTS,
            "mean over the list's pairs of (label_i - label_j) * log(1 + exp(x_j - x_i)) (D2LLM)",
            TEMPERATURE,
            labels="finite",
        ),
    )
)


@dataclass(frozen=True)
class WeightedSum:
    """Several losses of the same scores and labels, each times its weight; called as a loss is.

    Attributes:
        weights: By name of the loss.
        options: By name of the loss, its options.
    """

    weights: Mapping[str, float]
    options: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.weights:
            raise ValueError("A weighted sum needs a loss, as in {'ranknet': 1.0, 'mse': 0.1}.")
        for name, weight in self.weights.items():
            Option(1.0).check(f"the weight of {name}", weight)
            LOSSES[name].fill(self.options.get(name, {}))
        if extra := set(self.options) - set(self.weights):
            raise ValueError(f"options for {', '.join(sorted(extra))}, which the sum does not contain.")

    def __call__(self, scores: Tensor, labels: Tensor, list_offsets: Tensor, **common: object) -> Tensor:
        """The sum. common: reduction, backend and check, as every loss takes them."""
        parts = [
            weight * LOSSES[name](scores, labels, list_offsets, **self.options.get(name, {}), **common)
            for name, weight in self.weights.items()
        ]
        return sum(parts[1:], parts[0])


def count_terms(name: str, labels: Tensor, list_offsets: Tensor, **options: object) -> Tensor:
    """How many terms each list has, int64 (lists,): what reduction="mean" divides by, known from the labels alone.

    name: a loss of LOSSES. labels, list_offsets, options: as the loss takes them.
    """
    LOSSES[name].fill(options)
    return ops.listwise_terms(name, labels, list_offsets)


def resolve_loss(
    loss: str | Mapping[str, float] | Callable[..., Tensor], options: Mapping[str, Mapping[str, object]] | None = None
) -> Callable[..., Tensor]:
    """The loss of this name, or the function at this dotted path (package.module.function), or the function itself.

    A mapping of names to weights is their WeightedSum, with these options by name.

    A user's function is called as loss(scores, labels, list_offsets, **options) and returns one number. Raises
    ValueError for a name that is neither.
    """
    if callable(loss):
        return loss
    if isinstance(loss, Mapping):
        return WeightedSum(loss, options or {})
    if loss in LOSSES or "." not in loss:
        return LOSSES[loss]
    module, _, name = loss.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # a module that the user's own imports
        raise ValueError(f"loss={loss!r}: Python finds no module {error.name!r}.") from error
    if not callable(function):
        raise ValueError(f"loss={loss!r}: the module {module!r} has no function {name!r}.")
    return function


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
