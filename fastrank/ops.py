"""The menu of accelerated operations: shapes, validation, and one line each that hands over to the chosen backend.

Every tensor is packed: the tokens of all pairs behind one another, cut by offsets. Values of offsets are checked on a
CPU only, since reading them would make a GPU wait.
"""

import functools
import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrank.backend import choose
from fastrank.kernels.linear.weights import LinearWeights
from fastrank.kernels.linear.weights import freeze as freeze_linear
from fastrank.kernels.linear.weights import restore as restore_linear

__all__ = [
    "LinearWeights",
    "attention",
    "bias_gelu",
    "check_offsets",
    "embedding_norm",
    "freeze_linear",
    "fused_attention",
    "layer_norm",
    "linear",
    "listwise",
    "listwise_terms",
    "padded_attention",
    "quantise_rows",
    "release_linear",
    "restore_linear",
]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    query_offsets: Tensor | None = None,
    scale: float | None = None,
    span: tuple[int, int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale * q k^T) v inside each pair of a packed batch; differentiable once in q, k and v.

    q: (query tokens, heads, head_dim). k, v: (tokens, heads, head_dim), of q's dtype. Each may be a strided view whose
    last dimension is contiguous, such as a part of a fused projection. offsets: int32 (pairs + 1,), cuts k and v;
    lengths 2, 4, 3 are [0, 2, 6, 9]. query_offsets: the same for q where its rows are others than those of k (default:
    offsets). scale: default head_dim ** -0.5. span: tokens of the shortest and of the longest pair, for a caller that
    knows them: a GPU then starts no kernel for other lengths, and must not be told wrong. Returns (query tokens, heads,
    head_dim); a query whose pair has no key gives 0. Raises ValueError with the offending shapes. In training prefer
    fused_attention, whose gradient needs no copy.
    """
    _require(
        q.dim() == 3 and k.dim() == 3 and k.shape == v.shape and q.shape[1:] == k.shape[1:],
        "attention takes q (query tokens, heads, head_dim) and k, v (tokens, heads, head_dim)",
        q=q,
        k=k,
        v=v,
    )
    _require_alike(q=q, k=k, v=v)
    _require_contiguous_rows(q=q, k=k, v=v)
    check_offsets("offsets", offsets, k)
    _check_span(span, offsets)
    if query_offsets is not None:
        check_offsets("query_offsets", query_offsets, q)
        _require(
            query_offsets.shape == offsets.shape,
            "query_offsets must cut as many pairs as offsets",
            query_offsets=query_offsets,
            offsets=offsets,
        )
    elif q.shape[0] != k.shape[0]:
        raise ValueError(
            f"q has {q.shape[0]} tokens and k {k.shape[0]}: where they differ, query_offsets must cut q into pairs."
        )
    scale = max(q.shape[2], 1) ** -0.5 if scale is None else float(scale)
    return choose("attention", backend, q).attention(q, k, v, offsets, query_offsets, scale, span)


def fused_attention(
    qkv: Tensor,
    offsets: Tensor,
    *,
    scale: float | None = None,
    span: tuple[int, int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """attention() of the three parts of one projection, whose gradient is written straight into one tensor.

    qkv: (tokens, 3, heads, head_dim), for instance a linear layer's (tokens, 3 * hidden) output through .view. offsets,
    scale, span: as in attention(). Returns (tokens, heads, head_dim).
    """
    _require(qkv.dim() == 4 and qkv.shape[1] == 3, "fused_attention takes qkv (tokens, 3, heads, head_dim)", qkv=qkv)
    _require_contiguous_rows(qkv=qkv)
    check_offsets("offsets", offsets, qkv)
    _check_span(span, offsets)
    scale = max(qkv.shape[3], 1) ** -0.5 if scale is None else float(scale)
    return choose("attention", backend, qkv).fused_attention(qkv, offsets, scale, span)


def padded_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """attention() on a padded batch: rows past a pair's length are neither read nor count, come out as 0 and get
    gradient 0.

    q, k, v: (batch, length, heads, head_dim), one dtype. lengths: int32 or int64 (batch,), each in [0, length]. scale:
    default head_dim ** -0.5. Returns (batch, length, heads, head_dim).
    """
    _require(
        q.dim() == 4 and q.shape == k.shape == v.shape,
        "padded_attention takes q, k, v of one shape (batch, length, heads, head_dim)",
        q=q,
        k=k,
        v=v,
    )
    _require_alike(q=q, k=k, v=v)
    _require_contiguous_rows(q=q, k=k, v=v)
    _require_integers("lengths", lengths, q, (torch.int32, torch.int64))
    if lengths.shape != q.shape[:1]:
        raise ValueError(f"lengths must hold one number for each of the {q.shape[0]} pairs, not {_shape(lengths)}.")
    if q.shape[0] * q.shape[1] >= 2**31:
        raise ValueError(f"The batch of {q.shape[0]} by {q.shape[1]} tokens must stay below 2^31; cut it.")
    if lengths.device.type == "cpu" and lengths.numel():
        values = lengths.numpy()
        if values.min() < 0 or values.max() > q.shape[1]:
            raise ValueError(f"lengths must lie in [0, {q.shape[1]}], but reach from {values.min()} to {values.max()}.")
    scale = max(q.shape[3], 1) ** -0.5 if scale is None else float(scale)
    return choose("attention", backend, q).padded_attention(q, k, v, lengths, scale)


def bias_gelu(x: Tensor, bias: Tensor, *, tanh_form: bool = False, backend: str = "auto") -> Tensor:
    """GELU(x + bias), what follows a feed-forward network's first matrix product; differentiable once in both.

    x: (tokens, columns). bias: (columns,), of x's dtype or float32. tanh_form: the tanh approximation instead of the
    exact erf form. Returns (tokens, columns). Raises ValueError with the offending shapes.
    """
    _require(
        x.dim() == 2 and bias.shape == x.shape[1:],
        "bias_gelu takes x (tokens, columns) and bias (columns,)",
        x=x,
        bias=bias,
    )
    _require_alike(x=x)
    _require_weights(x, bias=bias)
    return choose("gelu", backend, x).bias_gelu(x, bias, tanh_form)


def layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, *, backend: str = "auto"
) -> Tensor:
    """LayerNorm(x + residual) * weight + bias over the last dimension; differentiable once in every tensor.

    x, residual: (tokens, hidden), residual may be None. weight, bias: (hidden,), of x's dtype or float32. eps: added to
    the variance. Returns (tokens, hidden). Raises ValueError with the offending shapes.
    """
    inputs = {"x": x} | ({} if residual is None else {"residual": residual})
    _require(
        x.dim() == 2 and weight.shape == bias.shape == x.shape[1:] and (residual is None or residual.shape == x.shape),
        "layer_norm takes x and residual (tokens, hidden), weight and bias (hidden,)",
        **inputs,
        weight=weight,
        bias=bias,
    )
    _require_alike(**inputs)
    _require_weights(x, weight=weight, bias=bias)
    return choose("layer_norm", backend, x).layer_norm(x, residual, weight, bias, float(eps))


def quantise_rows(x: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Rows in fp8 (e4m3), each with a scale of its own that makes its largest number the largest code; not
    differentiable.

    x: (rows, columns), in any float dtype. Returns codes, float8_e4m3fn (rows, columns), and scales, float32 (rows,):
    a code times its row's scale is the number, rounded. A row of zeros has codes of zero; one with NaN or infinity in
    it gives NaN when it is multiplied. Raises ValueError with the offending shape.
    """
    _require(x.dim() == 2 and x.shape[1] > 0, "quantise_rows takes x (rows, columns)", x=x)
    _require_alike(x=x)
    return choose("fp8", backend, x).quantise_rows(x)


def embedding_norm(
    ids: tuple[Tensor, Tensor, Tensor],
    tables: tuple[Tensor, Tensor, Tensor],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    padding: tuple[int | None, int | None] = (None, None),
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """LayerNorm of the sum of a token's word, type and position vectors; differentiable once in tables, weight, bias.

    ids: of words, types and positions, int64 (tokens,) each. tables: the vectors, (rows, columns) each, of one dtype.
    weight, bias: (columns,), of the tables' dtype or float32. eps: added to the variance. padding: a word and a
    position whose rows get no gradient. dtype: of the result, by default the tables'. Returns (tokens, columns). Raises
    ValueError with the offending shapes; ids outside their tables are an IndexError on a CPU and not looked for on a
    GPU.
    """
    words = tables[0]
    named = dict(zip(("words", "types", "positions"), tables, strict=True))
    _require(
        all(one.dim() == 2 and one.shape[1:] == weight.shape == bias.shape for one in tables),
        "embedding_norm takes tables (rows, columns), weight and bias (columns,)",
        **named,
        weight=weight,
        bias=bias,
    )
    _require(
        all(one.dim() == 1 and one.shape == ids[0].shape for one in ids),
        "embedding_norm takes ids of words, types and positions (tokens,)",
        words=ids[0],
        types=ids[1],
        positions=ids[2],
    )
    for name, one in zip(named, ids, strict=True):
        _require_integers(f"ids of {name}", one, words, (torch.int64,))
    _require_alike(**named)
    _require_weights(words, weight=weight, bias=bias)
    kernels = choose("layer_norm", backend, words)
    return kernels.embedding_norm(ids, tables, padding, weight, bias, float(eps), dtype or words.dtype)


def linear(
    x: Tensor,
    first: LinearWeights,
    *,
    activation: str = "none",
    second: LinearWeights | None = None,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 0.0,
    groups: int = 1,
    backend: str = "auto",
) -> Tensor:
    """activation(x W^T + b), then, where they are given, a second product and LayerNorm(that + residual): what stands
    between two attentions, for inference.

    x: (rows, depth). first, second: weights from freeze_linear, of one precision; second's depth is first's columns.
    activation: "none", "gelu" (erf), "gelu_tanh" or "relu". residual: (rows, columns) of x's dtype; norm_weight,
    norm_bias: (columns,); all three or none. eps: added to the variance. Returns (rows, columns); with groups above 1
    a view (rows, groups, columns of a group) of memory in which each group stands by itself, as attention reads its
    heads. bf16 weights: x is rounded to bf16, sums are float32, and "gelu" is a polynomial that is wrong by at most
    1.2e-5. int8 weights: blocks of a row of x are quantised by themselves, the product of integers is exact, and "gelu"
    is wrong by at most 1.9e-4; matrix units (FASTRANK_CPU_ISA=amx) take them as bf16. float32 is multiplied there in
    three parts of bf16: numbers that are infinite or above 3.39e38 give NaN, and products below 1e-33 lose digits. In
    the C++ kernel a row's result does not depend on other rows.
    Raises ValueError with the offending shapes, and where a gradient is asked for.
    """
    last = first if second is None else second
    sizes = " then ".join(f"{one.columns} x {one.depth}" for one in (first, second) if one is not None)
    _require(
        x.dim() == 2 and first.depth == x.shape[1] and (second is None or second.depth == first.columns),
        f"linear takes x (rows, depth) and weights that fit it, not weights of {sizes}",
        x=x,
    )
    if not x.is_floating_point():
        raise ValueError(f"linear takes floating point numbers, not {x.dtype}.")
    norm = [tensor for tensor in (residual, norm_weight, norm_bias) if tensor is not None]
    if len(norm) not in (0, 3):
        raise ValueError("residual, norm_weight and norm_bias belong together: give all three or none.")
    if norm:
        _require(
            residual.shape == (x.shape[0], last.columns) and norm_weight.shape == norm_bias.shape == (last.columns,),
            f"linear takes residual (rows, {last.columns}), norm_weight and norm_bias ({last.columns},)",
            residual=residual,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
        )
        _require_alike(x=x, residual=residual)
        if norm_weight.dtype != torch.float32 or norm_bias.dtype != torch.float32:
            raise ValueError(f"norm_weight and norm_bias must be float32, not {norm_weight.dtype}, {norm_bias.dtype}.")
    if second is not None and first.precision != second.precision:
        raise ValueError("first and second must be frozen in one precision.")
    if activation not in LINEAR_ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: choose one of {', '.join(LINEAR_ACTIVATIONS)}.")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *norm)):
        raise ValueError("linear has no gradient: call it under torch.no_grad() or torch.inference_mode().")
    if groups != 1 and (second is not None or norm or groups < 1 or first.columns % (groups * GROUP_COLUMNS)):
        raise ValueError(
            f"groups={groups}: only the columns of a single product without a norm can stand in groups, each of a "
            f"multiple of {GROUP_COLUMNS} columns, not {first.columns} columns."
        )
    return choose("linear", backend, x).linear(
        x, first, activation, second, residual, norm_weight, norm_bias, float(eps), groups
    )


def release_linear(weights: LinearWeights) -> None:
    """Packs frozen weights for the backend that runs here, and gives back the memory of what they were packed from.

    Another backend or instruction set then refuses them with a RuntimeError. Where the backend packs nothing, nothing
    happens.
    """
    kernel = choose("linear", "auto", weights.bias)
    if hasattr(kernel, "pack"):
        kernel.pack(weights)
        weights.release()


LINEAR_ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu")
GROUP_COLUMNS = 16  # the floats of the widest vector: none may reach from one group into the next


def listwise(
    name: str,
    scores: Tensor,
    labels: Tensor,
    list_offsets: Tensor,
    *,
    options: Mapping[str, object],
    reduction: str = "none",
    backend: str = "auto",
    check: str = "",
) -> tuple[Tensor, Tensor]:
    """The terms of a listwise loss, summed and counted list by list, and reduced; differentiable once in scores.

    name: a loss of fastrank.losses.LOSSES, which is what a user calls. scores, labels: (documents,); labels bool,
    integers up to 2^53 or floating point, higher is better. list_offsets: int32 or int64 (lists + 1,). options: all
    options of the loss, as Loss.fill returns them. reduction: a name of REDUCTIONS. check: which labels the loss
    allows, a key of LABELS; scores must then be finite, too; "" looks at no value. Returns the sums (lists,), or one
    number where they are reduced, in the scores' dtype, and the counts int64 (lists,). Raises ValueError with the
    offending shapes or values. To torch.compile it is one operator, torch.ops.fastrank.listwise, whose third output is
    the gradients of the sums.
    """
    _require(
        scores.dim() == 1 and labels.shape == scores.shape,
        "A listwise loss takes scores and labels of one shape (documents,)",
        scores=scores,
        labels=labels,
        list_offsets=list_offsets,
    )
    if not scores.is_floating_point():
        raise ValueError(f"scores must be floating point numbers, not {scores.dtype}.")
    if labels.is_complex():
        raise ValueError(f"labels must be real numbers, not {labels.dtype}.")
    for what, tensor in (("labels", labels), ("list_offsets", list_offsets)):
        if tensor.device != scores.device:
            raise ValueError(f"{what} must be on {scores.device}, where the scores are, not on {tensor.device}.")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r}: choose one of {', '.join(REDUCTIONS)}.")
    given = scores, labels.detach(), list_offsets
    return _FusedLoss.apply(*given, reduction, (name, backend, check), UNUSED_OPTIONS | options)


REDUCTIONS = ("mean", "list_mean", "none", "sum")  # as Loss.__call__ describes them


# The operator takes the options of all losses; these stand for the ones that a loss does not have.
UNUSED_OPTIONS = {
    "temperature": 1.0,
    "discount": "",
    "ties": "",
    "margin": None,
    "squared": False,
    "weighting": "",
    "k": None,
    "gain": "",
}
torch.library.define(
    "fastrank::listwise",
    "(Tensor scores, Tensor labels, Tensor list_offsets, str name, str backend, str check, *, float temperature, "
    "str discount, str ties, float? margin, bool squared, str weighting, int? k, str gain) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("fastrank::listwise", "CompositeExplicitAutograd")
def _run_listwise(
    scores: Tensor, labels: Tensor, list_offsets: Tensor, name: str, backend: str, check: str, **options: object
) -> tuple[Tensor, Tensor, Tensor]:
    check_offsets("list_offsets", list_offsets, scores, segment="list", row="document")
    if check:
        _check_values(scores, labels, list_offsets, check)
    kernels = choose("listwise", backend, scores)
    _check_loss(name, kernels.LOSSES)
    used = {option: options[option] for option in _option_names(name)}
    return kernels.listwise(name, scores, labels, list_offsets.int(), used)


@functools.cache
def _option_names(name: str) -> tuple[str, ...]:
    return choose("listwise", "reference", torch.empty(0)).OPTIONS[name]


@torch.library.register_fake("fastrank::listwise")
def _fake_listwise(scores, labels, list_offsets, name, backend, check, **options):
    lists = list_offsets.shape[0] - 1
    return scores.new_empty(lists), scores.new_empty(lists, dtype=torch.int64), scores.new_empty(scores.shape)


class _FusedLoss(torch.autograd.Function):
    """The kernel writes the gradients of the sums in the forward pass, where they are divided by what the sums are; the
    backward pass only scales them. Dividing in place is safe: the operator's outputs are fresh memory."""

    @staticmethod
    def forward(
        ctx,
        scores: Tensor,
        labels: Tensor,
        list_offsets: Tensor,
        reduction: str,
        settings: tuple[str, str, str],
        options: dict[str, object],
    ) -> tuple[Tensor, Tensor]:
        value, terms, gradients = torch.ops.fastrank.listwise(
            scores.detach(), labels, list_offsets, *settings, **options
        )
        if reduction == "mean":
            num_terms = terms.sum().clamp_(min=1)
            value, gradients = value.sum() / num_terms, gradients.div_(num_terms)
        elif reduction == "list_mean":
            shares = 1 / (terms.clamp(min=1) * terms.count_nonzero().clamp_(min=1)).to(value.dtype)
            each = shares.repeat_interleave(list_offsets.diff(), output_size=len(gradients))
            value, gradients = (value * shares).sum(), gradients.mul_(each)
        elif reduction == "sum":
            value = value.sum()
        # Only unreduced sums need to know how long lists are.
        ctx.save_for_backward(gradients, *([list_offsets.diff()] if reduction == "none" else []))
        ctx.mark_non_differentiable(terms)
        return value, terms

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor, _terms: Tensor | None):
        gradients, *lengths = ctx.saved_tensors
        if lengths:
            upstream = upstream.repeat_interleave(lengths[0], output_size=len(gradients))
        return gradients * upstream, None, None, None, None, None


# What a loss may demand of labels: a sentence for the others, and which these are.
LABELS = {
    "ordered": ("labels must be numbers", torch.isnan),
    "finite": ("this loss uses their values, so labels must be finite numbers", lambda labels: ~labels.isfinite()),
    "probabilities": ("labels must be probabilities, from 0 to 1", lambda labels: ~((labels >= 0) & (labels <= 1))),
}


def _check_values(scores: Tensor, labels: Tensor, list_offsets: Tensor, check: str) -> None:
    for name, values, (rule, find_wrong) in (
        ("scores", scores.detach(), ("scores must be finite numbers", LABELS["finite"][1])),
        ("labels", labels.detach(), LABELS[check]),
    ):
        # A finite sum says in one pass that all are finite; one that overflowed needs the closer look.
        if check != "probabilities" and math.isfinite(values.sum()):
            continue
        wrong = find_wrong(values)
        if wrong.any():
            position = int(wrong.nonzero()[0])
            where = int(torch.searchsorted(list_offsets, position, right=True)) - 1
            document = position - int(list_offsets[where])
            raise ValueError(
                f"{name}[{position}] is {values[position].item()} (document {document} of list {where}): {rule}."
            )


def listwise_terms(name: str, labels: Tensor, list_offsets: Tensor) -> Tensor:
    """How many terms listwise() counts in each list, int64 (lists,): they are known from the labels alone.

    name, labels, list_offsets: as in listwise().
    """
    _require(labels.dim() == 1, "listwise_terms takes labels (documents,)", labels=labels, list_offsets=list_offsets)
    check_offsets("list_offsets", list_offsets, labels, segment="list", row="document")
    reference = choose("listwise", "reference", labels)
    _check_loss(name, reference.LOSSES)
    return reference.count_terms(name, labels, list_offsets)


def _check_loss(name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ValueError(f"There is no listwise loss {name!r}; known are {', '.join(sorted(known))}.")


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))}{',' if tensor.dim() == 1 else ''})"


def _require(holds: bool, rule: str, **tensors: Tensor) -> None:
    if not holds:
        given = ", ".join(f"{name} {_shape(tensor)}" for name, tensor in tensors.items())
        raise ValueError(f"{rule}; given: {given}.")


def _require_alike(**tensors: Tensor) -> None:
    first = next(iter(tensors.values()))
    if any(tensor.dtype != first.dtype or tensor.device != first.device for tensor in tensors.values()):
        given = ", ".join(f"{name} {tensor.dtype} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"All of these must have one dtype and one device; given: {given}.")


def _require_weights(beside: Tensor, **tensors: Tensor) -> None:
    if any(one.dtype not in (beside.dtype, torch.float32) or one.device != beside.device for one in tensors.values()):
        given = ", ".join(f"{name} {tensor.dtype} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(
            f"All of these must be of one dtype or float32, and on one device: {beside.dtype} on {beside.device} and "
            f"{given}."
        )


def _require_contiguous_rows(**tensors: Tensor) -> None:
    for name, rows in tensors.items():
        if rows.shape[-1] > 1 and rows.stride(-1) != 1 and rows.numel():
            raise ValueError(
                f"The last dimension of {name} must be contiguous, not of stride {rows.stride(-1)}: "
                f"pass {name}.contiguous()."
            )


def _require_integers(name: str, tensor: Tensor, beside: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes or tensor.device != beside.device:
        raise ValueError(
            f"{name} must be {' or '.join(map(str, dtypes))} on {beside.device}, where the values are, "
            f"not {tensor.dtype} on {tensor.device}."
        )


def _check_span(span: tuple[int, int] | None, offsets: Tensor) -> None:
    if span is not None and offsets.device.type == "cpu" and len(offsets) > 1:
        lengths = np.diff(offsets.numpy())
        if lengths.min() < span[0] or lengths.max() > span[1]:
            raise ValueError(f"span says {span}, but the pairs have from {lengths.min()} to {lengths.max()} tokens.")


def check_offsets(name: str, offsets: Tensor, rows: Tensor, *, segment: str = "pair", row: str = "token") -> None:
    """Offsets begin at 0, never decrease and end at the number of rows: otherwise a kernel would read foreign
    memory. Those of lists may be int64, which is what torch makes by itself."""
    _require_integers(name, offsets, rows, (torch.int32, torch.int64) if segment == "list" else (torch.int32,))
    if offsets.dim() != 1 or not len(offsets):
        raise ValueError(f"{name} must have the shape ({segment}s + 1,), not {_shape(offsets)}.")
    if offsets.device.type != "cpu":
        return
    values = offsets.numpy()
    if values[0] != 0:
        raise ValueError(f"{name} must begin at 0, not at {values[0]}.")
    if values[-1] != len(rows):
        raise ValueError(f"{name} must end at the number of {row}s, {len(rows)}, not at {values[-1]}.")
    steps = values[1:] < values[:-1]
    if steps.any():
        first = int(steps.argmax())
        raise ValueError(
            f"{name} must not decrease, but {segment} {first} reaches from {values[first]} to {values[first + 1]}."
        )
