"""GELU(x + bias) in Triton, float32 inside. Saved for the backward is x, the matrix product's own output.

dbias is summed over rows by a fixed number of programs and then by torch: without atomics, the same in every run.
"""

from collections.abc import Callable

import torch
import triton
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from triton import language as tl

from fastrank.kernels.configuration import (
    FLOATS,
    POINTERS,
    STEP,
    Configuration,
    Table,
    align,
    configure,
    kernel,
    name_of,
)

BLOCK_ROWS, BLOCK_COLUMNS = 8, 256
MOST_PROGRAMS = 1024  # of the backward


@triton.jit
def normal_share(x, TANH_FORM: tl.constexpr):
    """What GELU multiplies x with, and the derivative of that."""
    if TANH_FORM:
        square = x * x
        share = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * square))
        slope = share * (1.0 - share) * 1.5957691216057308 * (1.0 + 3 * 0.044715 * square)
    else:
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        slope = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return share, slope


@kernel(aligned=("x", "bias", "out", "dout", "dx"))
def gelu_forward_kernel(
    x_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    num_steps,
    TANH_FORM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    num_columns = num_steps * STEP
    num_blocks = tl.cdiv(num_columns, BLOCK_COLUMNS)
    rows = tl.program_id(0) // num_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(0) % num_blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
    offsets = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    bias = tl.load(bias_ptr + columns, mask=columns < num_columns, other=0.0)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
    share, _ = normal_share(x, TANH_FORM)
    out = tl.where(share > 0.0, x * share, 0.0)  # 0 for -inf, where it would be NaN
    out = tl.where(x != x, x, out)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=inside)


@kernel(aligned=("x", "bias", "out", "dout", "dx"))
def gelu_backward_kernel(
    x_ptr,
    bias_ptr,
    dout_ptr,
    dx_ptr,
    sums_ptr,
    num_rows,
    num_steps,
    num_parts,
    TANH_FORM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """dx and this program's part of dbias, sums (parts, columns): each part has every num_parts-th block of rows."""
    num_columns = num_steps * STEP
    num_blocks = tl.cdiv(num_columns, BLOCK_COLUMNS)
    part = tl.program_id(0) // num_blocks
    columns = tl.program_id(0) % num_blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    bias = tl.load(bias_ptr + columns, mask=columns < num_columns, other=0.0)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for first_row in range(part * BLOCK_ROWS, num_rows, num_parts * BLOCK_ROWS):
        rows = first_row + tl.arange(0, BLOCK_ROWS)
        inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
        offsets = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
        dout = tl.load(dout_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        share, slope = normal_share(x, TANH_FORM)
        bend = tl.where(slope > 0.0, x * slope, 0.0)
        dx = dout * tl.where(x != x, x, share + bend)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dbias += dx
    tl.store(sums_ptr + part * num_columns + columns, tl.sum(dbias, 0), mask=columns < num_columns)


def _configure(kernel: Callable, dtype: torch.dtype, tanh_form: bool) -> Configuration:
    types = dict.fromkeys(("x", "out", "dout", "dx"), POINTERS[dtype]) | {"bias": "*fp32", "sums": "*fp32"}
    constants = {"TANH_FORM": tanh_form, "BLOCK_ROWS": BLOCK_ROWS, "BLOCK_COLUMNS": BLOCK_COLUMNS}
    return configure(kernel, types, constants)


CONFIGURATIONS = Table(
    {
        f"{name} {form} {name_of(dtype)}": _configure(kernel, dtype, form == "tanh")
        for name, kernel in (("forward", gelu_forward_kernel), ("backward", gelu_backward_kernel))
        for form in ("erf", "tanh")
        for dtype in FLOATS
    }
)


def refusals(tensor: Tensor) -> list[str]:
    if tensor.shape[-1] % STEP.value == 0:
        return []
    return [f"The gpu backend takes rows of a multiple of 8 numbers, not of {tensor.shape[-1]}."]


def bias_gelu(x: Tensor, bias: Tensor, tanh_form: bool) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or bias.requires_grad):
        return _BiasGelu.apply(x, bias, tanh_form)
    return _forward(align(x), align(bias.float()), tanh_form)


def _launch(name: str, like: Tensor, tanh_form: bool, num_programs: int, *arguments: Tensor | int) -> None:
    form = "tanh" if tanh_form else "erf"
    CONFIGURATIONS.launch(f"{name} {form} {name_of(like.dtype)}", num_programs, *arguments)


def _forward(x: Tensor, bias: Tensor, tanh_form: bool) -> Tensor:
    rows, columns = x.shape
    out = torch.empty_like(x)
    programs = -(-rows // BLOCK_ROWS) * -(-columns // BLOCK_COLUMNS)
    _launch("forward", x, tanh_form, programs, x, bias, out, rows, columns // STEP.value)
    return out


class _BiasGelu(Function):
    @staticmethod
    def forward(ctx, x, bias, tanh_form):
        x, full_bias = align(x), align(bias.detach().float())
        out = _forward(x, full_bias, tanh_form)
        ctx.save_for_backward(x, full_bias)
        ctx.settings = tanh_form, bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, bias = ctx.saved_tensors
        tanh_form, bias_dtype = ctx.settings
        x_needed, bias_needed, _ = ctx.needs_input_grad
        rows, columns = x.shape
        blocks = max(1, -(-columns // BLOCK_COLUMNS))
        parts = min(-(-rows // BLOCK_ROWS), max(1, MOST_PROGRAMS // blocks))
        dx = torch.empty_like(x)
        sums = torch.empty(parts, columns, dtype=torch.float32, device=x.device)
        given = x, bias, align(dout), dx, sums, rows, columns // STEP.value, parts
        _launch("backward", x, tanh_form, parts * blocks, *given)
        return dx if x_needed else None, sums.sum(0).to(bias_dtype) if bias_needed else None, None
