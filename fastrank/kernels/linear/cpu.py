"""Products, activation and LayerNorm in C++ (csrc/linear.cpp), float32 on CPU tensors: one pass from x to the result.

Weights are packed once for each instruction set.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fastrank import _cpu
from fastrank.kernels.linear.weights import LinearWeights


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
    last = first if second is None else second
    out = torch.empty(groups, x.shape[0], last.columns // groups)
    _cpu.linear_forward(
        _array(x),
        pack(first),
        activation,
        None if second is None else pack(second),
        _array(residual),
        _array(norm_weight),
        _array(norm_bias),
        eps,
        out.numpy(),
        groups,
        torch.get_num_threads(),
    )
    return out.view(-1, last.columns) if groups == 1 else out.transpose(0, 1)


def _array(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.detach().contiguous().numpy()


def _as_multiplied(weights: LinearWeights) -> LinearWeights:
    """int8 weights as bf16 where matrix units multiply it: scaling their sums of integers block by block would take
    longer than the products do."""
    return weights.as_bf16() if weights.precision == "int8" and _cpu.multiplies_in_tiles() else weights


def pack(weights: LinearWeights) -> tuple:
    """Panels of columns, and in each, groups of neighbours along the depth; both filled up with zeros."""
    isa = _cpu.isa()
    if isa not in weights.packed:
        weights.require_weight()
        kept, weights = weights, _as_multiplied(weights)
        panel, group, block = _cpu.linear_layout(weights.precision)
        columns, missing = weights.columns, -weights.columns % panel
        values = weights.weight.flatten(1)
        filled = functional.pad(values, (0, -values.shape[1] % block, 0, missing))
        panels = filled.view(-1, panel, filled.shape[1] // group, group).transpose(1, 2).contiguous()
        scales = sums = None
        if weights.scales is not None:
            scales = functional.pad(weights.scales.T, (0, missing))
            sums = functional.pad(weights.weight.sum(2, dtype=torch.int32).T, (0, missing)) * scales
        bias = functional.pad(weights.bias, (0, missing))
        if weights.precision == "bf16":
            panels = panels.view(torch.int16)  # numpy has no bf16
        arrays = (_array(panels), _array(scales), _array(sums), _array(bias))
        kept.packed[isa] = (weights.precision, *arrays, columns, weights.depth)
        return kept.packed[isa]
    return weights.packed[isa]
