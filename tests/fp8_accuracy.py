"""The rule that rows in fp8 are held to; and fp8 in Triton's interpreter as GPUs round it.

A row's scale is its largest number over 448 in float32. A code is the nearest one: its distance is at most half a step,
a sixteenth of the number, or half the least step. Where a number lies halfway between two codes, rounding before it
decides; there and nowhere else codes may differ from the reference's.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from triton import language as tl
from triton.runtime import interpreter

from fastrank.kernels.fp8 import reference
from fastrank.model import CrossEncoder


def assert_quantised(codes: Tensor, scales: Tensor, exact: Tensor, rounding: float = 2.0**-20) -> None:
    """Holds codes (rows, columns) and scales (rows,) to the rule; exact: the numbers in float64; rounding: how far off,
    relative to the largest number of a row, they may have been before they were quantised."""
    assert codes.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32
    assert codes.shape == exact.shape and scales.shape == exact.shape[:1]
    if not exact.numel():
        return
    largest = exact.abs().amax(1)
    wanted = (largest / reference.LARGEST).clamp(min=reference.LEAST_SCALE)
    slack = largest * rounding
    assert ((scales - wanted).abs() <= wanted * rounding).all(), "scales are not the largest numbers over 448"
    found = codes.double() * scales.double()[:, None]
    half_step = torch.maximum(exact.abs() / 16, wanted[:, None] * 2.0**-10)
    apart = (found - exact).abs() - (half_step * (1 + 2 * rounding) + slack[:, None])
    worst = torch.unravel_index(torch.nan_to_num(apart, nan=torch.inf).argmax(), apart.shape)
    assert apart[worst] <= 0, f"{[int(one) for one in worst]}: {found[worst]} for {exact[worst]}"
    expected = reference.quantise_rows(exact.float())[0]
    differ = float((codes.float() != expected.float()).float().mean())
    assert differ <= 0.01 + 64 * rounding, f"{differ:.2%} of the codes are other ones than the reference's"


def convert_as_gpus_do() -> None:
    """Triton's interpreter rounds halves up, not to even, and loses what is carried into the exponent."""
    kept = interpreter.InterpreterBuilder.create_fp_to_fp

    def convert(self, source, kind, rounding):
        if source.dtype.scalar != tl.float32 or kind.scalar != tl.float8e4nv:
            return kept(self, source, kind, rounding)
        # NaN goes through clamp; larger numbers become the largest code, as in the GPU's instruction.
        numbers = torch.from_numpy(np.ascontiguousarray(source.data)).clamp(-reference.LARGEST, reference.LARGEST)
        codes = numbers.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return interpreter.TensorHandle(codes, kind.scalar)

    interpreter.InterpreterBuilder.create_fp_to_fp = convert


@contextlib.contextmanager
def emulated_fp8(model: CrossEncoder) -> Iterator[None]:
    """Inside it the products of all tokens multiply rows and weights as they are after they have been in fp8, in plain
    PyTorch: the definition of to_precision("fp8"), but for what rounds between products."""

    def quantised(x: Tensor) -> Tensor:
        return reference.dequantise_rows(*reference.quantise_rows(x))

    chosen = []
    for layer in model.encoder.layers:
        chosen += [layer.key_value] if layer.is_last else [layer.qkv, layer.attention_output, layer.up, layer.down]
    for linear in chosen:
        weight = quantised(linear.weight.detach())
        multiply = lambda x, weight=weight: (quantised(x) @ weight.t()).to(x.dtype)  # noqa: E731
        linear.multiply = multiply
        linear.forward = lambda x, one=linear, multiply=multiply: multiply(x) + one.bias.to(x.dtype)
    try:
        yield
    finally:
        for linear in chosen:
            del linear.multiply, linear.forward
