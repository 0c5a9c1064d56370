"""The layers of an encoder on a GPU in as few steps of Python as it takes: module by module and operation by operation,
Python needs longer to start a small model's kernels than the GPU to run them.

encoder.Layer defines what is computed, and the kernels are the same. Here a layer is one node of the autograd graph,
its backward written out; products are torch's, on half-precision copies of the weights, which a pass makes all at once;
biases are summed where their gradients pass by; and a batch's launches are checked for the first layer only. The layers
are not called as modules: hooks on them or on what is in them do not run, and autocast is not looked at.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from fastrank.backend import choose

if TYPE_CHECKING:
    from fastrank.kernels.configuration import Launch
    from fastrank.model.encoder import Layer

HALF = (torch.bfloat16, torch.float16)


def suits(layers: Sequence[Layer], x: Tensor) -> bool:
    """Whether the layers can go this way: half precision throughout, and each of their operations by Triton here."""
    return len(x) > 0 and x.dtype == layers[0].attention_output.precision and can_run(layers, x.device.type, x.dtype)


def can_run(layers: Sequence[Layer], device_type: str, dtype: torch.dtype) -> bool:
    """Whether layers of this precision can go this way on such a device."""
    layer = layers[0]
    if dtype not in HALF or layer.activation == "relu" or layer.norm.weight.dtype != torch.float32:
        return False
    if not all("weight" in one._parameters for layer in layers for one in _products(layer)):  # pruned, for instance
        return False
    sizes = layer.heads[1], layer.norm.weight.shape[0], layer.up.out_features
    return _has_kernels(device_type, dtype, *sizes, os.environ.get("FASTRANK_BACKEND"))


@functools.cache
def _has_kernels(device_type: str, dtype: torch.dtype, head_dim: int, hidden: int, inner: int, _: str | None) -> bool:
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    probes = {"attention": head_dim, "layer_norm": hidden, "gelu": inner}
    kernels = (choose(op, "auto", torch.empty(0, n, dtype=dtype, device=device_type)) for op, n in probes.items())
    return all(kernel.__name__.endswith(".gpu") for kernel in kernels)


class Pass:
    """One batch on its way through the layers: what they share, above all their launches, which are made for one layer
    and repeated with the tensors of the others."""

    def __init__(self, layer: Layer, offsets: Tensor, span: tuple[int, int], num_tokens: int) -> None:
        # These need triton, which a CPU goes without.
        from fastrank.kernels.attention import gpu as attention
        from fastrank.kernels.gelu import gpu as gelu
        from fastrank.kernels.layer_norm import gpu as norms

        self.attention, self.gelu, self.norms = attention, gelu, norms
        self.heads, self.head_dim = layer.heads
        self.tanh_form = layer.activation == "gelu_tanh"
        self.first_rows = offsets[:-1]
        self.cuts = attention.find_cuts(offsets, None, num_tokens, num_tokens, span)
        self._launches: dict[tuple, list[tuple[Launch, tuple[str, ...]]]] = {}

    @functools.cached_property
    def first_cuts(self) -> object:
        """For the last layer, whose only queries are the pairs' first tokens."""
        return self.attention.first_token_cuts(self.cuts)

    def attend(self, given: Sequence[Tensor], out: Tensor, statistics: Tensor) -> None:
        """given: what products made of the tokens, (tokens, 3 * hidden) for q, k and v, or (pairs, hidden) for q and
        (tokens, 2 * hidden) for k and v. Writes out (queries, hidden) and statistics."""
        q, k, v = self._parts(given)

        def make() -> Iterable[Launch]:
            cuts = self.cuts if len(given) == 1 else self.first_cuts
            return self.attention.forward_launches(q, k, v, self._heads(out), statistics, cuts, self.head_dim**-0.5)

        highest, log_totals = statistics
        tensors = {"q": q, "k": k, "v": v, "out": out, "highest": highest, "log_totals": log_totals}
        self._repeat(("attend", len(given)), make, tensors)

    def attend_backward(
        self, given: Sequence[Tensor], out: Tensor, statistics: Tensor, dout: Tensor, gradients: Sequence[Tensor]
    ) -> None:
        """Writes the gradients of what was given."""
        parts, made = self._parts(given), self._parts(gradients)

        def make() -> Iterable[Launch]:
            cuts = self.cuts if len(given) == 1 else self.first_cuts
            more = self._heads(out), self._heads(dout), statistics, made, cuts, self.head_dim**-0.5
            return self.attention.backward_launches(*parts, *more)

        names = "q", "k", "v", "out", "dout", "highest", "log_totals", "dq", "dk", "dv"
        tensors = dict(zip(names, (*parts, out, dout, *statistics, *made), strict=True))
        self._repeat(("attend backward", len(given)), make, tensors)

    def normalise(
        self, x: Tensor, residual: Tensor, norm: torch.nn.Module, out: Tensor, statistics: Sequence[Tensor]
    ) -> None:
        """Writes out and statistics."""
        given, eps = (x, residual, norm.weight, norm.bias), float(norm.eps)
        names = "x", "residual", "weight", "bias", "out", "means", "inverses"
        tensors = dict(zip(names, (*given, out, *statistics), strict=True))
        key = "normalise", len(x), eps
        self._repeat(key, lambda: [self.norms.forward_launch(*given, eps, out, statistics)], tensors)

    def activate(self, x: Tensor, bias: Tensor, out: Tensor) -> None:
        """Writes out, which may be x."""
        tensors = {"x": x, "bias": bias, "out": out}
        self._repeat(("activate", len(x)), lambda: [self.gelu.forward_launch(x, bias, self.tanh_form, out)], tensors)

    def _repeat(self, key: tuple, make: Callable[[], Iterable[Launch]], tensors: Mapping[str, Tensor]) -> None:
        """Runs launches with these tensors; makes them the first time, and keeps nothing of these tensors alive."""
        launches = self._launches.get(key)
        if launches is None:
            launches = [(one, tuple(name for name in tensors if name in one.places)) for one in make()]
            for launch, names in launches:
                launch.forget(names)
            self._launches[key] = launches
        for launch, names in launches:
            launch(**{name: tensors[name] for name in names})

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.view(len(rows), self.heads, self.head_dim)

    def _parts(self, given: Sequence[Tensor]) -> list[Tensor]:
        """q, k and v."""
        return [part for one in given for part in one.view(len(one), -1, self.heads, self.head_dim).unbind(1)]


def _products(layer: Layer) -> list[torch.nn.Module]:
    """In the order in which they are computed: of q, k and v, or of k and v and of q; then three."""
    first = [layer.key_value, layer.query] if layer.is_last else [layer.qkv]
    return [*first, layer.attention_output, layer.up, layer.down]


def state_of(parameters: Sequence[Tensor]) -> list[tuple]:
    """Differs once one of them lies elsewhere or has been edited in place. An edit through .data is not seen, nor one
    of a tensor that was made in inference mode."""
    return [(None if one.is_inference() else one._version, one.data_ptr()) for one in parameters]


class Halves:
    """Weights and biases of layers in half precision, for inference: cast once, until one of them changes as far as
    state_of() sees; anew each time where they learn, since a fused optimizer counts no versions up."""

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._linears = [_products(layer) for layer in layers]
        # Looking a parameter up in its module takes longer than everything else here.
        self._slots = [
            (linear._parameters, name) for some in self._linears for linear in some for name in ("weight", "bias")
        ]
        self._state: list[tuple] = []
        self._originals: list[Tensor] = []  # their memory stays theirs, so that an address tells who lies there
        self._layers: list[list[tuple[Tensor, Tensor]]] = []

    def get(self) -> list[list[tuple[Tensor, Tensor]]]:
        """Of each layer, in the order of _products(): the weight, transposed, and the bias."""
        originals = [parameters[name] for parameters, name in self._slots]
        if any(one.requires_grad for one in originals):
            self._state, self._originals, self._layers = [], [], []
            return self._cast()
        state = state_of(originals)
        if state != self._state:
            self._layers = self._cast()
            self._state, self._originals = state, [one.detach() for one in originals]
        return self._layers

    def _cast(self) -> list[list[tuple[Tensor, Tensor]]]:
        casts = iter(_cast([linear for some in self._linears for linear in some], self.dtype))
        return [[(weight.t(), bias) for weight, bias in itertools.islice(casts, len(some))] for some in self._linears]


@torch.no_grad()
def infer(layers: Sequence[Layer], x: Tensor, offsets: Tensor, span: tuple[int, int], halves: Halves) -> Tensor:
    """All layers, without a gradient: x (tokens, hidden), which is overwritten -> the first tokens' vectors, (pairs,
    hidden). One set of buffers serves all layers."""
    tokens, hidden = x.shape
    one_pass = Pass(layers[0], offsets, span, tokens)
    qkv = x.new_empty(tokens, 3 * hidden)
    for layer, products in zip(layers, halves.get(), strict=True):
        *first, (out_weight, out_bias), (up_weight, _), (down_weight, down_bias) = products
        if layer.is_last:
            key_value = qkv.view(-1)[: 2 * x.numel()].view(tokens, 2 * hidden)
            torch.addmm(first[0][1], x, first[0][0], out=key_value)
            x = x.index_select(0, one_pass.first_rows)
            given = torch.addmm(first[1][1], x, first[1][0]), key_value
        else:
            torch.addmm(first[0][1], x, first[0][0], out=qkv)
            given = (qkv,)
        if layer is layers[0] or layer.is_last:
            inner = x.new_empty(len(x), layer.up.out_features)
            attended, projected, y = (torch.empty_like(x) for _ in range(3))
            statistics = one_pass.attention.empty_statistics(attended.unflatten(1, layer.heads))
            means = one_pass.norms.empty_statistics(x)
        one_pass.attend(given, attended, statistics)
        torch.addmm(out_bias, attended, out_weight, out=projected)
        one_pass.normalise(projected, x, layer.attention_norm, y, means)
        torch.mm(y, up_weight, out=inner)
        one_pass.activate(inner, layer.up.bias, inner)
        torch.addmm(down_bias, inner, down_weight, out=projected)
        one_pass.normalise(projected, y, layer.norm, x, means)
    return x


def train(
    layers: Sequence[Layer], x: Tensor, offsets: Tensor, span: tuple[int, int], *, recomputes: bool = False
) -> Tensor:
    """All layers, differentiable once: x (tokens, hidden) -> the first tokens' vectors, (pairs, hidden). recomputes: as
    Encoder says."""
    one_pass = Pass(layers[0], offsets, span, len(x))
    casts = iter(_cast([linear for layer in layers for linear in _products(layer)], x.dtype))
    for layer in layers:
        linears, norms = _products(layer), (layer.attention_norm, layer.norm)
        learned = [parameter for one in (*linears, *norms) for parameter in (one.weight, one.bias)]
        given = one_pass, layer, [next(casts) for _ in linears], *learned
        x = checkpoint(_Layer.apply, x, *given, use_reentrant=False) if recomputes else _Layer.apply(x, *given)
    return x


@torch.no_grad()
def _cast(linears: Sequence[torch.nn.Module], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Weights and biases in `dtype`, in memory of their own: the next step may change the weights, and a backward must
    still find these."""
    originals = [one for linear in linears for one in (linear.weight, linear.bias)]
    sizes = [one.numel() for one in originals]
    parts = torch.empty(sum(sizes), dtype=dtype, device=originals[0].device).split(sizes)
    copies = [part.view(one.shape) for part, one in zip(parts, originals, strict=True)]
    torch._foreach_copy_(copies, originals)
    return list(zip(copies[::2], copies[1::2], strict=True))


class _Layer(Function):
    """One layer. Its parameters come after the settings for autograd to see: weight and bias of each of _products(),
    then of the two norms."""

    @staticmethod
    def forward(ctx, x: Tensor, one_pass: Pass, layer: Layer, halves: list[tuple[Tensor, Tensor]], *learned: Tensor):
        *first, (out_weight, out_bias), (up_weight, _), (down_weight, down_bias) = halves
        share = layer.dropout if layer.training else 0.0
        rows = x.index_select(0, one_pass.first_rows) if layer.is_last else x  # what has queries
        given = [torch.addmm(first[0][1], x, first[0][0].t())]
        if layer.is_last:
            given.insert(0, torch.addmm(first[1][1], rows, first[1][0].t()))
        attended, y, z = (torch.empty_like(rows) for _ in range(3))
        statistics = one_pass.attention.empty_statistics(attended.unflatten(1, layer.heads))
        first_means, second_means = one_pass.norms.empty_statistics(rows), one_pass.norms.empty_statistics(rows)

        one_pass.attend(given, attended, statistics)
        projected, first_mask = _drop(torch.addmm(out_bias, attended, out_weight.t()), share)
        one_pass.normalise(projected, rows, layer.attention_norm, y, first_means)
        raw = torch.mm(y, up_weight.t())
        inner = torch.empty_like(raw)
        one_pass.activate(raw, layer.up.bias, inner)
        down, second_mask = _drop(torch.addmm(down_bias, inner, down_weight.t()), share)
        one_pass.normalise(down, y, layer.norm, z, second_means)

        ctx.save_for_backward(
            x, rows, attended, statistics, projected, first_mask, *first_means, y, raw, inner, down, second_mask,
            *second_means, layer.up.bias, layer.attention_norm.weight, layer.norm.weight,
            out_weight, up_weight, down_weight, *(weight for weight, _ in first), *given,
        )  # fmt: skip
        ctx.settings = one_pass, share, layer.is_last
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, dz: Tensor):
        one_pass, share, is_last = ctx.settings
        (
            x, rows, attended, statistics, projected, first_mask, first_mean, first_inverse, y, raw, inner, down,
            second_mask, second_mean, second_inverse, up_bias, first_norm, second_norm,
            out_weight, up_weight, down_weight, *more,
        ) = ctx.saved_tensors  # fmt: skip
        first_weights, given = more[: 1 + is_last], more[1 + is_last :]
        x_needed, _, _, _, *needed = ctx.needs_input_grad
        gradients: list[Tensor | None] = [None] * len(needed)
        out_place = 2 * len(first_weights)  # of attention_output's weight; up, down and the norms follow
        up_place, down_place, first_norm_place, second_norm_place = (out_place + step for step in (2, 4, 6, 8))

        def differentiate_norm(place: int, *inputs: object) -> tuple[Tensor, Tensor]:
            """The gradient of what the norm was taken of, and the sum of its rows."""
            dx = torch.empty_like(rows)
            launch, sums = one_pass.norms.backward_launch(*inputs, dx)
            launch()
            *gradients[place : place + 2], total = sums.sum(0)
            return dx, total

        def differentiate_weights(place: int, dout: Tensor, factor: Tensor, total: Tensor | None) -> None:
            """Of a product of `factor`; total: the sum of dout's rows, where it is known."""
            if needed[place]:
                gradients[place] = _outer(dout, factor)
            if needed[place + 1]:
                gradients[place + 1] = dout.sum(0, dtype=torch.float32) if total is None else total

        statistics_of_second = second_mean, second_inverse
        dy, total = differentiate_norm(
            second_norm_place, down, y, second_norm, statistics_of_second, one_pass.norms.align(dz)
        )
        ddown, total = _drop_backward(dy, second_mask, share, total)
        differentiate_weights(down_place, ddown, inner, total)
        draw = torch.mm(ddown, down_weight)
        launch, sums = one_pass.gelu.backward_launch(raw, up_bias, one_pass.tanh_form, draw, draw)
        launch()
        differentiate_weights(up_place, draw, y, sums.sum(0))
        dy.addmm_(draw, up_weight)

        drows, total = differentiate_norm(
            first_norm_place, projected, rows, first_norm, (first_mean, first_inverse), dy
        )
        dprojected, total = _drop_backward(drows, first_mask, share, total)
        differentiate_weights(out_place, dprojected, attended, total)
        dgiven = [torch.empty_like(one) for one in given]
        one_pass.attend_backward(given, attended, statistics, torch.mm(dprojected, out_weight), dgiven)
        differentiate_weights(0, dgiven[-1], x, None)
        if is_last:
            differentiate_weights(2, dgiven[0], rows, None)
        if not x_needed:
            dx = None
        elif is_last:
            drows.addmm_(dgiven[0], first_weights[1])
            dx = torch.mm(dgiven[1], first_weights[0]).index_add_(0, one_pass.first_rows, drows)
        else:
            dx = drows.addmm_(dgiven[0], first_weights[0])
        return dx, None, None, None, *gradients


def _drop(x: Tensor, share: float) -> tuple[Tensor, Tensor | None]:
    return torch.native_dropout(x, share, True) if share > 0 else (x, None)


def _drop_backward(dout: Tensor, mask: Tensor | None, share: float, total: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradient before dropout, and the sum of its rows where it is known."""
    if mask is None:
        return dout, total
    return torch.ops.aten.native_dropout_backward(dout, mask, 1 / (1 - share) if share < 1 else 0.0), None


def _outer(dout: Tensor, given: Tensor) -> Tensor:
    """dout^T given, in float32: the gradient of a product's weight."""
    if dout.is_cuda:
        return torch.mm(dout.t(), given, out_dtype=torch.float32)
    return dout.t().float() @ given.float()
