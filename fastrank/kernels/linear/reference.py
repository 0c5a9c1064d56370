"""activation(x W^T + b), a second product and LayerNorm in plain PyTorch: the definition that kernels are held against.

bf16 rounds the weights and x, product by product; what they give is exact, and summed in x's dtype. int8 is dynamic:
each block of a row of x is quantised by itself, to 256 levels from its least to its largest value; the product of
integers is exact.
"""

import torch
from torch import Tensor
from torch.nn import functional

from fastrank.kernels.linear.weights import LinearWeights

# What stands for the erf form of GELU where the next product rounds anyway: x times 1/2 and an odd polynomial for
# Phi(x) - 1/2 on [-end, end]. By precision: end, a number that is taken from x^2 first, so that powers do not cancel,
# and the coefficients, lowest power first. Off by 1.2e-5 for bf16, and 1.9e-4, far less than a step, for int8.
GELU_POLYNOMIALS = {
    "bf16": (
        4.6,
        10.58,
        (
            0.15354344248771667,
            -0.007160280831158161,
            0.00048364000394940376,
            -3.42951861966867e-05,
            2.3565949049952906e-06,
            -1.4346839805057243e-07,
            7.807440027818302e-09,
            -5.290619609077396e-10,
            3.578869839371279e-11,
            -1.1080515845141026e-12,
        ),
    ),
    "int8": (
        4.0,
        0.0,
        (
            0.3978702606242605,
            -0.06455440133842247,
            0.00876368614793093,
            -0.0008121865510100632,
            4.7763799762013e-05,
            -1.5888231371633693e-06,
            2.2588136704465103e-08,
        ),
    ),
}


def gelu_polynomial(x: Tensor, precision: str) -> Tensor:
    """GELU as it stands beside weights of this precision."""
    end, middle, coefficients = GELU_POLYNOMIALS[precision]
    near = x.clamp(-end, end)
    ratio = torch.zeros_like(x)
    for coefficient in reversed(coefficients):
        ratio = ratio * (near.square() - middle) + coefficient
    return x.clamp(min=-end) * (0.5 + near * ratio)


ACTIVATIONS = {
    "none": lambda x: x,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}
LEAST_STEP = 1e-30  # values that lie closer together than 255 of these count as equal


def quantize_blocks(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Levels 0 to 255 of blocks of values (..., block), what one is worth, and what level 0 is (..., 1): all float32.

    In float32, whatever x is: scale = (largest - low) / 255, level = round((x - low) / scale). A block with a value
    that is not finite has the low NaN.
    """
    x = x.float()
    low, largest = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (largest - low) / 255
    scale = torch.where(scale > LEAST_STEP, scale, 0)
    inverse = torch.where(scale > 0, 1 / scale, 0)
    levels = ((x - low) * inverse).round()
    return levels.nan_to_num(), scale, low + (x * 0).sum(-1, keepdim=True)


def multiply(x: Tensor, weights: LinearWeights) -> Tensor:
    """x W^T + b in x's dtype."""
    weights.require_weight()
    bias = weights.bias.to(x.dtype)
    if weights.precision == "bf16":
        x = x.bfloat16().to(x.dtype)
    if weights.precision != "int8":
        return x @ weights.weight.to(x.dtype).T + bias
    blocks, size = weights.weight.shape[1:]
    # A block that is filled up repeats its first value, which its zero weights never see.
    first = x[:, (blocks - 1) * size :][:, :1]
    x = torch.cat([x, first.expand(-1, blocks * size - weights.depth)], 1)
    levels, scale, low = quantize_blocks(x.view(len(x), blocks, size))
    # The product of integers is exact in float64. (rows, blocks, columns)
    exact = torch.einsum("rbk,cbk->rbc", levels.double(), weights.weight.double())
    steps = weights.scales.T.to(x.dtype)
    sums = weights.weight.sum(2, dtype=torch.int32).T.to(x.dtype) * steps
    return (exact.to(x.dtype) * (scale.to(x.dtype) * steps) + low.to(x.dtype) * sums).sum(1) + bias


def linear(
    x: Tensor,
    first: LinearWeights,
    activation: str,
    second: LinearWeights | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    groups: int,
) -> Tensor:
    x = multiply(x, first)
    if activation == "gelu" and first.precision in GELU_POLYNOMIALS:
        x = gelu_polynomial(x, first.precision)
    else:
        x = ACTIVATIONS[activation](x)
    if second is not None:
        x = multiply(x, second)
    if residual is None:
        return x if groups == 1 else x.unflatten(1, (groups, -1))
    return functional.layer_norm(x + residual, x.shape[1:], norm_weight.to(x.dtype), norm_bias.to(x.dtype), eps)
