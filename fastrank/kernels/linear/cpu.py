"""Products, activation and LayerNorm in C++ (csrc/linear.cpp), float32 on CPU tensors: one pass from x to the result.

Weights are packed once for each instruction set.
"""

import numpy as np
import torch
from torch import Tensor

from fastrank import _cpu
from fastrank.kernels.linear.weights import LinearWeights

STORED = {4: torch.float32, 1: torch.int8}  # a packed weight, by its bytes


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
    columns = (first if second is None else second).shape[0]
    out = torch.empty(x.shape[0], columns)
    _cpu.linear_forward(
        _array(x),
        _pack(first),
        activation,
        None if second is None else _pack(second),
        _array(residual),
        _array(norm_weight),
        _array(norm_bias),
        eps,
        out.numpy(),
        torch.get_num_threads(),
    )
    return out


def _array(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.detach().contiguous().numpy()


def _pack(weights: LinearWeights) -> tuple:
    isa = _cpu.isa()
    if isa not in weights.packed:
        columns, depth = weights.shape
        panel, group, size = _cpu.linear_layout(weights.scales is not None)
        filled = torch.zeros(-columns % panel + columns, -depth % group + depth, dtype=STORED[size])
        filled[:columns, :depth] = weights.weight
        panels = filled.view(-1, panel, filled.shape[1] // group, group).transpose(1, 2).contiguous()
        sums = None if weights.scales is None else filled.sum(1, dtype=torch.int32).numpy()
        scales = None if weights.scales is None else _fill(weights.scales, len(filled))
        weights.packed[isa] = (panels.numpy(), scales, sums, _fill(weights.bias, len(filled)), columns, depth)
    return weights.packed[isa]


def _fill(values: Tensor, size: int) -> np.ndarray:
    return torch.cat([values, values.new_zeros(size - len(values))]).numpy()
