"""LayerNorm in Triton: of a sum (for inference in fp8, too), and of the vectors of packed token ids; float32 inside,
weights and bias float32.

Saved for the backward are the inputs and two numbers a row. Sums over rows are made by a fixed number of programs and
then by torch, without atomics, so that a gradient is the same bit for bit in every run.
"""

import functools
from collections.abc import Callable, Sequence

import torch
import triton
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from triton import language as tl

from fastrank.kernels.accumulation import accumulator
from fastrank.kernels.configuration import (
    FLOATS,
    HALF,
    POINTERS,
    STEP,
    Configuration,
    Launch,
    Table,
    align,
    configure,
    kernel,
    name_of,
)
from fastrank.kernels.fp8.gpu import TILE, WIDTHS, write_codes

MOST_PROGRAMS = 512  # that sum over rows
FEW_IDS = 4  # of a table whose gradient is a sum for each


@triton.jit
def load_rows(ptr, rows, columns, inside, num_steps):
    offsets = rows.to(tl.int64)[:, None] * (num_steps * STEP) + columns[None, :]
    return tl.load(ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_rows(ptr, values, rows, columns, inside, num_steps):
    offsets = rows.to(tl.int64)[:, None] * (num_steps * STEP) + columns[None, :]
    tl.store(ptr + offsets, values.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def sum_vectors(
    token_ids_ptr,
    token_types_ptr,
    positions_ptr,
    words_ptr,
    types_ptr,
    places_ptr,
    rows,
    num_rows,
    columns,
    inside,
    num_steps,
):
    """Word, type and position vectors of the tokens, summed."""
    ids = tl.load(token_ids_ptr + rows, mask=rows < num_rows, other=0)
    types = tl.load(token_types_ptr + rows, mask=rows < num_rows, other=0)
    positions = tl.load(positions_ptr + rows, mask=rows < num_rows, other=0)
    summed = load_rows(words_ptr, ids, columns, inside, num_steps)
    summed += load_rows(types_ptr, types, columns, inside, num_steps)
    return summed + load_rows(places_ptr, positions, columns, inside, num_steps)


@triton.jit
def normalise(summed, weight_ptr, bias_ptr, columns, inside, num_steps, eps):
    """Rows of LayerNorm, 0 outside, their means and inverse deviations."""
    num_columns = num_steps * STEP
    weight = tl.load(weight_ptr + columns, mask=columns < num_columns, other=0.0)
    bias = tl.load(bias_ptr + columns, mask=columns < num_columns, other=0.0)
    mean = tl.sum(summed, 1) / num_columns
    centred = tl.where(inside, summed - mean[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / num_columns + eps)
    return centred * inverse[:, None] * weight[None, :] + bias[None, :], mean, inverse


@triton.jit
def write_normalised(
    summed,
    weight_ptr,
    bias_ptr,
    out_ptr,
    means_ptr,
    inverses_ptr,
    rows,
    num_rows,
    columns,
    inside,
    num_steps,
    eps,
):
    """Rows of LayerNorm, their means and inverse deviations."""
    out, mean, inverse = normalise(summed, weight_ptr, bias_ptr, columns, inside, num_steps, eps)
    store_rows(out_ptr, out, rows, columns, inside, num_steps)
    tl.store(means_ptr + rows, mean, mask=rows < num_rows)
    tl.store(inverses_ptr + rows, inverse, mask=rows < num_rows)


@triton.jit
def differentiate(
    summed,
    weight,
    means_ptr,
    inverses_ptr,
    dout_ptr,
    dx_ptr,
    rows,
    num_rows,
    columns,
    inside,
    num_steps,
):
    """Writes the gradient of the summed rows; returns what they add to dweight and to dbias, and that gradient."""
    num_columns = num_steps * STEP
    dout = load_rows(dout_ptr, rows, columns, inside, num_steps)
    mean = tl.load(means_ptr + rows, mask=rows < num_rows, other=0.0)
    inverse = tl.load(inverses_ptr + rows, mask=rows < num_rows, other=0.0)
    normal = tl.where(inside, (summed - mean[:, None]) * inverse[:, None], 0.0)
    dnormal = dout * weight[None, :]
    shift = tl.sum(dnormal, 1) / num_columns
    slope = tl.sum(dnormal * normal, 1) / num_columns
    dx = (dnormal - shift[:, None] - normal * slope[:, None]) * inverse[:, None]
    store_rows(dx_ptr, dx, rows, columns, inside, num_steps)
    return dout * normal, dout, dx


@triton.jit
def store_sum(sums_ptr, number: tl.constexpr, NUM_SUMS: tl.constexpr, rows, columns, num_columns):
    """This program's part of one of its NUM_SUMS sums over rows."""
    sums_at = sums_ptr + (tl.program_id(0) * NUM_SUMS + number) * num_columns + columns
    tl.store(sums_at, tl.sum(rows, 0), mask=columns < num_columns)


@kernel(aligned=("x", "residual", "weight", "bias", "out", "dout", "dx"))
def layer_norm_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    means_ptr,
    inverses_ptr,
    num_rows,
    num_steps,
    has_residual,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """out = LayerNorm(x + residual) of BLOCK_ROWS rows."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_COLUMNS)
    num_columns = num_steps * STEP
    inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
    summed = load_rows(x_ptr, rows, columns, inside, num_steps)
    with_residual = inside & (rows[:, None] < num_rows * has_residual)
    summed += load_rows(residual_ptr, rows, columns, with_residual, num_steps)
    write_normalised(
        summed,
        weight_ptr,
        bias_ptr,
        out_ptr,
        means_ptr,
        inverses_ptr,
        rows,
        num_rows,
        columns,
        inside,
        num_steps,
        eps,
    )


@kernel(aligned=("x", "residual", "weight", "bias", "out", "codes"))
def layer_norm_fp8_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    codes_ptr,
    scales_ptr,
    num_rows,
    num_steps,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """out = LayerNorm(x + residual) of BLOCK_ROWS rows, and the same rows in fp8: for inference."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_COLUMNS)
    inside = (rows[:, None] < num_rows) & (columns[None, :] < num_steps * STEP)
    summed = load_rows(x_ptr, rows, columns, inside, num_steps)
    summed += load_rows(residual_ptr, rows, columns, inside, num_steps)
    out, _, _ = normalise(summed, weight_ptr, bias_ptr, columns, inside, num_steps, eps)
    store_rows(out_ptr, out, rows, columns, inside, num_steps)
    offsets = rows.to(tl.int64)[:, None] * (num_steps * STEP) + columns[None, :]
    write_codes(out, codes_ptr, scales_ptr, rows, num_rows, offsets, inside)


@kernel(aligned=("x", "residual", "weight", "bias", "out", "dout", "dx"))
def layer_norm_backward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    means_ptr,
    inverses_ptr,
    dout_ptr,
    dx_ptr,
    sums_ptr,
    num_rows,
    num_steps,
    has_residual,
    num_programs,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """dx, which is the residual's gradient too, and this program's part of sums (programs, 3, columns): dweight, dbias,
    and the sum of dx, which is the gradient of a bias that was added to x."""
    columns = tl.arange(0, BLOCK_COLUMNS)
    num_columns = num_steps * STEP
    weight = tl.load(weight_ptr + columns, mask=columns < num_columns, other=0.0)
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for first_row in range(tl.program_id(0) * BLOCK_ROWS, num_rows, num_programs * BLOCK_ROWS):
        rows = first_row + tl.arange(0, BLOCK_ROWS)
        inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
        summed = load_rows(x_ptr, rows, columns, inside, num_steps)
        with_residual = inside & (rows[:, None] < num_rows * has_residual)
        summed += load_rows(residual_ptr, rows, columns, with_residual, num_steps)
        for_weight, for_bias, dx = differentiate(
            summed,
            weight,
            means_ptr,
            inverses_ptr,
            dout_ptr,
            dx_ptr,
            rows,
            num_rows,
            columns,
            inside,
            num_steps,
        )
        dweight += for_weight
        dbias += for_bias
        total += tl.where(inside, dx, 0.0)
    store_sum(sums_ptr, 0, 3, dweight, columns, num_columns)
    store_sum(sums_ptr, 1, 3, dbias, columns, num_columns)
    store_sum(sums_ptr, 2, 3, total, columns, num_columns)


@kernel(aligned=("words", "types", "places", "weight", "bias", "out", "dout", "dx"))
def embedding_norm_forward_kernel(
    token_ids_ptr,
    token_types_ptr,
    positions_ptr,
    words_ptr,
    types_ptr,
    places_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    means_ptr,
    inverses_ptr,
    num_rows,
    num_steps,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """out = LayerNorm(word + type + position) of BLOCK_ROWS tokens."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_COLUMNS)
    num_columns = num_steps * STEP
    inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
    summed = sum_vectors(
        token_ids_ptr,
        token_types_ptr,
        positions_ptr,
        words_ptr,
        types_ptr,
        places_ptr,
        rows,
        num_rows,
        columns,
        inside,
        num_steps,
    )
    write_normalised(
        summed,
        weight_ptr,
        bias_ptr,
        out_ptr,
        means_ptr,
        inverses_ptr,
        rows,
        num_rows,
        columns,
        inside,
        num_steps,
        eps,
    )


@kernel(aligned=("words", "types", "places", "weight", "bias", "out", "dout", "dx"))
def embedding_norm_backward_kernel(
    token_ids_ptr,
    token_types_ptr,
    positions_ptr,
    words_ptr,
    types_ptr,
    places_ptr,
    weight_ptr,
    means_ptr,
    inverses_ptr,
    dout_ptr,
    dx_ptr,
    sums_ptr,
    num_rows,
    num_steps,
    num_programs,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """dx (tokens, columns), the gradient of each token's three vectors, and this program's part of sums (programs, 2,
    columns): dweight and dbias."""
    columns = tl.arange(0, BLOCK_COLUMNS)
    num_columns = num_steps * STEP
    weight = tl.load(weight_ptr + columns, mask=columns < num_columns, other=0.0)
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for first_row in range(tl.program_id(0) * BLOCK_ROWS, num_rows, num_programs * BLOCK_ROWS):
        rows = first_row + tl.arange(0, BLOCK_ROWS)
        inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
        summed = sum_vectors(
            token_ids_ptr,
            token_types_ptr,
            positions_ptr,
            words_ptr,
            types_ptr,
            places_ptr,
            rows,
            num_rows,
            columns,
            inside,
            num_steps,
        )
        for_weight, for_bias, _ = differentiate(
            summed,
            weight,
            means_ptr,
            inverses_ptr,
            dout_ptr,
            dx_ptr,
            rows,
            num_rows,
            columns,
            inside,
            num_steps,
        )
        dweight += for_weight
        dbias += for_bias
    store_sum(sums_ptr, 0, 2, dweight, columns, num_columns)
    store_sum(sums_ptr, 1, 2, dbias, columns, num_columns)


def _configure(kernel: Callable, dtype: torch.dtype, width: int) -> Configuration:
    names = {name.removesuffix("_ptr") for name in kernel.arg_names if name.endswith("_ptr")}
    types = dict.fromkeys(names, "*fp32") | {"eps": "fp32"}
    types |= dict.fromkeys(("token_ids", "token_types", "positions"), "*i64")
    types |= dict.fromkeys(("x", "residual", "out", "dout"), POINTERS[dtype])
    types["codes"] = POINTERS[torch.float8_e4m3fn]
    if kernel is layer_norm_backward_kernel:  # the gradient of hidden states; that of embeddings is float32
        types["dx"] = POINTERS[dtype]
    return configure(kernel, types, {"BLOCK_ROWS": TILE // width, "BLOCK_COLUMNS": width})


CONFIGURATIONS = Table(
    {
        f"{name} {name_of(dtype)} {width}": _configure(kernel, dtype, width)
        for name, kernel in (
            ("forward", layer_norm_forward_kernel),
            ("backward", layer_norm_backward_kernel),
            ("embedding forward", embedding_norm_forward_kernel),
            ("embedding backward", embedding_norm_backward_kernel),
        )
        for dtype in FLOATS
        for width in WIDTHS
    }
    | {
        f"fp8 {name_of(dtype)} {width}": _configure(layer_norm_fp8_kernel, dtype, width)
        for dtype in HALF
        for width in WIDTHS
    }
)


def refusals(tensor: Tensor) -> list[str]:
    columns = tensor.shape[-1]
    if columns % STEP.value == 0 and 0 < columns <= WIDTHS[-1]:
        return []
    return [f"The gpu backend normalises rows of a multiple of 8 numbers, up to {WIDTHS[-1]}, not of {columns}."]


def layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in (x, residual, weight, bias)):
        return _LayerNorm.apply(x, residual, weight, bias, eps)
    return _forward(align(x), None if residual is None else align(residual), _full(weight), bias, eps)[0]


def embedding_norm(
    ids: tuple[Tensor, Tensor, Tensor],
    tables: tuple[Tensor, Tensor, Tensor],
    padding: tuple[int | None, int | None],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    if dtype not in FLOATS:
        raise ValueError(f"The gpu backend gives float32, bf16 or fp16, not {dtype}.")
    return _EmbeddingNorm.apply(*ids, *tables, padding, weight, bias, eps, dtype)


def _prepare(
    name: str, dtype: torch.dtype, columns: int, num_programs: int, *arguments: Tensor | int | float
) -> Launch:
    return CONFIGURATIONS.prepare(_full_name(name, dtype, columns), num_programs, *arguments)


@functools.cache
def _width(columns: int) -> int:
    return next(width for width in WIDTHS if columns <= width)


@functools.cache
def _full_name(name: str, dtype: torch.dtype, columns: int) -> str:
    return f"{name} {name_of(dtype)} {_width(columns)}"


def _num_blocks(num_rows: int, columns: int) -> int:
    return -(-num_rows // (TILE // _width(columns)))


def _full(tensor: Tensor) -> Tensor:
    """A weight as the kernels read it."""
    return align(tensor.detach().float())


def empty_statistics(x: Tensor) -> list[Tensor]:
    """Room for the mean and the inverse deviation of each row: float32 (rows,) each."""
    return [torch.empty(len(x), dtype=torch.float32, device=x.device) for _ in range(2)]


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, list[Tensor]]:
    out, statistics = torch.empty_like(x), empty_statistics(x)
    forward_launch(x, residual, weight, _full(bias), eps, out, statistics)()
    return out, statistics


def forward_launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out: Tensor,
    statistics: Sequence[Tensor],
) -> Launch:
    """Writes out and statistics, float32 (rows,) each: means and inverse deviations. All tensors as align() leaves
    them, weight and bias float32."""
    rows, columns = x.shape
    given = x, x if residual is None else residual, weight, bias, out, *statistics
    numbers = rows, columns // STEP.value, int(residual is not None), eps
    return _prepare("forward", x.dtype, columns, _num_blocks(rows, columns), *given, *numbers)


def fp8_launch(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor, codes: Tensor, scales: Tensor
) -> Launch:
    """Writes out, and its rows before they are rounded to x's dtype in fp8: codes (rows, columns) and scales, float32
    (rows,), or (rows, 1). All tensors as align() leaves them, x in half precision, weight and bias float32."""
    rows, columns = x.shape
    given = x, residual, weight, bias, out, codes, scales, rows, columns // STEP.value, eps
    return _prepare("fp8", x.dtype, columns, _num_blocks(rows, columns), *given)


def backward_launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, statistics: Sequence[Tensor], dout: Tensor, dx: Tensor
) -> tuple[Launch, Tensor]:
    """Writes dx, and sums float32 (programs, 3, columns), also returned, whose sum over programs is dweight, dbias and
    the sum of dx. All tensors as align() leaves them, weight float32."""
    rows, columns = x.shape
    programs = min(_num_blocks(rows, columns), MOST_PROGRAMS)
    sums = torch.empty(programs, 3, columns, dtype=torch.float32, device=x.device)
    given = x, x if residual is None else residual, weight, *statistics, dout, dx, sums
    numbers = rows, columns // STEP.value, int(residual is not None), programs
    return _prepare("backward", x.dtype, columns, programs, *given, *numbers), sums


class _LayerNorm(Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps):
        ctx.weight_dtypes = weight.dtype, bias.dtype
        x, weight = align(x), _full(weight)
        residual = None if residual is None else align(residual)
        out, statistics = _forward(x, residual, weight, bias, eps)
        ctx.save_for_backward(x, residual, weight, *statistics)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, residual, weight, *statistics = ctx.saved_tensors
        x_needed, residual_needed, weight_needed, bias_needed, _ = ctx.needs_input_grad
        dx = torch.empty_like(x)
        launch, sums = backward_launch(x, residual, weight, statistics, align(dout), dx)
        launch()
        dweight, dbias = sums[:, :2].sum(0) if weight_needed or bias_needed else (None, None)
        return (
            dx if x_needed else None,
            dx if residual_needed else None,
            dweight.to(ctx.weight_dtypes[0]) if weight_needed else None,
            dbias.to(ctx.weight_dtypes[1]) if bias_needed else None,
            None,
        )


class _EmbeddingNorm(Function):
    @staticmethod
    def forward(ctx, token_ids, token_types, positions, words, types, places, padding, weight, bias, eps, dtype):
        ids = [one.contiguous() for one in (token_ids, token_types, positions)]
        tables = [_full(one) for one in (words, types, places)]
        weight = _full(weight)
        rows, columns = len(token_ids), words.shape[1]
        out = torch.empty(rows, columns, dtype=dtype, device=words.device)
        statistics = empty_statistics(out)
        given = *ids, *tables, weight, _full(bias), out, *statistics, rows, columns // STEP.value, eps
        _prepare("embedding forward", dtype, columns, _num_blocks(rows, columns), *given)()
        ctx.save_for_backward(*ids, *tables, weight, *statistics)
        # A gradient of the table's size is mostly zeros, if the batch is not as large; other tables are small.
        ctx.words_accumulator = accumulator(words) if 2 * rows <= len(words) else None
        ctx.padding = padding
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        *given, weight, means, inverses = ctx.saved_tensors
        ids, tables = given[:3], given[3:]
        rows, columns = dout.shape
        dx = torch.empty(rows, columns, dtype=torch.float32, device=dout.device)
        programs = min(_num_blocks(rows, columns), MOST_PROGRAMS)
        sums = torch.empty(programs, 2, columns, dtype=torch.float32, device=dout.device)
        arguments = *given, weight, means, inverses, align(dout), dx, sums, rows, columns // STEP.value, programs
        _prepare("embedding backward", dout.dtype, columns, programs, *arguments)()
        dweight, dbias = sums.sum(0)
        word_padding, position_padding = (-1 if one is None else one for one in ctx.padding)
        words_needed, *needed = ctx.needs_input_grad[3:6]
        gradients = [
            _sum_rows(dx, one, len(table), skipped) if needed else None
            for one, table, skipped, needed in zip(ids[1:], tables[1:], (-1, position_padding), needed, strict=True)
        ]
        if not words_needed:
            dwords = None
        elif ctx.words_accumulator is None:
            dwords = _sum_rows(dx, ids[0], len(tables[0]), word_padding)
        else:
            dwords = _add_rows(dx, ids[0], word_padding, ctx.words_accumulator)
        return None, None, None, dwords, *gradients, None, dweight, dbias, None, None


def _sum_rows(dx: Tensor, ids: Tensor, num_ids: int, skipped: int) -> Tensor:
    """The gradient of a table. torch sorts the ids and adds the rows of each up in order, but for few ids of thousands
    of rows each, as token types are: those it adds up by atomics (from 2.11 on), in another order in every run."""
    if num_ids <= FEW_IDS and skipped < 0:
        return torch.stack([torch.where((ids == one)[:, None], dx, 0.0).sum(0) for one in range(num_ids)])
    return torch.ops.aten.embedding_dense_backward(dx, ids, num_ids, skipped, False)


def _add_rows(dx: Tensor, ids: Tensor, skipped: int, accumulator: Tensor) -> None:
    """Adds the same to an accumulator, by way of a table with a row for each token: one token of each id, whichever,
    has the sum of that id's rows there, so that the sums are the same in every run; the other rows are zero, so that
    it does not matter in which order they are all added."""
    count = len(ids)
    chosen = torch.empty(len(accumulator), dtype=torch.int64, device=ids.device)
    chosen.scatter_(0, ids, torch.arange(count, device=ids.device))
    tokens = chosen[ids].masked_fill_(ids == skipped, count)
    accumulator.index_add_(0, ids, _sum_rows(dx, tokens, count + 1, count)[:count])
