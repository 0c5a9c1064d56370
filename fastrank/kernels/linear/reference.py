"""activation(x W^T + b), a second product and LayerNorm in plain PyTorch: the definition that kernels are held against.

int8 is dynamic: each row of x is quantised by itself, to 256 levels from its least to its largest value, 0 among them;
the product of integers is exact.
"""

import torch
from torch import Tensor
from torch.nn import functional

from fastrank.kernels.linear.weights import LinearWeights

ACTIVATIONS = {
    "none": lambda x: x,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}
LEAST_STEP = 1e-30  # a row whose levels lie closer counts as zeros


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers (rows, depth), the levels less the row's zero point, and what one step is worth (rows, 1) float32.

    In float32, whatever x is: scale = (high - low) / 255, zero = round(-low / scale), level = round(x / scale) + zero.
    A row with a value that is not finite has the scale NaN.
    """
    x = x.float()
    if x.shape[1] == 0:
        return x, x.new_zeros(len(x), 1)
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    inverse = torch.where(scale > LEAST_STEP, 1 / scale, 0)
    zero = (-low * inverse).round()
    levels = ((x * inverse).round() + zero).clamp(max=255)
    scale = torch.where(scale > LEAST_STEP, scale, 0) + (x * 0).sum(1, keepdim=True)
    return torch.where(scale.isfinite(), levels - zero, 0), scale


def multiply(x: Tensor, weights: LinearWeights) -> Tensor:
    """x W^T + b in x's dtype."""
    bias = weights.bias.to(x.dtype)
    if weights.scales is None:
        return x @ weights.weight.to(x.dtype).T + bias
    levels, scales = quantize_rows(x)
    product = levels.double() @ weights.weight.double().T  # of integers, so exact
    return product.to(x.dtype) * (scales * weights.scales).to(x.dtype) + bias


def linear(
    x: Tensor,
    first: LinearWeights,
    activation: str,
    second: LinearWeights | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    x = ACTIVATIONS[activation](multiply(x, first))
    if second is not None:
        x = multiply(x, second)
    if residual is None:
        return x
    return functional.layer_norm(
        x + residual, x.shape[1:], norm_weight.to(x.dtype), norm_bias.to(x.dtype), eps
    )
