"""GELU(x + bias) in Triton, for inference in fp8, too; float32 inside. Saved for the backward is x, the matrix
product's own output.

dbias is summed over rows by a fixed number of programs and then by torch: without atomics, the same in every run.
"""

import functools
from collections.abc import Callable

import torch
import triton
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from triton import language as tl

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
from fastrank.kernels.fp8.gpu import write_codes

BLOCK_COLUMNS = 256
BLOCK_BYTES = {"forward": 8192, "backward": 4096}  # of a tensor at a time: four loads of 16 bytes a thread, or two
MOST_PROGRAMS = 792  # of the backward, so that an H100 holds all at once: six on each of 132 processors, 80 registers
FP8_WIDTHS = (2048, 4096, 8192)  # of rows in fp8: the least that holds one is taken
THREAD_NUMBERS = 32  # of such a row: four loads of 16 bytes
FURTHEST = tl.constexpr(14.75)  # a number this far below zero times its share is 0 in every dtype


@triton.jit
def normal_tail(x, TANH_FORM: tl.constexpr, HALF: tl.constexpr):
    """The distance d of x from zero, and the tail: the share that GELU takes of -d, 0.5 at zero, falling to 0. Of d it
    takes one minus that: GELU(x) = max(x, 0) - d * tail. HALF: with an error far below a rounding to half precision."""
    # Without a limit -inf would be infinity times zero, NaN. NaN itself goes through.
    distance = tl.minimum(tl.abs(x), FURTHEST, propagate_nan=tl.PropagateNan.ALL)
    if TANH_FORM:
        # 2.302... is 2 sqrt(2 / pi) log2(e).
        tail = 1.0 / (1.0 + tl.exp2(2.302208198144325 * distance * (1.0 + 0.044715 * distance * distance)))
    elif HALF:
        # log2(erfc(d / sqrt(2)) / 2) as a minimax polynomial (Lawson), because tl.erf costs three times as
        # much, more than the memory lets through. The error, relative to the tail, is 2^-16 up to d = 3, 2^-11.8 up to
        # 6, 2^-10 up to 13. At FURTHEST the logarithm is -162, where float32 has no more numbers.
        power = 4.431587e-08 * distance - 2.5712185e-06
        power = power * distance + 6.4042767e-05
        power = power * distance - 9.0940488e-04
        power = power * distance + 8.3229589e-03
        power = power * distance - 5.3425949e-02
        power = power * distance - 4.5912127e-01
        power = power * distance - 1.1509524
        power = power * distance - 1.0000205
        tail = tl.exp2(power)
    else:
        tail = 0.5 - 0.5 * tl.erf(distance * 0.7071067811865476)
    return distance, tail


@triton.jit
def derivative(x, TANH_FORM: tl.constexpr, HALF: tl.constexpr):
    """Of GELU at x."""
    distance, tail = normal_tail(x, TANH_FORM, HALF)
    square = distance * distance
    if TANH_FORM:
        # The factors are 2 sqrt(2 / pi) and three times that times 0.044715. One minus the share, the tail, must not be
        # got by subtraction from the share: far out that cancels, and the rest is multiplied with up to 20.
        density = tail * (1.0 - tail) * (1.5957691216057308 + 0.21406444881780073 * square)
    else:
        # exp(-d^2 / 2) / sqrt(2 pi) as a power of 2.
        density = tl.exp2(-0.7213475204444817 * square - 1.3257480647361592)
    below = tail - distance * density  # the derivative at -d
    return tl.where(x < 0.0, below, 1.0 - below)


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
    first_row = tl.program_id(0) // num_blocks * BLOCK_ROWS
    first = first_row * num_columns.to(tl.int64)  # only this needs 64 bits
    rows = tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(0) % num_blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (rows[:, None] < num_rows - first_row) & (columns[None, :] < num_columns)
    offsets = rows[:, None] * num_columns + columns[None, :]
    x = tl.load(x_ptr + first + offsets, mask=inside)
    bias = tl.load(bias_ptr + columns, mask=columns < num_columns)
    x = x.to(tl.float32) + bias[None, :]
    distance, tail = normal_tail(x, TANH_FORM, x_ptr.dtype.element_ty != tl.float32)
    out = tl.maximum(x, 0.0) - distance * tail
    tl.store(out_ptr + first + offsets, out.to(out_ptr.dtype.element_ty), mask=inside)


@kernel(aligned=("x", "bias", "codes"))
def gelu_fp8_kernel(
    x_ptr,
    bias_ptr,
    codes_ptr,
    scales_ptr,
    num_rows,
    num_steps,
    TANH_FORM: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """GELU(x + bias) of one row in fp8: a scale needs the whole row."""
    num_columns = num_steps * STEP
    rows = tl.program_id(0) + tl.arange(0, 1)
    columns = tl.arange(0, BLOCK_COLUMNS)
    inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
    offsets = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + columns, mask=columns < num_columns, other=0.0)
    x = x.to(tl.float32) + bias[None, :]
    distance, tail = normal_tail(x, TANH_FORM, x_ptr.dtype.element_ty != tl.float32)
    out = tl.maximum(x, 0.0) - distance * tail
    write_codes(out, codes_ptr, scales_ptr, rows, num_rows, offsets, inside)


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
    rows = tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(0) % num_blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    offsets = rows[:, None] * num_columns + columns[None, :]
    bias = tl.load(bias_ptr + columns, mask=columns < num_columns, other=0.0)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for first_row in range(part * BLOCK_ROWS, num_rows, num_parts * BLOCK_ROWS):
        first = first_row * num_columns.to(tl.int64)  # only this needs 64 bits
        inside = (rows[:, None] < num_rows - first_row) & (columns[None, :] < num_columns)
        x = tl.load(x_ptr + first + offsets, mask=inside, other=0.0)
        dout = tl.load(dout_ptr + first + offsets, mask=inside, other=0.0)
        x = x.to(tl.float32) + bias[None, :]
        dx = dout.to(tl.float32) * derivative(x, TANH_FORM, x_ptr.dtype.element_ty != tl.float32)
        tl.store(dx_ptr + first + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        dbias += dx
    tl.store(sums_ptr + part * num_columns + columns, tl.sum(dbias, 0), mask=columns < num_columns)


def block_rows(name: str, dtype: torch.dtype) -> int:
    return BLOCK_BYTES[name] // (BLOCK_COLUMNS * dtype.itemsize)


def _configure(name: str, kernel: Callable, dtype: torch.dtype, tanh_form: bool) -> Configuration:
    types = dict.fromkeys(("x", "out", "dout", "dx"), POINTERS[dtype]) | {"bias": "*fp32", "sums": "*fp32"}
    constants = {"TANH_FORM": tanh_form, "BLOCK_ROWS": block_rows(name, dtype), "BLOCK_COLUMNS": BLOCK_COLUMNS}
    return configure(kernel, types, constants)


CONFIGURATIONS = Table(
    {
        f"{name} {form} {name_of(dtype)}": _configure(name, kernel, dtype, form == "tanh")
        for name, kernel in (("forward", gelu_forward_kernel), ("backward", gelu_backward_kernel))
        for form in ("erf", "tanh")
        for dtype in FLOATS
    }
    | {
        f"fp8 {form} {name_of(dtype)} {width}": configure(
            gelu_fp8_kernel,
            {"x": POINTERS[dtype], "bias": "*fp32", "codes": POINTERS[torch.float8_e4m3fn], "scales": "*fp32"},
            {"TANH_FORM": form == "tanh", "BLOCK_COLUMNS": width},
            num_warps=width // (32 * THREAD_NUMBERS),
        )
        for form in ("erf", "tanh")
        for dtype in HALF
        for width in FP8_WIDTHS
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


def _prepare(name: str, like: Tensor, tanh_form: bool, num_programs: int, *arguments: Tensor | int) -> Launch:
    return CONFIGURATIONS.prepare(_full_name(name, tanh_form, like.dtype), num_programs, *arguments)


@functools.cache
def _full_name(name: str, tanh_form: bool, dtype: torch.dtype) -> str:
    return f"{name} {'tanh' if tanh_form else 'erf'} {name_of(dtype)}"


def _forward(x: Tensor, bias: Tensor, tanh_form: bool) -> Tensor:
    out = torch.empty_like(x)
    forward_launch(x, bias, tanh_form, out)()
    return out


def forward_launch(x: Tensor, bias: Tensor, tanh_form: bool, out: Tensor) -> Launch:
    """Writes out, which may be x. All tensors as align() leaves them, bias float32."""
    rows, columns = x.shape
    programs = -(-rows // block_rows("forward", x.dtype)) * -(-columns // BLOCK_COLUMNS)
    return _prepare("forward", x, tanh_form, programs, x, bias, out, rows, columns // STEP.value)


def fp8_launch(x: Tensor, bias: Tensor, tanh_form: bool, codes: Tensor, scales: Tensor) -> Launch:
    """Writes GELU(x + bias) in fp8: codes (rows, columns) and scales, float32 (rows,), or (rows, 1); rows of at most
    FP8_WIDTHS[-1] numbers. All tensors as align() leaves them, x in half precision, bias float32."""
    rows, columns = x.shape
    width = next(width for width in FP8_WIDTHS if columns <= width)
    name = f"fp8 {'tanh' if tanh_form else 'erf'} {name_of(x.dtype)} {width}"
    return CONFIGURATIONS.prepare(name, rows, x, bias, codes, scales, rows, columns // STEP.value)


def backward_launch(x: Tensor, bias: Tensor, tanh_form: bool, dout: Tensor, dx: Tensor) -> tuple[Launch, Tensor]:
    """Writes dx, which may be dout, and sums float32 (parts, columns), also returned, whose sum over parts is dbias.
    All tensors as align() leaves them, bias float32."""
    rows, columns = x.shape
    blocks = max(1, -(-columns // BLOCK_COLUMNS))
    parts = min(-(-rows // block_rows("backward", x.dtype)), max(1, MOST_PROGRAMS // blocks))
    sums = torch.empty(parts, columns, dtype=torch.float32, device=x.device)
    given = x, bias, dout, dx, sums, rows, columns // STEP.value, parts
    return _prepare("backward", x, tanh_form, parts * blocks, *given), sums


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
        dx = torch.empty_like(x)
        launch, sums = backward_launch(x, bias, tanh_form, align(dout), dx)
        launch()
        return dx if x_needed else None, sums.sum(0).to(bias_dtype) if bias_needed else None, None
