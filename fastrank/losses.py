"""Listwise losses by name: scores, labels and list_offsets in, one number out.

Documents of all lists stand behind one another, cut by list_offsets; labels: higher is better; natural logarithm. A
loss sums over its terms and counts them (fastrank.ops.listwise); the reduction divides, here. A batch without any term
has the loss 0 and a gradient of zeros. The formulas, as code: fastrank/kernels/listwise/reference.py.
"""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastrank import ops

__all__ = ["LOSSES", "Loss", "UnknownLoss", "count_terms", "resolve_loss"]

REDUCTIONS = ("mean", "list_mean", "none", "sum")


class UnknownLoss(KeyError, ValueError):
    """There is no loss of this name."""

    def __str__(self) -> str:
        return self.args[0]


@dataclass(frozen=True)
class Option:
    """An option of a loss: one of `choices`, or without them a positive number."""

    default: object
    choices: tuple[str, ...] = ()

    def check(self, name: str, value: object) -> object:
        if self.choices:
            if value not in self.choices:
                raise ValueError(f"{name}={value!r}: choose one of {', '.join(self.choices)}.")
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r}: must be a finite number above 0.")
        return float(value)


@dataclass(frozen=True)
class Loss:
    """A listwise loss; calling it gives its value.

    Attributes:
        name: Its key in LOSSES.
        term: What it sums, and so what reduction="mean" divides by the number of: pairs, documents or lists.
        formula: One term, in words.
        options: Its options, by name.
    """

    name: str
    term: str
    formula: str
    options: Mapping[str, Option] = field(default_factory=dict)

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
        """The loss of a ragged batch of lists, differentiable once in the scores.

        Args:
            scores: (documents,) float32, bf16 or fp16, computed in float32; float64 stays float64. The gradient has the
                scores' dtype. Constants far from 0 (1e4) do no harm.
            labels: (documents,) any real dtype, higher is better. Equal labels are a tier without order inside. The
                losses here only compare labels (lce also with 0), so infinite ones are welcome.
            list_offsets: (lists + 1,) int32 or int64; lists of 2, 0 and 3 documents are [0, 2, 2, 5].
            reduction: "mean" over all terms of the batch; "list_mean" = the mean of the means of the lists that have a
                term; "none" = the sum over each list's terms, (lists,); "sum" over all terms.
            backend: "auto", "reference", "cpu" or "gpu".
            check: Whether to look for NaN and infinite scores and NaN labels. Default: on a CPU only, since elsewhere
                it waits for the device.
            options: As `options` lists them.

        Returns:
            A number, or (lists,) for "none". Empty lists, single documents and lists of one tier have no pair and so no
            part in a loss over pairs.

        Raises:
            ValueError: Shapes, dtypes or offsets that do not fit, values that are not numbers (with their position), an
                unknown reduction or option.
        """
        options = self.fill(options)
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction={reduction!r}: choose one of {', '.join(REDUCTIONS)}.")
        list_offsets = _narrow(list_offsets)
        if scores.dtype in (torch.bfloat16, torch.float16):
            scores = scores.float()
        sums, terms = ops.listwise(self.name, scores, labels, list_offsets, options=options, backend=backend)
        if check or (check is None and scores.device.type == "cpu"):
            _check_values(scores, labels, list_offsets)
        if reduction == "mean":
            return sums.sum() / terms.sum().clamp(min=1)
        if reduction == "list_mean":
            return (sums / terms.clamp(min=1)).sum() / terms.count_nonzero().clamp(min=1)
        return sums.sum() if reduction == "sum" else sums

    def fill(self, options: Mapping[str, object]) -> dict[str, object]:
        """All options of the loss: the given ones, checked, and the defaults of the others."""
        for name in options:
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                raise ValueError(f"{self.name} has no option {name!r}{_nearest(name, self.options)}; it knows {known}.")
        return {name: option.check(name, options.get(name, option.default)) for name, option in self.options.items()}


class _Losses(dict[str, Loss]):
    def __missing__(self, name: str) -> Loss:
        raise UnknownLoss(f"There is no loss {name!r}{_nearest(name, self)}; known are {', '.join(sorted(self))}.")


TEMPERATURE = Option(1.0)

LOSSES: Mapping[str, Loss] = _Losses(
    (loss.name, loss)
    for loss in (
        Loss(
            "ranknet",
            "pairs",
            "log(1 + exp((score_j - score_i) / temperature)) for label_i > label_j",
            {"temperature": TEMPERATURE},
        ),
        Loss(
            "lce",
            "lists with a label above 0",
            "cross-entropy of softmax(scores / temperature) against the first document of the highest label",
            {"temperature": TEMPERATURE},
        ),
        Loss(
            "adr_mse",
            "documents",
            "(r - t)^2 / discount(t), t = rank by label, r = 1 + sum of sigmoid((other - own score) / temperature)",
            {
                "temperature": TEMPERATURE,
                "discount": Option("log2", ("log2", "reciprocal", "none")),
                "ties": Option("average", ("average", "first")),
            },
        ),
    )
)


def count_terms(name: str, labels: Tensor, list_offsets: Tensor, **options: object) -> Tensor:
    """How many terms each list has, int64 (lists,): what reduction="mean" divides by, known from the labels alone.

    name: a loss of LOSSES. labels, list_offsets, options: as the loss takes them.
    """
    LOSSES[name].fill(options)
    return ops.listwise_terms(name, labels, _narrow(list_offsets))


def resolve_loss(loss: str | Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss of this name, or the function at this dotted path (package.module.function), or the function itself.

    A user's function is called as loss(scores, labels, list_offsets, **options) and returns one number. Raises
    ValueError for a name that is neither.
    """
    if callable(loss):
        return loss
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


def _narrow(list_offsets: Tensor) -> Tensor:
    return list_offsets.to(torch.int32) if list_offsets.dtype == torch.int64 else list_offsets


def _check_values(scores: Tensor, labels: Tensor, list_offsets: Tensor) -> None:
    for name, values, rule in (
        ("scores", scores.detach(), "scores must be finite numbers"),
        ("labels", labels.detach(), "labels must be numbers"),
    ):
        if math.isfinite(values.sum()):
            continue  # the usual case, in one pass; a sum that overflowed or met an infinite label needs a closer look
        wrong = values.isnan() if name == "labels" else ~values.isfinite()
        if wrong.any():
            position = int(wrong.nonzero()[0])
            where = int(torch.searchsorted(list_offsets, position, right=True)) - 1
            document = position - int(list_offsets[where])
            raise ValueError(
                f"{name}[{position}] is {values[position].item()} (document {document} of list {where}): {rule}."
            )
