"""The layers of an encoder on a GPU in as few steps of Python as it takes: module by module and operation by operation,
Python needs longer to start a small model's kernels than the GPU to run them.

encoder.Layer defines what is computed, and the kernels are the same. Here a layer is one node of the autograd graph,
its backward written out; products are torch's, on half-precision copies of the weights, which a pass makes all at once;
biases are summed where their gradients pass by; and a batch's launches are checked for the first layer only. The layers
are not called as modules: hooks on them or on what is in them do not run, and autocast is not looked at.

For inference the products of all tokens may be in fp8: weights with a scale for each output, quantised once, and
tokens with a scale each, quantised by whatever kernel wrote them. What lies between products stays in half precision,
and so do products of the last layer's few rows.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from fastrank import ops
from fastrank.backend import choose, refusals
from fastrank.kernels.accumulation import accumulator

if TYPE_CHECKING:
    from fastrank.kernels.configuration import Launch
    from fastrank.model.encoder import Layer

HALF = (torch.bfloat16, torch.float16)
FP8_STEP = 16  # fp8 products take columns in sixteens, and so are rows given to them
FP8_MOST_INNER = 8192  # columns of the feed-forward network whose rows one program quantises


def fp8_refusals(layers: Sequence[Layer]) -> list[str]:
    """Why layers of these sizes cannot run in fp8, in sentences; of the device nothing."""
    layer = layers[0]
    hidden, inner = layer.norm.weight.shape[0], layer.up.out_features
    found = [
        f"The {what} is {size}, no multiple of {FP8_STEP}."
        for what, size in (("hidden size", hidden), ("feed-forward network's size", inner))
        if size % FP8_STEP
    ]
    if inner > FP8_MOST_INNER:
        found.append(f"The feed-forward network's size is {inner}, above {FP8_MOST_INNER}.")
    if layer.activation == "relu":
        found.append("The feed-forward network's activation is relu, not a form of GELU.")
    return found


def has_fp8(device: torch.device) -> bool:
    """Whether rows can be quantised to fp8, and multiplied, there."""
    return _has_fp8(device, os.environ.get("TRITON_INTERPRET"))


@functools.cache
def _has_fp8(device: torch.device, _: str | None) -> bool:
    return not refusals("fp8", "gpu", torch.empty(0, FP8_STEP, dtype=torch.bfloat16, device=device))


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


class Rows(NamedTuple):
    """What products multiply: values (rows, columns) in half precision, and where they do so in fp8, codes of the same
    shape and scales, float32 (rows, 1)."""

    values: Tensor
    codes: Tensor | None = None
    scales: Tensor | None = None


def rows_of(values: Tensor, *, in_fp8: bool) -> Rows:
    """With room for codes and scales where they are wanted."""
    if not in_fp8:
        return Rows(values)
    codes = torch.empty_like(values, dtype=torch.float8_e4m3fn)
    return Rows(values, codes, torch.empty(len(values), 1, dtype=torch.float32, device=values.device))


class Pass:
    """One batch on its way through the layers: what they share, above all their launches, which are made for one layer
    and repeated with the tensors of the others."""

    def __init__(self, layer: Layer, offsets: Tensor, span: tuple[int, int], num_tokens: int) -> None:
        # These need triton, which a CPU goes without.
        from fastrank.kernels.attention import gpu as attention
        from fastrank.kernels.configuration import run_together
        from fastrank.kernels.gelu import gpu as gelu
        from fastrank.kernels.layer_norm import gpu as norms

        self._run_together = run_together
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
        self._repeat(("attend", len(given)), make, tensors, independent=True)

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

    def normalise_rows(
        self, x: Tensor, residual: Rows, norm: torch.nn.Module, out: Rows, statistics: Sequence[Tensor]
    ) -> None:
        """Writes out, in fp8 too where it has codes, else statistics."""
        if out.codes is None:
            return self.normalise(x, residual.values, norm, out.values, statistics)
        given, eps = (x, residual.values, norm.weight, norm.bias), float(norm.eps)
        names = "x", "residual", "weight", "bias", "out", "codes", "scales"
        tensors = dict(zip(names, (*given, *out), strict=True))
        return self._repeat(("normalise fp8", len(x), eps), lambda: [self.norms.fp8_launch(*given, eps, *out)], tensors)

    def activate_rows(self, x: Rows, bias: Tensor) -> None:
        """Writes x: in its place, or in fp8 where it has codes."""
        if x.codes is None:
            return self.activate(x.values, bias, x.values)
        tensors = {"x": x.values, "bias": bias, "codes": x.codes, "scales": x.scales}
        make = lambda: [self.gelu.fp8_launch(x.values, bias, self.tanh_form, x.codes, x.scales)]  # noqa: E731
        return self._repeat(("activate fp8", len(x.values)), make, tensors)

    def quantise(self, x: Rows) -> None:
        """Writes x in fp8, where it has codes."""
        if x.codes is not None:
            from fastrank.kernels.fp8 import gpu as fp8

            tensors = {"x": x.values, "codes": x.codes, "scales": x.scales}
            self._repeat(("quantise", len(x.values)), lambda: [fp8.rows_launch(*x)], tensors)

    def _repeat(
        self,
        key: tuple,
        make: Callable[[], Iterable[Launch]],
        tensors: Mapping[str, Tensor],
        *,
        independent: bool = False,
    ) -> None:
        """Runs launches with these tensors; makes them the first time, and keeps nothing of these tensors alive.
        independent: none reads what another writes."""
        launches = self._launches.get(key)
        if launches is None:
            launches = [(one, tuple(name for name in tensors if name in one.places)) for one in make()]
            for launch, names in launches:
                launch.forget(names)
            self._launches[key] = launches
        given = [(launch, {name: tensors[name] for name in names}) for launch, names in launches]
        if independent:
            self._run_together([functools.partial(launch, **some) for launch, some in given])
        else:
            for launch, some in given:
                launch(**some)

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

    in_fp8 = False

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._linears = [_products(layer) for layer in layers]
        # Looking a parameter up in its module takes longer than everything else here.
        self._slots = [
            (linear._parameters, name) for some in self._linears for linear in some for name in ("weight", "bias")
        ]
        self._state: list[tuple] = []
        self._originals: list[Tensor] = []  # their memory stays theirs, so that an address tells who lies there
        self._layers: list[list[HalfProduct | Fp8Product]] = []

    def get(self) -> list[list[HalfProduct | Fp8Product]]:
        """Of each layer, in the order of _products()."""
        originals = [parameters[name] for parameters, name in self._slots]
        if any(one.requires_grad for one in originals):
            self._state, self._originals, self._layers = [], [], []
            return self._make()
        state = state_of(originals)
        if state != self._state:
            self._layers = self._make()
            self._state, self._originals = state, [one.detach() for one in originals]
        return self._layers

    def _make(self) -> list[list[HalfProduct | Fp8Product]]:
        casts = iter(_cast([linear for some in self._linears for linear in some], self.dtype))
        return [[HalfProduct(*one) for one in itertools.islice(casts, len(some))] for some in self._linears]


class Fp8Weights(Halves):
    """The same with weights in fp8, but for those products of the last layer that have few rows."""

    in_fp8 = True

    def _make(self) -> list[list[HalfProduct | Fp8Product]]:
        *before, (key_value, *few) = self._linears
        made = [[Fp8Product(linear, self.dtype) for linear in some] for some in (*before, [key_value])]
        made[-1] += [HalfProduct(*one) for one in _cast(few, self.dtype)]
        return made


class HalfProduct:
    """Rows in half precision times a weight, plus a bias."""

    in_fp8 = False

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight.t(), bias

    def __call__(self, x: Rows, out: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.values, self.weight, out=out)

    def without_bias(self, x: Rows, out: Tensor) -> Tensor:
        return torch.mm(x.values, self.weight, out=out)


class Fp8Product:
    """Rows in fp8 times a weight in fp8, plus a bias; out in half precision."""

    in_fp8 = True

    def __init__(self, linear: torch.nn.Module, dtype: torch.dtype) -> None:
        codes, scales = ops.quantise_rows(linear.weight.detach(), backend="reference")
        self.codes, self.scales = codes.t(), scales[None]
        self.bias = linear.bias.detach().to(dtype)

    def __call__(self, x: Rows, out: Tensor) -> Tensor:
        return self._multiply(x, self.bias, out)

    def without_bias(self, x: Rows, out: Tensor) -> Tensor:
        return self._multiply(x, None, out)

    def _multiply(self, x: Rows, bias: Tensor | None, out: Tensor) -> Tensor:
        # Sums are kept in the matrix units, in less than float32 but far above a code's rounding, at twice the rate.
        how = {"bias": bias, "out_dtype": out.dtype, "use_fast_accum": True, "out": out}
        return torch._scaled_mm(x.codes, self.codes, x.scales, self.scales, **how)


@torch.no_grad()
def infer(layers: Sequence[Layer], x: Tensor, offsets: Tensor, span: tuple[int, int], weights: Halves) -> Tensor:
    """All layers, without a gradient: x (tokens, hidden), which is overwritten -> the first tokens' vectors, (pairs,
    hidden). One set of buffers serves all layers."""
    if weights.in_fp8 and len(x) % FP8_STEP:  # rows of no pair, which nothing reads but their products
        x = torch.nn.functional.pad(x, (0, 0, 0, -len(x) % FP8_STEP))
    tokens, hidden = x.shape
    one_pass = Pass(layers[0], offsets, span, tokens)
    qkv = x.new_empty(tokens, 3 * hidden)
    x = rows_of(x, in_fp8=weights.in_fp8)
    one_pass.quantise(x)
    for layer, (*first, out_product, up, down) in zip(layers, weights.get(), strict=True):
        if layer.is_last:
            key_value = first[0](x, qkv.view(-1)[: 2 * x.values.numel()].view(tokens, 2 * hidden))
            x = Rows(x.values.index_select(0, one_pass.first_rows))
            given = first[1](x, torch.empty_like(x.values)), key_value
        else:
            given = (first[0](x, qkv),)
        if layer is layers[0] or layer.is_last:
            inner = rows_of(qkv.new_empty(len(x.values), layer.up.out_features), in_fp8=down.in_fp8)
            attended = rows_of(torch.empty_like(x.values), in_fp8=out_product.in_fp8)
            y = rows_of(torch.empty_like(x.values), in_fp8=up.in_fp8)
            projected = torch.empty_like(x.values)
            statistics = one_pass.attention.empty_statistics(projected.unflatten(1, layer.heads))
            means = one_pass.norms.empty_statistics(projected)
        one_pass.attend(given, attended.values, statistics)
        one_pass.quantise(attended)
        out_product(attended, projected)
        one_pass.normalise_rows(projected, x, layer.attention_norm, y, means)
        up.without_bias(y, inner.values)
        one_pass.activate_rows(inner, layer.up.bias)
        down(inner, projected)
        one_pass.normalise_rows(projected, y, layer.norm, x, means)
    return x.values


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
        # Those of weights: vectors are small, and autograd adds all of them up in few launches.
        accumulators = [accumulator(one) if one.dim() > 1 else None for one in learned]
        ctx.settings = one_pass, share, layer.is_last, accumulators
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, dz: Tensor):
        one_pass, share, is_last, accumulators = ctx.settings
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
                gradients[place] = _outer(dout, factor, accumulators[place])
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


def _outer(dout: Tensor, given: Tensor, accumulator: Tensor | None) -> Tensor | None:
    """dout^T given, in float32: the gradient of a product's weight. None where it has been added to an accumulator."""
    if accumulator is None:
        return torch.mm(dout.t(), given, out_dtype=torch.float32) if dout.is_cuda else dout.t().float() @ given.float()
    if dout.is_cuda:
        torch.addmm(accumulator, dout.t(), given, out_dtype=torch.float32, out=accumulator)
    else:
        accumulator.addmm_(dout.t().float(), given.float())
    return None
