"""A linear layer's weights, frozen for inference: float32 as they are, or int8 with one scale a column.

Columns are output features, as everywhere here; weights of int8 are symmetric, so that no zero point is needed.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

PRECISIONS = ("float32", "int8")
# The largest int8 weight. AVX2 adds two products of a byte from 0 to 255 and a weight in 16 bits: more would not fit, and
# then scores would depend on the processor.
LEVELS = 63


@dataclass(frozen=True)
class LinearWeights:
    """Weights and bias of x W^T + b.

    Attributes:
        weight: (columns, depth) float32, or int8 from -63 to 63.
        bias: (columns,) float32.
        scales: (columns,) float32, what one step of an int8 weight is worth; None for float32.
        packed: What a backend has made of them, by instruction set.
    """

    weight: Tensor
    bias: Tensor
    scales: Tensor | None = None
    packed: dict[str, tuple] = field(default_factory=dict, repr=False, compare=False)

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape


def freeze(weight: Tensor, bias: Tensor, precision: str) -> LinearWeights:
    """Weights of this precision ("float32" or "int8"). weight: (columns, depth) and bias: (columns,), both float32.

    A column's largest weight becomes 63 steps. Raises ValueError for weights that are not finite, which int8 could
    not say.
    """
    weight, bias = weight.detach(), bias.detach()
    if precision == "float32":
        return LinearWeights(weight, bias)
    if precision != "int8":
        raise ValueError(f"Weights can be frozen as {' or '.join(PRECISIONS)}, not as {precision!r}.")
    largest = weight.abs().amax(1)
    if not largest.isfinite().all():
        raise ValueError("Weights that are NaN or infinite cannot be quantised to int8.")
    scales = largest / LEVELS
    steps = torch.where(scales > 0, weight.T / scales, 0).T
    return LinearWeights(steps.round().clamp(-LEVELS, LEVELS).to(torch.int8), bias, scales)
