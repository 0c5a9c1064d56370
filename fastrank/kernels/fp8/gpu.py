"""Rows in fp8 in Triton, and write_codes(), with which other kernels write their rows in fp8, too.

The instruction that rounds to e4m3 is one of compute capability 8.9 and later.
"""

import functools

import torch
import triton
from torch import Tensor
from triton import language as tl

from fastrank.kernels.configuration import (
    FLOATS,
    FP8_CAPABILITY,
    POINTERS,
    STEP,
    Launch,
    Table,
    align,
    configure,
    kernel,
    name_of,
)

WIDTHS = (512, 1024, 2048)  # of a tile of whole rows: the least that holds one is taken
TILE = 2048  # numbers of a tile
INVERSE_LARGEST = tl.constexpr(1 / 448)
LEAST_SCALE = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def write_codes(values, codes_ptr, scales_ptr, rows, num_rows, offsets, inside):
    """Rows of `values`, float32 and 0 outside, as codes at `offsets` and scales. NaN stays NaN, and so does the product
    of a row with infinity in it."""
    largest = tl.max(tl.abs(values), 1)
    scales = tl.maximum(largest * INVERSE_LARGEST, LEAST_SCALE)
    inverses = 1.0 / scales
    codes = values * inverses[:, None]  # a little above the largest code rounds down to it
    tl.store(codes_ptr + offsets, codes.to(codes_ptr.dtype.element_ty), mask=inside)
    tl.store(scales_ptr + rows, scales, mask=rows < num_rows)


@kernel(aligned=("x", "codes"))
def quantise_rows_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    num_rows,
    num_steps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Codes and scales of BLOCK_ROWS rows."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_COLUMNS)
    inside = (rows[:, None] < num_rows) & (columns[None, :] < num_steps * STEP)
    offsets = rows.to(tl.int64)[:, None] * (num_steps * STEP) + columns[None, :]
    values = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    write_codes(values, codes_ptr, scales_ptr, rows, num_rows, offsets, inside)


CONFIGURATIONS = Table(
    {
        f"rows {name_of(dtype)} {width}": configure(
            quantise_rows_kernel,
            {"x": POINTERS[dtype], "codes": POINTERS[torch.float8_e4m3fn], "scales": "*fp32"},
            {"BLOCK_ROWS": TILE // width, "BLOCK_COLUMNS": width},
        )
        for dtype in FLOATS
        for width in WIDTHS
    }
)


def refusals(tensor: Tensor) -> list[str]:
    columns = tensor.shape[-1]
    if columns % STEP.value or not 0 < columns <= WIDTHS[-1]:
        return [f"The gpu backend quantises rows of a multiple of 8 numbers, up to {WIDTHS[-1]}, not of {columns}."]
    if tensor.is_cuda and (found := torch.cuda.get_device_capability(tensor.device)) < FP8_CAPABILITY:
        needed, found = (".".join(map(str, one)) for one in (FP8_CAPABILITY, found))
        return [f"fp8 needs a GPU of compute capability {needed} or more; this one has {found}."]
    return []


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    x = align(x.detach())
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(len(x), dtype=torch.float32, device=x.device)
    rows_launch(x, codes, scales)()
    return codes, scales


@functools.cache
def _full_name(dtype: torch.dtype, columns: int) -> tuple[str, int]:
    """Of a configuration, and its rows."""
    width = next(width for width in WIDTHS if columns <= width)
    return f"rows {name_of(dtype)} {width}", TILE // width


def rows_launch(x: Tensor, codes: Tensor, scales: Tensor) -> Launch:
    """Writes codes (rows, columns) and scales, float32 (rows,), or (rows, 1). All tensors as align() leaves them."""
    rows, columns = x.shape
    name, block_rows = _full_name(x.dtype, columns)
    return CONFIGURATIONS.prepare(name, -(-rows // block_rows), x, codes, scales, rows, columns // STEP.value)
